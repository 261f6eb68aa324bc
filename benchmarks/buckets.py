"""A shuffle buffer of activations: this package's bucket against SAELens's mixing buffer, with equal data and sizes.

The peer appends each forward pass's rows to a tensor, which is copied each time, and shuffles by copying all of it. So
the more forward passes fit into the buffer, the more it copies for each row that it serves, and the factor depends on
the buffer's size. How well both mix is measured by :mod:`benchmarks.mixing`.

Each run is a separate process, which serves rows and then reports its speed and by how much its peak memory exceeded
that at the start: the buffer, a piece of new rows, a batch, and copies. Run: ``python -m benchmarks.buckets``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import compared, main, spread

PIECE = 8192  # rows of a forward pass: 8 sequences of 1,024 tokens
BATCH = 4096
BUFFERS = 2  # number of times that the buffer's rows are served
RUNS = 5
CASES = ((16_384, 128), (65_536, 128), (262_144, 128), (16_384, 2304), (131_072, 2304))
"""Rows of the buffer and their width: the bundled model's, and Gemma 2 2B's."""
QUICK_CASES = ((16_384, 8),)
PEER = "SAELens mixing_buffer"


def ours(rows: int, width: int, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """Batches of this package's bucket, which is filled with ``rows`` rows of ``pieces``, shuffled and served whole."""
    from gemma_scope_tl.activations.buckets import Bucket
    from gemma_scope_tl.sites import Place

    place = Place("res", 0)
    bucket = Bucket(rows, {place: width})
    for number in range(10**9):
        for at in range(0, rows, PIECE):
            bucket.fill(at, {place: next(pieces)})
        bucket.shuffle(0, number)
        for index in range(rows // BATCH):
            yield bucket.take(index, BATCH)[place]


def theirs(rows: int, width: int, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """Batches of SAELens's buffer of the same size, with its default of keeping half for the next round."""
    from sae_lens.training.mixing_buffer import mixing_buffer

    yield from mixing_buffer(rows, BATCH, pieces)


SERVERS = {"ours": ours, "theirs": theirs}


def _loader(width: int) -> Iterator[Tensor]:
    piece = torch.randn(PIECE, width, generator=torch.Generator().manual_seed(0))
    while True:
        yield piece


def _peak() -> int:
    """The peak memory of this process in bytes (Linux)."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _measure(who: str, rows: int, width: int) -> dict[str, float]:
    """Serve the buffer's rows once, then a few times with a timer, after a tiny run that loads the code."""
    serve = SERVERS[who]
    next(serve(2 * PIECE, 8, _loader(8)))
    before, batches = _peak(), serve(rows, width, _loader(width))
    for _ in range(rows // BATCH):
        next(batches)
    started, count = time.perf_counter(), BUFFERS * rows // BATCH
    for _ in range(count):
        next(batches)
    return {"rows_per_s": count * BATCH / (time.perf_counter() - started), "mib": (_peak() - before) / 2**20}


def _child(who: str, rows: int, width: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.buckets", who, str(rows), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows per second and peak memory of this package and the peer in turn."""
    return [_row(rows, width, 2 if quick else RUNS) for rows, width in (QUICK_CASES if quick else CASES)]


def _row(rows: int, width: int, runs: int) -> dict[str, Any]:
    pairs = [(_child("ours", rows, width), _child("theirs", rows, width)) for _ in range(runs)]
    mine, its = ([pair[side]["rows_per_s"] for pair in pairs] for side in (0, 1))
    size = rows * width * 4 / 2**20
    return {
        "id": f"{rows}-x-{width}",
        "what": f"shuffle buffer, {rows:,} rows of {width} ({size:.0f} MiB), batches of {BATCH}",
        "peer": PEER,
        **compared(mine, its, "rows/s", more_is_better=True),
        **spread("ours_extra_mib", [pair[0]["mib"] for pair in pairs]),
        **spread("peer_extra_mib", [pair[1]["mib"] for pair in pairs]),
        "buffer_mib": size,
    }


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main("buckets", run)
