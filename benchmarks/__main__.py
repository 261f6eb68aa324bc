"""Run every benchmark, write results/*.json and put the table into README.md."""

from __future__ import annotations

from importlib import import_module

from benchmarks.table import update_readme
from benchmarks.timing import save

NAMES = ("registry", "load", "splice")

if __name__ == "__main__":
    for name in NAMES:
        print(save(name, import_module(f"benchmarks.{name}").run()))
    update_readme()
