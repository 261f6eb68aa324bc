"""JumpReLU SAEs whose gate, decoder and gradients take time proportional to the number of active latents.

With row vectors ``x [..., d_in]``, as in :mod:`gemma_scope_tl.sae.base`::

    z = x W_enc + b_enc            f = z * H(z - theta)            x_hat = f W_dec + b_dec

Only ``x W_enc`` is dense. It is computed and gated in blocks, so memory never holds all of z or f. With 131072 latents
and 512 tokens a forward pass takes about 25 MB and the gradient of x about 75 MB, while z alone would take 268 MB. Of
16384 latents about 70 are active, and decoding, ``df`` and ``dx`` are sums over these. Above the densities that are
fixed in :mod:`gemma_scope_tl.sae.sparse_ops`, the dense product is used instead.

Backward, with ``g`` the gradient of ``x_hat`` and sums over tokens written out::

    df_ti = g_t . W_dec_i  at active places       dz = df H(z - theta)
    dx = dz W_enc^T      dW_enc = x^T dz      db_enc = sum_t dz_t      dW_dec = f^T g      db_dec = sum_t g_t
    dtheta_i = -(theta_i / epsilon) sum_t K((z_ti - theta_i) / epsilon) df_ti              (ste.py; with a bandwidth)

Only the requested gradients are computed. Weights have separate nodes in autograd's graph, so with frozen weights and
in ``torch.autograd.grad(metric, activations)`` only ``dx`` is computed. The time of the pass itself does not change.

Rounding: every sum has the terms of the dense formula without the zeros, in another order. The error of a sum of n
terms is at most n u times the sum of their absolute values, with u = 2^-53 or 2^-24, and typically about sqrt(n) u:
within 1e-12 in float64 and 1e-5 in float32 at Gemma's widths. The order is fixed, so repeated passes give identical
bits. A pre-activation that rounds to the other side of its threshold switches a latent, as between two BLAS libraries.

SAEs of 16 bits return their dtype. The bias is added before the product is rounded, once; ``base.py`` rounds twice.
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
    """Active latents of a batch of tokens, as a CSR matrix with a row for each token.

    Attributes:
        offsets: int64 ``[n + 1]``; token t has the entries ``offsets[t]`` to ``offsets[t + 1]``.
        latents: int64 ``[nnz]``, ascending within a token.
        values: ``[nnz]``, tracked by autograd. With a bandwidth there are explicit zeros for inactive latents within
            half a bandwidth of their threshold, because the gradient of the threshold needs them.
        shape: shape of the dense activations, ``(..., d_sae)``, whose leading dimensions have n tokens.
    """

    offsets: Tensor
    latents: Tensor
    values: Tensor
    shape: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Number of tokens, which is the product of all dimensions but the last."""
        return self.offsets.shape[0] - 1

    @property
    def d_sae(self) -> int:
        """Number of latents of the SAE."""
        return self.shape[-1]

    @property
    def density(self) -> float:
        """The share of the dense entries that are stored, from 0 to 1."""
        return self.latents.shape[0] / max(1, self.n_tokens * self.d_sae)

    @property
    def l0(self) -> float:
        """Mean number of active latents per token, without explicit zeros. NaN if there are no tokens."""
        return int(torch.count_nonzero(self.values)) / self.n_tokens if self.n_tokens else math.nan

    def tokens(self) -> Tensor:
        """The token index of each entry over the flattened batch dimensions, int64 ``[nnz]``."""
        return ops.rows_of(self.offsets, self.latents.shape[0])

    def with_values(self, values: Tensor) -> SparseActs:
        """The same entries with other values ``[nnz]``, such as from a hook that scales or clamps active latents.

        Raises:
            GemmaScopeError: for another shape.
        """
        if values.shape != self.latents.shape:
            raise GemmaScopeError(
                f"There are {self.latents.shape[0]} active entries, but the values have shape {list(values.shape)}: "
                "give one value for each, or edit to_dense() to switch other latents on."
            )
        return replace(self, values=values)

    def to_dense(self) -> Tensor:
        """``[..., d_sae]``, differentiable with respect to ``values``."""
        flat = self.tokens() * self.d_sae + self.latents
        return self.values.new_zeros(self.n_tokens * self.d_sae).index_copy(0, flat, self.values).view(self.shape)

    @classmethod
    def from_dense(cls, acts: Tensor) -> SparseActs:
        """The non-zero entries (including NaN) of ``[..., d_sae]``. Gradients flow back only to these entries."""
        d_sae = acts.shape[-1]
        flat = acts.reshape(-1, d_sae)
        offsets, latents, values = ops.compact(flat.detach(), None)
        if acts.requires_grad:
            places = ops.rows_of(offsets, latents.shape[0]) * d_sae + latents
            values = flat.reshape(-1).index_select(0, places)
        return cls(offsets, latents, values, tuple(acts.shape))


def compact(pre: Tensor, threshold: Tensor) -> SparseActs:
    """Gate given pre-activations. Not differentiable, unlike :func:`encode_sparse`.

    Args:
        pre: ``[..., d_sae]``. 16-bit values are compared in float32; NaN is kept.
        threshold: ``[d_sae]``, float32 or wider. Latents with ``pre <= threshold`` are inactive.
    """
    entries = ops.compact(pre.detach().reshape(-1, pre.shape[-1]), threshold.detach())
    return SparseActs(*entries, tuple(pre.shape))


def encode_sparse(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float | None = None
) -> SparseActs:
    """Active latents, differentiable with respect to all four tensors.

    Args:
        x: ``[..., d_in]``, any floating dtype, which is cast to the SAE's dtype.
        W_enc: ``[d_in, d_sae]``, any strides. If it is ``w.T`` of a contiguous ``[d_sae, d_in]``, the gradient of
            ``x`` is about three times faster and encoding takes the same time. No transposed copy is made.
        b_enc: ``[d_sae]``.
        threshold: ``[d_sae]``, float32 or wider.
        bandwidth: epsilon of the threshold's pseudo-derivative; None (inference) gives the threshold no gradient.

    Raises:
        GemmaScopeError: for shapes that do not match, or a bandwidth that is not positive.
    """
    d_in, d_sae = W_enc.shape
    if x.shape[-1:] != (d_in,) or b_enc.shape != (d_sae,) or threshold.shape != (d_sae,):
        raise GemmaScopeError(
            f"W_enc is [{d_in}, {d_sae}]: x must be [..., {d_in}], b_enc and threshold [{d_sae}]; given: "
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
        acts: sparse activations, differentiable with respect to their values; or dense activations ``[..., d_sae]``,
            such as after an edit by a hook. Their gradient is dense and includes inactive latents.
        W_dec: ``[d_sae, d_out]``.
        b_dec: ``[d_out]``.

    Raises:
        GemmaScopeError: for shapes that do not match.
    """
    d_sae, d_out = W_dec.shape
    if acts.shape[-1] != d_sae or b_dec.shape != (d_out,):
        raise GemmaScopeError(
            f"W_dec is [{d_sae}, {d_out}]: acts must be [..., {d_sae}] and b_dec [{d_out}]; given: "
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
    """Encode and decode: return ``x_hat [..., d_out]`` in the SAE's dtype, and the active latents.

    Raises:
        GemmaScopeError: as :func:`encode_sparse` and :func:`decode_sparse`.
    """
    acts = encode_sparse(x, W_enc, b_enc, threshold, bandwidth)
    return decode_sparse(acts, W_dec, b_dec), acts


def _tracked(*weights: Tensor) -> bool:
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


class _Encode(torch.autograd.Function):
    """Values, offsets and latents of ``x [n, d_in]``, differentiable only with respect to ``x``.

    With a bandwidth it also returns which entries are active and which are near their threshold. Use
    :func:`encode_sparse`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float | None
    ) -> tuple[Tensor | None, ...]:
        # The limit is slightly low, so that rounding in theta - epsilon / 2 loses no entry that the kernel counts.
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
    """Zeros ``[nnz]`` to add to the values of :class:`_Encode`. They carry the gradients of the encoder weights."""

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
        if need_threshold and near is not None:  # near is None without a bandwidth
            total = ops.bias_sums(offsets, latents, near * grad, d_sae)
            grad_threshold = -(threshold / ctx.bandwidth) * total.to(threshold.dtype)
        return grad_w, grad_b, grad_threshold, None, None, None, None, None, None


class _Decode(torch.autograd.Function):
    """``f W_dec + b_dec`` of CSR values, differentiable only with respect to these. Use :func:`decode_sparse`."""

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
    """``f W_dec + b_dec`` of a dense ``f [n, d_sae]`` that is mostly 0, with a dense gradient, and the entries of f."""

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
    """A zero to add to the output of a decoder. It carries the gradients of the decoder weights."""

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
