"""How the SAEs of one place lie in one stack of latents, and what a step is told about each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
class Seen:
    """What the forward half found for one SAE, over all processes.

    Attributes:
        error: mean over the batch of ``||y - y_hat||^2``; with Matryoshka prefixes of the whole SAE.
        loss: what must be finite: the mean over the prefixes of the error.
        l0: mean number of active latents.
        entries: the share of pre-activations that lie above the kernel's lower end, which decides how the next step
            computes.
    """

    error: float
    loss: float
    l0: float
    entries: float


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
    squares = partial.square().sum((0, 2)) if k > 1 else _square_sum(partial).view(1)
    partial *= 2.0 / (n * k)
    for j in range(k - 2, -1, -1):
        partial[:, j] += partial[:, j + 1]
    return partial, squares


def _square_sum(values: Tensor) -> Tensor:
    """``sum v^2`` without a temporary as large as ``values``."""
    flat = values.flatten(1)
    return flat.new_tensor(0.0) + sum((flat[i : i + 256].square().sum() for i in range(0, flat.shape[0], 256)))


__all__ = ["Batch", "Member", "Prices", "Seen", "members_of", "residuals_"]
