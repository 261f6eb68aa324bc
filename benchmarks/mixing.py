"""How well a shuffle buffer mixes: where the rows of one sequence come out, for both buffers of ``benchmarks.buckets``.

Rows carry the number of their sequence, forward passes bring sequences one after the other, and the buffers serve them
in batches. Two things are counted once the buffers are full: how far apart in the stream two rows of a sequence are
served (larger is better mixed), and how many other rows of its sequence a row meets in its batch (fewer is better,
because such rows are correlated).

This package serves a bucket whole before it fills the next one, so a sequence ends with its bucket. SAELens keeps half
of its rows for the next round, so some rows of a sequence stay for several rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.buckets import BATCH, PEER, PIECE, SERVERS
from benchmarks.timing import compared, main

CONTEXT = 1024  # rows of a sequence
CASES, QUICK_CASES = (16_384, 262_144), (16_384,)
LARGER = 2
"""The factor of a second bucket of this package, which still takes less memory than the peer's buffer with its copies
(:mod:`benchmarks.buckets` measures both)."""
ROUNDS = 12
"""The number of times that the buffer's size is served. Of the sequences that are served whole, the first and the last
quarter are left out: the peer's buffer is being filled, or only those that were quickly done are whole."""
SEEDS, QUICK_SEEDS = (0, 1, 2), (0, 1)


def _numbered() -> Iterator[Tensor]:
    """Pieces of :data:`PIECE` rows of one value, the number of the row's sequence."""
    per_piece = PIECE // CONTEXT
    number = 0
    while True:
        sequences = torch.arange(number, number + per_piece, dtype=torch.float32)
        yield sequences.repeat_interleave(CONTEXT).unsqueeze(1)
        number += per_piece


def served(who: str, rows: int, seed: int) -> np.ndarray:
    """The sequence numbers in the order in which a buffer of ``rows`` rows serves them, int64 ``[ROUNDS * rows]``."""
    torch.manual_seed(seed)  # the peer's permutations; this package's come from the bucket's number
    batches = SERVERS[who](rows, 1, _skipped(seed))
    return torch.cat([next(batches)[:, 0].clone() for _ in range(ROUNDS * rows // BATCH)]).long().numpy()


def _skipped(seed: int) -> Iterator[Tensor]:
    """The pieces from another start for each seed, so that buffers cut the stream elsewhere."""
    pieces = _numbered()
    for _ in range(seed):
        next(pieces)
    return pieces


def mixing(order: np.ndarray, batch: int = BATCH, context: int = CONTEXT) -> dict[str, float]:
    """``distance`` and ``together`` of a stream of sequence numbers: see the module.

    ``distance`` is the mean over sequences of the mean distance of two different rows, from the sorted positions
    ``p_0 < ... < p_(n-1)`` as ``2 sum_i (2 i - n + 1) p_i / (n (n - 1))``. Only sequences count whose ``context`` rows
    are all in the stream, and of these the middle half, by number.
    """
    by_sequence = np.argsort(order, kind="stable")
    numbers, counts = np.unique(order, return_counts=True)
    whole = numbers[counts == context]
    kept = whole[len(whole) // 4 : len(whole) - len(whole) // 4]
    starts = np.searchsorted(order[by_sequence], kept)
    at = by_sequence[starts[:, None] + np.arange(context)]  # positions, sorted in each sequence
    weights = 2 * np.arange(context) - context + 1
    distance = 2 * (at * weights).sum(1) / (context * (context - 1))
    batches = at // batch
    same = [np.unique(row, return_counts=True)[1] for row in batches]
    together = [(count * (count - 1)).sum() / context for count in same]
    return {"distance": float(distance.mean()), "together": float(np.mean(together))}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """For each size of the buffer two rows with equal buffers, and two with a larger bucket of this package."""
    seeds = QUICK_SEEDS if quick else SEEDS
    rows: list[dict[str, Any]] = []
    for size in QUICK_CASES if quick else CASES:
        theirs = [mixing(served("theirs", size, seed)) for seed in seeds]
        for factor in (1, LARGER):
            ours = [mixing(served("ours", factor * size, seed)) for seed in seeds]
            buffer = f"buffer of {size:,} rows" + (f", ours of {factor * size:,}" if factor > 1 else "")
            for name, what, more in (
                ("distance", "mean distance in the stream of two rows of one sequence", True),
                ("together", f"other rows of its sequence in a row's batch of {BATCH}", False),
            ):
                mine, its = ([one[name] for one in found] for found in (ours, theirs))
                row = {"id": f"{name}-{size}-{factor}", "what": f"{what}, {buffer}", "peer": PEER}
                rows.append({**row, **compared(mine, its, "rows", more_is_better=more), "context": CONTEXT})
    return rows


if __name__ == "__main__":
    main("mixing", run)
