"""Autograd's nodes of :mod:`gemma_scope_tl.sae.sparse`, whose docstring has the formulas.

The nodes get detached tensors, and functions that return the same tensors with their place in autograd's graph. Only
second derivatives need the latter: as arguments of a node they would have autograd compute gradients that nobody
asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.sae.ste import rectangle

InGraph = Callable[[], Tensor]


def spread(offsets: Tensor, latents: Tensor, values: Tensor, d_sae: int) -> Tensor:
    """The dense ``[n, d_sae]`` of CSR entries, differentiable with respect to the values."""
    n, flat = offsets.shape[0] - 1, ops.rows_of(offsets, latents.shape[0]) * d_sae + latents
    return values.new_zeros(n * d_sae).index_copy(0, flat, values).view(n, d_sae)


class Encode(torch.autograd.Function):
    """Values, offsets and latents of ``x [n, d_in]``, differentiable only with respect to ``x``.

    With a bandwidth it also returns which entries are active and which are near their threshold. Use
    :func:`encode_sparse`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        bandwidth: float | None,
        w_in_graph: InGraph,
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
        ctx.bandwidth, ctx.w_in_graph = bandwidth, w_in_graph
        return values, offsets, latents, on, near

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        if not (torch.is_grad_enabled() and ctx.bandwidth is None):
            return Encode.backward_once(ctx, *grads)
        w_enc, offsets, latents, _ = ctx.saved_tensors
        return spread(offsets, latents, grads[0], w_enc.shape[1]) @ ctx.w_in_graph().T, *[None] * 5

    @staticmethod
    @once_differentiable
    def backward_once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w_enc, offsets, latents, on = ctx.saved_tensors
        grad_pre = grads[0].contiguous() if on is None else grads[0] * on
        return ops.column_sums(offsets, latents, grad_pre, w_enc), *[None] * 5


class EncodeWeights(torch.autograd.Function):
    """Zeros ``[nnz]`` to add to the values of :class:`Encode`. They carry the gradients of the encoder weights."""

    @staticmethod
    def forward(
        ctx: Any,
        w_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        x: Tensor,
        x_in_graph: InGraph,
        bandwidth: float | None,
        offsets: Tensor,
        latents: Tensor,
        on: Tensor | None,
        near: Tensor | None,
    ) -> Tensor:
        ctx.bandwidth, ctx.like, ctx.x_in_graph = bandwidth, w_enc.dtype, x_in_graph
        ctx.save_for_backward(x, threshold, offsets, latents, on, near)
        return x.new_zeros(latents.shape)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        if not (torch.is_grad_enabled() and ctx.bandwidth is None):
            return EncodeWeights.backward_once(ctx, *grads)
        _, threshold, offsets, latents, _, _ = ctx.saved_tensors
        grad_pre = spread(offsets, latents, grads[0], threshold.shape[0])
        return ctx.x_in_graph().T @ grad_pre, grad_pre.sum(0), *[None] * 8

    @staticmethod
    @once_differentiable
    def backward_once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
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
        return grad_w, grad_b, grad_threshold, *[None] * 7


class Decode(torch.autograd.Function):
    """``f W_dec + b_dec`` of CSR values, differentiable only with respect to these. Use :func:`decode_sparse`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, w_dec: Tensor, b_dec: Tensor, offsets: Tensor, latents: Tensor, w_in_graph: InGraph
    ) -> Tensor:
        ctx.save_for_backward(w_dec, offsets, latents)
        ctx.w_in_graph = w_in_graph
        return ops.row_sums(offsets, latents, values, w_dec).add_(b_dec)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        w_dec, offsets, latents = ctx.saved_tensors
        if torch.is_grad_enabled():
            flat = ops.rows_of(offsets, latents.shape[0]) * w_dec.shape[0] + latents
            grad = (grads[0] @ ctx.w_in_graph().T).reshape(-1).index_select(0, flat)
        else:
            grad = ops.sampled(offsets, latents, grads[0].contiguous(), w_dec)
        return grad, *[None] * 5


class DecodeDense(torch.autograd.Function):
    """``f W_dec + b_dec`` of a dense ``f [n, d_sae]`` that is mostly 0, with a dense gradient, and the entries of f."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, w_dec: Tensor, b_dec: Tensor, w_in_graph: InGraph) -> tuple[Tensor, ...]:
        offsets, latents, values = ops.compact(acts, None)
        ctx.save_for_backward(w_dec)
        ctx.w_in_graph = w_in_graph
        ctx.mark_non_differentiable(offsets, latents, values)
        dense = ops.dense_wins(offsets, latents, w_dec.shape[0], ops.DENSE_ROWS)
        out = ops.product(acts, w_dec) if dense else ops.row_sums(offsets, latents, values, w_dec)
        return out.add_(b_dec), offsets, latents, values

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (w_dec,) = ctx.saved_tensors
        again = torch.is_grad_enabled()
        grad = grads[0] @ ctx.w_in_graph().T if again else ops.product(grads[0].contiguous(), w_dec.T)
        return grad, *[None] * 3


class DecodeWeights(torch.autograd.Function):
    """A zero to add to the output of a decoder. It carries the gradients of the decoder weights."""

    @staticmethod
    def forward(
        ctx: Any,
        w_dec: Tensor,
        b_dec: Tensor,
        offsets: Tensor,
        latents: Tensor,
        values: Tensor,
        acts_in_graph: InGraph,
    ) -> Tensor:
        ctx.d_sae, ctx.acts_in_graph = w_dec.shape[0], acts_in_graph
        ctx.save_for_backward(offsets, latents, values)
        return b_dec.new_zeros(1).expand(offsets.shape[0] - 1, w_dec.shape[1])

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return ctx.acts_in_graph().T @ grads[0], grads[0].sum(0), *[None] * 4
        offsets, latents, values = ctx.saved_tensors
        grad, (need_w, need_b) = grads[0].contiguous(), ctx.needs_input_grad[:2]
        grad_w = ops.latent_sums(offsets, latents, values, ctx.d_sae, grad) if need_w else None
        return grad_w, grad.sum(0) if need_b else None, *[None] * 4
