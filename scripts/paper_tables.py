"""The tables of docs/paper.md that set two recipes side by side, from the results of the comparisons."""

from __future__ import annotations

import json
import re
from typing import Any

from scripts.page_numbers.sources import ROOT
from scripts.page_tables import table

RESULTS = {"pareto": "pareto.json", "smollm2": "smollm2_pareto.json"}
HEAD = ("L0", "FVU", "SAELens", "delta loss", "SAELens")


def tables() -> dict[str, str]:
    """The tables by their markers."""
    folder = ROOT / "benchmarks" / "results"
    return {name: _table(json.loads((folder / file).read_text("utf-8"))["rows"]) for name, file in RESULTS.items()}


def _table(rows: list[dict[str, Any]]) -> str:
    """A line for each L0.

    Raises:
        ValueError: a row of results does not say its metric and L0, or one of both metrics is missing.
    """
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        match = re.match(r"(FVU|delta loss) at L0 (\d+),", row["what"])
        if match is None:
            raise ValueError(f"{row['what']!r} is no FVU or delta loss at an L0")
        cells.setdefault(match[2], {})[match[1]] = [row["ours"], row["theirs"]]
    if any(len(found) != 2 for found in cells.values()):
        raise ValueError("FVU or delta loss is missing at an L0")
    lines = [[l0, *found["FVU"], *found["delta loss"]] for l0, found in cells.items()]
    return table(HEAD, lines)
