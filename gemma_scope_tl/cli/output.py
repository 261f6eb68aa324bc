"""Printing: results to standard output, as text or JSON, and everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Generator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TextIO, cast

import typer
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

_RESULTS: list[TextIO] = []
progress = Console(stderr=True)  # spinners and bars


@contextlib.contextmanager
def results_apart() -> Generator[None]:
    """Within the context only :func:`say` writes to standard output; all other output goes to standard error."""
    if _RESULTS:
        yield
        return
    _RESULTS.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        _RESULTS[0].flush()
    finally:
        _RESULTS.clear()


def results() -> TextIO:
    """The stream of results."""
    return _RESULTS[0] if _RESULTS else sys.stdout


def say(text: str) -> None:
    """Print a result."""
    typer.echo(text, file=results())


def say_json(value: Any) -> None:
    """Print plain data as JSON, with null for NaN and infinities, and paths as strings."""
    say(json.dumps(_plain(value), indent=2, allow_nan=False))


def note(text: str) -> None:
    """Print a note to standard error."""
    typer.secho(text, fg="yellow", err=True)


def complain(text: str) -> None:
    """Print an error. A closed standard error is ignored."""
    with contextlib.suppress(OSError):
        typer.secho(text, fg="red", err=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, PathLike):
        return str(cast("PathLike[str]", value))
    if hasattr(value, "item"):  # a NumPy number
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


_FRAMED_ROWS = 100  # framing a longer table takes seconds
_LEAST = 16  # with fewer columns beside its name, a value is printed below the name
_BELOW = 4
_LOW, _HIGH = "_low", "_high"
_STYLES = {"✓": "green", "✗": "red"}
_BREAK = re.compile(r"(?<=/)|(?<=\s)")
_HEADER_BREAK = re.compile(r"(?<=[/_])|(?<=\s)")
Row = Mapping[str, Any]


def print_frame(frame: pd.DataFrame, title: str, as_json: bool, columns: Sequence[str] | None = None) -> None:
    """Print a DataFrame; see :func:`print_rows`.

    Args:
        frame: the table.
        title: printed below the table.
        as_json: print the table, with all columns, as JSON only.
        columns: the columns to print, with their intervals; by default all columns.
    """
    if as_json:
        say(frame.to_json(orient="records", indent=2))
        return
    wanted = frame.columns if columns is None else [
        name for column in columns for name in (column, column + _LOW, column + _HIGH) if name in frame.columns
    ]  # fmt: skip
    print_rows(frame[list(wanted)].to_dict("records"), title, False)  # pyright: ignore[reportArgumentType]


def print_rows(rows: Sequence[Row], title: str, as_json: bool) -> None:
    """Print rows that have the same keys: JSON, a table in a terminal, or aligned lines in a pipe.

    A number whose interval is in the columns ``x_low`` and ``x_high`` is shown as ``x ± e``, where ``e`` is the
    distance of the farther bound.
    """
    if as_json:
        say_json(rows)
        return
    shown = [with_intervals(row) for row in rows] if rows and _bounds(rows[0]) else rows
    cells = [[cell(value) for value in row.values()] for row in shown]
    names = list(shown[0]) if shown else []
    console = terminal()
    if not rows:
        say(title)
    elif not console.is_terminal:
        say("\n".join([*aligned([names, *cells]), title]))
    else:
        for part in _laid_out(names, cells, title, console.width):
            console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)


def print_facts(facts: Mapping[str, Any], as_json: bool = False) -> None:
    """Print names and values, one per line, with further lines of a value below the first.

    In a terminal, values are folded at its width, where possible between words or parts of names.
    """
    if as_json:
        say_json(facts)
        return
    indent, console = max(map(len, facts), default=0) + 2, terminal()
    beside = not console.is_terminal or console.width - indent >= _LEAST
    room = console.width - (indent if beside else _BELOW) if console.is_terminal else None
    for name, value in facts.items():
        lines = [line for part in _printable("-" if value is None else str(value)) for line in _hung(part, room)]
        label = typer.style(name.ljust(indent - 2), bold=True)
        first = [f"{label}  {lines.pop(0)}".rstrip() if beside else label.rstrip()]
        say("\n".join([*first, *(" " * (indent if beside else _BELOW) + line for line in lines)]))


def terminal() -> Console:
    """A console that prints to the stream of results."""
    return Console(file=results())


def with_intervals(row: Row) -> dict[str, Any]:
    """A row in which each number and its interval share one cell.

    >>> with_intervals({"kl": 0.4271, "kl_low": 0.4024, "kl_high": 0.4512})
    {'kl': '0.427 ± 0.025'}
    """
    bounds = _bounds(row)
    hidden = {name + end for name in bounds for end in (_LOW, _HIGH)}
    return {
        name: interval(value, *bounds[name]) if name in bounds else value
        for name, value in row.items()
        if name not in hidden
    }


def _bounds(row: Row) -> dict[str, tuple[Any, Any]]:
    """The two bounds of each number of a row that has an interval."""
    return {name: (row[name + _LOW], row[name + _HIGH]) for name in row if name + _LOW in row and name + _HIGH in row}


def interval(value: Any, low: Any, high: Any) -> Any:
    """``value ± distance of the farther bound``, with two digits of the distance."""
    numbers = [value, low, high]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        return value
    error = max(value - low, high - value)
    if error <= 1e-9 * abs(value):  # the difference is due to rounding
        return value
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}" if digits < 7 else f"{value:.3g} ± {error:.2g}"


def cell(value: Any) -> str:
    """A value as text on one line."""
    if value is True:
        return "✓"
    if value is False or value is None:
        return ""
    text = _rounded(value) if isinstance(value, float) else str(value)
    return "" if text in ("<NA>", "nan") else _escaped(text)


def _rounded(value: float) -> str:
    """A number with four significant digits, or all digits before the decimal point if there are more."""
    return f"{value:g}" if value.is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def _escaped(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _printable(text: str) -> list[str]:
    """The lines of a text, with control characters escaped."""
    return [_escaped(line) for line in text.split("\n")]


def _hung(text: str, room: int | None) -> list[str]:
    """A line in pieces of at most ``room`` columns; longer words are cut."""
    if room is None:
        return [text]
    return [piece for line in _folded(text, room).split("\n") for piece in chop_cells(line, room) or [""]]


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(map(_length, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(_padded, line, widths)).rstrip() for line in cells]


def _laid_out(names: list[str], cells: list[list[str]], title: str, width: int) -> list[Any]:
    """The table and the lines below it for a terminal of this width. Constant columns may become a line."""
    same: list[str] = []
    if _natural(names, cells) + _frame(len(names)) > width and len(cells) > 1:
        alike = [i for i in range(len(names)) if len({line[i] for line in cells}) == 1]
        alike = alike if len(alike) < len(names) else alike[1:]
        same = [f"{names[i]} {cells[0][i] or '-'}" for i in alike]
        names = [name for i, name in enumerate(names) if i not in alike]
        cells = [[text for i, text in enumerate(line) if i not in alike] for line in cells]
    last = [*([f"in every row: {', '.join(same)}"] if same else []), title]
    if len(cells) > _FRAMED_ROWS:
        return [*aligned([names, *cells]), *last]
    widths = _widths(names, cells, width - _frame(len(names)))
    if widths is None:
        longest = max(map(len, names))
        blocks = ["\n".join(f"{n.ljust(longest)}  {t}" for n, t in zip(names, line, strict=True)) for line in cells]
        return ["\n\n".join(blocks), "", *last]
    columns = [
        Column(_folded(name, size, _HEADER_BREAK), no_wrap=True, min_width=size, max_width=size)
        for name, size in zip(names, widths, strict=True)
    ]
    folded = [[_folded(text, size) for text, size in zip(line, widths, strict=True)] for line in cells]
    table = Table(*columns, show_lines=any("\n" in text for line in folded for text in line))
    for line in folded:
        table.add_row(*(Text(text, _STYLES.get(text, "")) for text in line))
    return [table, *last]


def _padded(text: str, width: int) -> str:
    return text.ljust(width) if text.isascii() else text + " " * (width - cell_len(text))


def _length(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def _frame(columns: int) -> int:
    return 3 * columns + 1


def _natural(names: list[str], cells: list[list[str]]) -> int:
    return sum(max(map(_length, column)) for column in zip(names, *cells, strict=True))


def _widths(names: list[str], cells: list[list[str]], room: int) -> list[int] | None:
    """Widths of the columns for which no part of a name is cut; None if there are none."""
    least: list[int] = []
    full: list[int] = []
    for name, *texts in zip(names, *cells, strict=True):
        parts = [*_HEADER_BREAK.split(name), *(part for text in texts for part in _BREAK.split(text))]
        least.append(max(cell_len(part.rstrip()) for part in parts))
        full.append(max(map(cell_len, [name, *texts])))
    spare = room - sum(least)
    if spare < 0:
        return None
    for i in sorted(range(len(names)), key=lambda i: full[i] - least[i]):
        given = min(spare, full[i] - least[i])
        least[i] += given
        spare -= given
    return least


def _folded(text: str, width: int, breaks: re.Pattern[str] = _BREAK) -> str:
    """The text in lines of at most ``width`` columns, broken between its parts."""
    lines = [""]
    for part in breaks.split(text):
        if lines[-1] and cell_len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
