"""Figures of the paper's studies and of explanations. Each function draws the table of a study.

Every function raises ``GemmaScopeError`` if a column is missing or there are no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.viz.figures import LABELS, STYLE, check_columns, grid, group_name, named_groups, scale

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("-", "--", ":", "-.")
_MOST_NAMES = 16
_WORDS = {"layer": "layer {}", "d_sae": "{} latents", "skip": "with skip"}
_SCORES = {"detection": ("balanced accuracy of detection", 0.5), "simulation": ("correlation of simulation", 0.0)}


def fidelity_figure(table: pd.DataFrame, metrics: Sequence[str] = ("delta_loss", "fvu")) -> Figure:
    """Metrics over L0 (section 4.1): a row of panels per metric, a column per site, a line per layer and width.

    Transcoders with a skip connection (column ``skip``) have lines of their own.

    Args:
        table: the table of :func:`~gemma_scope_tl.studies.sparsity_fidelity`.
        metrics: columns to draw; lower and further left is better.

    Raises:
        GemmaScopeError: a column is missing, or there are no rows.
    """
    return _over_l0(table, metrics, _series(table))


def transfer_figure(table: pd.DataFrame, metrics: Sequence[str] = ("delta_loss", "fvu")) -> Figure:
    """Base SAEs on the tuned model (section 4.5): like :func:`fidelity_figure`, with a line per model and kind of SAE.

    Args:
        table: the table of :func:`~gemma_scope_tl.studies.base_on_tuned`.
        metrics: columns to draw.
    """
    return _over_l0(table, metrics, [*(["part"] if "part" in table else []), "model", "saes"])


def uniformity_figure(table: pd.DataFrame) -> Figure:
    """Uniformity of active latent importance over L0 (appendix C.3): a panel per site, a line per layer and width.

    Transcoders with a skip connection (column ``skip``) have lines of their own.

    Args:
        table: the table of :func:`~gemma_scope_tl.studies.importance_uniformity`, with its intervals.
    """
    return _over_l0(table, ["uniformity"], _series(table), bounds=True)


def position_figure(table: pd.DataFrame, metrics: Sequence[str] = ("squared_error", "fvu", "delta_loss")) -> Figure:
    """Metrics over the position in the sequence (section 4.2): a panel per metric, a line per SAE.

    Args:
        table: the table of :func:`~gemma_scope_tl.studies.binned_by_position`.
        metrics: columns to draw.
    """
    check_columns(table, ["start", "stop", "site", "layer", "id", *metrics])
    figure, panels = _grid(1, len(metrics))
    for ax, metric in zip(panels[0], metrics, strict=True):
        for number, (name, rows) in enumerate(_groups(table, ["site", "layer", "id"])):
            middle = (rows["start"] + rows["stop"] - 1) / 2
            ax.plot(middle.to_list(), rows[metric].to_list(), color=STYLE.color(number), lw=1.1, label=name)
        ax.set_xscale("symlog", linthresh=16)
        STYLE.axes(ax, "position", metric)
    STYLE.legend(figure, panels[0][0], _MOST_NAMES)
    return figure


def frequency_figure(table: pd.DataFrame) -> Figure:
    """Histograms of how often latents fire (section 4.3): a panel per site, a line per SAE, a colour per width.

    Args:
        table: the table of :func:`~gemma_scope_tl.studies.firing_frequencies`.
    """
    check_columns(table, ["site", "layer", "id", "d_sae", "low", "high", "share", "dead"])
    sites = list(dict.fromkeys(table["site"]))
    widths = sorted(set(table["d_sae"]))
    figure, panels = _grid(1, len(sites))
    for ax, site in zip(panels[0], sites, strict=True):
        named: set[int] = set()
        for _, rows in _groups(table[table["site"] == site], ["layer", "id"]):
            width = int(rows["d_sae"].iloc[0])
            edges = [*rows["low"].to_list(), rows["high"].iloc[-1]]
            label = None if width in named else f"{width:,} latents"
            named.add(width)
            color = STYLE.color(widths.index(width))
            ax.stairs(rows["share"].to_list(), edges, color=color, alpha=0.7, lw=1.1, label=label)
        ax.set_title(site, fontsize=STYLE.title)
        STYLE.axes(ax, "log10 of the share of tokens", "share of latents")
        ax.legend(fontsize=STYLE.tick, frameon=False)
    return figure


def domain_figure(table: pd.DataFrame, metrics: Sequence[str] = ("delta_loss", "fvu")) -> Figure:
    """Metrics by kind of text (section 4.6): a panel per metric, a point per SAE, domains from best to worst.

    Args:
        table: the table of :func:`~gemma_scope_tl.studies.by_domain`.
        metrics: columns to draw.
    """
    check_columns(table, ["domain", "site", *metrics])
    sites = list(dict.fromkeys(table["site"]))
    figure, panels = _grid(1, len(metrics))
    for ax, metric in zip(panels[0], metrics, strict=True):
        means = table.groupby("domain")[metric].mean().sort_values()
        places = {name: at for at, name in enumerate(means.index)}
        for number, site in enumerate(sites):
            rows = table[table["site"] == site]
            across = [places[name] + 0.6 * (number + 0.5) / len(sites) - 0.3 for name in rows["domain"]]
            ax.plot(across, rows[metric].to_list(), STYLE.marker(number), ms=4, alpha=0.7, label=site)
        ax.plot(range(len(means)), means.to_list(), "k_", ms=18, label="mean")
        ax.set_xticks(range(len(means)), list(means.index), rotation=40, ha="right")
        STYLE.axes(ax, "", metric)
        scale(ax, "y", table, metric)
    panels[0][0].legend(fontsize=STYLE.tick, frameon=False)
    return figure


def precision_figure(table: pd.DataFrame, metrics: Sequence[str] = ("delta_loss", "fvu", "l0")) -> Figure:
    """Metrics in each dtype over those in the first dtype (section 4.7); points on the diagonal are unchanged.

    Args:
        table: the table of :func:`~gemma_scope_tl.studies.by_dtype`.
        metrics: columns to draw.
    """
    check_columns(table, ["dtype", *metrics])
    dtypes = list(dict.fromkeys(table["dtype"]))
    if len(dtypes) < 2:
        raise GemmaScopeError(f"A comparison needs two dtypes; the table has {dtypes}.")
    figure, panels = _grid(1, len(metrics))
    for ax, metric in zip(panels[0], metrics, strict=True):
        reference = table.loc[table["dtype"] == dtypes[0], metric].to_list()
        for number, dtype in enumerate(dtypes[1:]):
            values = table.loc[table["dtype"] == dtype, metric].to_list()
            ax.plot(reference, values, STYLE.marker(number), ms=4, alpha=0.8, label=dtype)
        scale(ax, "x", table, metric)
        scale(ax, "y", table, metric)
        ax.axline((min(reference),) * 2, (max(reference) + 1e-9,) * 2, color="0.6", lw=0.8)
        STYLE.axes(ax, f"{LABELS.get(metric, metric)}, {dtypes[0]}", metric)
    panels[0][0].legend(fontsize=STYLE.tick, frameon=False)
    return figure


def probe_figure(table: pd.DataFrame) -> Figure:
    """AUROC of probes by concept, with a panel per k.

    For each concept a point shows the mean over SAEs for latents, random latents and raw activations each, and a line
    extends from the lowest to the highest SAE.

    Args:
        table: the table of :func:`~gemma_scope_tl.studies.probe_concepts`.
    """
    check_columns(table, ["concept", "features", "k", "auroc"])
    sparse = table[table["features"] != "dense"]
    sizes = sorted(set(sparse["k"])) or [0]
    order = table.groupby("concept")["auroc"].mean().sort_values().index.to_list()
    kinds = ("random", "latents", "dense")
    figure, panels = grid(1, len(sizes), (2.2 + 2.4 * len(sizes), 1.4 + 0.3 * len(order)))
    for ax, k in zip(panels[0], sizes, strict=True):
        for number, kind in enumerate(kinds):
            rows = table[(table["features"] == kind) & ((table["k"] == k) | (kind == "dense"))]
            found = rows.groupby("concept")["auroc"].agg(["mean", "min", "max"]).reindex(order)
            y = [at + 0.2 * (number - 1) for at in range(len(order))]
            ax.hlines(y, found["min"].to_list(), found["max"].to_list(), color=f"C{number}", lw=1, alpha=0.6)
            ax.plot(found["mean"].to_list(), y, STYLE.marker(number), ms=4, color=f"C{number}", label=kind)
        ax.axvline(0.5, color="0.6", ls="--", lw=0.8)
        ax.set_title(f"k = {k}", fontsize=STYLE.title)
        ax.set_yticks(range(len(order)), order if ax is panels[0][0] else [""] * len(order))
        STYLE.axes(ax, "AUROC", "")
    STYLE.legend(figure, panels[0][0], _MOST_NAMES)
    return figure


def scores_figure(table: pd.DataFrame) -> Figure:
    """Scores of explanations: a panel per method, a box and its points per SAE, a dashed line at chance.

    Args:
        table: the table of :func:`~gemma_scope_tl.interp.detection_scores` or
            :func:`~gemma_scope_tl.interp.simulation_scores`, or both combined; or that of
            :func:`~gemma_scope_tl.interp.explanation_study`, whose random SAEs have boxes of their own.

    Raises:
        GemmaScopeError: a column is missing, or there is no score to draw.
    """
    check_columns(table, ["site", "layer", "id", "latent"])
    methods = [name for name in _SCORES if name in table.columns and table[name].notna().any()]
    if not methods:
        raise GemmaScopeError(f"There is no score to draw: none of {', '.join(_SCORES)} has a value.")
    by = ["id", *(["features"] if "features" in table else [])]
    groups = [
        (" ".join(str(part) for part in name if part != "latents"), rows)
        for name, rows in table.groupby(by, sort=False, dropna=False)
    ]
    figure, panels = grid(1, len(methods), (max(5.0, 1.2 * len(groups) * len(methods) + 2), 3.6))
    for ax, method in zip(panels[0], methods, strict=True):
        label, chance = _SCORES[method]
        for at, (_, rows) in enumerate(groups):
            values = rows[method].dropna().to_list()
            if values:
                ax.boxplot([values], positions=[at], widths=0.5, showfliers=False)
                spread = [at + 0.3 * ((7 * number) % 11 / 11 - 0.5) for number in range(len(values))]
                ax.plot(spread, values, "o", ms=3, alpha=0.6, color=STYLE.color(at))
        ax.axhline(chance, color="0.5", ls="--", lw=0.8)
        ax.set_xticks(range(len(groups)), [name for name, _ in groups], rotation=25, ha="right", fontsize=7)
        ax.set_ylabel(label, fontsize=8)
    return figure


def _over_l0(table: pd.DataFrame, metrics: Sequence[str], by: list[str], bounds: bool = False) -> Figure:
    check_columns(table, ["site", "l0", *by, *metrics])
    sites = list(dict.fromkeys(table["site"]))
    *head, last = by  # colours distinguish the values of head, lines and markers those of last
    first, second = ([name for name, _ in _groups(table, columns)] for columns in (head, [last]))
    figure, panels = _grid(len(metrics), len(sites))
    for line, metric in zip(panels, metrics, strict=True):
        for ax, site in zip(line, sites, strict=True):
            rows = table[table["site"] == site]
            for name, group in _groups(rows, by):
                ordered = group.sort_values("l0")
                color = STYLE.color(first.index(group_name(group.iloc[0], head, _WORDS)))
                kind = second.index(group_name(group.iloc[0], [last], _WORDS))
                line_style, marker = _LINES[kind % len(_LINES)], STYLE.marker(kind)
                x, y = ordered["l0"].to_list(), ordered[metric].to_list()
                ax.plot(x, y, label=name, color=color, ls=line_style, marker=marker, ms=4, lw=1)
                if bounds:
                    ax.vlines(x, ordered[f"{metric}_low"], ordered[f"{metric}_high"], color=color, lw=0.8)
            ax.set_title(site, fontsize=STYLE.title)
            STYLE.axes(ax, "L0", metric)
            scale(ax, "x", rows, "l0")
            scale(ax, "y", rows, metric)
    STYLE.legend(figure, panels[0][0], _MOST_NAMES)
    return figure


def _series(table: pd.DataFrame) -> list[str]:
    return ["layer", *(["skip"] if "skip" in table else []), "d_sae"]


def _groups(table: pd.DataFrame, by: list[str]) -> list[tuple[str, pd.DataFrame]]:
    return named_groups(table, by, _WORDS)


def _grid(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    return grid(rows, columns, (max(3.6 * columns, 5.0), 3.2 * rows))
