"""Rows of results as Markdown: medians with their ranges, in readable units."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

HEAD = ("", "ours", "peer", "peer / ours")
Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """The rows with a peer: what was measured, both results and their ratio (above 1 if ours is better)."""
    lines = [[row["what"], _cell(row, "ours"), f"{_cell(row, 'peer')} ({row['peer']})", _ratio(row)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [HEAD, ["---"] * len(HEAD), *lines])


def identity(row: Row) -> str:
    """The row's ``id``, or one made from its words: what was measured, and the peer."""
    words = row.get("id") or f"{row['what']} vs {row['peer']}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def _cell(row: Row, who: str) -> str:
    """A side's value with its range, products and memory as far as they were measured."""
    text = row.get("ours" if who == "ours" else "theirs")
    if text is None:
        name, unit = (f"{who}_s", "s") if f"{who}_s" in row else (f"{who}_value", row["unit"])
        text = ranged(row[name], row.get(f"{name}_min"), row.get(f"{name}_max"), unit)
    if f"{who}_products" in row:
        text += f" = {row[f'{who}_products']:.1f} products"
    extra = f"{who}_extra_mib"
    if extra in row:
        text += f", {ranged(row[extra], row.get(f'{extra}_min'), row.get(f'{extra}_max'), 'MiB')} more memory"
    return text


def _ratio(row: Row) -> str:
    low, high = row.get("ratio_min", row.get("ratio_low")), row.get("ratio_max", row.get("ratio_high"))
    decimals = next((n for n, least in enumerate((20, 2, 0.1, 0.01)) if row["ratio"] >= least), 4)
    return f"**{row['ratio']:,.{decimals}f}**" + _range(row["ratio"], low, high, 1.0, decimals)


def ranged(value: float, low: float | None, high: float | None, unit: str) -> str:
    """``value`` with its unit, and the range behind it if there is one: ``3.00 s (2.95–3.10)``."""
    factor, decimals, label = scale(value, unit)
    return f"{value * factor:,.{decimals}f}{label}" + _range(value, low, high, factor, decimals)


def _range(value: float, low: float | None, high: float | None, factor: float, decimals: int) -> str:
    """The range in parentheses, unless it is not known or all is one number as it is shown."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    shown = [f"{number * factor:,.{decimals}f}" for number in (low, value, high)]
    return "" if len(set(shown)) == 1 else f" ({shown[0]}–{shown[2]})"


def scale(value: float, unit: str) -> tuple[float, int, str]:
    """The factor, decimals and unit with which ``value`` and its range are shown."""
    if unit == "s":
        return (1.0, 2, " s") if value >= 1 else (1e3, 0 if value >= 0.01 else 1, " ms")
    if unit == "bytes/s":
        return 1e-9, 2, " GB/s"
    if unit == "rows/s" and value >= 1e4:
        return 1e-6, 2 if value >= 1e5 else 3, " M rows/s"
    if not unit:
        return 1.0, 4, ""  # a loss or a share
    label = f" {unit}"
    return 1.0, 0 if value >= 100 else 1 if value >= 10 else 2, label
