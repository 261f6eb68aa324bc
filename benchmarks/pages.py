"""The benchmark tables of the README and of docs/benchmarks.md, made from results/*.json.

The README has the rows by which a user decides, chosen by name in ``README_ROWS``. docs/benchmarks.md has all rows, in
the groups of ``GROUPS``, whose names are the page's markers.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.table import identity, table
from benchmarks.timing import RESULTS
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import write_atomically
from scripts.page_tables import with_tables

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
Row = dict[str, Any]

README_ROWS = (
    "first_feature/wall-clock",
    "loading/features-16k",
    "remote/one-latent-decoder-row-bias-threshold-of-a-remote-1m-wide-sae-vs-whole-download",
    "splice/forward-pass-through-78-saes-with-error-term-vs-saelens-hookedsaetransformer",
    "generation/saelens-bridge",
    "evals/evaluate-72-saes-on-32-x-256-tokens-vs-saelens-run-evals-sae-by-sae",
    "training_step/d2304-l0",
    "training_step/d2304-start",
    "training_suite/speed",
    "gpu/training-step-d-2304-16-384-latents-batch-4096-l0-63-vs-saelens-jumprelutrainingsae",
)
"""The README's rows in their order: the file of results, and the row's identity (:func:`benchmarks.table.identity`)."""

PENDING: tuple[str, ...] = ()
"""Rows of the README that wait for their first run on an idle machine. They are left out until there are results, and a
test asserts that nothing stays here which has some."""

NOT_MEASURED = "Not measured yet."
"""What stands in place of the table of a group that has no results."""

GROUPS = {
    "bench_loading": ("first_feature", "loading", "remote"),
    "bench_splicing": ("sparse", "splice", "generation"),
    "bench_evaluating": ("evals",),
    "bench_steps": ("training_step",),
    "bench_suite": ("training_suite",),
    "bench_buffer": ("buckets", "mixing"),
    "bench_store": ("store",),
    "bench_quality": ("pareto", "smollm2_pareto"),
    "bench_gemma3": ("gemma3", "gemma3_loading", "gemma3_1b"),
    "bench_layered": ("layered_splice", "layered_training", "layered_graph"),
    "bench_gpu": ("gpu",),
}
"""The tables of docs/benchmarks.md: the marker, and the files of results whose rows follow each other in its table."""


class Results:
    """What the files of a folder say: rows by file, and the machine of each file."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.rows: dict[str, list[Row]] = {}
        self.machines: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            lists = (
                [part for part in found.values() if isinstance(part, list)] if path.stem == "gpu" else [found["rows"]]
            )
            self.rows[path.stem] = [row for part in lists for row in part if "peer" in row]
            self.machines[path.stem] = found["machine"]

    def chosen(self, names: Iterable[str]) -> list[tuple[str, Row]]:
        """The rows of these names with their files, without those that are pending.

        Raises:
            GemmaScopeError: there is no such row, or there are several.
        """
        named = [(f"{file}/{identity(row)}", file, row) for file, rows in self.rows.items() for row in rows]
        found: list[tuple[str, Row]] = []
        for name in names:
            matches = [(file, row) for key, file, row in named if key == name]
            if not matches and name in PENDING:
                continue
            if len(matches) != 1:
                near = difflib.get_close_matches(name, [key for key, _, _ in named], cutoff=0.3)
                raise GemmaScopeError(f"{len(matches)} results are named {name!r}; near it: {', '.join(near)}.")
            found += matches
        return found

    def sentences(self, files: Iterable[str]) -> str:
        """The machines of these files, a line each, with the files that were measured on it."""
        by_machine: dict[str, list[str]] = {}
        for file in dict.fromkeys(files):
            by_machine.setdefault(_where(self.machines[file]), []).append(file)
        return "\n\n".join(f"Measured by `{'`, `'.join(names)}` on: {where}." for where, names in by_machine.items())


def _where(described: Mapping[str, Any]) -> str:
    """The machine in words; on a GPU it is the device that counts."""
    if "device" in described:
        return f"{described['device']}, PyTorch {described['torch']}; {described.get('date', 'date not recorded')}"
    return machine.sentence(dict(described))


def readme_table(results: Results) -> str:
    """The README's table, and the machines it was measured on."""
    chosen = results.chosen(README_ROWS)
    rows = [{**row, "what": f"{row['what']}, on a GPU"} if file == "gpu" else row for file, row in chosen]
    return f"{table(rows)}\n\n{results.sentences(file for file, _ in chosen)}"


def page_tables(results: Results) -> dict[str, str]:
    """The tables of docs/benchmarks.md by marker.

    Raises:
        GemmaScopeError: a file of results is in no group, or two rows of a file have one name.
    """
    missing = set(results.rows) - {file for files in GROUPS.values() for file in files}
    if missing:
        raise GemmaScopeError(f"No group of docs/benchmarks.md has the results {sorted(missing)}; add them to GROUPS.")
    for file, rows in results.rows.items():
        names = [identity(row) for row in rows]
        if twice := {name for name in names if names.count(name) > 1}:
            raise GemmaScopeError(f"{file}.json has several rows named {sorted(twice)}.")
    made: dict[str, str] = {}
    for marker, group in GROUPS.items():
        files = [file for file in group if file in results.rows]
        rows = [row for file in files for row in results.rows[file]]
        made[marker] = f"{table(rows)}\n\n{results.sentences(files)}" if files else NOT_MEASURED
    return made


def with_readme_table(text: str) -> str:
    """The README's ``text`` with its table as the results say."""
    return with_tables(text, {"benchmarks": readme_table(Results())})


def with_page_tables(text: str) -> str:
    """The ``text`` of docs/benchmarks.md with its tables as the results say."""
    return with_tables(text, page_tables(Results()))


def pages() -> dict[Path, str]:
    """Both pages as the results say."""
    makers = {README: with_readme_table, PAGE: with_page_tables}
    return {path: made(path.read_text(encoding="utf-8")) for path, made in makers.items()}


def update_pages() -> None:
    """Rewrite both pages."""
    for path, text in pages().items():
        write_atomically(path, text)
