"""The page of an attribution graph: one HTML file without external resources.

Tokens run along the bottom and layers upwards. The page is made of the files in ``viz/web``, whose script computes
influence and pruning again when its sliders move. Whatever the graph's texts hold, they are data for it and no markup:
they stand in a block of JSON, and the page's policy lets nothing run but the script whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.attributions.graph_records import plain_values
from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.errors import GemmaScopeError, brief
from gemma_scope_tl.files import checked_path, write_atomically
from gemma_scope_tl.sites import LAYERED_SITES
from gemma_scope_tl.viz.graph_notes import LatentKey, LatentNote, latent_key

if TYPE_CHECKING:
    import pandas as pd

_SCRIPTS = ("influence.js", "model.js", "plot.js", "panel.js", "groups.js", "main.js")
_COLUMNS = ("site", "layer", "position", "latent", "activation", "probability", "token_id", "label")
_KEY = ("coder", "layer", "latent")
_NO_NOTES = "This page was made without examples and promoted tokens of latents."


def write_graph_page(
    graph: AttributionGraph,
    path: str | PathLike[str],
    *,
    notes: Mapping[LatentKey, LatentNote] | None = None,
    title: str | None = None,
    max_nodes: int = 1500,
    max_edges: int = 20_000,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> Path:
    """Write the page of a graph, completely or not at all.

    Args:
        graph: the graph.
        path: the HTML file. Missing folders are created.
        notes: what is known of latents, from :func:`~gemma_scope_tl.viz.graph_notes.graph_notes`.
        title: heading of the page; by default it names the model.
        max_nodes: number of nodes on the page, the most influential ones; tokens and logits always are.
        max_edges: number of edges between these, the most influential ones. What is left out is stated on the page, and
            counts in the influence of what is there.
        node_threshold, edge_threshold: where the sliders begin, between 0 and 1.

    Raises:
        GemmaScopeError: for a number below 1, or a threshold outside 0..1.
        WriteError: when the file cannot be written.
    """
    target = checked_path(path)
    thresholds = {"node": node_threshold, "edge": edge_threshold}
    if bad := [value for value in thresholds.values() if not 0 <= value <= 1]:
        raise GemmaScopeError(f"Thresholds are shares between 0 and 1; given: {brief(bad[0])}.")
    limits = checked_count(max_nodes, "max_nodes"), checked_count(max_edges, "max_edges")
    title = f"Attribution graph of {graph.model}" if title is None else title
    page = page_html(title, page_data(graph, notes, title, thresholds, *limits))
    try:
        return write_atomically(target, page.encode())
    except UnicodeEncodeError as error:
        raise GemmaScopeError(f"The graph has text that is not Unicode: {error}.") from error


def page_html(title: str, data: Mapping[str, Any]) -> str:
    """The page with its data, in which only its own script and style are active."""
    parts = _web()
    encoded = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        encoded = encoded.replace(sign, f"\\u{ord(sign):04x}")
    policy = f"default-src 'none'; script-src '{_hash(parts['script'])}'; style-src '{_hash(parts['style'])}'"
    filled = {
        "policy": policy,
        "title": escape(title),
        "data": encoded,
        "script": parts["script"],
        "style": parts["style"],
    }
    found: list[str] = []
    for piece in parts["html"].split("{{"):
        name, ends, rest = piece.partition("}}")
        found.append(filled[name] + rest if ends else piece)
    return "".join(found)


@cache
def _web() -> dict[str, str]:
    folder = files("gemma_scope_tl") / "viz" / "web"
    scripts = [(folder / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    return {
        "html": (folder / "graph.html").read_text(encoding="utf-8"),
        "style": (folder / "graph.css").read_text(encoding="utf-8"),
        "script": '"use strict";\n(() => {\n' + "\n".join(scripts) + "\n})();\n",
    }


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page_data(
    graph: AttributionGraph,
    notes: Mapping[LatentKey, LatentNote] | None,
    title: str,
    thresholds: Mapping[str, float],
    max_nodes: int,
    max_edges: int,
) -> dict[str, Any]:
    """The data of the page as plain values: what is on it, and sentences that say what is not."""
    graph, constants = _without_biases(graph)
    rows, pairs, influence = _chosen(graph, max_nodes, max_edges)
    nodes = graph.nodes.iloc[rows]
    at = {int(row): n for n, row in enumerate(rows)}
    coders = list(dict.fromkeys(nodes["coder"].dropna()))
    kept = [_note_key(*one) for one in zip(*(plain_values(nodes[name]) for name in _KEY), strict=True)]
    known = notes or {}
    listed = [key for key in dict.fromkeys(kept) if key is not None and key in known]
    numbers = {key: n for n, key in enumerate(listed)}
    columns: dict[str, list[Any]] = {name: plain_values(nodes[name]) for name in _COLUMNS}
    columns["label"] = _labels(columns)
    weights = graph.weights.data[pairs]
    target = np.repeat(np.arange(len(graph)), np.diff(graph.weights.indptr))[pairs]
    totals = np.asarray(abs(graph.weights).sum(axis=1)).ravel()[rows]
    return {
        "title": title,
        "model": graph.model,
        "text": graph.text,
        "tokens": list(graph.tokens),
        "nodes": {
            "id": nodes["node_id"].tolist(),
            "kind": nodes["kind"].tolist(),
            "coder": [coders.index(one) if one in coders else None for one in plain_values(nodes["coder"])],
            "note": [None if key is None else numbers.get(key) for key in kept],
            "constants": [float(f"{one:.6g}") for one in constants[rows]],
            **columns,
        },
        "edges": {
            "source": [at[int(one)] for one in graph.weights.indices[pairs]],
            "target": [at[int(one)] for one in target],
            "weight": [float(f"{one:.6g}") for one in weights],
        },
        "totals": [float(f"{one:.6g}") for one in totals],
        "coders": coders,
        "layered": _layered(nodes, coders),
        "notes": [known[key].as_data() for key in listed],
        "notes_said": _NO_NOTES if notes is None else "Nothing was collected for this latent.",
        "supernodes": _supernodes(graph, set(nodes["node_id"])),
        "counts": {"nodes": len(rows), "edges": len(pairs)},
        "thresholds": dict(thresholds),
        "left_out": _left_out(graph, rows, len(pairs), influence),
        "checks": _checks(graph),
        "settings": json.dumps(
            {name: value for name, value in graph.settings.items() if name not in ("imported", "qParams")},
            indent=1,
            ensure_ascii=False,
            default=str,
        ),
    }


def _without_biases(graph: AttributionGraph) -> tuple[AttributionGraph, Any]:
    """The graph without biases, which have no influence, and their sum in each of its nodes."""
    biases = (graph.nodes["kind"] == "bias").to_numpy()
    constants = np.asarray(graph.weights[:, np.flatnonzero(biases)].sum(axis=1)).ravel()
    chosen = np.flatnonzero(~biases)
    weights: Any = graph.weights[chosen]
    nodes = graph.nodes.iloc[chosen].reset_index(drop=True)
    there = set(nodes["node_id"])
    groups = ((name, tuple(one for one in members if one in there)) for name, members in graph.supernodes)
    left = tuple((name, members) for name, members in groups if members)
    return replace(graph, nodes=nodes, weights=weights[:, chosen].tocsr(), supernodes=left), constants[chosen]


def _note_key(coder: Any, layer: Any, latent: Any) -> LatentKey | None:
    """None for nodes that are no latents of a known coder."""
    return latent_key(coder, layer, latent) if isinstance(coder, str) and isinstance(latent, int) else None


def _layered(nodes: pd.DataFrame, coders: list[str]) -> list[int]:
    """Numbers of the coders whose latents read several layers."""
    latents = nodes[(nodes["kind"] == "latent") & nodes["coder"].notna()]
    counts = latents.groupby("coder")["layer"].nunique()
    return [coders.index(name) for name in counts.index[counts > 1]]


def _labels(columns: Mapping[str, list[Any]]) -> list[str | None]:
    """Labels without those of latents that only repeat their coder's kind, layer and number."""
    found: list[str | None] = []
    for site, layer, latent, label in zip(
        *(columns[name] for name in ("site", "layer", "latent", "label")), strict=True
    ):
        kinds = (site, *(kind for kind, read in LAYERED_SITES.items() if read == site))
        number = f"{'' if layer is None else f'{layer} '}#{latent}"
        repeated = latent is not None and label in [f"{kind} {number}" for kind in kinds]
        found.append(None if repeated else label)
    return found


def _chosen(graph: AttributionGraph, max_nodes: int, max_edges: int) -> tuple[Any, Any, Any]:
    """Rows of the nodes on the page, numbers of the edges among ``weights.data``, and the influence of all nodes."""
    kinds = graph.nodes["kind"].to_numpy(dtype=object)
    influence = graph.influence().to_numpy()
    always = np.isin(kinds, ("embedding", "logit"))
    others = np.flatnonzero(~always)
    most = max(0, max_nodes - int(always.sum()))
    kept = always.copy()
    kept[others[np.argsort(-influence[others], kind="stable")][:most]] = True
    target = np.repeat(np.arange(len(graph)), np.diff(graph.weights.indptr))
    pairs = np.flatnonzero(kept[target] & kept[graph.weights.indices] & (graph.weights.data != 0))
    if len(pairs) > max_edges:
        probabilities = np.where(kinds == "logit", graph.nodes["probability"].fillna(0.0).to_numpy(), 0.0)
        totals = np.asarray(abs(graph.weights).sum(axis=1)).ravel()
        shares = np.abs(graph.weights.data[pairs]) / totals[target[pairs]]
        scores = shares * (influence + probabilities)[target[pairs]]
        pairs = np.sort(pairs[np.argsort(-scores, kind="stable")][:max_edges])
    return np.flatnonzero(kept), pairs, influence


def _left_out(graph: AttributionGraph, rows: Any, edges: int, influence: Any) -> list[str]:
    said: list[str] = []
    if len(rows) < len(graph):
        share = 1 - influence[rows].sum() / max(influence.sum(), 1e-300)
        said.append(
            f"Not on this page: {len(graph) - len(rows):,} of {len(graph):,} nodes, those of least influence, "
            f"with {share:.1%} of all influence together."
        )
    total = int((graph.weights.data != 0).sum())
    if edges < total:
        said.append(f"Not on this page: {total - edges:,} of {total:,} edges, with these nodes or of least influence.")
    return said


def _supernodes(graph: AttributionGraph, there: set[str]) -> list[list[str]]:
    groups = ([name, *(one for one in members if one in there)] for name, members in graph.supernodes)
    return [group for group in groups if len(group) > 1]


def _checks(graph: AttributionGraph) -> str:
    shares = graph.checks["missing_share"].abs().dropna()
    if not len(shares):
        return ""
    said = f"The parts of each of {len(shares):,} targets, before any was left out, add up to its value"
    worst = float(shares.max())
    return f"{said}." if worst == 0 else f"{said}; at most {worst:.2g} of the sum of their absolute values is missing."
