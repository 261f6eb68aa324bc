"""Figures of training: fidelity over sparsity, and curves of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.viz.figures import LABELS, Style, check_columns, grid, named_groups, scale

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = ("error", "l0", "lambda", "threshold")
SERIES = ("name", "site", "layer", "width", "d_sae", "target_l0", "seed")
"""Columns of a training log that identify the SAE of a row."""
_MOST_NAMES = 24
_STYLE = Style(title=10, label=9, tick=8)


def pareto(
    frame: pd.DataFrame, metrics: Sequence[str] = ("fvu", "delta_loss"), by: str = "recipe", title: str = ""
) -> Figure:
    """Metrics over L0: a panel per metric, lower and further left is better.

    Args:
        frame: a row per SAE with the columns ``l0``, ``by`` and ``metrics``, as
            :func:`~gemma_scope_tl.evals.suite.evaluate` names them.
        metrics: columns to draw.
        by: the column whose values are compared; the points of each value are connected in the order of L0.
        title: title above the panels.

    Raises:
        GemmaScopeError: a column is missing, there are no rows, or a value is not finite.
    """
    check_columns(frame, ["l0", by, *metrics], finite=True)
    figure, panels = _panels(len(metrics), columns=len(metrics))
    for ax, metric in zip(panels, metrics, strict=True):
        for number, (name, rows) in enumerate(frame.groupby(by, sort=False)):
            ordered = rows.sort_values("l0")
            x, y = ordered["l0"].to_list(), ordered[metric].to_list()
            marker, color = _STYLE.marker(number), _STYLE.color(number)
            ax.plot(x, y, label=str(name), marker=marker, color=color, ms=5, lw=1.2)
        _scaled(ax, "l0", metric, frame)
    panels[0].legend(fontsize=_STYLE.tick, frameon=False)
    if title:
        figure.suptitle(title, fontsize=_STYLE.title)
    return figure


def training_curves(
    log: str | Path | pd.DataFrame,
    metrics: Sequence[str] = CURVES,
    by: str | Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Curves of a run: a panel per metric over the steps, a line per SAE.

    Args:
        log: a training log with one JSON object per line, or its rows as a frame. Rows that lack ``step`` or one of
            ``metrics`` (events) are left out.
        metrics: columns to draw.
        by: the columns that distinguish SAEs; by default those of ``name``, ``site``, ``layer``, ``target_l0`` ... that
            exist.
        title: title above the panels.

    Raises:
        GemmaScopeError: when the log cannot be read, or holds no row with these columns.
    """
    frame = _read_log(log) if isinstance(log, (str, Path)) else log
    check_columns(frame, ["step", *metrics])
    frame = frame.dropna(subset=["step", *metrics])
    check_columns(frame, ["step", *metrics], finite=True)
    keys = _series(frame, by)
    figure, panels = _panels(len(metrics), columns=min(2, len(metrics)))
    words = {key: f"{LABELS.get(key, key)} {{}}" for key in keys if key not in ("name", "site")}
    series = named_groups(frame, keys, words)
    for (name, rows), color in zip(series, _colors(len(series)), strict=True):
        ordered = rows.sort_values("step")
        for ax, metric in zip(panels, metrics, strict=True):
            ax.plot(ordered["step"].to_list(), ordered[metric].to_list(), color=color, lw=1.0, label=name)
    for ax, metric in zip(panels, metrics, strict=True):
        _scaled(ax, "step", metric, frame)
    _STYLE.legend(figure, panels[0], _MOST_NAMES)
    if title:
        figure.suptitle(title, fontsize=_STYLE.title)
    return figure


def _read_log(path: str | Path) -> pd.DataFrame:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise GemmaScopeError(f"The training log {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # a killed run may leave an incomplete last line
                continue
            raise GemmaScopeError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise GemmaScopeError(f"{path}, line {number} is not a JSON object.")
        rows.append(row)
    return pd.DataFrame(rows)


def _series(frame: pd.DataFrame, by: str | Sequence[str] | None) -> list[str]:
    if by is not None:
        keys = [by] if isinstance(by, str) else list(by)
        check_columns(frame, keys)
        return keys
    if "name" in frame.columns:
        return ["name"]
    return [column for column in SERIES if column in frame.columns and frame[column].notna().all()]


def _colors(count: int) -> list[Any]:
    """Colours of the default cycle, or, for more lines than it has colours, of a colour map."""
    from matplotlib import colormaps

    if count <= _STYLE.colors:
        return [_STYLE.color(number) for number in range(count)]
    return [colormaps["turbo"](0.05 + 0.9 * number / (count - 1)) for number in range(count)]


def _panels(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    figure, lines = grid(rows, columns, (4.6 * columns, 3.3 * rows))
    axes = [ax for line in lines for ax in line]
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _scaled(ax: Axes, x: str, y: str, frame: pd.DataFrame) -> None:
    """Scale and label both axes."""
    scale(ax, "x", frame, x)
    scale(ax, "y", frame, y)
    _STYLE.axes(ax, x, y)
