"""The README's benchmark table, made from results/*.json."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.timing import RESULTS
from gemma_scope_tl.files import write_atomically

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- benchmarks: start -->", "<!-- benchmarks: end -->"


def table() -> str:
    """Markdown, a row per measurement."""
    lines = ["| | ours | peer | peer / ours |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            ours, peer = _seconds(row["ours_s"]), f"{_seconds(row['peer_s'])} ({row['peer']})"
            lines.append(f"| {row['what']} | {ours} | {peer} | **{row['ratio']:.1f}** |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """``text`` with the part between the two markers replaced."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


def update_readme() -> None:
    """Rewrite the table in the README."""
    write_atomically(README, with_table(README.read_text(encoding="utf-8")))


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
