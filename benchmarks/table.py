"""The README's benchmark tables, made from results/*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS
from gemma_scope_tl.files import write_atomically
from scripts.page_tables import with_tables

README = Path(__file__).parent.parent / "README.md"
GPU = RESULTS / "gpu.json"


def table() -> str:
    """The table in Markdown, with one row per measurement."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if path != GPU]
    return _table([row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]])


def gpu_table() -> str:
    """The table of measurements with a peer in gpu.json, and the name of the GPU."""
    found = json.loads(GPU.read_text(encoding="utf-8"))
    rows = [row for part in found.values() if isinstance(part, list) for row in part if "peer" in row]
    return f"{found['machine']['device']}, PyTorch {found['machine']['torch']}.\n\n{_table(rows)}"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | ours | peer | peer / ours |", "|---|---|---|---|"]
    for row in rows:
        ours = (row.get("ours") or _seconds(row["ours_s"])) + _memory(row, "ours")
        theirs = (row.get("theirs") or _seconds(row["peer_s"])) + _memory(row, "peer")
        lines.append(f"| {row['what']} | {ours} | {theirs} ({row['peer']}) | **{_ratio(row['ratio'])}** |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """``text`` with new tables between the pairs of markers."""
    return with_tables(text, {"benchmarks": table(), "gpu": gpu_table()})


def update_readme() -> None:
    """Rewrite the table in the README."""
    write_atomically(README, with_table(README.read_text(encoding="utf-8")))


def _memory(row: dict[str, Any], who: str) -> str:
    extra = row.get(f"{who}_extra_mib")
    return "" if extra is None else f", {extra:.0f} MiB more memory"


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.0f} ms" if value >= 0.01 else f"{value * 1e3:.1f} ms"
