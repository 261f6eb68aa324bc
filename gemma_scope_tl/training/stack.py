"""How the SAEs of one place lie in one stack of latents, and what a step is told about each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gemma_scope_tl.training.penalties import Prices
from gemma_scope_tl.training.shard import Shard
from gemma_scope_tl.training.spec import SAESpec


@dataclass(frozen=True)
class Member:
    """One SAE of the stack.

    Attributes:
        index: its number among the place's SAEs, and its row of ``b_dec``.
        rows: its latents in the stack: those that this process has.
        segments: ``rows`` cut where its Matryoshka prefixes end; some may be empty where latents are divided.
        bandwidth: epsilon.
        d_sae: all of its latents, on all processes.
    """

    index: int
    rows: slice
    segments: tuple[slice, ...]
    bandwidth: float
    d_sae: int


def members_of(specs: Sequence[SAESpec], shard: Shard) -> list[Member]:
    """One after the other, in the order of ``specs``."""
    members: list[Member] = []
    at = 0
    for index, spec in enumerate(specs):
        own = shard.latents(spec.d_sae)
        ends = [min(max(size, own.start), own.stop) - own.start for size in spec.recipe.prefixes_of(spec.d_sae)]
        segments = tuple(slice(at + a, at + b) for a, b in zip([0, *ends[:-1]], ends, strict=True))
        rows = slice(at, at + own.stop - own.start)
        members.append(Member(index, rows, segments, spec.recipe.bandwidth, spec.d_sae))
        at = rows.stop
    return members


@dataclass(frozen=True)
class Batch:
    """One batch as every part of the step sees it.

    Attributes:
        x: ``[rows, d_in]``, this process's rows.
        y: the target ``[rows, d_out]``, the same tensor as ``x`` unless the SAEs are transcoders.
        n: rows on all processes.
        centred: whether ``b_dec`` is subtracted before the encoder.
        shard: how sums over other processes are made.
    """

    x: Tensor
    y: Tensor
    n: int
    centred: bool
    shard: Shard


@dataclass(frozen=True)
class Chunk:
    """Gradients of the matrices for some neighbouring latents, summed over the batch and all processes.

    Attributes:
        rows: where they lie in the stack.
        touched: which of ``rows`` have gradients, ``[k]``, counted from ``rows.start``; None for all.
        enc, dec: ``[k, d_in]`` and ``[k, d_out]``, the caller's to overwrite.
    """

    rows: slice
    touched: Tensor | None
    enc: Tensor
    dec: Tensor


@dataclass
class Vectors:
    """What a pass gives for every latent of its SAEs, ``[latents]`` each, over all processes' rows.

    Attributes:
        b_enc, log_threshold: gradients.
        fired: on how many activations of the batch each was active.
    """

    b_enc: Tensor
    log_threshold: Tensor
    fired: Tensor


class Pass(Protocol):
    """Forward and backward through some SAEs of the stack for one batch, without changing any parameter.

    Attributes:
        members: the SAEs.
        sums: ``[members, 4]`` in float64 after the forward half, over all processes: of ``||e||^2`` for the whole SAE
            and for the mean of its prefixes, of active latents, and of pre-activations above the kernel's lower end
            (from a sample of the rows where products are dense).
        vectors: complete once the chunks of all members have been taken.
        b_dec: ``[members, d_out]``, likewise.
    """

    members: Sequence[Member]
    sums: Tensor
    vectors: Vectors
    b_dec: Tensor

    def backward(self, prices: Sequence[Prices]) -> None:
        """Prepare the gradients, one :class:`Prices` for each member."""
        ...

    def chunks(self, member: int) -> Iterator[Chunk]:
        """The gradients of a member's matrices. A chunk's rows may be changed as soon as it has been yielded."""
        ...


def residuals_(partial: Tensor, b_dec: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """From partial reconstructions to errors, and the gradients of the error term, which replace them.

    With ``P_j`` what segment ``j`` of ``k`` reconstructs, ``e_j = b_dec - y + P_1 + ... + P_j`` is the error of prefix
    ``j``, and the loss ``mean_j mean_t ||e_j||^2`` has the gradient ``(2 / (n k)) (e_j + ... + e_k)`` with respect to
    ``P_j``.

    Args:
        partial: ``[rows, k, d_out]``; overwritten.

    Returns:
        The gradients, in ``partial``'s memory, and the sum of ``||e_j||^2`` over the rows, ``[k]``.
    """
    k = partial.shape[1]
    partial[:, 0] += b_dec
    partial[:, 0] -= y
    for j in range(1, k):
        partial[:, j] += partial[:, j - 1]
    squares = torch.linalg.vector_norm(partial, dim=(0, 2)).square()
    partial *= 2.0 / (n * k)
    for j in range(k - 2, -1, -1):
        partial[:, j] += partial[:, j + 1]
    return partial, squares
