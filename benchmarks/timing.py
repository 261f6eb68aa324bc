"""Paired timing of this package and a peer in turn, so that ratios are valid although the machine's speed drifts.

A row of results is a flat dictionary: ``what``, ``peer``, ``ratio`` (above 1 if this package is better), and one of

- ``ours_s`` and ``peer_s``, in seconds (:func:`paired`);
- ``ours_value`` and ``peer_value`` with their ``unit`` (:func:`compared`);
- ``ours`` and ``theirs``, as text, for what has no spread: a count of requests, for example.

A number that was measured several times is a median, with ``_min`` and ``_max`` beside it (:func:`spread`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.machine import PACKAGES, describe
from gemma_scope_tl.files import write_atomically

__all__ = ["PACKAGES", "RESULTS", "child_flags", "compared", "in_turn", "main", "paired", "ratios", "save", "spread"]

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


class Run(Protocol):
    """A benchmark's function: rows of results; ``quick`` makes every size tiny and the numbers meaningless."""

    def __call__(self, quick: bool = False) -> list[Row]: ...


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median under ``name``, and the range under ``<name>_min`` and ``<name>_max``."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def compared(ours: Sequence[float], theirs: Sequence[float], unit: str, *, more_is_better: bool = False) -> Row:
    """Medians and ranges of values that were measured in pairs, and of the pairs' ratios (above 1 if ours is better).

    Args:
        ours: this package's values.
        theirs: the peer's, each measured just after the value of the same position.
        unit: what the values are in: ``s``, ``MiB``, ``rows/s`` ...
        more_is_better: for speeds; without it less is better, as for times and memory.
    """
    pairs = list(zip(ours, theirs, strict=True))
    ratios = [a / b if more_is_better else b / a for a, b in pairs]
    values = spread("ours_value", ours) | spread("peer_value", theirs) | spread("ratio", ratios)
    return {"unit": unit, **values, "runs": len(pairs)}


def paired(ours: Callable[[], Any], peer: Callable[[], Any], runs: int = 7, warmup: int = 1) -> dict[str, float]:
    """Medians and ranges of the seconds of both, and of the paired ratios peer/ours (above 1 if ours is faster)."""
    return ratios(*in_turn((ours, peer), runs=runs, warmup=warmup))


def in_turn(functions: Sequence[Callable[[], Any]], *, runs: int = 7, warmup: int = 1) -> list[list[float]]:
    """Seconds of each function in each of ``runs`` rounds, which call all of them one after the other."""
    for _ in range(warmup):
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(runs):
        for function, found in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            found.append(time.perf_counter() - started)
    return times


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """A row's numbers from the seconds of both, measured in the same rounds."""
    found = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {**spread("ours_s", ours), **spread("peer_s", theirs), **spread("ratio", found), "runs": len(found)}


def save(name: str, rows: list[Row], seconds: float | None = None) -> Path:
    """Write the rows of a benchmark, with a description of the machine and the time that the whole run took."""
    found = {"machine": describe(), **({} if seconds is None else {"seconds": round(seconds, 1)}), "rows": rows}
    return write_atomically(RESULTS / f"{name}.json", json.dumps(found, indent=2) + "\n")


def child_flags(quick: bool) -> list[str]:
    """The flags that make a child process measure at the same sizes."""
    return ["--quick"] if quick else []


def main(name: str, run: Run, argv: Sequence[str] | None = None) -> None:
    """The command line of a benchmark: run it and save its rows, or with ``--quick`` print them at tiny sizes."""
    from benchmarks.table import table  # which reads what this module writes

    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; nothing is saved")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    rows = run(quick=options.quick)
    print(table(rows))
    if not options.quick:
        print(save(name, rows, time.perf_counter() - started))
