"""Figures with matplotlib, drawn without a display and written atomically."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import write_atomically

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


def latent_heatmap(ax: Axes, table: pd.DataFrame, tokens: list[str], title: str, latents: int = 10) -> None:
    """Draw which latents fire on which token.

    Args:
        ax: where to draw.
        table: rows of :func:`~gemma_scope_tl.latents.table.features` of one SAE and one sequence.
        tokens: the sequence's tokens, for the horizontal axis; position 0 is the first.
        title: above the plot.
        latents: how many to show, by their strongest activation.
    """
    import numpy as np

    strongest = table.groupby("latent")["activation"].max().nlargest(latents).index.tolist()
    grid = np.zeros((len(strongest), len(tokens)))
    shown = table[table["latent"].isin(strongest)]
    rows = [strongest.index(latent) for latent in shown["latent"]]
    grid[rows, shown["position"].to_numpy()] = shown["activation"].to_numpy()
    image = ax.imshow(grid, aspect="auto", cmap="magma_r", interpolation="nearest")
    ax.set_xticks(range(len(tokens)), [visible_token(token) for token in tokens], rotation=60, ha="right", fontsize=8)
    ax.set_yticks(range(len(strongest)), [str(latent) for latent in strongest], fontsize=8)
    ax.set_ylabel("latent")
    ax.set_title(title, fontsize=10)
    ax.figure.colorbar(image, ax=ax, label="activation", pad=0.01)


def metric_by_layer(ax: Axes, table: pd.DataFrame, metric: str, label: str) -> None:
    """Draw a metric of :func:`~gemma_scope_tl.evals.suite.evaluate` by layer: a line per site, one panel.

    Where a site has several SAEs in a layer, the denser is drawn solid and the sparser dashed.
    """
    for color, (site, rows) in zip(("C0", "C1", "C2", "C3", "C4"), table.groupby("site", sort=False), strict=False):
        order = rows.sort_values("l0").groupby("layer")
        for style, pick in (("--", order.head(1)), ("-", order.tail(1))):
            picked = pick.sort_values("layer")
            mean = picked["l0"].mean()
            ax.plot(
                picked["layer"], picked[metric], style, color=color, marker="o", ms=4, label=f"{site}, L0 {mean:.0f}"
            )
    ax.set_xlabel("layer")
    ax.set_ylabel(label)
    ax.set_xticks(sorted(table["layer"].unique()))
    ax.legend(fontsize=7, ncols=2)


def new_figure(rows: int, width: float = 9.0, height: float = 3.2) -> tuple[Figure, Any]:
    """A figure of stacked panels that needs no display: ``(figure, list of axes)``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` as PNG; folders are made, and a killed process leaves no half file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return write_atomically(path, buffer.getvalue())


def visible_token(token: str) -> str:
    return token.replace("\n", "\\n").replace("$", r"\$").strip() or "·"
