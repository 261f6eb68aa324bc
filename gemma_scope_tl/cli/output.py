"""What the commands print: tables for people, whole lines for pipes, JSON for scripts."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

_PIPED = 160  # columns where there is no terminal that has a width
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED)
progress = Console(stderr=True)  # standard output holds nothing but the answer
_FRAMED_ROWS = 100

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def print_frame(frame: pd.DataFrame, title: str, as_json: bool) -> None:
    """Print a DataFrame; see :func:`print_rows`."""
    if as_json:
        typer.echo(frame.to_json(orient="records", indent=2))
    else:
        print_rows(frame.to_dict("records"), title, as_json)  # pyright: ignore[reportArgumentType]


def print_rows(rows: list[dict[str, Any]], title: str, as_json: bool) -> None:
    """Print rows that have the same keys: JSON, a framed table in a terminal, or aligned lines."""
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    cells = [list(rows[0]) if rows else [], *([_cell(value) for value in row.values()] for row in rows)]
    if not console.is_terminal or len(rows) > _FRAMED_ROWS:  # whole lines for pipes; frames of long tables take seconds
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        typer.echo("\n".join([*lines, title]))
        return
    table = Table(*cells[0], title=title)
    for line in cells[1:]:
        table.add_row(*line)
    console.print(table)


def _cell(value: Any) -> str:
    if value is True:
        return "✓"
    if value is False or value is None or str(value) in ("<NA>", "nan"):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)
