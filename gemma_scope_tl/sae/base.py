"""What Gemma Scope's SAEs and transcoders share, as a mixin over SAELens' classes.

It changes four things in SAELens' inference classes and nothing else:

- the thresholds stay float32 (or wider) whatever the dtype of the rest;
- methods stand where SAELens keeps local functions on the object, so SAEs can be pickled and deep-copied;
- activations with heads apart (``[..., n_heads, d_head]``) and flat ones (``[..., d_in]``) are told apart at every call
  instead of once for the lifetime of the object;
- ``forward`` answers in the dtype and the shape of its input.

Parameters require gradients, as SAELens's do, so an optimiser moves them through a splice. Inference pays nothing for
that (``sparse.py``): a pass costs the same with gradients of the weights, without, and under ``torch.no_grad()``, and
their gradients are computed by ``backward()`` alone, not by ``torch.autograd.grad(metric, activations)``.
``sae.requires_grad_(False)`` freezes an SAE; an optimiser's step on frozen parameters moves nothing, as everywhere in
PyTorch. Weights mapped from a file are private copies once written to: training never reaches the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]
from torch import nn

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, device_mismatch
from gemma_scope_tl.sae.indices import as_indices
from gemma_scope_tl.sae.loading_methods import LoadingMixin
from gemma_scope_tl.sae.saving_methods import SavingMixin

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gemma_scope_tl.registry.schema import SAERow


def checked_latents(latents: int | Iterable[int], d_sae: int) -> list[int]:
    """Indices of latents as a list.

    Raises:
        SpliceError: for one that does not exist, or is no integer.
    """
    chosen = as_indices(latents)
    wrong = [latent for latent in chosen if not 0 <= latent < d_sae]
    if wrong:
        raise SpliceError(f"No latent {wrong[0]}: this SAE has latents 0..{d_sae - 1}.")
    return chosen


class GemmaScopeMixin(LoadingMixin, SavingMixin):
    """Encoder, decoder and bookkeeping of a JumpReLU SAE or transcoder.

    With row vectors, for an input ``x [..., d_in]`` (JumpReLU paper, eq. 3 and 8; Gemma Scope, section 2.2)::

        z = x W_enc + b_enc            f = z * H(z - theta)            x_hat = f W_dec + b_dec

    with H(0) = 0, so a pre-activation equal to its threshold is off. ``b_dec`` is not subtracted from the input: Gemma
    Scope folds that into ``b_enc`` after training (appendix A).

    Attributes:
        site, layer: where it reads (``sites.py``), None when unknown. The embedding has no layer.
        row: the registry row it was loaded from, if any.
        is_transcoder: whether input and output are different tensors.
        threshold: theta, float32 even in a bfloat16 or float16 SAE. The comparison runs in float32: a threshold rounded
            to bfloat16 would switch latents near it on or off.
        d_head: width of a head in the last input encoded, None when that was flat; what :meth:`decode` shapes by.
    """

    site: str | None = None
    layer: int | None = None
    row: SAERow | None = None
    is_transcoder: bool = False
    d_head: int | None
    b_enc: nn.Parameter
    threshold: nn.Parameter

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        if cfg.apply_b_dec_to_input or cfg.normalize_activations not in ("none", None):
            raise GemmaScopeError(
                "Gemma Scope SAEs take raw activations: set apply_b_dec_to_input=False and "
                "normalize_activations='none', and fold both into the weights (from_folder folds b_dec)."
            )
        super().__init__(cfg, *args, **kwargs)

    @property
    def model_name(self) -> str | None:
        """The model that the SAE was trained on, such as ``"gemma-2-2b"``."""
        return self.cfg.metadata.model_name

    def initialize_weights(self) -> None:
        """As SAELens, with thresholds in float32 or wider."""
        super().initialize_weights()
        wide = torch.promote_types(self.dtype, torch.float32)
        self.threshold = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=wide, device=self.device))

    # SAELens assigns closures in these two; the methods below take their place.
    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Accept ``[..., n_heads, d_head]`` beside ``[..., d_in]``."""
        self.hook_z_reshaping_mode = True
        self.d_head = None

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Accept ``[..., d_in]`` only."""
        self.hook_z_reshaping_mode = False
        self.d_head = None

    def _setup_activation_normalization(self) -> None:
        pass

    def run_time_activation_norm_fn_in(self, x: torch.Tensor) -> torch.Tensor:
        """Identity: Gemma Scope's normalisation is folded into its weights (appendix A)."""
        return x

    def run_time_activation_norm_fn_out(self, x: torch.Tensor) -> torch.Tensor:
        """Identity, as :meth:`run_time_activation_norm_fn_in`."""
        return x

    def reshape_fn_in(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., n_heads, d_head]`` or ``[..., d_in]`` -> ``[..., d_in]``; remembers which in ``d_head``.

        Raises:
            SpliceError: when the last dimension(s) are not the SAE's input width; complex numbers, whose imaginary
                part a cast would drop.
            DeviceError: when ``x`` is elsewhere than the SAE.
        """
        d_in = self.cfg.d_in
        if x.device != self.W_enc.device:
            raise device_mismatch(self.get_name(), self.W_enc.device, x.device)
        if x.is_complex():
            raise SpliceError(f"{self.get_name()} reads real numbers, the tensor given is {x.dtype}.")
        if x.shape[-1:] == (d_in,):
            self.d_head = None
            return x
        if self.hook_z_reshaping_mode and x.ndim > 1 and x.shape[-2] * x.shape[-1] == d_in:
            self.d_head = x.shape[-1]
            return x.flatten(-2)
        heads = f" or [..., n_heads, d_head] with {d_in} in all" if self.hook_z_reshaping_mode else ""
        raise SpliceError(f"{self.get_name()} reads [..., {d_in}]{heads}, the tensor given is {list(x.shape)}.")

    def reshape_fn_out(self, x: torch.Tensor, d_head: int | None) -> torch.Tensor:
        """``[..., d_in]`` -> ``[..., n_heads, d_head]``, or itself without ``d_head``."""
        return x if d_head is None else x.unflatten(-1, (-1, d_head))

    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """Cast to the SAE's dtype, put heads together, pass ``hook_sae_input``."""
        return self.hook_sae_input(self.reshape_fn_in(sae_in).to(self.dtype))

    def encode(self, x: torch.Tensor, latents: int | Iterable[int] | None = None) -> torch.Tensor:
        """Latents of activations.

        Args:
            x: ``[..., d_in]``, or ``[..., n_heads, d_head]`` at the att site; any floating dtype.
            latents: indices of the only ones to compute, in this order; hook points are not passed then, because what
                a hook expects there is all latents.

        Returns:
            ``[..., d_sae]``, or ``[..., len(latents)]``, in the SAE's dtype. NaN in, NaN out.

        Raises:
            SpliceError: for another width, or a latent that does not exist.
            DeviceError: for ``x`` on another device: an SAE moves by itself only when it is used with a model, which
                has its device; called on a tensor it stays, as any module does.
        """
        if latents is not None:
            chosen = checked_latents(latents, self.cfg.d_sae)
            pre = self.reshape_fn_in(x).to(self.dtype) @ self.W_enc[:, chosen] + self.b_enc[chosen]
            return torch.where(pre <= self.threshold[chosen], 0.0, pre)
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(torch.where(pre <= self.threshold, 0.0, pre))

    def decode(self, feature_acts: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstruction from latents, in the SAE's dtype.

        Args:
            feature_acts: ``[..., d_sae]``.
            like: a tensor of the site, with heads apart or not, whose layout to answer in. Without it the layout is
                that of the last input encoded, and flat before any.

        Returns:
            ``[..., d_out]``, or ``[..., n_heads, d_head]`` at the att site.

        Raises:
            DeviceError: for latents on another device.
        """
        if feature_acts.device != self.W_dec.device:
            raise device_mismatch(self.get_name(), self.W_dec.device, feature_acts.device)
        recons = self.hook_sae_recons(feature_acts.to(self.dtype) @ self.W_dec + self.b_dec)
        if like is None:
            return self.reshape_fn_out(recons, self.d_head)
        return self.reshape_fn_out(recons, like.shape[-1] if like.shape[-1] != self.cfg.d_in else None)

    def skip(self, x: torch.Tensor) -> torch.Tensor | None:
        """The linear path around the latents, which only skip transcoders have; None here."""
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``decode(encode(x))``, plus the skip path of skip transcoders, in the dtype and layout of ``x``.

        With SAELens' error term, the error is taken and added back in the wider of both dtypes.

        Raises:
            SpliceError, DeviceError: as :meth:`encode`.
        """
        out = self._reconstruct(x)
        if self.use_error_term:
            if self.is_transcoder:
                raise SpliceError("A transcoder's error needs the MLP's output: splice it into a model instead.")
            with torch.no_grad(), _disable_hooks(self):
                clean = self._reconstruct(x)
            out = out + self.hook_sae_error(x - clean)
        return self.hook_sae_output(out.to(x.dtype))

    def _reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        out = self.decode(self.encode(x), like=x)
        skipped = self.skip(x)
        return out if skipped is None else out + skipped

    def __setstate__(self, state: Any) -> None:
        """Copies made while the SAE is attached to a model have hook points of their own names."""
        super().__setstate__(state)  # pyright: ignore[reportAttributeAccessIssue]
        for name, point in self.hook_dict.items():
            point.name = name

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep thresholds wide, and ``dtype`` and ``device`` true, through ``to``, ``half``, ``cuda`` and the like."""
        held = self._parameters.get("threshold")
        before = None if held is None else held.data
        out = super()._apply(fn, *args, **kwargs)
        after = self._parameters.get("threshold")
        if before is not None and after is not None:
            wide = torch.promote_types(torch.float32, self.W_enc.dtype)
            if after.dtype != wide:
                after.data = before.to(device=after.device, dtype=wide)
        self.dtype, self.device = self.W_enc.dtype, self.W_enc.device
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        return out
