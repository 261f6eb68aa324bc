"""Head loadings add up to edges, and are what a head carries when all others are silent behind it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.head_loadings import head_loadings
from gemma_scope_tl.errors import GemmaScopeError
from tests.attribution.graph_coders import mixtures, sae_of
from tests.helpers import hooked, random_gemma, random_tokens

ROUNDING = 1e-12  # float64, relative to the largest edge


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("transcoders", "saes", "clt")]


@pytest.mark.parametrize("kind", [*SLOW, "mixture"])
def test_loadings_add_up_to_edges(kind: str) -> None:
    model = hooked(random_gemma("grouped", dtype=torch.float64), "bridge")
    ids, coders = random_tokens(model, batch=1, length=6)[0], mixtures(model)[kind]
    graph = gs.attribution_graph(model, ids, coders, logits=2)
    edges = graph.edges()
    edges = edges[edges["source"] != "bias_encoders"].iloc[:: max(1, len(edges) // 40)]
    pairs = list(zip(edges["source"], edges["target"], strict=True))
    table = head_loadings(model, graph, coders, pairs)
    sums = table.groupby(["source", "target"])["loading"].sum()
    weights = edges.set_index(["source", "target"])["weight"]
    np.testing.assert_allclose(sums.reindex(weights.index), weights, rtol=0, atol=ROUNDING * weights.abs().max())
    heads = table.dropna()
    across = heads[heads["source"].str.split("_").str[-1] != heads["target"].str.split("_").str[-1]]
    bypass = table[table["head"].isna()]
    moved = bypass.merge(across[["source", "target"]].drop_duplicates())
    of_positions = moved[~moved["source"].str.startswith("bias")]
    assert (of_positions["loading"] == 0).all() and len(of_positions)  # only heads move anything between tokens


def test_a_head_is_its_share_of_the_pattern() -> None:
    """With one head left in one layer, everything between two positions passes it."""
    plain = random_gemma("narrow-heads", dtype=torch.float64)
    with torch.no_grad():
        for number, layer in enumerate(plain.model.layers):
            keep = torch.zeros(32, dtype=torch.bool)
            keep[8:16] = number == 1  # the second head of the second layer
            layer.self_attn.o_proj.weight[:, ~keep] = 0.0
    model = hooked(plain, "bridge")
    ids, coders = random_tokens(model, batch=1, length=5)[0], [sae_of(model, "transcoder", 0)]
    graph = gs.attribution_graph(model, ids, coders, logits=2)
    edges = graph.edges()
    edges = edges[edges["source"].str.startswith("E_") & edges["target"].str.startswith("logit")]
    table = head_loadings(model, graph, coders, zip(edges["source"], edges["target"], strict=True))
    heads = table.dropna()
    assert set(
        zip(heads.loc[heads["loading"] != 0, "layer"], heads.loc[heads["loading"] != 0, "head"], strict=True)
    ) == {(1, 1)}
    with pytest.raises(GemmaScopeError, match="No edges"):
        head_loadings(model, graph, coders, [])
    with pytest.raises(gs.errors.UnknownNameError, match="logit"):
        head_loadings(model, graph, coders, [(edges["source"].iloc[0], "logit_1_99")])
    with pytest.raises(GemmaScopeError, match="give these"):
        head_loadings(model, graph, [sae_of(model, "att", 0)], [("a", "b")])
