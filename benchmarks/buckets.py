"""A shuffle buffer of activations: this package's bucket against SAELens's mixing buffer, with equal data and sizes.

Each run is a separate process, which serves rows and then reports its speed and by how much its peak memory exceeded
that at the start: the buffer, a piece of new rows, a batch, and copies. Run: ``python -m benchmarks.buckets``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import save

PIECE = 8192  # rows of a forward pass: 8 sequences of 1,024 tokens
BATCH = 4096
BUFFERS = 2  # number of times that the buffer's rows are served
RUNS = 3
CASES = ((262144, 128), (131072, 2304))  # rows of the buffer, width: the bundled model's, Gemma 2 2B's


def _loader(width: int) -> Iterator[Tensor]:
    piece = torch.randn(PIECE, width, generator=torch.Generator().manual_seed(0))
    while True:
        yield piece


def _ours(rows: int, width: int) -> Iterator[Tensor]:
    from gemma_scope_tl.activations.buckets import Bucket
    from gemma_scope_tl.sites import Place

    place, loader = Place("res", 0), _loader(width)
    bucket = Bucket(rows, {place: width})
    for number in range(10**9):
        for at in range(0, rows, PIECE):
            bucket.fill(at, {place: next(loader)})
        bucket.shuffle(0, number)
        for index in range(rows // BATCH):
            yield bucket.take(index, BATCH)[place]


def _theirs(rows: int, width: int) -> Iterator[Tensor]:
    from sae_lens.training.mixing_buffer import mixing_buffer

    yield from mixing_buffer(rows, BATCH, _loader(width))


def _peak() -> int:
    """The peak memory of this process in bytes (Linux)."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _measure(who: str, rows: int, width: int) -> dict[str, float]:
    """Serve the buffer's rows once, then a few times with a timer, after a tiny run that loads the code."""
    serve = {"ours": _ours, "theirs": _theirs}[who]
    next(serve(2 * PIECE, 8))
    before, batches = _peak(), serve(rows, width)
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


def run() -> list[dict[str, Any]]:
    """Rows per second and peak memory of this package and the peer in turn."""
    out: list[dict[str, Any]] = []
    for rows, width in CASES:
        pairs = [(_child("ours", rows, width), _child("theirs", rows, width)) for _ in range(RUNS)]
        speeds = [statistics.median(pair[i]["rows_per_s"] for pair in pairs) for i in (0, 1)]
        memory = [statistics.median(pair[i]["mib"] for pair in pairs) for i in (0, 1)]
        ratios = [ours["rows_per_s"] / theirs["rows_per_s"] for ours, theirs in pairs]
        size = rows * width * 4 / 2**20
        out.append(
            {
                "what": f"shuffle buffer, {rows} rows of {width} ({size:.0f} MiB), batches of {BATCH}",
                "peer": "SAELens mixing_buffer",
                "ours": f"{speeds[0] / 1e6:.2f} M rows/s",
                "theirs": f"{speeds[1] / 1e6:.3f} M rows/s",
                "ours_extra_mib": memory[0],
                "peer_extra_mib": memory[1],
                "buffer_mib": size,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "runs": RUNS,
            }
        )
    return out


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        print(save("buckets", run()))
