"""A graph of ours and one of circuit-tracer, edge by edge."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_tl.attributions.attribution_graph import AttributionGraph

Key = tuple[Hashable, ...]


@dataclass(frozen=True, eq=False)
class TracerGraph:
    """What ``reference.py`` wrote.

    Attributes:
        keys: of each node, ``("latent", layer, position, latent)``, ``("error", layer, position)``, ``("embedding",
            position)`` or ``("logit", token id)``, in circuit-tracer's order.
        weights: ``[n, n]``, targets in rows, float64.
        facts: versions of the libraries, dtype and thresholds.
        arrays: everything in the file.
    """

    keys: list[Key]
    weights: np.ndarray
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def numbers(self) -> dict[Key, int]:
        """The row of each node."""
        return {key: number for number, key in enumerate(self.keys)}

    @property
    def kept_nodes(self) -> set[Key]:
        """The nodes that its pruning keeps."""
        return {self.keys[number] for number in np.flatnonzero(self.arrays["kept_nodes"])}

    @property
    def kept_edges(self) -> set[tuple[Key, Key]]:
        """The edges, target and source, that its pruning keeps."""
        return {(self.keys[t], self.keys[s]) for t, s in zip(*np.nonzero(self.arrays["kept_edges"]), strict=True)}


def read_tracer(path: Path, layers: int) -> TracerGraph:
    """Read the ``graph.npz`` of a case whose model has this many layers."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    positions = len(arrays["token_ids"])
    keys: list[Key] = [("latent", layer, position, latent) for layer, position, latent in arrays["latents"].tolist()]
    keys += [("error", layer, position) for layer in range(layers) for position in range(positions)]
    keys += [("embedding", position) for position in range(positions)]
    keys += [("logit", token) for token in arrays["logit_tokens"].tolist()]
    weights = arrays["adjacency"].astype(np.float64)
    if weights.shape != (len(keys), len(keys)):
        raise ValueError(f"{path}: {len(keys)} nodes, but the adjacency matrix is {weights.shape}.")
    return TracerGraph(keys, weights, json.loads(str(arrays["facts"])), arrays)


def keys_of(graph: AttributionGraph) -> list[Key]:
    """The nodes of one of our graphs in the terms of :class:`TracerGraph`; those of biases have no counterpart."""
    found: list[Key] = []
    for node in graph.nodes.itertuples():
        kind: Any = node.kind
        parts: dict[str, tuple[Any, ...]] = {
            "latent": (node.layer, node.position, node.latent),
            "error": (node.layer, node.position),
            "embedding": (node.position,),
            "logit": (node.token_id,),
            "bias": (node.node_id,),
        }
        found.append((kind, *parts[kind]))
    return found


def restricted(graph: AttributionGraph, wanted: set[Key]) -> AttributionGraph:
    """Our graph without the nodes that are not ``wanted``, to prune what circuit-tracer prunes."""
    keep = np.flatnonzero([key in wanted for key in keys_of(graph)])
    nodes = graph.nodes.iloc[keep].reset_index(drop=True)
    return replace(graph, nodes=nodes, weights=graph.weights[keep][:, keep])


def compare(graph: AttributionGraph, tracer: TracerGraph) -> dict[str, Any]:
    """How far the edges between nodes that both graphs have agree, and what only one of them has.

    Returns:
        ``nodes``: how many nodes both have; ``only_ours`` and ``only_theirs``: how many of each kind only one has.
        ``edges``: shared nodes between which at least one of both has an edge. ``largest_difference`` and
        ``largest_edge``, absolute. ``worst``: the edge with the largest difference, target and source.
        ``pruned_nodes``, ``pruned_edges``: of circuit-tracer's pruning; ``pruned_equal``: whether ours of the shared
        nodes, at the same thresholds, keeps the same nodes and edges.
        ``largest_share_of_the_rest``: the largest part of a logit, of the sum of its parts' absolute values, that comes
        from nodes which circuit-tracer does not have.
    """
    ours, numbers = keys_of(graph), tracer.numbers
    pairs = [(i, numbers[key]) for i, key in enumerate(ours) if key in numbers]
    mine, theirs = (np.array(column, dtype=int) for column in zip(*pairs, strict=True))
    dense = graph.weights.toarray()
    left, right = dense[np.ix_(mine, mine)], tracer.weights[np.ix_(theirs, theirs)]
    difference = np.abs(left - right)
    target, source = np.unravel_index(int(difference.argmax()), difference.shape)
    shared = {ours[i] for i in mine}
    rest = np.setdiff1d(np.arange(len(ours)), mine)
    logits = [i for i, key in enumerate(ours) if key[0] == "logit"]
    shares = np.abs(dense[np.ix_(logits, rest)]).sum(1) / np.abs(dense[logits]).sum(1)
    return {
        "nodes": len(shared),
        "only_ours": _counted([key for key in ours if key not in numbers]),
        "only_theirs": _counted([key for key in tracer.keys if key not in shared]),
        "edges": int(np.count_nonzero((left != 0) | (right != 0))),
        "largest_difference": float(difference.max()),
        "largest_edge": float(np.abs(right).max()),
        "worst": [list(map(str, ours[mine[target]])), list(map(str, ours[mine[source]]))],
        **_pruned(graph, tracer, shared),
        "largest_share_of_the_rest": float(shares.max()),
    }


def _pruned(graph: AttributionGraph, tracer: TracerGraph, shared: set[Key]) -> dict[str, Any]:
    thresholds = {name: tracer.facts[name] for name in ("node_threshold", "edge_threshold")}
    kept = restricted(graph, shared).pruned(**thresholds)
    keys, edges = keys_of(kept), kept.weights.tocoo()
    pairs = {(keys[t], keys[s]) for t, s in zip(edges.row, edges.col, strict=True)}
    return {
        "pruned_nodes": len(tracer.kept_nodes),
        "pruned_edges": len(tracer.kept_edges),
        "pruned_equal": set(keys) == tracer.kept_nodes and pairs == tracer.kept_edges,
    }


def _counted(keys: list[Key]) -> dict[str, int]:
    kinds = [str(key[0]) for key in keys]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
