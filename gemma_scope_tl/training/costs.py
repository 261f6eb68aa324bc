"""What training takes, by formula: bytes of memory and disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

FLOAT32 = 4
CHECKPOINTS = 3  # two are kept while a third is written
SAE_LENS_BUFFERS = 3.0
"""SAELens's mixing buffer holds the old rows, their concatenation and its permuted copy; measured at 3.0 times."""
SAE_LENS_NORM_BATCHES = 1_000
"""Batches of every hook that SAELens's multi-SAE runner holds to estimate norms."""


def parameters(d_in: int, d_out: int, d_sae: int) -> int:
    """Trained numbers of one SAE."""
    return d_sae * (d_in + d_out + 2) + d_out


def state_bytes(d_in: int, d_out: int, widths: Sequence[int]) -> int:
    """Weights and Adam's second moments of SAEs stepped together; also about what a checkpoint of them takes.

    Counters (when a latent last moved, how often it fired) are some bytes a latent and left out.
    """
    return 2 * FLOAT32 * sum(parameters(d_in, d_out, d_sae) for d_sae in widths)


def step_bytes(d_in: int, d_out: int, widths: Sequence[int], batch: int) -> int:
    """What a step takes on top: gradients, a batch and its reconstructions, and the pre-activations of all latents."""
    gradients = sum(parameters(d_in, d_out, d_sae) for d_sae in widths)
    return FLOAT32 * (gradients + batch * (2 * d_in + 2 * d_out * len(widths) + sum(widths)))


def released_bytes(d_in: int, d_out: int, d_sae: int) -> int:
    """One ``params.npz``, its headers apart."""
    return FLOAT32 * parameters(d_in, d_out, d_sae)


def bucket_bytes(widths: Iterable[int], rows: int, item_size: int) -> int:
    """The streamed source's buffers, one for each place; there is no second copy."""
    return rows * sum(widths) * item_size


def largest_bucket(widths: Iterable[int], item_size: int, batch: int, budget: float) -> int:
    """The most rows, whole batches, whose buffers fit ``budget`` bytes; 0 if one batch does not.

    All 78 sites of Gemma 2 2B in bfloat16 and 16 GiB:

    >>> largest_bucket([2304, 2304, 2048] * 26, 2, 4096, 16 * 2**30)
    49152
    """
    row = sum(widths) * item_size
    return max(0, int(budget // (row * batch))) * batch


def sae_lens_bytes(widths: Iterable[int], rows: int, batch: int, item_size: int) -> int:
    """Peak of SAELens's multi-SAE runner for the same: its mixing buffers, or the batches of its norm estimate.

    The residual stream of Gemma 2 2B in bfloat16, 4,096 a batch: 491 GB.

    >>> sae_lens_bytes([2304] * 26, 10**6, 4096, 2) / 1e9
    490.733568
    """
    row = sum(widths) * item_size
    return int(row * max(SAE_LENS_BUFFERS * rows, SAE_LENS_NORM_BATCHES * batch))


def store_bytes(width: int, rows: int, item_size: int) -> int:
    """A place's activations on disk, shard headers apart."""
    return width * rows * item_size
