"""The table of docs/attribution-checks.md: how well graphs predict interventions, for each kind of coder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.page_tables import table

DATA = Path(__file__).resolve().parent.parent / "docs" / "interventions.json"
HEAD = ("coders", "effects on latents", "r", "rank r", "on logit differences", "r", "rank r")


def tables() -> dict[str, str]:
    """The table by its marker."""
    results = json.loads(DATA.read_text(encoding="utf-8"))["results"]
    found = {(row["title"], row["target"]): _shown(row) for row in results}
    none = ("none", "", "")
    rows = [
        [title, *found.get((title, "latents"), none), *found.get((title, "logit differences"), none)]
        for title in dict.fromkeys(row["title"] for row in results)
    ]
    return {"interventions": table(HEAD, rows)}


def _shown(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['n']:,}", f"{row['pearson']:.2f}", f"{row['spearman']:.2f}"
