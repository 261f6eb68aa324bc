"""The drawing of a graph: every node at its token and tensor, every edge, and the rings of supernodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.viz.graph_figure import MOST_NODES, draw_graph
from tests.attribution.example_graph import checks_of, table


def graph_of(latents: int = 3) -> AttributionGraph:
    """Two tokens; latents and an error of a transcoder, a bias, an SAE's latent, one logit that all add to."""
    from scipy.sparse import csr_array

    rows: list[dict[str, Any]] = [
        {"node_id": f"E_{p}_{p}", "kind": "embedding", "position": p, "token_id": p, "label": "x"} for p in range(2)
    ]
    place = {"kind": "latent", "position": 1}
    rows += [
        {"node_id": f"0_{i}_1", "site": "transcoder", "layer": 0, "latent": i, "coder": "t", **place, "activation": 1.0}
        for i in range(latents)
    ]
    rows.append(
        {"node_id": "res_1_7_1", "site": "res", "layer": 1, "latent": 7, "coder": "r", **place, "activation": 1.0}
    )
    rows.append({"node_id": "error_mlp_0_0", "kind": "error", "site": "mlp", "layer": 0, "position": 0})
    rows.append({"node_id": "bias_mlp_0", "kind": "bias", "site": "mlp", "layer": 0})
    rows.append({"node_id": "bias_encoders", "kind": "bias"})
    rows.append(
        {"node_id": "logit_5_1", "kind": "logit", "position": 1, "token_id": 5, "probability": 0.5, "label": " a"}
    )
    nodes = table(rows)
    weights = np.zeros((len(nodes), len(nodes)))
    weights[-1, :-1] = np.linspace(-1, 2, len(nodes) - 1)
    sparse = csr_array(weights)
    graph = AttributionGraph("m", "t", (0, 1), ("<bos>", "x"), nodes, sparse, checks_of(nodes, sparse))
    return replace(graph, nodes=nodes.assign(influence=graph.influence()))


def drawn(graph: AttributionGraph, **kwargs: Any) -> Any:
    ax = Figure().subplots()
    draw_graph(ax, graph, **kwargs)
    return ax


def test_lines_ascend_through_the_pass_and_tokens_are_columns() -> None:
    ax = drawn(graph_of(), title="a graph")
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["biases", "tokens", "transcoder 0", "mlp 0", "res 1", "logits"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["", "<bos>", "x"]
    assert ax.get_title() == "a graph"
    assert {text.get_text() for text in ax.texts} == {"0", "1", "2", "7", "a"}


def test_every_edge_has_its_sign_and_width() -> None:
    graph = graph_of()
    ax = drawn(graph)
    assert len(ax.lines) == graph.weights.nnz
    weights = graph.weights.tocoo().data
    widths = np.array([line.get_linewidth() for line in ax.lines])
    assert (np.argsort(widths) == np.argsort(np.abs(weights))).all()
    assert len({line.get_color() for line in ax.lines}) == 2


def test_supernodes_are_named_and_labels_can_be_left_out() -> None:
    ax = drawn(graph_of().grouped("both", ["0_0_1", "0_1_1"]), labels=False)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["both"]
    assert [text.get_text() for text in ax.texts] == []
    ringed = [one for one in ax.collections if len(one.get_offsets()) and one.get_linewidths()[0] > 1]
    assert len(ringed) == 2


def test_a_graph_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(GemmaScopeError, match="prune to 150"):
        drawn(graph_of(MOST_NODES))
