"""Figures with matplotlib, drawn without a display and written atomically."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def latent_heatmap(ax: Axes, table: pd.DataFrame, tokens: list[str], title: str, latents: int = 10) -> None:
    """Draw which latents fire on which token.

    Args:
        ax: where to draw.
        table: rows of :func:`~gemma_scope_tl.feature_table.features` of one SAE and one sequence.
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
