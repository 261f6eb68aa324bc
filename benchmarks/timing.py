"""Paired timing of this package and a peer in turn, so that ratios are valid although the machine's speed drifts."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gemma_scope_tl.files import write_atomically

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens")


def paired(ours: Callable[[], Any], peer: Callable[[], Any], runs: int = 7, warmup: int = 1) -> dict[str, float]:
    """Median seconds of both, and the median of the paired ratios peer/ours (above 1 if this package is faster)."""
    for _ in range(warmup):
        ours()
        peer()
    mine: list[float] = []
    theirs: list[float] = []
    for _ in range(runs):
        for function, times in ((ours, mine), (peer, theirs)):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    return {
        "ours_s": statistics.median(mine),
        "peer_s": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "runs": runs,
    }


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write the rows of a benchmark, with a description of the machine."""
    machine = {
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    return write_atomically(RESULTS / f"{name}.json", json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
