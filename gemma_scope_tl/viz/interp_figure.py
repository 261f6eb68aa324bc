"""A figure of how good explanations of latents are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.viz.panels import check_columns, grid

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SCORES = {"detection": ("balanced accuracy of detection", 0.5), "simulation": ("correlation of simulation", 0.0)}


def scores_figure(table: pd.DataFrame) -> Figure:
    """Scores of explanations: a panel per method, a box and its points per SAE, a dashed line at chance.

    Args:
        table: of :func:`~gemma_scope_tl.interp.detection_scores`, of :func:`~gemma_scope_tl.interp.simulation_scores`,
            or of both.

    Raises:
        GemmaScopeError: a column is missing, or there is no score to draw.
    """
    check_columns(table, ["site", "layer", "id", "latent"])
    methods = [name for name in _SCORES if name in table.columns and table[name].notna().any()]
    if not methods:
        raise GemmaScopeError(f"There is no score to draw: none of {', '.join(_SCORES)} has a value.")
    groups = [(str(name[0]), rows) for name, rows in table.groupby(["id"], sort=False, dropna=False)]
    figure, panels = grid(1, len(methods), (max(5.0, 1.2 * len(groups) * len(methods) + 2), 3.6))
    for ax, method in zip(panels[0], methods, strict=True):
        label, chance = _SCORES[method]
        for at, (_, rows) in enumerate(groups):
            values = rows[method].dropna().to_list()
            if values:
                ax.boxplot([values], positions=[at], widths=0.5, showfliers=False)
                spread = [at + 0.3 * ((7 * number) % 11 / 11 - 0.5) for number in range(len(values))]
                ax.plot(spread, values, "o", ms=3, alpha=0.6, color=f"C{at % 10}")
        ax.axhline(chance, color="0.5", ls="--", lw=0.8)
        ax.set_xticks(range(len(groups)), [name for name, _ in groups], rotation=25, ha="right", fontsize=7)
        ax.set_ylabel(label, fontsize=8)
    return figure
