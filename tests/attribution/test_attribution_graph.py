"""Graphs against the Jacobian of a frozen pass of plain Hugging Face, and the sums of their parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from tests.attribution.graph_coders import mixtures
from tests.attribution.graph_oracle import Oracle, recorded
from tests.helpers import hooked, random_gemma, random_tokens

CONVERTED = 1e-6  # HookedTransformer's conversion of weights rounds gains and the embedding's scale to float32
KINDS = ("transcoders", "saes", "clt", "crosscoder", "mixture")
FLOAT64 = 1e-11  # relative to the largest effect: sums of about a thousand products, through at most seven layers


def _double(config: str, backend: str) -> tuple[Any, Any, torch.Tensor]:
    plain = random_gemma(config, dtype=torch.float64)
    model = hooked(random_gemma(config, dtype=torch.float64), backend)
    return plain, model, random_tokens(model, batch=1, length=6)[0]


def _column(row: Any) -> tuple[Any, ...]:
    """The oracle's name of a node."""
    layer, position = (-1 if pd.isna(number) else int(number) for number in (row.layer, row.position))
    match row.kind:
        case "latent":
            return "latent", row.site, layer, position, int(row.latent)
        case "embedding":
            return "embedding", position
        case "bias":
            return "bias", row.site, layer
        case _:
            raw = "without a coder" in row.label or "read by the SAE" in row.label
            return ("mlp", layer, position) if raw else ("error", row.site, layer, position)


FAST = [("grouped", "saes"), ("grouped", "mixture"), ("gemma3", "transcoders"), ("gemma3", "clt")]
SLOW = [(config, kind) for config in ("grouped", "gemma3") for kind in KINDS if (config, kind) not in FAST]
CASES = [
    *((*case, "bridge") for case in FAST),
    *(pytest.param(*case, "bridge", marks=pytest.mark.slow) for case in SLOW),
    ("grouped", "mixture", "hooked_transformer"),
    pytest.param("gemma3", "clt", "hooked_transformer", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("config", "kind", "backend"), CASES)
def test_weights_are_the_jacobian_of_a_frozen_pass(config: str, kind: str, backend: str) -> None:
    plain, model, ids = _double(config, backend)
    coders = mixtures(model)[kind]
    graph = gs.attribution_graph(model, ids, coders, logits=3, probability=1.0, budget=40_000)
    assert graph.settings["dtype"] == "float64"
    oracle = Oracle(plain, ids, coders, config == "grouped", ids != 2, recorded(model, ids))
    sources = (graph.nodes["kind"] != "logit") & (graph.nodes["node_id"] != "bias_encoders")
    columns = np.flatnonzero(sources)
    names = [_column(row) for row in graph.nodes.iloc[columns].itertuples()]
    latents = graph.nodes[graph.nodes["kind"] == "latent"]
    assert len(latents) == sum(int((f != 0).sum()) for f in oracle.acts.values()) > 10
    dense, tolerance = graph.weights.toarray(), FLOAT64 if backend == "bridge" else CONVERTED
    for number in [*latents.index[:: max(1, len(latents) // 6)]]:
        row = graph.nodes.loc[number]
        z = oracle.pre[row.site, int(row.layer)][int(row.position), int(row.latent)]
        assert row.activation == pytest.approx(float(z.detach()), rel=tolerance)
        wanted = oracle.effects(z)
        expected = np.array([wanted[name] for name in names])
        np.testing.assert_allclose(dense[number, columns], expected, rtol=0, atol=tolerance * np.abs(expected).max())
        assert set(wanted) >= set(names)
    unembedding = plain.lm_head.weight.detach()
    for number in graph.nodes.index[graph.nodes["kind"] == "logit"]:
        u = oracle.final[-1] @ unembedding.T
        cap = plain.config.final_logit_softcapping
        ratio = torch.ones_like(u) if cap is None else (cap * (u / cap).tanh() / u).detach()
        logit = u * ratio
        wanted = oracle.effects(logit[graph.nodes["token_id"].tolist()[number]] - logit.mean())
        expected = np.array([wanted[name] for name in names])
        np.testing.assert_allclose(dense[number, columns], expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert graph.checks["missing_share"].max() < 1e-13
