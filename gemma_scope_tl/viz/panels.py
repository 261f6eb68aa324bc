"""What figures with panels of metrics share: names, marks, colours, axes and the legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

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
    "squared_error": "squared error",
    "uniformity": "uniformity r_L0",
    "kl": "KL, nats",
    "lambda": "lambda",
    "threshold": "threshold",
    "silent": "share of silent latents",
    "dense_share": "share of L0 of latents firing on > 10 %",
    "lr": "learning rate",
}
_LOGARITHMIC = ("delta_loss", "error", "l0", "lambda", "threshold", "lr")
MARKERS = "osD^vP*X"
COLORS = 10  # of the default cycle


def check_columns(frame: pd.DataFrame, columns: Sequence[str], *, finite: bool = False) -> None:
    """Raise :class:`GemmaScopeError` unless there are rows with these columns, of finite numbers if so asked."""
    import numpy as np

    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise GemmaScopeError(f"The figure needs the columns {', '.join(missing)}; there are {list(frame.columns)}.")
    if not len(frame):
        raise GemmaScopeError(f"There is no row with {', '.join(columns)} to draw.")
    for column in columns if finite else ():
        if frame[column].dtype.kind in "fiu" and not np.isfinite(frame[column].to_numpy()).all():
            raise GemmaScopeError(f"{column!r} holds values that are not finite.")


def is_logarithmic(frame: pd.DataFrame, metric: str) -> bool:
    """Whether the metric is drawn on a logarithmic axis and is positive: a splice may lower the loss."""
    return metric in _LOGARITHMIC and bool((frame[metric] > 0).all())


def scale(ax: Axes, which: Literal["x", "y"], frame: pd.DataFrame, metric: str) -> None:
    """Make an axis logarithmic where the metric asks for it, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not is_logarithmic(frame, metric):
        return
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[list[Axes]]]:
    """A figure of this size, in inches, and its panels, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [list(line) for line in figure.subplots(rows, columns, squeeze=False)]


def legend(figure: Figure, ax: Axes, most: int) -> None:
    """One legend below all panels, where the names are few enough to be read."""
    handles, labels = ax.get_legend_handles_labels()
    if 1 < len(labels) <= most:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
