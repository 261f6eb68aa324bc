"""Influence, pruning and scores against dense formulas, and what the class of graphs checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array

from gemma_scope_tl.attributions.attribution_graph import CHECKS, COLUMNS, AttributionGraph
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError

LATENTS, ERRORS, TOKENS, LOGITS = 20, 6, 4, 3


def random_graph(seed: int = 0, biases: int = 0) -> AttributionGraph:
    """Latents in the order of the pass, then errors, biases, embeddings and logits, with half of the edges there."""
    rng = np.random.default_rng(seed)
    kinds = ["latent"] * LATENTS + ["error"] * ERRORS + ["bias"] * biases + ["embedding"] * TOKENS + ["logit"] * LOGITS
    count = len(kinds)
    dense = rng.normal(size=(count, count)) ** 3 * (rng.random((count, count)) < 0.5)
    latents = np.arange(LATENTS)
    dense[:LATENTS, :LATENTS] *= latents[:, None] > latents[None]  # later latents read earlier ones
    dense[LATENTS : count - LOGITS] = 0
    dense[:, count - LOGITS :] = 0
    probability = np.full(count, np.nan)
    probability[-LOGITS:] = [0.5, 0.3, 0.1]
    columns: dict[str, Any] = {name: [None] * count for name in COLUMNS}
    columns |= {
        "node_id": [f"n{i}" for i in range(count)],
        "kind": kinds,
        "position": [None if kind == "bias" else i % TOKENS for i, kind in enumerate(kinds)],
        "probability": probability,
        "activation": rng.random(count),
    }
    nodes = pd.DataFrame(columns)[list(COLUMNS)].astype(dict(COLUMNS))
    checks = pd.DataFrame({name: [] for name in CHECKS})
    return AttributionGraph("m", "abcd", (1, 2, 3, 4), ("a", "b", "c", "d"), nodes, csr_array(dense), checks)


def shares_of(dense: Any) -> Any:
    absolute = np.abs(dense)
    return absolute / np.maximum(absolute.sum(1, keepdims=True), 1e-10)


def influence_of(dense: Any, start: Any) -> Any:
    return start @ (np.linalg.inv(np.eye(len(dense)) - shares_of(dense)) - np.eye(len(dense)))


def cut_at(scores: Any, share: float) -> float:
    """The definition: the lowest score among the highest that reach the share of the sum."""
    ordered = sorted(scores, reverse=True)
    reached, at = 0.0, 0
    while at < len(ordered) - 1 and (reached := reached + ordered[at] / sum(ordered)) < share:
        at += 1
    return ordered[at]


@pytest.mark.parametrize("seed", range(4))
def test_influence_pruning_and_scores_are_the_dense_formulas(seed: int) -> None:
    graph = random_graph(seed)
    dense = graph.weights.toarray()
    start = np.nan_to_num(graph.nodes["probability"].to_numpy())
    influence = influence_of(dense, start)
    np.testing.assert_allclose(graph.influence(), influence, rtol=1e-12)

    kinds = graph.nodes["kind"].to_numpy()
    always = np.isin(kinds, ["embedding", "logit"])
    keep = (influence >= cut_at(influence, 0.7)) | always
    left = dense * keep[:, None] * keep[None]
    edges = shares_of(left) * (influence_of(left, start) + start)[:, None]
    left = left * (edges >= cut_at(edges[left != 0], 0.9))
    for _ in range(len(dense)):
        keep = keep & ((left != 0).any(0) | always) & ((left != 0).any(1) | (kinds != "latent"))
        left = left * keep[:, None] * keep[None]
    pruned = graph.pruned(0.7, 0.9)
    assert pruned.nodes["node_id"].tolist() == graph.nodes["node_id"][keep].tolist()
    np.testing.assert_array_equal(pruned.weights.toarray(), left[keep][:, keep])
    assert 0 < (kinds[keep] == "latent").sum() < LATENTS

    embeddings, errors = influence[kinds == "embedding"].sum(), influence[kinds == "error"].sum()
    output = influence + start
    from_errors = shares_of(dense)[:, kinds == "error"].sum(1)
    replacement, completeness = graph.scores()
    assert replacement == pytest.approx(embeddings / (embeddings + errors), rel=1e-12)
    assert completeness == pytest.approx(((1 - from_errors) * output).sum() / output.sum(), rel=1e-12)


def test_biases_have_no_part_in_influence() -> None:
    with_biases = random_graph(1, biases=3)
    kinds = with_biases.nodes["kind"].to_numpy()
    some = np.flatnonzero(kinds != "bias")
    dense = with_biases.weights.toarray()[some][:, some]
    start = np.nan_to_num(with_biases.nodes["probability"].to_numpy())[some]
    np.testing.assert_allclose(with_biases.influence()[some], influence_of(dense, start), rtol=1e-12)
    assert (with_biases.influence()[kinds == "bias"] == 0).all()
    assert "bias" not in set(with_biases.pruned(1.0, 1.0).nodes["kind"])


def test_edge_influence_is_in_the_order_of_edges_and_adds_up() -> None:
    graph = random_graph()
    edges = graph.edges().assign(influence=graph.edge_influence())
    assert edges["weight"].abs().is_monotonic_decreasing
    dense = graph.weights.toarray()
    for row in edges.iloc[:20].itertuples():
        assert row.weight == dense[graph.number_of(str(row.target)), graph.number_of(str(row.source))]
    sums = edges.groupby("source")["influence"].sum()
    wanted = pd.Series(graph.influence().to_numpy(), index=graph.nodes["node_id"])
    np.testing.assert_allclose(sums, wanted[sums.index], rtol=1e-12)  # influence leaves a node through its edges


def test_supernodes_group_move_and_survive_pruning() -> None:
    graph = random_graph().grouped("a", ["n0", "n1"]).grouped("b", ["n1", "n2"])
    assert graph.supernodes == (("a", ("n0",)), ("b", ("n1", "n2")))
    kept = set(graph.pruned(0.5).nodes["node_id"])
    assert all(set(members) <= kept and members for _, members in graph.pruned(0.5).supernodes)
    assert graph.grouped("c", "n0").supernodes == (("b", ("n1", "n2")), ("c", ("n0",)))
    with pytest.raises(UnknownNameError, match="Unknown node 'n999'"):
        graph.grouped("c", ["n999"])
    with pytest.raises(GemmaScopeError, match="has no nodes"):
        graph.grouped("c", [])
    with pytest.raises(GemmaScopeError, match="one name"):
        graph.grouped("a", ["n5"])


def test_a_graph_checks_what_it_is_given() -> None:
    graph = random_graph()
    nodes = graph.nodes
    for changes, message in (
        ({"nodes": nodes.drop(columns="kind")}, "missing: .'kind'"),
        ({"nodes": nodes.assign(node_id="same")}, "there twice"),
        ({"nodes": nodes.assign(kind="feature")}, "kind of node 'feature'"),
        ({"nodes": nodes.assign(position=9)}, "Positions of nodes are 0..3"),
        ({"nodes": nodes.iloc[:-1]}, "need weights of"),
        ({"tokens": ("a",)}, "a string for each token"),
        ({"weights": csr_array(graph.weights.toarray().T)}, "lead to nodes of kind latent and logit"),
        ({"weights": csr_array(graph.weights * np.nan)}, "must be finite"),
        ({"checks": graph.checks.drop(columns="sum")}, "missing: .'sum'"),
        ({"supernodes": (("a", ("n999",)),)}, "supernode 'a'"),
    ):
        with pytest.raises(GemmaScopeError, match=message):
            replace(graph, **changes)
    for low, high in ((1.5, 0.5), (-0.1, 0.5), (0.5, float("nan"))):
        with pytest.raises(GemmaScopeError, match="threshold"):
            graph.pruned(low, high)
    circle = graph.weights.toarray()
    circle[0, 5] = circle[5, 0] = 1.0
    with pytest.raises(GemmaScopeError, match="circle"):
        replace(graph, weights=csr_array(circle)).influence()
