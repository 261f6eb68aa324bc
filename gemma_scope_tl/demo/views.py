"""The presentation of the demo's results: highlighted tokens, sentences, and the heat map of a suite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from gemma_scope_tl.errors import unknown_name
from gemma_scope_tl.registry.listing import list_saes
from gemma_scope_tl.sites import SITES
from gemma_scope_tl.viz.latent_page import token_text

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.demo.logic import Reading, SpliceEffect
    from gemma_scope_tl.demo.world import World
    from gemma_scope_tl.registry.schema import SAERow

MIDDLE = "medium"
GRID_METRICS = {"fvu": "FVU", "delta_loss": "delta loss, nats", "loss_recovered": "loss recovered", "kl": "KL, nats"}


def measured(world: World) -> pd.DataFrame:
    """The registry's table of the demo's SAEs, with the metrics that come with the package and gaps for others."""
    releases = list(dict.fromkeys(row.release for row in world.rows.values()))
    table = list_saes(release=releases, with_metrics=True)
    shown = [f"{release}/{id_}" in world.rows for release, id_ in zip(table["release"], table["id"], strict=True)]
    return table[shown].reset_index(drop=True)


def widths(table: pd.DataFrame) -> list[str]:
    """Widths of the SAEs, narrowest first."""
    return table.sort_values("d_sae")["width"].drop_duplicates().tolist()


def suite_grid(table: pd.DataFrame, metric: str, width: str) -> pd.DataFrame:
    """A metric of the canonical SAEs of a width; if none is canonical, of those of one label and without skip.

    The label is the one that most sites have, medium if several have as many: one label makes sites comparable.

    Args:
        table: the table of :func:`measured`.
        metric: a key of :data:`GRID_METRICS`.
        width: label of the width, such as ``"16k"``.

    Returns:
        A row per site and a column per layer; the embedding's column is ``"-"``. Values that were not measured are
        missing.

    Raises:
        UnknownNameError: the metric or the width is unknown.
    """
    if metric not in GRID_METRICS:
        raise unknown_name("metric", metric, GRID_METRICS)
    if width not in widths(table):
        raise unknown_name("width", width, widths(table))
    rows = table[table["width"] == width]
    if rows["canonical"].any():
        rows = rows[rows["canonical"]]
    else:
        rows = rows[~rows["affine"].astype("boolean").fillna(False) & rows["seed"].isna()]
        sites = rows.groupby("label")["site"].nunique()
        rows = rows[
            rows["label"] == max(sites.index, key=lambda label: (sites[label], label == MIDDLE), default=MIDDLE)
        ]
    named = rows.assign(column=rows["layer"].astype("string").fillna("-"))
    grid = named.pivot_table(index="site", columns="column", values=metric, dropna=False, sort=False)
    order = sorted(grid.columns, key=lambda name: -1 if name == "-" else int(name))
    return grid.loc[[site for site in SITES if site in grid.index], order]


# !important is needed because Gradio has its own rules for tables and colours inside HTML.
HEAT_STYLE = """
.gs-heat { background: #fff; padding: 1rem; border-radius: 8px; overflow-x: auto; }
.gs-heat table { border-collapse: separate !important; border-spacing: 3px; margin: 0; }
.gs-heat table, .gs-heat thead, .gs-heat tbody, .gs-heat tr { border: 0 !important; background: none; }
.gs-heat, .gs-heat * { color: #1c1917 !important; }
.gs-heat p { margin: 0 0 .5rem; }
.gs-heat th { font-weight: 600; padding: .3rem .6rem; border: 0 !important; text-align: center; }
.gs-heat td { padding: .5rem .8rem; text-align: center; border: 0 !important; border-radius: 4px; min-width: 4.2rem;
  font-variant-numeric: tabular-nums; }
"""


def sae_label(row: SAERow) -> str:
    """The label of an SAE in a list of one site and layer."""
    l0 = "" if row.l0 is None else f", L0 {row.l0:g}"
    said = [row.label, "with skip" if row.affine else None, None if row.seed is None else f"seed {row.seed}"]
    said += [f"series {row.series}" if row.series else None, "canonical" if row.canonical else None]
    return f"{row.width} latents{l0}{''.join(f', {word}' for word in said if word)}"


def place_label(row: SAERow) -> str:
    """The label of an SAE in a list of all SAEs."""
    return f"{row.site}{'' if row.layer is None else f' {row.layer}'}: {sae_label(row)}"


def layer_label(layer: int | None) -> str:
    """The label of a layer in a list."""
    return "none" if layer is None else str(layer)


def highlighted(tokens: Sequence[str], values: Sequence[float], maximum: float) -> list[tuple[str, float | None]]:
    """Tokens with their values divided by ``maximum``, from -1 to 1; None where the value is 0."""
    pairs = zip(tokens, values, strict=True)
    scale = maximum if maximum > 0 else 1.0
    return [(token_text(token), value / scale if value else None) for token, value in pairs]


def reading_view(reading: Reading, latent: int) -> list[tuple[str, float | None]]:
    """A text's tokens with the activation of one latent, scaled so that the strongest is 1."""
    values = reading.activations(latent)
    return highlighted(reading.tokens, values, max(values, default=0.0))


def reading_words(reading: Reading, latent: int, position: int) -> str:
    """A sentence that explains the colours."""
    values = reading.activations(latent)
    active = sum(value > 0 for value in values)
    if not active:
        return f"Latent {latent} is silent on this text."
    here = f"{values[position]:.2f}" if values[position] else "silent"
    return (
        f"Latent {latent} is active on {active} of {len(values)} tokens, at most with {max(values):.2f}; "
        f"on token {position} ({reading.tokens[position]!r}): {here}."
    )


def splice_view(effect: SpliceEffect) -> list[tuple[str, float | None]]:
    """A text's tokens with the change of their loss, above 0 where the SAEs make them less likely."""
    changes = effect.table["change"].tolist()
    return highlighted(effect.tokens, [0.0, *changes], max((abs(change) for change in changes), default=0.0))


def splice_words(effect: SpliceEffect) -> str:
    """A sentence with the mean losses."""
    return (
        f"Loss of the model {effect.clean:.3f} nats, with the SAEs {effect.spliced:.3f}: "
        f"delta loss {effect.change:+.3f} nats over {len(effect.table)} tokens."
    )


def splice_table(effect: SpliceEffect) -> pd.DataFrame:
    """The table with three decimals and visible tokens."""
    shown = effect.table.assign(token=[token_text(token) for token in effect.table["token"]])
    return shown.round({"clean": 3, "spliced": 3, "change": 3})


def heat_map(grid: pd.DataFrame, label: str, lower_is_better: bool = True) -> str:
    """An HTML table of sites by layers, in which worse values have darker cells.

    Args:
        grid: the table of :func:`suite_grid`.
        label: label of the metric.
        lower_is_better: False for a metric whose higher values are better.
    """
    values = [float(value) for value in grid.to_numpy().ravel() if value == value]
    if not values:
        return (
            f'<style>{HEAT_STYLE}</style><div class="gs-heat">No measurement of these SAEs comes with the package: '
            "<code>gemma-scope eval</code> makes one.</div>"
        )
    low, high = min(values), max(values)
    heads = "".join(f"<th scope='col'>{escape(str(column))}</th>" for column in grid.columns)
    lines: list[str] = []
    for site, row in zip(grid.index, grid.to_numpy().tolist(), strict=True):
        cells = "".join(_cell(float(value), low, high, lower_is_better) for value in row)
        lines.append(f"<tr><th scope='row'>{escape(str(site))}</th>{cells}</tr>")
    return (
        f'<style>{HEAT_STYLE}</style><div class="gs-heat">'
        f"<p>{escape(label)}, by site and layer; the darker the worse</p>"
        f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        "</div>"
    )


def _cell(value: float, low: float, high: float, lower_is_better: bool) -> str:
    if math.isnan(value):
        return "<td>–</td>"
    share = (value - low) / (high - low) if high > low else 0.5
    worse = share if lower_is_better else 1 - share
    return f'<td style="background:rgba(234,88,12,{0.08 + 0.62 * worse:.2f})">{value:.3f}</td>'
