"""A drawing of an attribution graph: tokens of the prompt from left to right, layers from bottom to top."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.attributions.placing import layer_stage, stage_of
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import get_site
from gemma_scope_tl.viz.circuit_figure import NEGATIVE, POSITIVE, column_places, node_places
from gemma_scope_tl.viz.figures import visible_token

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MOST_NODES = 150
"""The largest graph that is drawn. More nodes cannot be told apart."""
_MARKERS = {"embedding": "s", "latent": "o", "error": "D", "bias": "v", "logit": "*"}
_PLACE = ("kind", "site", "layer")
_RINGS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442")


def draw_graph(ax: Axes, graph: AttributionGraph, title: str = "", labels: bool = True) -> None:
    """Draw a small graph, such as a pruned one, on ``ax``.

    Squares are tokens, circles latents, diamonds errors, triangles biases (which have no position, and stand left of
    the first token), stars logits. Nodes of one token and tensor stand side by side. A node's area grows with its
    influence, and an edge's width with its absolute weight; red edges are positive, blue ones negative. A coloured ring
    marks the nodes of a supernode, which the legend names.

    Args:
        ax: the axes to draw on.
        graph: a graph of at most :data:`MOST_NODES` nodes.
        title: title of the plot.
        labels: write the index of each latent and the token of each logit next to its node.

    Raises:
        GemmaScopeError: for a larger graph.
    """
    if len(graph) > MOST_NODES:
        raise GemmaScopeError(f"A figure of {len(graph):,} nodes cannot be read: prune to {MOST_NODES} at most.")
    nodes = _ranked(graph)
    shown = ["", *(visible_token(token) for token in graph.tokens)]
    places = node_places(nodes, len(shown))
    pairs = graph.weights.tocoo()
    widest = float(abs(pairs.data).max()) if pairs.nnz else 1.0
    for target, source, weight in zip(pairs.row, pairs.col, pairs.data, strict=True):
        (x0, y0), (x1, y1) = places[int(source)], places[int(target)]
        share, color = abs(weight) / widest, POSITIVE if weight > 0 else NEGATIVE
        ax.plot([x0, x1], [y0, y1], color=color, lw=0.3 + 3.0 * share, alpha=0.15 + 0.6 * share, zorder=1)
    rings = {one: number for number, (_, members) in enumerate(graph.supernodes) for one in members}
    largest = max(float(nodes["influence"].max()), 1e-30)
    for number, node in nodes.iterrows():
        x, y = places[int(number)]  # type: ignore[call-overload]
        size = 90.0 if node["kind"] == "logit" else 25.0 + 150.0 * float(node["influence"]) / largest
        ring = rings.get(str(node["node_id"]))
        edge = "white" if ring is None else _RINGS[ring % len(_RINGS)]
        style = {"marker": _MARKERS[str(node["kind"])], "color": "0.25", "edgecolors": edge}
        ax.scatter([x], [y], s=size, lw=0.5 if ring is None else 2.5, zorder=2, **style)
        if labels and node["text"]:
            ax.annotate(node["text"], (x, y), (0, 8), textcoords="offset points", ha="center", fontsize=6, zorder=3)
    for number, (name, _) in enumerate(graph.supernodes):
        ax.scatter([], [], s=60, color="0.25", edgecolors=_RINGS[number % len(_RINGS)], lw=2.5, label=name)
    if graph.supernodes:
        ax.legend(fontsize=7, loc="upper left")
    _axes(ax, nodes, shown, title)


def _ranked(graph: AttributionGraph) -> pd.DataFrame:
    """The nodes with their line (``rank``), the line's name, a column for biases before all positions, and a text."""
    nodes = graph.nodes
    top = layer_stage(int(nodes["layer"].max()) + 2) if nodes["layer"].notna().any() else 1
    found = [_line(kind, site, layer, top) for kind, site, layer in zip(*(nodes[c] for c in _PLACE), strict=True)]
    text = [
        str(latent) if kind == "latent" else visible_token(str(label)) if kind == "logit" else ""
        for kind, latent, label in zip(nodes["kind"], nodes["latent"], nodes["label"], strict=True)
    ]
    ranks, lines = zip(*found, strict=True)
    position = nodes["position"].fillna(-1).astype(int) + 1
    return nodes.assign(rank=list(ranks), line=list(lines), text=text, position=position)


def _line(kind: str, site: Any, layer: Any, top: int) -> tuple[int, str]:
    """The line of a node, as a number that ascends through the pass and a name."""
    if isinstance(site, str):
        number = int(layer) if isinstance(layer, Integral) else None
        return stage_of(get_site(site), number), site if number is None else f"{site} {number}"
    return {"logit": (top, "logits"), "bias": (-1, "biases")}.get(kind, (0, "tokens"))


def _axes(ax: Axes, nodes: pd.DataFrame, shown: list[str], title: str) -> None:
    lines = nodes.drop_duplicates("rank").sort_values("rank")["line"].tolist()
    ax.set_yticks(range(len(lines)), lines, fontsize=8)
    columns = column_places(nodes, len(shown))
    ax.set_xticks([centre for centre, _ in columns], shown, rotation=60, ha="right", fontsize=8)
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.3, sum(width for _, width in columns) + 0.3)
    ax.set_ylim(-0.6, len(lines) - 0.3)
    ax.set_title(title, fontsize=10)
