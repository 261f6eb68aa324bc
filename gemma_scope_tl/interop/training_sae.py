# pyright: basic
"""The paper's JumpReLU SAE as a SAELens training class.

The architecture name ``gemma_scope_jumprelu`` exists only during training. For inference the class saves SAELens's own
``jumprelu`` with ``apply_b_dec_to_input=False``, which stock SAELens loads without this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.sae import (
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor, nn

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.sae.config import UNFINISHED
from gemma_scope_tl.sae.sae_lens_methods import SavingMixin, write_sae_lens_files
from gemma_scope_tl.sae.ste import jumprelu, step
from gemma_scope_tl.training.recipe import STARTS
from gemma_scope_tl.weights.fold import fold
from gemma_scope_tl.weights.modes import ordinary_tensors

ARCHITECTURE = UNFINISHED
SCALINGS = ("none", "expected_average_only_in")
DTYPES = ("float32", "float64")
FADE = "ste_to_input_fade"
"""The coefficient that SAELens's schedule raises from 0 to 1 while ``ste_to_input`` fades."""


@dataclass
class GemmaScopeTrainingSAEConfig(TrainingSAEConfig):
    """The hyper-parameters of an SAE (section 3.2 and the JumpReLU paper's appendix I), by default the paper's.

    All numbers are in the units of activations with ``E ||x||^2 = 1``.

    Args:
        l0_coefficient: lambda. The paper publishes one value: 6e-4 gives an L0 of about 50 at layer 20 of the 9B model.
        l0_warm_up_steps: number of steps over which lambda rises linearly from 0.
        init_threshold: theta of every latent at the start.
        bandwidth: epsilon of the rectangle kernel.
        ste_to_input: the factor with which the estimator passes a gradient to the pre-activations too.
        ste_to_input_steps: number of steps over which this factor falls linearly to 0; 0 keeps it.
        init_encoder_scale: the factor with which the initial encoder, the decoder's transpose, is multiplied.
        b_dec_start: ``"zero"``, or ``"mean"``: ``b_dec`` starts at the mean of the first batch.
        decoder_init_norm: the length of decoder rows; the recipe keeps it at 1.
        apply_b_dec_to_input: subtract ``b_dec`` before the encoder while training; saving folds it into ``b_enc``.
    """

    l0_coefficient: float = 6e-4
    l0_warm_up_steps: int = 10_000
    init_threshold: float = 1e-3
    bandwidth: float = 1e-3
    ste_to_input: float = 0.0
    ste_to_input_steps: int = 0
    b_dec_start: str = "zero"
    init_encoder_scale: float = 1.0
    decoder_init_norm: float | None = 1.0

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_activations not in SCALINGS:
            hint = "The recipe divides by one scalar per site."
            raise unknown_name("normalize_activations", self.normalize_activations, SCALINGS, hint)
        if self.dtype not in DTYPES:
            hint = "The paper trains in float32 throughout: steps on log thresholds are lost in 16 bits."
            raise unknown_name("training dtype", self.dtype, DTYPES, hint)
        if self.b_dec_start not in STARTS:
            raise unknown_name("b_dec_start", self.b_dec_start, STARTS)
        if not (self.ste_to_input >= 0.0 and self.ste_to_input_steps >= 0):
            raise GemmaScopeError("ste_to_input and ste_to_input_steps must be 0 or greater.")
        wrong = [f"{k}={v}" for k, v in self._positive().items() if not (v is not None and v > 0)]
        if wrong:
            raise GemmaScopeError(f"These must be greater than 0: {', '.join(wrong)}.")

    def _positive(self) -> dict[str, float | None]:
        names = ("init_threshold", "bandwidth", "decoder_init_norm", "init_encoder_scale")
        return {name: getattr(self, name) for name in names}

    def get_inference_config_class(self) -> type[SAEConfig]:
        """The configuration class of saved SAEs, SAELens's ``jumprelu``."""
        return JumpReLUSAEConfig

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """The configuration of the saved SAE: no pre-encoder bias, and flattened heads where the hook has heads."""
        cfg = super().get_inference_sae_cfg_dict()
        cfg["apply_b_dec_to_input"] = False
        hook = self.metadata.hook_name
        if hook is not None and hook.endswith("hook_z") and self.metadata.hook_head_index is None:
            cfg["reshape_activations"] = "hook_z"
        return cfg


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.scale, None


class GemmaScopeTrainingSAE(SavingMixin, TrainingSAE[GemmaScopeTrainingSAEConfig]):
    """The paper's SAE while it trains.

    ::

        pre   = (x - b_dec) W_enc + b_enc          x [batch, d_in], pre [batch, d_sae]
        f     = JumpReLU_theta(pre)                theta = exp(log_threshold)
        x_hat = f W_dec + b_dec
        loss  = mean over batch of  ||x - x_hat||_2^2 + lambda ||f||_0

    The gradients of the threshold are those of :mod:`gemma_scope_tl.sae.ste`, taken at the pre-activations as in the
    paper's equations. Parameters are initialised as in the paper: a He-uniform decoder scaled to unit rows, its
    transpose as the encoder, and zero biases.

    Attributes:
        log_threshold: ``[d_sae]``, the trained parameter.
        grad_scale: factor of the gradients, but not of the loss. A tiny value keeps training loops from clipping
            gradients; the optimizer hooks of the recipe divide by it.
    """

    b_enc: nn.Parameter
    log_threshold: nn.Parameter

    def __init__(self, cfg: GemmaScopeTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.grad_scale = 1.0
        self._to_input = 0.0  # other than 0 during a training step only

    def initialize_weights(self) -> None:
        """Initialise the parameters: unit decoder rows, transposed encoder, zero biases, and equal thresholds."""
        super().initialize_weights()
        with torch.no_grad():
            self.W_enc.mul_(self.cfg.init_encoder_scale)
        empty = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        self.b_enc = nn.Parameter(empty)
        self.log_threshold = nn.Parameter(torch.full_like(empty, self.cfg.init_threshold).log())

    @property
    def threshold(self) -> Tensor:
        """theta ``[d_sae]``, always positive."""
        return self.log_threshold.exp()

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and pre-activations ``[..., d_sae]`` of activations ``[..., d_in]``.

        ``(x - b_dec) W_enc + b_enc`` is computed as ``x W_enc + (b_enc - b_dec W_enc)``, so that the gradient of
        ``b_dec`` through the encoder takes a vector product instead of a product over the batch.
        """
        sae_in = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        bias = self.b_enc
        if self.cfg.apply_b_dec_to_input:
            bias = bias - self.b_dec @ self.W_enc
        pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + bias)
        return self.hook_sae_acts_post(jumprelu(pre, self.threshold, self.cfg.bandwidth, self._to_input)), pre

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """``lambda`` times the mean L0 of the batch."""
        l0 = step(hidden_pre, self.threshold, self.cfg.bandwidth, self._to_input).sum(-1).mean()
        return {"l0_loss": step_input.coefficients["l0"] * l0}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The loss of one batch; its gradients are scaled by ``grad_scale``."""
        if self.cfg.b_dec_start == "mean" and step_input.n_training_steps == 0:
            with torch.no_grad():
                self.b_dec.copy_(self.reshape_fn_in(step_input.sae_in.to(self.dtype)).mean(0))
        self._to_input = self.cfg.ste_to_input * (1.0 - step_input.coefficients.get(FADE, 0.0))
        try:
            output = super().training_forward_pass(step_input)
        finally:
            self._to_input = 0.0
        if self.grad_scale != 1.0:
            output.loss = _ScaleGradient.apply(output.loss, self.grad_scale)  # type: ignore[assignment]
        return output

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """``lambda`` and its linear warm-up, and the share by which ``ste_to_input`` has faded."""
        found: dict[str, float | TrainCoefficientConfig] = {
            "l0": TrainCoefficientConfig(self.cfg.l0_coefficient, self.cfg.l0_warm_up_steps)
        }
        if self.cfg.ste_to_input and self.cfg.ste_to_input_steps:
            found[FADE] = TrainCoefficientConfig(1.0, self.cfg.ste_to_input_steps)
        return found

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Change units so that raw activations can be passed: ``C = 1 / scaling_factor`` (appendix A).

        Biases and thresholds are scaled. The matrices do not change, so decoder rows keep their unit length.
        """
        folded = fold(self._named(), 1.0 / scaling_factor, pre_encoder_bias=False)
        self.b_enc.copy_(folded["b_enc"])
        self.b_dec.copy_(folded["b_dec"])
        self.log_threshold.copy_(folded["threshold"].log())
        self.cfg.normalize_activations = "none"

    def fold_W_dec_norm(self) -> None:
        """Give decoder rows unit length by scaling encoder, bias and threshold of each latent."""
        with torch.no_grad():
            self.log_threshold.add_(self.fold_and_get_W_dec_norm().log())

    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Replace the trained parameters by those of the equivalent SAE without pre-encoder bias, in place."""
        params = {name: value.detach().double() for name, value in self._named().items()}
        folded = fold(params, 1.0, pre_encoder_bias=self.cfg.apply_b_dec_to_input)
        del state_dict["log_threshold"]
        state_dict.update({name: value.to(self.dtype).contiguous() for name, value in folded.items()})

    @ordinary_tensors()
    def save_inference_model(self, path: str | PathLike[str]) -> tuple[Path, Path]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the equivalent SAE without pre-encoder bias, as :meth:`save_model` writes this one.

        Raises:
            WriteError: as for :meth:`save_model`.
        """
        state = dict(self.state_dict())
        self.process_state_dict_for_saving_inference(state)
        return write_sae_lens_files(path, state, self.cfg.get_inference_sae_cfg_dict())

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Accept a state with thresholds in place of their logarithms."""
        if "threshold" in state_dict:
            state_dict["log_threshold"] = state_dict.pop("threshold").log()

    def _named(self) -> dict[str, Tensor]:
        return {
            "W_enc": self.W_enc,
            "W_dec": self.W_dec,
            "b_enc": self.b_enc,
            "b_dec": self.b_dec,
            "threshold": self.threshold,
        }


if ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(ARCHITECTURE, GemmaScopeTrainingSAE, GemmaScopeTrainingSAEConfig)
