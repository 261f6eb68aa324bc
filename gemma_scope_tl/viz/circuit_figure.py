"""A drawing of a circuit: tokens of the prompt from left to right, sites from bottom to top."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.viz.figures import visible_token

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from gemma_scope_tl.attributions.graph import Circuit

POSITIVE, NEGATIVE = "#c23b22", "#2b6ca3"
_MARKERS = {"latent": "o", "error": "D", "skip": "^", "unspliced": "s", "metric": "*"}
_BARE = 0.5  # width of the column of a token without nodes; a node takes 1


def draw_circuit(ax: Axes, circuit: Circuit, title: str = "", labels: bool = True) -> None:
    """Draw ``circuit`` on ``ax``.

    A node is drawn in the column of its token at the height of its site. Nodes that share both are drawn side by side,
    in a column of sufficient width. A node's area grows with the absolute attribution, and an edge's width with the
    absolute effect; red raises the metric, and blue lowers it. Diamonds are errors, squares are unspliced places,
    triangles are skip paths, and the star is the metric.

    Args:
        ax: the axes to draw on.
        circuit: a circuit from :func:`~gemma_scope_tl.circuit`.
        title: title of the plot.
        labels: write the index of each latent next to its node.
    """
    nodes, edges = circuit.nodes, circuit.edges
    places = node_places(nodes, len(circuit.tokens))
    widest = float(edges["effect"].abs().max()) if len(edges) else 1.0
    for edge in edges.itertuples():
        (x0, y0), (x1, y1) = places[int(edge.source)], places[int(edge.target)]  # type: ignore[call-overload]
        share = abs(float(edge.effect)) / widest  # type: ignore[arg-type]
        color = POSITIVE if float(edge.effect) > 0 else NEGATIVE  # type: ignore[arg-type]
        ax.plot([x0, x1], [y0, y1], color=color, lw=0.4 + 3.0 * share, alpha=0.2 + 0.6 * share, zorder=1)
    inner = nodes[nodes["kind"] != "metric"]
    largest = float(inner["attribution"].abs().max()) if len(inner) else 1.0
    for number, node in nodes.iterrows():
        x, y = places[int(number)]  # type: ignore[call-overload]
        final = node["kind"] == "metric"
        size = 220.0 if final else 30.0 + 170.0 * abs(node["attribution"]) / largest
        color = "black" if final else POSITIVE if node["attribution"] > 0 else NEGATIVE
        ax.scatter([x], [y], s=size, marker=_MARKERS[node["kind"]], color=color, edgecolors="white", zorder=2)
        text = f"{circuit.metric:.2f}" if final else _label(node)
        if labels and text:
            ax.annotate(text, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=6, zorder=3)
    _axes(ax, circuit, title)


def column_places(nodes: pd.DataFrame, tokens: int) -> list[tuple[float, float]]:
    """``(centre, width)`` of each token's column, which is as wide as its largest number of nodes side by side."""
    counts = nodes.groupby(["position", "rank"]).size().groupby("position").max().to_dict()
    found: list[tuple[float, float]] = []
    left = 0.0
    for position in range(tokens):
        width = float(counts.get(position, _BARE))
        found.append((left + width / 2, width))
        left += width
    return found


def node_places(nodes: pd.DataFrame, tokens: int) -> dict[int, tuple[float, float]]:
    """``x`` and ``y`` of each node by number: a position in the token's column, and the index of the site's line."""
    columns = column_places(nodes, tokens)
    lines = {rank: line for line, rank in enumerate(sorted(set(nodes["rank"])))}
    cells: list[tuple[Any, Any]] = list(zip(nodes["position"], nodes["rank"], strict=True))
    counts, seen = Counter(cells), Counter[tuple[Any, Any]]()
    found: dict[int, tuple[float, float]] = {}
    for number, cell in zip(nodes.index, cells, strict=True):
        centre, width = columns[int(cell[0])]
        offset = ((seen[cell] + 0.5) / counts[cell] - 0.5) * width
        found[int(number)] = (centre + offset, float(lines[cell[1]]))
        seen[cell] += 1
    return found


def _label(node: Any) -> str:
    return str(node["latent"]) if node["kind"] == "latent" else node["kind"] if node["kind"] == "skip" else ""


def _axes(ax: Axes, circuit: Circuit, title: str) -> None:
    sites = circuit.nodes.drop_duplicates("rank").sort_values("rank")
    layers = ["" if layer != layer else f" {int(layer)}" for layer in sites["layer"].astype(float)]
    names = [f"{site}{layer}" for site, layer in zip(sites["site"], layers, strict=True)]
    ax.set_yticks(range(len(names)), [*names[:-1], "metric"], fontsize=8)
    columns = column_places(circuit.nodes, len(circuit.tokens))
    labels = [visible_token(token) for token in circuit.tokens]
    ax.set_xticks([centre for centre, _ in columns], labels, rotation=60, ha="right", fontsize=8)
    ax.set_xlim(-0.3, sum(width for _, width in columns) + 0.3)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_title(title, fontsize=10)
