"""JumpReLU SAEs whose gate, decoder and gradients take time in proportion to the active latents.

With row vectors ``x [..., d_in]``, as in :mod:`gemma_scope_tl.sae.base`::

    z = x W_enc + b_enc            f = z * H(z - theta)            x_hat = f W_dec + b_dec

Only ``x W_enc`` is dense; it is made and gated in blocks, so neither z nor f is ever whole in memory. With 131072
latents and 512 tokens a forward pass takes some 25 MB and the gradient of x some 75, where z alone would take 268. Of
16384 latents some 70 are active, and decoding, ``df`` and ``dx`` are sums over these. Where too many are active, the
dense product is taken instead, at densities fixed in :mod:`gemma_scope_tl.sae.sparse_ops`.

Backward, with ``g`` the gradient of ``x_hat`` and sums over tokens written out::

    df_ti = g_t . W_dec_i  at active places       dz = df H(z - theta)
    dx = dz W_enc^T      dW_enc = x^T dz      db_enc = sum_t dz_t      dW_dec = f^T g      db_dec = sum_t g_t
    dtheta_i = -(theta_i / epsilon) sum_t K((z_ti - theta_i) / epsilon) df_ti              (ste.py; with a bandwidth)

Only those asked for are computed: weights hang on nodes of their own in autograd's graph, so that neither frozen
weights nor ``torch.autograd.grad(metric, activations)`` cost more than ``dx``. A pass itself costs the same either way.

Rounding: every sum has the dense formula's terms without the zeros, in another order. A sum of n terms is then off by
at most n u times the sum of their sizes, u = 2^-53 or 2^-24, and by about sqrt(n) u as a rule: within 1e-12 in float64
and 1e-5 in float32 at Gemma's widths. The order is fixed, so repeats are equal to the bit without asking for it. A
pre-activation that rounds to the other side of its threshold switches a latent, as between any two BLAS libraries.

16-bit SAEs answer in their dtype. The bias is added before the product is rounded, once; ``base.py`` rounds twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.sae.ste import rectangle


@dataclass(frozen=True, eq=False)
class SparseActs:
    """Active latents of a batch of tokens: a CSR matrix with a row for each token.

    Attributes:
        offsets: int64 ``[n + 1]``; token t has the entries ``offsets[t]`` to ``offsets[t + 1]``.
        latents: int64 ``[nnz]``, ascending within a token.
        values: ``[nnz]``, what autograd tracks. With a bandwidth there are explicit zeros, for inactive latents within
            half a bandwidth of their threshold: the threshold's gradient needs them.
        shape: of the dense activations, ``(..., d_sae)`` with n tokens in front.
    """

    offsets: Tensor
    latents: Tensor
    values: Tensor
    shape: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """How many tokens there are: the product of all but the last dimension."""
        return self.offsets.shape[0] - 1

    @property
    def d_sae(self) -> int:
        """How many latents the SAE has."""
        return self.shape[-1]

    @property
    def density(self) -> float:
        """The share of entries that are held, from 0 to 1."""
        return self.latents.shape[0] / max(1, self.n_tokens * self.d_sae)

    @property
    def l0(self) -> float:
        """Mean number of active latents of a token, explicit zeros not counted; NaN without tokens."""
        return int(torch.count_nonzero(self.values)) / self.n_tokens if self.n_tokens else math.nan

    def tokens(self) -> Tensor:
        """The token of each entry, int64 ``[nnz]``, counting through all batch dimensions."""
        return ops.rows_of(self.offsets, self.latents.shape[0])

    def with_values(self, values: Tensor) -> SparseActs:
        """The same places with other values ``[nnz]``, as a hook that scales or clamps active latents makes them.

        Raises:
            GemmaScopeError: for another shape.
        """
        if values.shape != self.latents.shape:
            raise GemmaScopeError(
                f"There are {self.latents.shape[0]} active entries, the values given have shape {list(values.shape)}: "
                "give one value for each, or edit to_dense() to switch other latents on."
            )
        return replace(self, values=values)

    def to_dense(self) -> Tensor:
        """``[..., d_sae]``, differentiable with respect to ``values``."""
        flat = self.tokens() * self.d_sae + self.latents
        return self.values.new_zeros(self.n_tokens * self.d_sae).index_copy(0, flat, self.values).view(self.shape)

    @classmethod
    def from_dense(cls, acts: Tensor) -> SparseActs:
        """The non-zero entries (NaN is one) of ``[..., d_sae]``; gradients flow back to these entries only."""
        d_sae = acts.shape[-1]
        flat = acts.reshape(-1, d_sae)
        offsets, latents, values = ops.compact(flat.detach(), None)
        if acts.requires_grad:
            places = ops.rows_of(offsets, latents.shape[0]) * d_sae + latents
            values = flat.reshape(-1).index_select(0, places)
        return cls(offsets, latents, values, tuple(acts.shape))


def compact(pre: Tensor, threshold: Tensor) -> SparseActs:
    """Gate pre-activations that exist already. Not differentiable; :func:`encode_sparse` is.

    Args:
        pre: ``[..., d_sae]``. 16-bit values are compared in float32; NaN is kept.
        threshold: ``[d_sae]``, float32 or wider. ``pre <= threshold`` is off.
    """
    entries = ops.compact(pre.detach().reshape(-1, pre.shape[-1]), threshold.detach())
    return SparseActs(*entries, tuple(pre.shape))


def encode_sparse(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float | None = None
) -> SparseActs:
    """Active latents, differentiable with respect to all four tensors.

    Args:
        x: ``[..., d_in]``, any floating dtype: it is cast to the SAE's.
        W_enc: ``[d_in, d_sae]``, any strides. Made as ``w.T`` of a contiguous ``[d_sae, d_in]`` the gradient of ``x``
            is about three times cheaper and encoding costs the same; no transposed copy is kept.
        b_enc: ``[d_sae]``.
        threshold: ``[d_sae]``, float32 or wider.
        bandwidth: epsilon of the threshold's pseudo-derivative; None (inference) gives the threshold no gradient.

    Raises:
        GemmaScopeError: for shapes that do not fit, or a bandwidth that is not positive.
    """
    d_in, d_sae = W_enc.shape
    if x.shape[-1:] != (d_in,) or b_enc.shape != (d_sae,) or threshold.shape != (d_sae,):
        raise GemmaScopeError(
            f"W_enc is [{d_in}, {d_sae}]: x must be [..., {d_in}], b_enc and threshold [{d_sae}]; given are "
            f"{list(x.shape)}, {list(b_enc.shape)} and {list(threshold.shape)}."
        )
    if bandwidth is not None and not bandwidth > 0:
        raise GemmaScopeError(f"The bandwidth must be positive, not {bandwidth}.")
    flat = x.reshape(-1, d_in).to(W_enc.dtype)
    weights = (W_enc, b_enc) if bandwidth is None else (W_enc, b_enc, threshold)
    fixed = W_enc.detach(), b_enc.detach(), threshold.detach(), bandwidth
    values, *entries = _Encode.apply(flat, *fixed)  # type: ignore[misc]
    if _tracked(*weights):
        values = values + _EncodeWeights.apply(W_enc, b_enc, threshold, flat.detach(), bandwidth, *entries)
    return SparseActs(entries[0], entries[1], values, (*x.shape[:-1], d_sae))


def decode_sparse(acts: SparseActs | Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction ``f W_dec + b_dec``, ``[..., d_out]`` in the dtype of ``W_dec``.

    Args:
        acts: sparse activations, differentiable with respect to their values; or dense ones ``[..., d_sae]``, such as a
            hook edited. Their gradient is dense: inactive latents have one too.
        W_dec: ``[d_sae, d_out]``.
        b_dec: ``[d_out]``.

    Raises:
        GemmaScopeError: for shapes that do not fit.
    """
    d_sae, d_out = W_dec.shape
    if acts.shape[-1] != d_sae or b_dec.shape != (d_out,):
        raise GemmaScopeError(
            f"W_dec is [{d_sae}, {d_out}]: acts must be [..., {d_sae}] and b_dec [{d_out}]; given are "
            f"{list(acts.shape)} and {list(b_dec.shape)}."
        )
    out: Any
    fixed = W_dec.detach(), b_dec.detach()
    if isinstance(acts, Tensor):
        out, *entries = _DecodeDense.apply(acts.reshape(-1, d_sae).to(W_dec.dtype), *fixed)  # type: ignore[misc]
    else:
        values = acts.values.to(W_dec.dtype)
        entries = [acts.offsets, acts.latents, values.detach()]
        out = _Decode.apply(values, *fixed, acts.offsets, acts.latents)
    if _tracked(W_dec, b_dec):
        out = out + _DecodeWeights.apply(W_dec, b_dec, *entries)
    return out.view(*acts.shape[:-1], d_out)


def reconstruct(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    bandwidth: float | None = None,
) -> tuple[Tensor, SparseActs]:
    """:func:`encode_sparse` and :func:`decode_sparse`: ``x_hat [..., d_out]`` in the SAE's dtype, and the latents.

    Raises:
        GemmaScopeError: as these two.
    """
    acts = encode_sparse(x, W_enc, b_enc, threshold, bandwidth)
    return decode_sparse(acts, W_dec, b_dec), acts


def _tracked(*weights: Tensor) -> bool:
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


class _Encode(torch.autograd.Function):
    """Values, offsets and latents of ``x [n, d_in]``, and with a bandwidth what of them is on and what is near its
    threshold; differentiable with respect to ``x`` alone. Use :func:`encode_sparse`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float | None
    ) -> tuple[Tensor | None, ...]:
        # The limit is a little low, so that rounding in theta - epsilon / 2 loses nothing that the kernel counts.
        limit = threshold if bandwidth is None else threshold - 0.51 * bandwidth
        offsets, latents, values = ops.encode(x, w_enc, b_enc, limit)
        on = near = None
        if bandwidth is not None:
            theta = threshold.index_select(0, latents)
            on, near = ~(values <= theta), rectangle((values - theta) / bandwidth)
            kept = (on | (near > 0)).nonzero().squeeze(1)
            rows = ops.rows_of(offsets, latents.shape[0]).index_select(0, kept)
            offsets = ops.starts_of(rows.bincount(minlength=x.shape[0]))
            latents, values, on, near = (t.index_select(0, kept) for t in (latents, values, on, near))
            values = torch.where(on, values, 0.0)
            ctx.mark_non_differentiable(on, near)
        ctx.save_for_backward(w_enc, offsets, latents, on)
        ctx.mark_non_differentiable(offsets, latents)
        return values, offsets, latents, on, near

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        w_enc, offsets, latents, on = ctx.saved_tensors
        grad_pre = grads[0].contiguous() if on is None else grads[0] * on
        return ops.column_sums(offsets, latents, grad_pre, w_enc), None, None, None, None


class _EncodeWeights(torch.autograd.Function):
    """Zeros beside the values of :class:`_Encode`, ``[nnz]``, which carry the gradients of the encoder's weights."""

    @staticmethod
    def forward(
        ctx: Any,
        w_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        x: Tensor,
        bandwidth: float | None,
        offsets: Tensor,
        latents: Tensor,
        on: Tensor | None,
        near: Tensor | None,
    ) -> Tensor:
        ctx.bandwidth, ctx.like = bandwidth, w_enc.dtype
        ctx.save_for_backward(x, threshold, offsets, latents, on, near)
        return x.new_zeros(latents.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, threshold, offsets, latents, on, near = ctx.saved_tensors
        grad = grads[0].contiguous()
        need_w, need_b, need_threshold = ctx.needs_input_grad[:3]
        grad_pre, d_sae = grad if on is None else grad * on, threshold.shape[0]
        grad_w = ops.latent_sums(offsets, latents, grad_pre, d_sae, x).T if need_w else None
        grad_b = ops.bias_sums(offsets, latents, grad_pre, d_sae).to(ctx.like) if need_b else None
        grad_threshold = None
        if need_threshold and near is not None:  # without a bandwidth there is none
            total = ops.bias_sums(offsets, latents, near * grad, d_sae)
            grad_threshold = -(threshold / ctx.bandwidth) * total.to(threshold.dtype)
        return grad_w, grad_b, grad_threshold, None, None, None, None, None, None


class _Decode(torch.autograd.Function):
    """``f W_dec + b_dec`` of CSR values, differentiable with respect to these alone; use :func:`decode_sparse`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, w_dec: Tensor, b_dec: Tensor, offsets: Tensor, latents: Tensor) -> Tensor:
        ctx.save_for_backward(w_dec, offsets, latents)
        return ops.row_sums(offsets, latents, values, w_dec).add_(b_dec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        w_dec, offsets, latents = ctx.saved_tensors
        return ops.sampled(offsets, latents, grads[0].contiguous(), w_dec), None, None, None, None


class _DecodeDense(torch.autograd.Function):
    """``f W_dec + b_dec`` of a dense ``f [n, d_sae]`` that is mostly 0, with a dense gradient; and the entries of f."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, w_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, ...]:
        offsets, latents, values = ops.compact(acts, None)
        ctx.save_for_backward(w_dec)
        ctx.mark_non_differentiable(offsets, latents, values)
        return ops.row_sums(offsets, latents, values, w_dec).add_(b_dec), offsets, latents, values

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (w_dec,) = ctx.saved_tensors
        return ops.product(grads[0].contiguous(), w_dec.T), None, None


class _DecodeWeights(torch.autograd.Function):
    """A zero beside the output of a decoder, which carries the gradients of its weights."""

    @staticmethod
    def forward(ctx: Any, w_dec: Tensor, b_dec: Tensor, offsets: Tensor, latents: Tensor, values: Tensor) -> Tensor:
        ctx.d_sae = w_dec.shape[0]
        ctx.save_for_backward(offsets, latents, values)
        return b_dec.new_zeros(1).expand(offsets.shape[0] - 1, w_dec.shape[1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        offsets, latents, values = ctx.saved_tensors
        grad, (need_w, need_b) = grads[0].contiguous(), ctx.needs_input_grad[:2]
        grad_w = ops.latent_sums(offsets, latents, values, ctx.d_sae, grad) if need_w else None
        return grad_w, grad.sum(0) if need_b else None, None, None, None
