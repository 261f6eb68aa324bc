"""Figures of training: how good SAEs are at their sparsity, and how a run went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "l0": "L0",
    "fvu": "FVU",
    "delta_loss": "delta loss, nats",
    "loss_recovered": "loss recovered",
    "error": "squared error",
    "lambda": "lambda",
    "threshold": "threshold",
    "silent": "share of silent latents",
    "lr": "learning rate",
}
LOGARITHMIC = ("delta_loss", "error", "l0", "lambda", "threshold", "lr")
"""Metrics that are drawn on a logarithmic axis where all their values are positive."""
CURVES = ("error", "l0", "lambda", "threshold")
SERIES = ("name", "site", "layer", "width", "d_sae", "target_l0", "seed")
"""Columns of a training log that say which SAE a row belongs to."""
_MARKERS = "osD^vP*X"
_COLORS = 10  # of the default cycle


def pareto(
    frame: pd.DataFrame, metrics: Sequence[str] = ("fvu", "delta_loss"), by: str = "recipe", title: str = ""
) -> Figure:
    """What SAEs lose at their sparsity: a panel per metric over L0, lower and further left is better.

    Args:
        frame: a row per SAE with the columns ``l0``, ``by`` and ``metrics``, as
            :func:`~gemma_scope_tl.evals.suite.evaluate` names them.
        metrics: columns to draw.
        by: the column whose values are compared: a line through the points of each, in the order of L0.
        title: above the panels.

    Raises:
        GemmaScopeError: a column is missing, there is no row, or a value is not finite.
    """
    _check(frame, ["l0", by, *metrics])
    figure, panels = _panels(len(metrics), columns=len(metrics))
    for ax, metric in zip(panels, metrics, strict=True):
        for number, (name, rows) in enumerate(frame.groupby(by, sort=False)):
            ordered = rows.sort_values("l0")
            mark, color = _MARKERS[number % len(_MARKERS)], f"C{number % _COLORS}"
            x, y = ordered["l0"].to_list(), ordered[metric].to_list()
            ax.plot(x, y, label=str(name), marker=mark, color=color, ms=5, lw=1.2)
        _axis(ax, "x", "l0", frame)
        _axis(ax, "y", metric, frame)
    panels[0].legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def training_curves(
    log: str | Path | pd.DataFrame,
    metrics: Sequence[str] = CURVES,
    by: str | Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """How a run went: a panel per metric over the steps, a line per SAE.

    Args:
        log: a training log with one JSON object a line, or its rows as a frame. Rows without a ``step`` and all of
            ``metrics`` (events) are passed over.
        metrics: columns to draw.
        by: the columns that tell SAEs apart; None takes those of ``name``, ``site``, ``layer``, ``target_l0`` ... that
            are there.
        title: above the panels.

    Raises:
        GemmaScopeError: the log cannot be read, or holds no row with these columns.
    """
    frame = _read_log(log) if isinstance(log, (str, Path)) else log
    _check(frame, ["step", *metrics], finite=False)
    frame = frame.dropna(subset=["step", *metrics])
    _check(frame, ["step", *metrics])
    keys = _series(frame, by)
    figure, panels = _panels(len(metrics), columns=min(2, len(metrics)))
    series = _split(frame, keys)
    for (name, rows), color in zip(series, _colors(len(series)), strict=True):
        ordered = rows.sort_values("step")
        for ax, metric in zip(panels, metrics, strict=True):
            ax.plot(ordered["step"].to_list(), ordered[metric].to_list(), color=color, lw=1.0, label=name)
    for ax, metric in zip(panels, metrics, strict=True):
        _axis(ax, "x", "step", frame)
        _axis(ax, "y", metric, frame)
    _legend(figure, panels[0])
    if title:
        figure.suptitle(title, fontsize=10)
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
            if number == len(lines):  # a killed run leaves its last line half written
                continue
            raise GemmaScopeError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise GemmaScopeError(f"{path}, line {number} is not a JSON object.")
        rows.append(row)
    return pd.DataFrame(rows)


def _check(frame: pd.DataFrame, columns: Sequence[str], *, finite: bool = True) -> None:
    import numpy as np

    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise GemmaScopeError(f"The figure needs the columns {', '.join(missing)}; there are {list(frame.columns)}.")
    if not len(frame):
        raise GemmaScopeError(f"There is no row with {', '.join(columns)} to draw.")
    for column in columns if finite else ():
        if frame[column].dtype.kind in "fiu" and not np.isfinite(frame[column].to_numpy()).all():
            raise GemmaScopeError(f"{column!r} holds values that are not finite.")


def _series(frame: pd.DataFrame, by: str | Sequence[str] | None) -> list[str]:
    if by is not None:
        keys = [by] if isinstance(by, str) else list(by)
        _check(frame, keys, finite=False)
        return keys
    if "name" in frame.columns:
        return ["name"]
    return [column for column in SERIES if column in frame.columns and frame[column].notna().all()]


def _split(frame: pd.DataFrame, keys: list[str]) -> list[tuple[str, pd.DataFrame]]:
    if not keys:
        return [("", frame)]
    return [(_name(keys, key), rows) for key, rows in frame.groupby(keys, sort=False, dropna=False)]


def _colors(count: int) -> list[Any]:
    """The default cycle while it lasts, else as many colours of one map as there are lines."""
    from matplotlib import colormaps

    if count <= _COLORS:
        return [f"C{number}" for number in range(count)]
    return [colormaps["turbo"](0.05 + 0.9 * number / (count - 1)) for number in range(count)]


def _name(keys: list[str], values: Any) -> str:
    parts = values if isinstance(values, tuple) else (values,)
    plain = {"name", "site"}
    shown = [int(v) if isinstance(v, float) and v.is_integer() else v for v in parts]
    return ", ".join(str(v) if k in plain else f"{LABELS.get(k, k)} {v}" for k, v in zip(keys, shown, strict=True))


def _panels(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _axis(ax: Axes, which: str, metric: str, frame: pd.DataFrame) -> None:
    """Label, scale and ticks of one axis; a logarithmic one shows plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = ax.xaxis if which == "x" else ax.yaxis
    if metric in LOGARITHMIC and bool((frame[metric] > 0).all()):
        (ax.set_xscale if which == "x" else ax.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(LABELS.get(metric, metric), fontsize=9)
    axis.set_tick_params(labelsize=8)
    ax.grid(visible=True, which="major", alpha=0.25, lw=0.6)


def _legend(figure: Figure, ax: Axes, most: int = 24) -> None:
    """One legend below all panels, where the names are few enough to be read."""
    handles, labels = ax.get_legend_handles_labels()
    if 1 < len(labels) <= most:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
