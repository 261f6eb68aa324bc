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
    """Our graph without the nodes that are not ``wanted``, to prune what circuit-tracer prunes.

    The influence in its table stays that of the whole graph.
    """
    keep = np.flatnonzero([key in wanted for key in keys_of(graph)])
    nodes = graph.nodes.iloc[keep].reset_index(drop=True)
    return replace(graph, nodes=nodes, weights=graph.weights[keep][:, keep])


def compare(graph: AttributionGraph, tracer: TracerGraph, skips: bool) -> dict[str, Any]:
    """How far the edges between nodes that both graphs have agree, and what only one of them has.

    circuit-tracer leaves out what MLPs write at BOS, and biases. Our nodes for these are the *rest*: errors at BOS, and
    biases. But it follows skip connections at BOS, where we apply no coder, so edges from the embedding of BOS differ.

    Returns:
        ``nodes``: how many nodes both have; ``only_ours`` and ``only_theirs``: how many of each kind only one has.
        ``edges``: pairs of shared nodes, without the rest, between which at least one of both has an edge.
        ``largest_edge``: absolute.
        ``largest_difference``: of edges from sources that are not at BOS. ``worst``: where it is, target and source.
        ``largest_difference_from_bos``: of edges from the embedding of BOS.
        ``pruned_nodes``, ``pruned_edges``: of circuit-tracer's pruning. ``pruned_equal``: whether ours at the same
            thresholds keeps the same nodes and edges, of our graph without the rest and, where there are skip
            connections, with circuit-tracer's edges from the embedding of BOS.
        ``rest_of_a_logit``: the largest share of a logit, of the sum of its parts' absolute values, from the rest.
    """
    ours, numbers = keys_of(graph), tracer.numbers
    rest = {key for key in ours if key[0] == "bias" or (key[0] == "error" and key[2] == 0)}
    pairs = [(i, numbers[key]) for i, key in enumerate(ours) if key in numbers and key not in rest]
    mine, theirs = (np.array(column, dtype=int) for column in zip(*pairs, strict=True))
    dense = graph.weights.toarray()
    left, right = dense[np.ix_(mine, mine)], tracer.weights[np.ix_(theirs, theirs)]
    difference = np.abs(left - right)
    bos = np.array([ours[i] == ("embedding", 0) for i in mine])
    elsewhere = np.where(bos, 0.0, difference)
    target, source = np.unravel_index(int(elsewhere.argmax()), elsewhere.shape)
    logits = [i for i, key in enumerate(ours) if key[0] == "logit"]
    others = [i for i, key in enumerate(ours) if key in rest]
    shares = np.abs(dense[np.ix_(logits, others)]).sum(1) / np.abs(dense[logits]).sum(1)
    return {
        "nodes": len({*ours} & {*numbers}),
        "only_ours": _counted([key for key in ours if key not in numbers]),
        "only_theirs": _counted([key for key in tracer.keys if key not in set(ours)]),
        "edges": int(np.count_nonzero((left != 0) | (right != 0))),
        "largest_edge": float(np.abs(right).max()),
        "largest_difference": float(elsewhere.max()),
        "worst": [list(map(str, ours[mine[target]])), list(map(str, ours[mine[source]]))],
        "largest_difference_from_bos": float(difference[:, bos].max()),
        **_pruned(graph, tracer, {ours[i] for i in mine}, skips),
        "rest_of_a_logit": float(shares.max()),
    }


def _pruned(graph: AttributionGraph, tracer: TracerGraph, shared: set[Key], skips: bool) -> dict[str, Any]:
    thresholds = {name: tracer.facts[name] for name in ("node_threshold", "edge_threshold")}
    smaller = restricted(graph, shared)
    if skips:
        smaller = _with_their_bos(smaller, tracer)
    kept = smaller.pruned(**thresholds)
    keys, edges = keys_of(kept), kept.weights.tocoo()
    pairs = {(keys[t], keys[s]) for t, s in zip(edges.row, edges.col, strict=True)}
    return {
        "pruned_nodes": len(tracer.kept_nodes),
        "pruned_edges": len(tracer.kept_edges),
        "pruned_equal": set(keys) == tracer.kept_nodes and pairs == tracer.kept_edges,
    }


def _with_their_bos(graph: AttributionGraph, tracer: TracerGraph) -> AttributionGraph:
    """Our graph with circuit-tracer's edges from the embedding of BOS."""
    from scipy.sparse import csr_array

    keys, numbers = keys_of(graph), tracer.numbers
    dense = graph.weights.toarray()
    column = ("embedding", 0)
    dense[:, keys.index(column)] = tracer.weights[[numbers[key] for key in keys], numbers[column]]
    return replace(graph, weights=csr_array(dense))


def _counted(keys: list[Key]) -> dict[str, int]:
    kinds = [str(key[0]) for key in keys]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
