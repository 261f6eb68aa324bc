"""The pass of a few tokens through a JumpReLU SAE without gradients, as in each step of a generation.

For one token, reading the weights is all the work: ``W_enc`` once (151 MB at 2304 x 16384 in float32), and the rows of
``W_dec`` of the active latents. So the decoder is summed row by row at any density, while :mod:`sparse_ops` takes the
dense product above 4 %, which pays only when many tokens share its reading; and the bookkeeping of
:mod:`gemma_scope_tl.sae.sparse` for gradients and batches is left out, which takes longer than a small SAE's product.

The kernels are those of :mod:`sparse_ops`. Below its densities the results are equal to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_scope_tl.sae import sparse_ops as ops

MOST = 8
"""Number of tokens up to which this pass is taken. A GPU has its own kernels, and enough tokens fill its blocks."""


def is_few(x: Tensor, d_in: int) -> bool:
    """Whether the tokens of ``x [..., d_in]`` are few, on a CPU, and without gradients to record or autocast.

    Autocast would give the product another dtype than the decoder has, and the sums take one dtype.
    """
    few = x.shape[-1] == d_in and 0 < x.numel() <= MOST * d_in
    plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    return few and plain and x.device.type == "cpu"


def reconstruct_few(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """``f W_dec + b_dec`` with ``f = JumpReLU_theta(x W_enc + b_enc)``, ``[..., d_out]`` in the dtype of the SAE.

    Args:
        x: ``[..., d_in]``, a few tokens of any floating dtype.
        W_enc, b_enc, threshold, W_dec, b_dec: as :func:`~gemma_scope_tl.sae.sparse.reconstruct` takes them.
    """
    rows = x.reshape(-1, x.shape[-1]).to(W_enc.dtype)
    pre = ops.product(rows, W_enc).add_(b_enc)
    on = torch.le(pre, ops.floor_to(threshold, pre.dtype)).logical_not_()  # NaN compares false, so it is kept
    flat = ops.nonzero(on.view(-1))
    values = pre.view(-1).index_select(0, flat)
    if len(rows) == 1:
        offsets = torch.tensor([0, flat.shape[0]])
    else:
        row = flat.div(pre.shape[1], rounding_mode="floor")
        offsets, flat = ops.starts_of(row.bincount(minlength=len(rows))), flat - row * pre.shape[1]
    out = ops.weighted_rows(offsets, flat, values, W_dec).add_(b_dec)
    return out.view(*x.shape[:-1], W_dec.shape[1])
