"""The measured metrics of a demo's SAEs, by site and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_scope_tl.errors import unknown_name
from gemma_scope_tl.registry.listing import list_saes
from gemma_scope_tl.sites import SITES

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.demo.world import World

GRID_METRICS = {"fvu": "FVU", "delta_loss": "delta loss, nats", "loss_recovered": "loss recovered", "kl": "KL, nats"}


def measured(world: World) -> pd.DataFrame:
    """The registry's table of the demo's SAEs with the metrics that come with the package, missing where none do."""
    releases = list(dict.fromkeys(row.release for row in world.rows.values()))
    table = list_saes(release=releases, with_metrics=True)
    shown = [f"{release}/{id_}" in world.rows for release, id_ in zip(table["release"], table["id"], strict=True)]
    return table[shown].reset_index(drop=True)


def widths(table: pd.DataFrame) -> list[str]:
    """Widths of the SAEs, narrowest first."""
    return table.sort_values("d_sae")["width"].drop_duplicates().tolist()


def suite_grid(table: pd.DataFrame, metric: str, width: str) -> pd.DataFrame:
    """A metric of the canonical SAEs of a width.

    Args:
        table: of :func:`measured`.
        metric: a key of :data:`GRID_METRICS`.
        width: such as ``"16k"``.

    Returns:
        A row per site and a column per layer; the embedding's column is ``"-"``. Missing where nothing was measured.

    Raises:
        UnknownNameError: for another metric or width.
    """
    if metric not in GRID_METRICS:
        raise unknown_name("metric", metric, GRID_METRICS)
    if width not in widths(table):
        raise unknown_name("width", width, widths(table))
    rows = table[(table["width"] == width) & table["canonical"]]
    named = rows.assign(column=rows["layer"].astype("string").fillna("-"))
    grid = named.pivot_table(index="site", columns="column", values=metric, dropna=False, sort=False)
    order = sorted(grid.columns, key=lambda name: -1 if name == "-" else int(name))
    return grid.loc[[site for site in SITES if site in grid.index], order]
