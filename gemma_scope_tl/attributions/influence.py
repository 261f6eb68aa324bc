"""Influence of nodes and edges on the logits of an attribution graph, and pruning by it.

With ``A[t, s] = |w[t, s]| / sum_s |w[t, s]|``, the shares of each target's inputs, and p the probabilities of the logit
nodes, the influence of a node is the sum over all paths from it to a logit,

    influence = p (A + A^2 + A^3 + ...)

A graph has no circles, so the series is finite. The influence of an edge is its share of its target's inputs times the
target's influence, ``A[t, s] (influence_t + p_t)``. Pruning keeps the most influential nodes that together have
``node_threshold`` of the influence of all nodes; then, with influence computed again in the pruned graph, the edges
that together have ``edge_threshold``; and then removes nodes that have lost their connection. Embeddings and logits are
kept. Influence, pruning and the two scores are defined as in circuit-tracer (Hanna et al., 2025), so numbers of the two
can be compared. Biases are no nodes there, and the functions here are given weights without theirs: a bias explains
nothing about a prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_scope_tl.counts import checked_real
from gemma_scope_tl.errors import GemmaScopeError

Numbers = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Kinds = npt.NDArray[np.object_]
Sparse = Any
"""A ``scipy.sparse.csr_array``, whose methods type checkers cannot follow."""
_LEAST = 1e-10  # the smallest sum that rows are divided by


def normalised(weights: Sparse) -> Sparse:
    """Absolute weights divided by the sum of their row; rows without weights stay empty."""
    from scipy.sparse import diags_array

    absolute: Any = abs(weights).astype(np.float64)
    sums = np.asarray(absolute.sum(axis=1)).ravel()
    scale: Any = diags_array(1.0 / np.maximum(sums, _LEAST))
    return (scale @ absolute).tocsr()


def path_sums(shares: Sparse, start: Numbers) -> Numbers:
    """``start (A + A^2 + ...)`` for the shares A.

    Raises:
        GemmaScopeError: the graph has a circle, so the sum has no end.
    """
    total, step = np.zeros_like(start), start
    for _ in range(shares.shape[0] + 1):
        step = shares.T @ step
        if not step.any():
            return total
        total = total + step
    raise GemmaScopeError("The graph has a circle of edges, so influence along its paths has no end.")


def node_influence(weights: Sparse, probabilities: Numbers) -> Numbers:
    """The influence of every node, ``[n]``.

    Args:
        weights: ``[n, n]``, rows are targets.
        probabilities: ``[n]``, of logit nodes; 0 for others.
    """
    return path_sums(normalised(weights), probabilities)


def edge_influence(weights: Sparse, probabilities: Numbers) -> Sparse:
    """The influence of every edge, ``[n, n]``."""
    from scipy.sparse import diags_array

    shares = normalised(weights)
    scale: Any = diags_array(path_sums(shares, probabilities) + probabilities)
    return (scale @ shares).tocsr()


def threshold_of(scores: Numbers, share: float) -> float:
    """The smallest of the highest scores that together have ``share`` of the sum; 0 if all scores are 0."""
    ordered = np.sort(scores)[::-1]
    total = ordered.sum()
    if not total > 0:
        return 0.0
    at = int(np.searchsorted(np.cumsum(ordered) / total, share))
    return float(ordered[min(at, len(ordered) - 1)])


def pruned_masks(
    weights: Sparse, probabilities: Numbers, kinds: Kinds, node_threshold: float, edge_threshold: float
) -> tuple[Mask, Sparse]:
    """Which nodes to keep, ``[n]``, and the weights of the edges to keep, ``[n, n]``.

    Args:
        weights, probabilities: as for :func:`node_influence`.
        kinds: the kind of every node.
        node_threshold, edge_threshold: shares of influence, from 0 to 1.

    Raises:
        GemmaScopeError: for thresholds outside of 0..1.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if checked_real(value, name, least=0.0) > 1:
            raise GemmaScopeError(f"{name} must be at most 1, not {value}: it is a share of all influence.")
    influence = node_influence(weights, probabilities)
    always = np.isin(kinds, ("embedding", "logit"))
    keep: Any = ((influence >= threshold_of(influence, node_threshold)) & (kinds != "bias")) | always
    left = _only(weights, keep)
    scores = edge_influence(left, probabilities)
    lowest = threshold_of(scores.data, edge_threshold)
    edges = left.tocoo()
    kept = np.asarray(scores[edges.row, edges.col]).ravel() >= lowest if edges.nnz else np.zeros(0, bool)
    from scipy.sparse import csr_array

    left = csr_array((edges.data[kept], (edges.row[kept], edges.col[kept])), shape=weights.shape)
    needs_source = kinds == "latent"
    while True:
        into, out = np.diff(left.tocsr().indptr) > 0, np.diff(left.tocsc().indptr) > 0
        still = keep & (out | always) & (into | ~needs_source)
        if (still == keep).all():
            return keep, left
        keep = still
        left = _only(left, keep)


def scores_of(weights: Sparse, probabilities: Numbers, kinds: Kinds) -> tuple[float, float]:
    """Replacement and completeness (:meth:`~gemma_scope_tl.attributions.AttributionGraph.scores`)."""
    shares = normalised(weights)
    influence = path_sums(shares, probabilities)
    embeddings, errors = (influence[kinds == kind].sum() for kind in ("embedding", "error"))
    from_errors = np.asarray(shares[:, np.flatnonzero(kinds == "error")].sum(axis=1)).ravel()
    output = influence + probabilities
    replacement = embeddings / (embeddings + errors) if embeddings + errors > 0 else float("nan")
    completeness = ((1 - from_errors) * output).sum() / output.sum() if output.sum() > 0 else float("nan")
    return float(replacement), float(completeness)


def _only(weights: Sparse, keep: Mask) -> Sparse:
    """The weights between kept nodes, in the shape of all."""
    from scipy.sparse import diags_array

    kept: Any = diags_array(keep.astype(weights.dtype))
    out = (kept @ weights @ kept).tocsr()
    out.eliminate_zeros()
    return out
