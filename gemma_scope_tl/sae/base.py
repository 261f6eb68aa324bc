"""The common part of Gemma Scope's SAEs and transcoders, as a mixin for SAELens's classes.

It changes four properties of SAELens's inference classes:

- the thresholds stay float32 (or wider) for every dtype of the other parameters;
- local functions that SAELens stores on the object are methods, so SAEs can be pickled and deep-copied;
- activations with a dimension of heads (``[..., n_heads, d_head]``) and flat ones (``[..., d_in]``) are distinguished
  at every call instead of once for the lifetime of the object;
- ``forward`` returns the dtype and the shape of its input (the SAE's dtype for an input of integers);
- ``forward`` and ``decode`` compute the decoder from the active latents alone, where that is faster (``routes.py``).

Parameters require gradients, as in SAELens, so an optimiser can train them through a splice. Inference is not slower
for that (``sparse.py``): a pass takes the same time with gradients of the weights, without, and under
``torch.no_grad()``. The gradients of the weights are computed only by ``backward()``, and not by
``torch.autograd.grad(metric, activations)``. ``sae.requires_grad_(False)`` freezes an SAE. Weights that are mapped from
a file are copied when they are written to, so training never changes the file.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]
from torch import nn

from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.sae.arguments import checked_latents, checked_tensor
from gemma_scope_tl.sae.hooked_pass import hooked_pass, is_hooked
from gemma_scope_tl.sae.provenance import Marks, config_of, facts_of, marks_of
from gemma_scope_tl.sae.routes import called_sparsely, decoded_sparsely
from gemma_scope_tl.sae.sae_lens_methods import LoadingMixin, SavingMixin
from gemma_scope_tl.sae.sparse import decode_sparse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gemma_scope_tl.registry.schema import SAERow


class GemmaScopeMixin(LoadingMixin, SavingMixin):
    """Encoder, decoder and bookkeeping of a JumpReLU SAE or transcoder.

    With row vectors, for an input ``x [..., d_in]`` (JumpReLU paper, eq. 3 and 8; Gemma Scope, section 2.2)::

        z = x W_enc + b_enc            f = z * H(z - theta)            x_hat = f W_dec + b_dec

    with H(0) = 0, so a pre-activation equal to its threshold is inactive. ``b_dec`` is not subtracted from the input:
    Gemma Scope folds this subtraction into ``b_enc`` after training (appendix A).

    Attributes:
        site, layer: the place that the SAE reads (``sites.py``), None if unknown. The embedding has no layer.
        row: the registry row of the weights; None outside the registry, and after the weights were changed.
        facts_when_loaded: values in the metadata that describe the loaded weights
            (:mod:`~gemma_scope_tl.sae.provenance`).
        is_transcoder: whether input and output are different tensors.
        threshold: theta, float32 even in a bfloat16 or float16 SAE. The comparison runs in float32: a threshold rounded
            to bfloat16 would switch latents near it on or off.
        d_head: width of a head in the last encoded input, None if that was flat. It determines the shape of
            :meth:`decode`.
    """

    site: str | None = None
    layer: int | None = None
    facts_when_loaded: Mapping[str, Any] = MappingProxyType({})
    _row: SAERow | None = None
    _marks: Marks | bool | None = None
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
        """Initialise as SAELens does, with thresholds in float32 or wider."""
        super().initialize_weights()
        wide = torch.promote_types(self.dtype, torch.float32)
        self.threshold = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=wide, device=self.device))

    @property
    def row(self) -> SAERow | None:
        """The registry row of the weights; None after they were changed (:attr:`as_loaded`)."""
        return self._row if self._row is not None and self.as_loaded else None

    @row.setter
    def row(self, row: SAERow | None) -> None:
        self._row = row

    @property
    def as_loaded(self) -> bool:
        """Whether the weights have the loaded values, apart from moves and conversions. True if nothing was loaded.

        An optimiser's step and other writes make it False, in copies of the SAE too. A write to a few rows through
        ``.data``, which PyTorch does not record, may be missed. The registry's name, L0 and hash do not apply to
        changed weights.
        """
        if self._marks is None or isinstance(self._marks, bool):
            return self._marks is not False
        return marks_of(self) == self._marks

    def mark_as_loaded(self) -> None:
        """Record the current weights as the loaded ones. Every function that loads an SAE calls it."""
        self.facts_when_loaded, self._marks = facts_of(self.cfg.metadata), marks_of(self)

    def _saved_config(self) -> Mapping[str, Any]:
        return config_of(self)

    # SAELens assigns closures here, which cannot be pickled; the methods below replace them.
    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Accept ``[..., n_heads, d_head]`` as well as ``[..., d_in]``."""
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
        """Identity, like :meth:`run_time_activation_norm_fn_in`."""
        return x

    def reshape_fn_in(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., n_heads, d_head]`` or ``[..., d_in]`` -> ``[..., d_in]``. Stores the layout in ``d_head``.

        Raises:
            SpliceError: when the last dimension(s) differ from the SAE's input width, or ``x`` is not a tensor of
                real numbers.
            DeviceError: when ``x`` is on another device than the SAE.
        """
        d_in = self.cfg.d_in
        x = checked_tensor(x, self.get_name(), self.W_enc.device)
        if x.shape[-1:] == (d_in,):
            self.d_head = None
            return x
        if self.hook_z_reshaping_mode and x.ndim > 1 and x.shape[-2] * x.shape[-1] == d_in:
            self.d_head = x.shape[-1]
            return x.flatten(-2)
        heads = f" or [..., n_heads, d_head] with {d_in} in all" if self.hook_z_reshaping_mode else ""
        raise SpliceError(f"{self.get_name()} reads [..., {d_in}]{heads}, but the given tensor is {list(x.shape)}.")

    def reshape_fn_out(self, x: torch.Tensor, d_head: int | None) -> torch.Tensor:
        """``[..., d_in]`` -> ``[..., n_heads, d_head]``, or unchanged if ``d_head`` is None."""
        return x if d_head is None else x.unflatten(-1, (-1, d_head))

    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """Cast to the SAE's dtype, flatten heads, and pass ``hook_sae_input``."""
        return self.hook_sae_input(self.reshape_fn_in(sae_in).to(self.dtype))

    def encode(self, x: torch.Tensor, latents: int | Iterable[int] | None = None) -> torch.Tensor:
        """The activations of the latents on ``x``.

        Args:
            x: ``[..., d_in]``, or ``[..., n_heads, d_head]`` at the att site; any real dtype.
            latents: indices of the latents to compute, in this order; None for all. Hook points are then skipped,
                because hooks there expect all latents.

        Returns:
            ``[..., d_sae]``, or ``[..., len(latents)]``, in the SAE's dtype. NaN inputs give NaN.

        Raises:
            SpliceError: for an input of another width or one that is not a tensor of real numbers, and for no latent, a
                latent that does not exist, or one that is given twice.
            DeviceError: for ``x`` on another device. An SAE is moved automatically only when it is used with a model; a
                call on a tensor does not move it, as for any module.
        """
        if latents is not None:
            chosen = checked_latents(latents, self.cfg.d_sae)
            pre = self.reshape_fn_in(x).to(self.dtype) @ self.W_enc[:, chosen] + self.b_enc[chosen]
            return torch.where(pre <= self.threshold[chosen], 0.0, pre)
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(torch.where(pre <= self.threshold, 0.0, pre))

    def decode(self, feature_acts: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstruction from latents, in the SAE's dtype.

        If few latents are not 0, only their decoder rows are read (``routes.py``). The other terms of the dense product
        are exact zeros, unless ``W_dec`` has infinities or NaN, which weights files may not have. NaN and infinities
        in the latents give what the dense product gives.

        Args:
            feature_acts: ``[..., d_sae]``.
            like: a tensor of the site, with or without a dimension of heads, whose layout the result gets. Without it,
                the layout is that of the last encoded input, and flat if there was none.

        Returns:
            ``[..., d_out]``, or ``[..., n_heads, d_head]`` at the att site.

        Raises:
            SpliceError: for latents of another width, or an argument that is not a tensor of real numbers.
            DeviceError: for latents on another device.
        """
        feature_acts = checked_tensor(feature_acts, self.get_name(), self.W_dec.device)
        if feature_acts.shape[-1:] != (self.cfg.d_sae,):
            what = f"{self.get_name()} decodes [..., {self.cfg.d_sae}]"
            raise SpliceError(f"{what}, but the given tensor is {list(feature_acts.shape)}.")
        acts = feature_acts.to(self.dtype)
        sparse = decoded_sparsely(acts, self.W_dec, self.b_dec)
        recons = decode_sparse(acts, self.W_dec, self.b_dec) if sparse else acts @ self.W_dec + self.b_dec
        recons = self.hook_sae_recons(recons)
        if like is None:
            return self.reshape_fn_out(recons, self.d_head)
        return self.reshape_fn_out(recons, self._heads_of(like, recons.shape[-1]))

    def _heads_of(self, like: torch.Tensor, width: int) -> int | None:
        """The width of a head in ``like``, a tensor of the site; None if it is flat."""
        if like.shape[-1:] in ((self.cfg.d_in,), (width,)):
            return None
        if like.ndim > 1 and like.shape[-2] * like.shape[-1] == width:
            return like.shape[-1]
        raise SpliceError(f"{self.get_name()} returns [..., {width}], and like= is {list(like.shape)}: no such layout.")

    def skip(self, x: torch.Tensor) -> torch.Tensor | None:
        """The linear path around the latents, which only skip transcoders have; None here."""
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``decode(encode(x))``, plus the skip path of skip transcoders, in the dtype and layout of ``x``.

        For an ``x`` of integers the result has the SAE's dtype. With SAELens's error term, the error is computed and
        added back in the wider of the two dtypes.

        The latents are not made dense, except for hooks on them (``hooked_pass.py``).

        Raises:
            SpliceError, DeviceError: as :meth:`encode`.
        """
        x = self._floating(x)
        if self.use_error_term and self.is_transcoder:
            raise SpliceError("A transcoder's error needs the MLP's output: splice it into a model instead.")
        out, clean = self._sparse_pass(x) if self._runs_sparsely(x) else self._dense_pass(x)
        if self.use_error_term:
            with torch.no_grad():
                error = self.hook_sae_error(x - clean)
            out = out + error
        return self.hook_sae_output(out.to(x.dtype))

    def _floating(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, with integers converted to the SAE's dtype, since a result of integers would be truncated."""
        x = checked_tensor(x, self.get_name(), self.W_enc.device)
        return x if x.is_floating_point() else x.to(self.dtype)

    def _runs_sparsely(self, x: torch.Tensor) -> bool:
        """Whether :meth:`forward` goes through the kernels: not if a subclass or the object has steps of its own."""
        steps = ("process_sae_in", "encode", "decode")
        ours = all(getattr(type(self), name) is getattr(GemmaScopeMixin, name) for name in steps)
        if not ours or any(name in self.__dict__ for name in steps):
            return False
        if type(self).skip is not GemmaScopeMixin.skip and is_hooked(self.hook_sae_input):
            return False  # an edit of the input changes the latents alone here, and the skip path too in a splice
        return called_sparsely(self, x)

    def _sparse_pass(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output for ``x``, and the output without hooks if the error term needs it."""
        done = hooked_pass(self, self.reshape_fn_in(x), need_clean=self.use_error_term)
        return self.reshape_fn_out(done.out, self.d_head), self.reshape_fn_out(done.clean, self.d_head)

    def _dense_pass(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`_sparse_pass`."""
        out = self._reconstruct(x)
        if not (self.use_error_term and any(map(is_hooked, self.hook_dict.values()))):
            return out, out
        with torch.no_grad(), _disable_hooks(self):
            return out, self._reconstruct(x)

    def _reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        out = self.decode(self.encode(x), like=x)
        skipped = self.skip(x)
        return out if skipped is None else out + skipped

    def __getstate__(self) -> dict[str, Any]:
        """The state, with a bool for whether the weights are as loaded in place of marks of these tensors."""
        return {**self.__dict__, "_marks": None if self._marks is None else self.as_loaded}

    def __setstate__(self, state: Any) -> None:
        """Restore whether the weights are as loaded, and name the hook points of the copy."""
        state = dict(state)
        if "row" in state:  # a pickle from when row was an attribute
            state["_row"] = state.pop("row")
        super().__setstate__(state)  # pyright: ignore[reportAttributeAccessIssue]
        if self._marks is True:
            self._marks = marks_of(self)
        for name, point in self.hook_dict.items():
            point.name = name

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep thresholds wide, and ``dtype`` and ``device`` correct, in ``to``, ``half``, ``cuda`` and so on."""
        held = getattr(self, "threshold", None)
        before = None if held is None else held.data
        as_loaded = self._marks is not None and self.as_loaded
        out = super()._apply(fn, *args, **kwargs)
        after = getattr(self, "threshold", None)
        if before is not None and after is not None:
            wide = torch.promote_types(torch.float32, self.W_enc.dtype)
            if after.dtype != wide:
                after.data = before.to(device=after.device, dtype=wide)
        self.dtype, self.device = self.W_enc.dtype, self.W_enc.device
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        if as_loaded:  # moving and converting do not count as changes
            self._marks = marks_of(self)
        return out
