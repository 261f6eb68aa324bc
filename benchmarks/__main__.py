"""Run all benchmarks or those named, write results/*.json, and write the table into README.md."""

from __future__ import annotations

import sys
from importlib import import_module

from benchmarks.table import update_readme
from benchmarks.timing import save

NAMES = (
    "loading",
    "remote",
    "sparse",
    "splice",
    "generation",
    "buckets",
    "store",
    "training_step",
    "training_suite",
    "evals",
)

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        print(save(name, import_module(f"benchmarks.{name}").run()))
    update_readme()
