"""The sums of a sparse JumpReLU without autograd. :mod:`gemma_scope_tl.sae.sparse` adds the gradients.

Active latents are stored by rows (CSR): token ``t`` has ``latents[offsets[t]:offsets[t + 1]]``, ascending, with one
value each. Every sum has a fixed order without atomic additions, so repeated runs give identical bits on every device.

The table has the time of each operation on a CPU, as a share of the encoder's product ``x @ W_enc`` (2304 x 16384, 512
tokens, float32, two threads; ``benchmarks/sparse.py`` measures the totals):

====================================== =========== =========== =========== ===========
density of active latents               0.4%        2%          4%          8%
====================================== =========== =========== =========== ===========
decode: sparse / dense                  0.05 / 0.88 0.25 / 0.86 0.48 / 0.88 1.12 / 0.84
gradient of values: sparse / dense      0.03 / 0.99 0.09 / 1.01 0.17 / 1.01 0.33 / 1.00
gradient of x, latent-major W_enc       0.06 / 0.81 0.28 / 0.86 0.47 / 0.84 1.02 / 0.85
gradient of x, other W_enc              0.21 / 0.95 0.76 / 0.86 1.35 / 0.95 1.87 / 0.92
gradient of a matrix: sparse / dense    0.20 / 1.11 0.25 / 1.27 0.27 / 1.14 0.36 / 1.17
====================================== =========== =========== =========== ===========

On a processor with a faster product and slower memory the sparse shares were up to twice as large. The constants below
suit both. No time is measured at run time.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

# Above these densities (active latents / all) the dense product is faster.
DENSE_ROWS = 0.04  # weighted sums of rows, and sampled products with a small matrix
DENSE_IN_ORDER = 0.15  # sampled products with a large matrix
DENSE_COLUMNS = 0.025  # the gradient of x when W_enc's columns are not contiguous
DENSE_LATENTS = 0.12  # the gradient of a matrix

# Size of a block of pre-activations that is compacted while it is in the cache: 512 tokens x 4096 latents in float32.
# Time of encode, gate and decode relative to the product: 1.16 at 512 latents, 1.13 at 1024, 1.09 at 2048, 1.08 at
# 4096, 1.20 at all 16384. Blocks of fewer than 512 tokens slow down the product itself: 1.12 at 128, 1.33 at 64.
BLOCK_BYTES = 8 << 20
BLOCK_TOKENS = 512
CACHED_BYTES = 32 << 20  # reading a larger matrix in order is faster than random access
DENSE_BYTES = 64 << 20  # bound of every dense temporary
NUMPY_THREADS = (
    4  # with more threads, PyTorch's search for true bytes should be faster; with two, NumPy's takes half the time
)
GPU_BLOCK_BYTES = 256 << 20  # of a block on a GPU, where a few large kernels are fastest

Entries = tuple[Tensor, Tensor, Tensor]


@cache
def native_half(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for matrix products of ``dtype``.

    Without them, PyTorch's bfloat16 product is tens of times slower than float32; with AMX it is several times faster.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    supported = ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported
    return bool(supported())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _triton(tensor: Tensor) -> ModuleType | None:
    """The Triton kernels for a CUDA tensor, or None if Triton is missing or the tensor is on another device."""
    if not (tensor.is_cuda and _has_triton()):
        return None
    from gemma_scope_tl.sae import sparse_triton

    return sparse_triton


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in the dtype of the arguments.

    16-bit matrices on a CPU without instructions for them are multiplied in float32, a block of ``b`` at a time, and
    rounded once. This is as accurate as the 16-bit product, which also accumulates in float32.
    """
    if a.is_cuda or native_half(a.dtype):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    wide = a.float()
    result = torch.zeros(a.shape[0], b.shape[1])
    step = max(1, BLOCK_BYTES // (4 * min(b.shape)))
    if b.shape[1] >= b.shape[0]:
        for j in range(0, b.shape[1], step):
            result[:, j : j + step] += wide @ b[:, j : j + step].float()
    else:
        for j in range(0, b.shape[0], step):
            result.addmm_(wide[:, j : j + step], b[j : j + step].float())
    return result.to(a.dtype) if out is None else out.copy_(result)


def encode(x: Tensor, w_enc: Tensor, b_enc: Tensor, limit: Tensor) -> Entries:
    """Pre-activations ``x W_enc + b_enc`` of ``x [n, d_in]`` above ``limit [d_sae]``, or NaN.

    They are computed in blocks of :data:`BLOCK_BYTES`, so memory never holds all of ``[n, d_sae]``. The bias is added
    to the rounded product, because the dense ``encode`` does so and must agree about every gate.

    Returns:
        offsets ``[n + 1]``, latents ``[nnz]``, pre-activations ``[nnz]``.
    """
    n, d_sae = x.shape[0], w_enc.shape[1]
    limit = floor_to(limit, x.dtype)
    kernels = _triton(x)
    if kernels is not None:
        step = max(1, GPU_BLOCK_BYTES // (d_sae * x.element_size()))
        blocks = (torch.mm(x[i : i + step], w_enc).add_(b_enc) for i in range(0, n, step))
        return _stack([kernels.compact(pre, limit) for pre in blocks], x)
    tokens, width = _block_shape(x, d_sae)
    buffer = torch.empty(tokens * width, dtype=x.dtype, device=x.device)
    mask = torch.empty(tokens * width, dtype=torch.bool, device=x.device)
    parts: list[Entries] = []
    for i in range(0, n, tokens):
        rows = x[i : i + tokens]
        found: list[Entries] = []
        for j in range(0, d_sae, width):
            at = slice(j, min(j + width, d_sae))
            shape = rows.shape[0], at.stop - at.start
            pre = product(rows, w_enc[:, at], out=buffer[: shape[0] * shape[1]].view(shape)).add_(b_enc[at])
            row, column, value = _select(pre, limit[at], mask)
            found.append((row, column + j, value))
        parts.append(_by_row(found, rows.shape[0]))
    return _stack(parts, x)


def compact(dense: Tensor, limit: Tensor | None) -> Entries:
    """The entries of ``dense [n, d_sae]`` above ``limit``, or the non-zero entries without a limit. NaN is kept."""
    n, d_sae = dense.shape
    limit = None if limit is None else floor_to(limit, dense.dtype)
    kernels = _triton(dense)
    if kernels is not None:
        return kernels.compact(dense, limit)
    tokens = max(1, min(n, BLOCK_BYTES // d_sae))
    mask = torch.empty(tokens * d_sae, dtype=torch.bool, device=dense.device)
    parts = [_by_row([_select(dense[i : i + tokens], limit, mask)], min(tokens, n - i)) for i in range(0, n, tokens)]
    return _stack(parts, dense)


def floor_to(limit: Tensor, dtype: torch.dtype) -> Tensor:
    """``limit`` in ``dtype``, rounded down if it is not representable.

    For ``z`` of that dtype, ``z <= limit`` is equivalent to ``z <= floor_to(limit)``, which is exact and four times
    faster than comparing bfloat16 with float32.
    """
    near = limit.to(dtype)
    if torch.promote_types(limit.dtype, dtype) == dtype:
        return near
    return torch.where(near.to(limit.dtype) > limit, torch.nextafter(near, torch.full_like(near, -torch.inf)), near)


def _block_shape(x: Tensor, d_sae: int) -> tuple[int, int]:
    """Number of tokens and latents of a block. A GPU compacts whole rows, because its caches are too small to help."""
    if x.is_cuda:
        return max(1, min(x.shape[0], GPU_BLOCK_BYTES // (d_sae * x.element_size()))), d_sae
    tokens = max(1, min(x.shape[0], BLOCK_TOKENS))
    width = BLOCK_BYTES // (tokens * x.element_size()) // 8 * 8  # a multiple of 8 for nonzero
    return tokens, max(1, min(width, d_sae))


def _select(values: Tensor, limit: Tensor | None, mask: Tensor) -> Entries:
    """Rows, columns and values of the entries that :func:`compact` keeps; ``mask`` is a buffer."""
    on = mask[: values.numel()].view(values.shape)
    if limit is None:
        torch.ne(values, 0, out=on)
    else:
        torch.le(values, limit, out=on).logical_not_()  # NaN compares false, so it is kept
    return entries(values, on)[1:]


def entries(values: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat indices, rows, columns and ``values`` of the true entries of the bools ``on [n, m]``, row by row."""
    flat = nonzero(on.view(-1))
    rows = flat.div(max(1, values.shape[1]), rounding_mode="floor")
    return flat, rows, flat - rows * values.shape[1], values.reshape(-1).index_select(0, flat)


def nonzero(mask: Tensor) -> Tensor:
    """Indices of the true bytes of ``mask [n]``.

    NumPy finds them in a third to a half of PyTorch's time, in one thread. With more threads, the mask is searched in
    steps of eight bytes first.
    """
    here = mask.device.type == "cpu"
    if here and torch.get_num_threads() <= NUMPY_THREADS:
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    if not here or mask.numel() % 8 or mask.storage_offset() % 8:
        return mask.nonzero().squeeze(1)
    words = mask.view(torch.int64).nonzero().squeeze(1)
    inside = mask.view(-1, 8).index_select(0, words).view(-1).nonzero().squeeze(1)
    return words.index_select(0, inside >> 3) * 8 + (inside & 7)


def stable_order(numbers: Tensor, below: int) -> Tensor:
    """Indices that sort ``numbers`` (from 0 to ``below - 1``), stably.

    Narrow integers sort faster: a hundred thousand take 0.6 ms with 16 bits and 2.4 ms with 32 in one thread.
    """
    return numbers.to(torch.int16 if below <= 1 << 15 else torch.int32).argsort(stable=True)


def groups(numbers: Tensor, below: int) -> tuple[Tensor, Tensor]:
    """The result of :func:`stable_order`, and the start of the entries of each number in it, ``[below + 1]``."""
    return stable_order(numbers, below), starts_of(numbers.bincount(minlength=below))


def _by_row(found: list[Entries], n: int) -> Entries:
    """Merge the entries of adjacent blocks, each ordered by row, into offsets, columns and values ordered by row."""
    row, column, value = (torch.cat(part) if len(found) > 1 else part[0] for part in zip(*found, strict=True))
    if len(found) > 1:
        order = stable_order(row, n)  # stable: latents stay ascending within a token
        column, value = column.index_select(0, order), value.index_select(0, order)
    return starts_of(row.bincount(minlength=n)), column, value


def _stack(parts: list[Entries], like: Tensor) -> Entries:
    """Concatenate the entries of consecutive chunks of tokens."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        empty = torch.zeros(0, dtype=torch.int64, device=like.device)
        return empty.new_zeros(1), empty, like.new_zeros(0)
    counts = torch.cat([offsets.diff() for offsets, _, _ in parts])
    return starts_of(counts), torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])


def starts_of(counts: Tensor) -> Tensor:
    """``[0, c0, c0 + c1, ...]``: the start of each group, and the end."""
    return pad(counts.cumsum(0), (1, 0))


def rows_of(offsets: Tensor, nnz: int) -> Tensor:
    """The token of every entry, ``[nnz]``."""
    return torch.arange(offsets.shape[0] - 1, device=offsets.device).repeat_interleave(offsets.diff(), output_size=nnz)


def row_sums(offsets: Tensor, latents: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
    """``F @ matrix`` for the sparse ``F [n, d_sae]`` and ``matrix [d_sae, d]``: a sum of rows for each token."""
    if dense_wins(offsets, latents, matrix.shape[0], DENSE_ROWS):
        return _dense_rows(offsets, latents, values, matrix)
    return weighted_rows(offsets, latents, values, matrix)


def weighted_rows(offsets: Tensor, rows: Tensor, weights: Tensor, matrix: Tensor) -> Tensor:
    """For each group between two offsets, the sum of ``weights`` times ``rows`` of ``matrix``."""
    kernels = _triton(matrix)
    if kernels is not None:
        return kernels.row_sums(offsets, rows, weights, matrix)
    if rows.shape[0] == 0:
        return matrix.new_zeros(offsets.shape[0] - 1, matrix.shape[1])
    return embedding_bag(rows, matrix, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def column_sums(offsets: Tensor, latents: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
    """``F @ matrix^T`` for the sparse ``F [n, d_sae]`` and ``matrix [d, d_sae]``, the layout of ``W_enc``.

    If the column of each latent is contiguous (``W_enc`` is ``w.T`` of a contiguous ``[d_sae, d]``), this is
    :func:`row_sums`, which is three times faster. The caller chooses the layout; no transposed copy is made here.
    """
    if matrix.stride(0) == 1 and matrix.stride(1) >= matrix.shape[0]:
        return row_sums(offsets, latents, values, matrix.T)
    n, d_sae = offsets.shape[0] - 1, matrix.shape[1]
    narrow = values.dtype not in (torch.float32, torch.float64)  # no sparse product for these
    if narrow or dense_wins(offsets, latents, d_sae, DENSE_COLUMNS):
        return _dense_rows(offsets, latents, values, matrix.T)
    if latents.shape[0] == 0:
        return matrix.new_zeros(n, matrix.shape[0])
    columns = _csr(offsets, latents, values, (n, d_sae)).t()
    out = matrix.new_empty(matrix.shape[0], n)
    step = max(32, BLOCK_BYTES // (d_sae * matrix.element_size()))
    for i in range(0, matrix.shape[0], step):  # the kernel copies its dense matrix; the whole matrix at once is slower
        out[i : i + step] = matrix[i : i + step] @ columns
    return out.T.contiguous()


def latent_sums(offsets: Tensor, latents: Tensor, values: Tensor, d_sae: int, x: Tensor) -> Tensor:
    """``F^T @ x`` for the sparse ``F [n, d_sae]`` and ``x [n, d]``: for each latent, a sum of rows of ``x``."""
    if x.shape[1] > 1 and dense_wins(offsets, latents, d_sae, DENSE_LATENTS):
        total = torch.zeros(d_sae, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for at, chunk in _dense_chunks(offsets, latents, values, d_sae):
            total += product(chunk.T, x[at])
        return total.to(x.dtype)
    order, starts = groups(latents, d_sae)
    rows = rows_of(offsets, latents.shape[0]).index_select(0, order)
    return weighted_rows(starts, rows, values.index_select(0, order), x)


def bias_sums(offsets: Tensor, latents: Tensor, values: Tensor, d_sae: int) -> Tensor:
    """``F^T 1 [d_sae]``, summed in float32 or wider."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    ones = wide.new_ones(offsets.shape[0] - 1, 1)
    return latent_sums(offsets, latents, wide, d_sae, ones).squeeze(1)


def sampled(
    offsets: Tensor, latents: Tensor, left: Tensor, matrix: Tensor, by_latent: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``left_t . matrix_i`` for every active latent i of every token t: ``left [n, d]``, ``matrix [d_sae, d]``.

    On a CPU a large matrix is read once, latent by latent, instead of row by row for each token. This takes a
    third of the time. ``by_latent`` is the result of :func:`groups` for the latents, if the caller has it.
    """
    d_sae, nnz = matrix.shape[0], latents.shape[0]
    if nnz == 0:
        return left.new_zeros(0)
    in_order = not matrix.is_cuda and matrix.nbytes > CACHED_BYTES and 2 * nnz >= d_sae
    dense = dense_wins(offsets, latents, d_sae, DENSE_IN_ORDER if in_order else DENSE_ROWS)
    kernels = _triton(matrix)
    if kernels is not None and not dense:
        return kernels.sampled(offsets, latents, left, matrix)
    if dense or left.dtype not in (torch.float32, torch.float64):
        out = left.new_empty(latents.shape[0])
        for at, first, last in _token_chunks(offsets, d_sae, left.element_size()):
            here = rows_of(offsets[at.start : at.stop + 1], last - first) * d_sae + latents[first:last]
            out[first:last] = product(left[at], matrix.T).view(-1).index_select(0, here)
        return out
    if not in_order:
        return _sampled(offsets, latents, left, matrix)
    order, starts = by_latent or groups(latents, d_sae)
    found = _sampled(starts, rows_of(offsets, nnz).index_select(0, order), matrix, left)
    return torch.empty_like(found).scatter_(0, order, found)


def _sampled(offsets: Tensor, columns: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """``rows_i . others_j`` for the columns j of each row i."""
    zeros, shape = rows.new_zeros(columns.shape), (rows.shape[0], others.shape[0])
    pattern = _csr(offsets, columns, zeros, shape)
    return torch.sparse.sampled_addmm(pattern, rows, others.T, beta=0.0).values()


def _csr(offsets: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    _silence_beta_warning()
    return torch.sparse_csr_tensor(offsets, columns, values, shape, check_invariants=False)


@cache
def _silence_beta_warning() -> None:
    """Silence PyTorch's warning that its CSR tensors are in beta, which the first one of a process causes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none, offsets = (torch.zeros(n, dtype=torch.int64, device="cpu") for n in (0, 1))
        torch.sparse_csr_tensor(offsets, none, none, (0, 0))


def dense_wins(offsets: Tensor, latents: Tensor, d_sae: int, above: float) -> bool:
    """Whether the entries are denser than ``above``, one of the constants of this module."""
    return latents.shape[0] > above * (offsets.shape[0] - 1) * d_sae


def _token_chunks(offsets: Tensor, d_sae: int, item_size: int) -> Generator[tuple[slice, int, int]]:
    """Slices of tokens whose dense rows fit :data:`DENSE_BYTES`, with their first and last entries."""
    n = offsets.shape[0] - 1
    tokens = max(1, DENSE_BYTES // (d_sae * item_size))
    for i in range(0, n, tokens):
        at = slice(i, min(i + tokens, n))
        yield at, int(offsets[at.start]), int(offsets[at.stop])


def _dense_chunks(offsets: Tensor, latents: Tensor, values: Tensor, d_sae: int) -> Generator[tuple[slice, Tensor]]:
    """The sparse matrix as dense chunks of tokens."""
    for at, first, last in _token_chunks(offsets, d_sae, values.element_size()):
        chunk = values.new_zeros((at.stop - at.start) * d_sae)
        here = rows_of(offsets[at.start : at.stop + 1], last - first) * d_sae + latents[first:last]
        chunk.index_copy_(0, here, values[first:last])
        yield at, chunk.view(-1, d_sae)


def _dense_rows(offsets: Tensor, latents: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
    """:func:`row_sums` by a dense product for each chunk of tokens."""
    return torch.cat([product(chunk, matrix) for _, chunk in _dense_chunks(offsets, latents, values, matrix.shape[0])])
