"""Style, axes, legends and files shared by all figures, and two plots for scripts. No display is needed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Style:
    """The style of panels.

    Attributes:
        title, label, tick: text sizes in points; legends have the size of ticks.
        colors: number of colours in matplotlib's default cycle.
        markers: the markers of lines that share a colour.
    """

    title: float = 9
    label: float = 8
    tick: float = 7
    colors: int = 10
    markers: str = "osD^vP*X"

    def color(self, number: int) -> str:
        """The colour of a line by its number."""
        return f"C{number % self.colors}"

    def marker(self, number: int) -> str:
        """The marker of a line by its number."""
        return self.markers[number % len(self.markers)]

    def axes(self, ax: Axes, x: str, y: str) -> None:
        """Label both axes with the label of a metric or with the given text, and draw a grid."""
        ax.set_xlabel(LABELS.get(x, x), fontsize=self.label)
        ax.set_ylabel(LABELS.get(y, y), fontsize=self.label)
        ax.tick_params(labelsize=self.tick)
        ax.grid(visible=True, alpha=0.25, lw=0.6)

    def legend(self, figure: Figure, ax: Axes, most: int) -> None:
        """Draw one legend below all panels, unless there are more than ``most`` names, or only one.

        It has up to four columns, fewer where long names would not fit.
        """
        from matplotlib.textpath import TextPath

        handles, labels = ax.get_legend_handles_labels()
        if 1 < len(labels) <= most:
            longest = max(TextPath((0, 0), label, size=self.tick).get_extents().width for label in labels)
            column = longest + 5.0 * self.tick  # the line beside a name, and the space between columns
            columns = max(1, min(4, int(72 * figure.get_figwidth() / column)))
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=self.tick, frameon=False)


STYLE = Style()


def check_columns(frame: pd.DataFrame, columns: Sequence[str], *, finite: bool = False) -> None:
    """Raise :class:`GemmaScopeError` unless there are rows with these columns (finite numbers, if ``finite``)."""
    import numpy as np

    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise GemmaScopeError(f"The figure needs the columns {', '.join(missing)}; there are {list(frame.columns)}.")
    if not len(frame):
        raise GemmaScopeError(f"There is no row with {', '.join(columns)} to draw.")
    for column in columns if finite else ():
        if frame[column].dtype.kind in "fiu" and not np.isfinite(frame[column].to_numpy()).all():
            raise GemmaScopeError(f"{column!r} holds values that are not finite.")


def named_groups(table: pd.DataFrame, by: list[str], words: Mapping[str, str]) -> list[tuple[str, pd.DataFrame]]:
    """The name and the rows of each combination of values in ``by``, in order of appearance.

    Missing values (the layer of an embedding, the release of an unregistered SAE) form a group and are left out of
    its name. ``words`` holds formats for the values of columns, such as ``"layer {}"``, and for a column of bools what
    the name says where it is True.
    """
    if not by:
        return [("", table)]
    groups = table.groupby(by, sort=False, dropna=False)
    return [(group_name(rows.iloc[0], by, words), rows) for _, rows in groups]


def group_name(row: pd.Series[Any], by: list[str], words: Mapping[str, str]) -> str:
    """The name of a row's combination of values; see :func:`named_groups`."""
    import numpy as np

    named: list[str] = []
    for column in by:
        value = row[column]
        if isinstance(value, (bool, np.bool_)):
            named += [words.get(column, column)] if value else []
        elif value is not None and value == value:
            number = int(value) if isinstance(value, float) and value.is_integer() else value
            named.append(words.get(column, "{}").format(number))
    return ", ".join(named) or "–"


def scale(ax: Axes, which: Literal["x", "y"], frame: pd.DataFrame, metric: str) -> None:
    """Make an axis logarithmic for metrics drawn that way, if all values are positive (delta loss may be negative)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if metric not in _LOGARITHMIC or not (frame[metric] > 0).all():
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


def new_figure(rows: int, width: float = 9.0, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with a column of panels, each of this size in inches, and the panels."""
    figure, panels = grid(rows, 1, (width, height * rows))
    return figure, [line[0] for line in panels]


def latent_heatmap(ax: Axes, table: pd.DataFrame, tokens: list[str], title: str, latents: int = 10) -> None:
    """Draw which latents fire on which token.

    Args:
        ax: the axes to draw on.
        table: rows of :func:`~gemma_scope_tl.latents.table.features` of one SAE and one sequence.
        tokens: the sequence's tokens, for the horizontal axis; position 0 is the first.
        title: title of the plot.
        latents: number of latents to show, those of strongest activation.
    """
    import numpy as np

    strongest = table.groupby("latent")["activation"].max().nlargest(latents).index.tolist()
    values = np.zeros((len(strongest), len(tokens)))
    shown = table[table["latent"].isin(strongest)]
    rows = [strongest.index(latent) for latent in shown["latent"]]
    values[rows, shown["position"].to_numpy()] = shown["activation"].to_numpy()
    image = ax.imshow(values, aspect="auto", cmap="magma_r", interpolation="nearest")
    ax.set_xticks(range(len(tokens)), [visible_token(token) for token in tokens], rotation=60, ha="right", fontsize=8)
    ax.set_yticks(range(len(strongest)), [str(latent) for latent in strongest], fontsize=8)
    ax.set_ylabel("latent")
    ax.set_title(title, fontsize=10)
    ax.figure.colorbar(image, ax=ax, label="activation", pad=0.01)


def metric_by_layer(ax: Axes, table: pd.DataFrame, metric: str, label: str) -> None:
    """Draw a metric of :func:`~gemma_scope_tl.evals.suite.evaluate` by layer: a line per site, one panel.

    If a site has several SAEs in a layer, the denser one is drawn solid and the sparser one dashed.
    """
    for number, (site, rows) in enumerate(table.groupby("site", sort=False)):
        order = rows.sort_values("l0").groupby("layer")
        for style, pick in (("--", order.head(1)), ("-", order.tail(1))):
            picked = pick.sort_values("layer")
            mean = picked["l0"].mean()
            name, color = f"{site}, L0 {mean:.0f}", STYLE.color(number)
            ax.plot(picked["layer"], picked[metric], style, color=color, marker="o", ms=4, label=name)
    ax.set_xlabel("layer")
    ax.set_ylabel(label)
    ax.set_xticks(sorted(table["layer"].unique()))
    ax.legend(fontsize=7, ncols=2)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` as PNG, atomically. Missing folders are created."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return write_atomically(path, buffer.getvalue())


def visible_token(token: str) -> str:
    """A token as text for a figure, in which ``$`` would begin a formula and spaces would be invisible."""
    return token.replace("\n", "\\n").replace("$", r"\$").strip() or "·"
