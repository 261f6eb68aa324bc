"""Triton kernels for :mod:`gemma_scope_tl.sae.sparse_ops` on CUDA tensors.

Tests run the kernels in Triton's interpreter (``TRITON_INTERPRET=1``, which accepts CPU tensors) and compile them for
compute capability 9.0 without a device. ``benchmarks/gpu.py`` compares them with exact sums on a GPU and measures their
time. The module is imported only when a tensor is on CUDA.

One program handles one token and processes its entries in order, without atomic additions, so repeated runs give
identical bits. Sums are accumulated in float32, or in float64 for float64.
"""

# The parameters of a kernel have no Python type, and Triton is not installed everywhere.
# pyright: reportMissingImports=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LATENTS = 1024  # latents that a compacting program processes at a time
# Tiles of entries by dimensions, accumulated elementwise and summed at the end. This was the fastest of eight shapes on
# an H200, for 70 entries per token and 2304 or 3584 dimensions in bfloat16 and float32.
_ROW_TILE = (4, 512)
_SAMPLED_TILE = (8, 256)
_SPLITS = 8  # programs that share the entries of one token in `sampled`: a BOS token may have thousands


@triton.jit
def _count_kernel(pre, limit, counts, stride, d_sae, HAS_LIMIT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    total = 0
    for start in range(0, d_sae, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(pre + token * stride + at, mask=at < d_sae, other=0.0)
        off = z.to(WIDE) <= tl.load(limit + at, mask=at < d_sae, other=0.0) if HAS_LIMIT else z.to(WIDE) == 0.0
        total += tl.sum((~off & (at < d_sae)).to(tl.int32), 0)
    tl.store(counts + token, total.to(tl.int64))


@triton.jit
def _fill_kernel(
    pre,
    limit,
    offsets,
    latents,
    values,
    stride,
    d_sae,
    HAS_LIMIT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + token)
    for start in range(0, d_sae, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(pre + token * stride + at, mask=at < d_sae, other=0.0)
        off = z.to(WIDE) <= tl.load(limit + at, mask=at < d_sae, other=0.0) if HAS_LIMIT else z.to(WIDE) == 0.0
        on = ~off & (at < d_sae)
        place = first + tl.cumsum(on.to(tl.int32), 0) - 1
        tl.store(latents + place, at.to(tl.int64), mask=on)
        tl.store(values + place, z, mask=on)
        first += tl.sum(on.to(tl.int32), 0)


@triton.jit
def _row_sums_kernel(
    offsets, latents, values, matrix, out, d, stride, WIDE: tl.constexpr, ENTRIES: tl.constexpr, DIMS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    first, last = tl.load(offsets + token), tl.load(offsets + token + 1)
    total = tl.zeros([ENTRIES, DIMS], dtype=WIDE)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        latent = tl.load(latents + entry, mask=entry < last, other=0)
        value = tl.load(values + entry, mask=entry < last, other=0.0).to(WIDE)
        inside = (entry < last)[:, None] & (dims < d)[None, :]
        row = tl.load(matrix + latent[:, None] * stride + dims[None, :], mask=inside, other=0.0).to(WIDE)
        total += value[:, None] * row
    tl.store(out + token * d + dims, tl.sum(total, 0).to(out.dtype.element_ty), mask=dims < d)


@triton.jit
def _sampled_kernel(
    offsets,
    latents,
    left,
    matrix,
    out,
    d,
    stride_left,
    stride,
    WIDE: tl.constexpr,
    ENTRIES: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + token), tl.load(offsets + token + 1)
    for start in range(first + tl.program_id(1) * ENTRIES, last, ENTRIES * SPLITS):
        entry = start + tl.arange(0, ENTRIES)
        latent = tl.load(latents + entry, mask=entry < last, other=0)
        total = tl.zeros([ENTRIES, DIMS], dtype=WIDE)
        for begin in range(0, d, DIMS):
            dims = begin + tl.arange(0, DIMS)
            inside = (entry < last)[:, None] & (dims < d)[None, :]
            row = tl.load(matrix + latent[:, None] * stride + dims[None, :], mask=inside, other=0.0).to(WIDE)
            here = tl.load(left + token * stride_left + dims, mask=dims < d, other=0.0).to(WIDE)
            total += row * here[None, :]
        tl.store(out + entry, tl.sum(total, 1).to(out.dtype.element_ty), mask=entry < last)


def _wide(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def compact(pre: Tensor, limit: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, latents and values of the entries of ``pre [n, d_sae]`` above ``limit``, or not 0 without a limit."""
    pre = pre if pre.stride(1) == 1 else pre.contiguous()
    n, d_sae = pre.shape
    bound = pre if limit is None else limit.contiguous()
    counts = torch.zeros(n, dtype=torch.int64, device=pre.device)
    shared = {"HAS_LIMIT": limit is not None, "WIDE": _wide(pre.dtype), "BLOCK": _LATENTS}
    if n:
        _count_kernel[(n,)](pre, bound, counts, pre.stride(0), d_sae, **shared)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    nnz = int(offsets[-1])
    latents = torch.empty(nnz, dtype=torch.int64, device=pre.device)
    values = torch.empty(nnz, dtype=pre.dtype, device=pre.device)
    if nnz:
        _fill_kernel[(n,)](pre, bound, offsets, latents, values, pre.stride(0), d_sae, **shared)
    return offsets, latents, values


def row_sums(offsets: Tensor, latents: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
    """The sum of ``values`` times rows of ``matrix [rows, d]`` for each token, ``[n, d]``."""
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    n, d = offsets.shape[0] - 1, matrix.shape[1]
    out = torch.empty(n, d, dtype=matrix.dtype, device=matrix.device)
    if n:
        entries, dims = _ROW_TILE
        _row_sums_kernel[(n, triton.cdiv(d, dims))](
            offsets,
            latents.contiguous(),
            values.contiguous(),
            matrix,
            out,
            d,
            matrix.stride(0),
            WIDE=_wide(matrix.dtype),
            ENTRIES=entries,
            DIMS=dims,
        )
    return out


def sampled(offsets: Tensor, latents: Tensor, left: Tensor, matrix: Tensor) -> Tensor:
    """``left_t . matrix_i`` for every active latent i of every token t, ``[nnz]``."""
    left, matrix = (t if t.stride(1) == 1 else t.contiguous() for t in (left, matrix))
    n, d = left.shape
    out = torch.empty(latents.shape[0], dtype=left.dtype, device=left.device)
    if n and latents.shape[0]:
        _sampled_kernel[(n, _SPLITS)](
            offsets,
            latents.contiguous(),
            left,
            matrix,
            out,
            d,
            left.stride(0),
            matrix.stride(0),
            WIDE=_wide(left.dtype),
            ENTRIES=_SAMPLED_TILE[0],
            DIMS=_SAMPLED_TILE[1],
            SPLITS=_SPLITS,
        )
    return out
