"""What the latents of one layer of a layered coder write at several layers.

The decoder of a layer is ``W [m, P, d_out]``, with an output plane for each layer that it writes. In a mapped file of
all planes it is a strided view: between two latents lie planes that are never read. PyTorch's sum over rows copies a
matrix whose rows are not adjacent, which for one plane ``W[:, p]`` takes a hundred times as long as the sum. Here the
planes are rows of one matrix over the same memory, in which every row is adjacent to the next::

    rows [(m - 1) S + P, d_out],    W[i, p] = rows[i S + p],    S = planes from one latent to the next in memory

Each active latent has an entry for every plane, and one sum gives what all planes get.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.sae.routes import kernels_apply
from gemma_scope_tl.sae.sparse import SparseActs, decode_sparse


def written_planes(acts: SparseActs | Tensor, W_dec: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """What latents write at the layers ``first`` to ``last`` (exclusive) of those that they write.

    Args:
        acts: latents ``[..., m]``, sparse or dense. Gradients reach the values, and all entries of a dense tensor.
        W_dec: ``[m, P, d_out]``. No plane is copied.
        first, last: indices of planes; None for all from ``first`` on.

    Returns:
        ``[last - first, ..., d_out]`` in the dtype of ``W_dec``, without biases.
    """
    chosen = W_dec[:, first:last]
    count, d_out = chosen.shape[1:]
    if not kernels_apply(chosen, acts if isinstance(acts, Tensor) else acts.values):
        dense = acts if isinstance(acts, Tensor) else acts.to_dense()
        return _apart(dense.to(chosen.dtype) @ chosen.flatten(1), count)
    if isinstance(acts, Tensor):
        if torch.is_grad_enabled() and W_dec.requires_grad:
            return _apart(acts.to(chosen.dtype) @ chosen.flatten(1), count)
        flat = acts.reshape(-1, acts.shape[-1]).to(chosen.dtype)
        out: Any = _DensePlanes.apply(flat, chosen)
        return out.view(count, *acts.shape[:-1], d_out)
    return _written(acts, chosen)


def _written(acts: SparseActs, chosen: Tensor) -> Tensor:
    count, d_out = chosen.shape[1:]
    rows, step = as_rows(chosen)
    if rows is None or acts.density > ops.DENSE_ROWS:  # a dense product takes strided planes as they are
        return _apart(decode_sparse(acts, chosen.flatten(1), chosen.new_zeros(count * d_out)), count)
    several = _for_planes(acts, count, rows.shape[0], step)
    return decode_sparse(several, rows, rows.new_zeros(d_out))


def as_rows(chosen: Tensor) -> tuple[Tensor | None, int]:
    """The planes as rows of one matrix, and the rows from one latent to the next; None if memory has another order."""
    m, count, d_out = chosen.shape
    along, across, within = chosen.stride()
    if count == 1:
        across = d_out
    if m == 0 or within != 1 or across != d_out or along % d_out:
        return None, 0
    step = along // d_out
    return chosen.as_strided(((m - 1) * step + count, d_out), (d_out, 1)), step


def _for_planes(acts: SparseActs, count: int, rows: int, step: int) -> SparseActs:
    """The entries of all planes, plane by plane, as latents of :func:`as_rows`."""
    shape = (count, *acts.shape[:-1], rows)
    if count == 1:
        return SparseActs(acts.offsets, acts.latents * step, acts.values, shape)
    planes = torch.arange(count, device=acts.latents.device)[:, None]
    latents = (acts.latents * step + planes).view(-1)
    nnz = acts.latents.shape[0]
    starts = (acts.offsets[:-1] + planes * nnz).view(-1)
    offsets = torch.cat([starts, starts.new_full((1,), count * nnz)])
    return SparseActs(offsets, latents, acts.values.repeat(count), shape)


def _apart(out: Tensor, count: int) -> Tensor:
    """``[..., P d_out]`` -> ``[P, ..., d_out]``."""
    return out.unflatten(-1, (count, -1)).movedim(-2, 0)


class _DensePlanes(torch.autograd.Function):
    """Sums over a dense ``[n, m]`` that is mostly 0, with a dense gradient."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(chosen)
        return _written(SparseActs.from_dense(acts), chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (chosen,) = ctx.saved_tensors
        grad = grads[0].movedim(0, -2).flatten(-2)
        return ops.product(grad, chosen.flatten(1).T), None
