"""Run benchmarks, each in a process of its own, and write their tables into README.md and docs/benchmarks.md.

Without names all of them run. What is done is noted, so a run that was stopped goes on with the rest; after the last
one the notes are removed, and the next run begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import update_pages
from benchmarks.timing import RESULTS
from gemma_scope_tl.files import write_atomically

NAMES = (
    "first_feature",
    "loading",
    "remote",
    "sparse",
    "splice",
    "generation",
    "buckets",
    "mixing",
    "store",
    "training_step",
    "training_suite",
    "evals",
    "gemma3",
    "gemma3_loading",
    "gemma3_1b",
    "layered_splice",
    "layered_training",
    "layered_graph",
)
"""All of them run on a processor. A GPU's are ``python -m benchmarks.gpu``; the searches and trainings for quality take
hours and are ``python -m benchmarks.pareto`` and ``python -m scripts.smollm2``."""

NOTES = Path(__file__).parents[1] / "build" / "bench.json"


def done(notes: Path = NOTES) -> list[str]:
    """The benchmarks of the present run that are finished."""
    return json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else []


def run_all(names: Sequence[str], notes: Path | None, flags: Sequence[str] = ()) -> None:
    """Run the benchmarks that ``notes`` do not list, one after the other; None runs all of ``names``."""
    finished = done(notes) if notes else []
    for name in [name for name in names if name not in finished]:
        print(f"{name} (last time {_seconds(name)}) ...", flush=True)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=True)
        print(f"{name}: {time.perf_counter() - started:.0f} s\n", flush=True)
        finished.append(name)
        if notes:
            notes.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(notes, json.dumps(finished) + "\n")
        if not flags:
            update_pages()
    if notes:
        notes.unlink(missing_ok=True)


def _seconds(name: str) -> str:
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("seconds") if path.exists() else None
    return "of unknown length" if found is None else f"{found:.0f} s"


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"benchmarks to run, of {', '.join(NAMES)}; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all run; nothing is written")
    parser.add_argument("--fresh", action="store_true", help="forget what a run that was stopped had finished")
    parser.add_argument("--list", action="store_true", help="list the benchmarks, how long each took, and what is done")
    parser.add_argument("--pages", action="store_true", help="only write the pages from the stored results")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    if options.list:
        for name in NAMES:
            print(f"{name:16} {_seconds(name):>18}{'  done' if name in done() else ''}")
        return
    if options.pages:
        update_pages()
        return
    if options.fresh:
        NOTES.unlink(missing_ok=True)
    if load := _load():
        print(load, file=sys.stderr)
    everything = not options.names and not options.quick
    run_all(options.names or NAMES, NOTES if everything else None, ["--quick"] if options.quick else [])


def _load() -> str | None:
    """A warning if others are using the processor."""
    share = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0
    return f"The machine is busy (load {share:.1f} a core): ratios hold, times do not." if share > 0.5 else None


if __name__ == "__main__":
    main()
