"""Predicted effects against interventions: exact in the frozen pass, and correlated in a trained model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.measured import correlations, measured_effects
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from tests.attribution.graph_coders import mixtures
from tests.helpers import hooked, random_gemma, random_tokens

ROUNDING = 1e-12  # float64, relative to the largest effect


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", [pytest.param("saes", marks=SLOW), pytest.param("clt", marks=SLOW), "mixture"])
def test_direct_effects_are_measured_exactly_in_the_frozen_pass(kind: str) -> None:
    model = hooked(random_gemma("gemma3", dtype=torch.float64), "bridge")
    ids, coders = random_tokens(model, batch=1, length=6)[0], mixtures(model)[kind]
    graph = gs.attribution_graph(model, ids, coders, logits=2)
    table = measured_effects(model, graph, coders, sources=6, targets=8, scale=0.5)
    frozen = table[table["measured_in"] == "frozen"]
    error = (frozen["predicted"] - frozen["measured"]).abs().max()
    assert error <= ROUNDING * graph.nodes["activation"].abs().max() and (frozen["measured"] != 0).any()
    assert set(table["measured_in"]) == {"frozen", "replacement", "model"} and np.isfinite(table["measured"]).all()


@pytest.mark.parametrize("kind", ["saes", pytest.param("clt", marks=SLOW), pytest.param("mixture", marks=SLOW)])
def test_small_changes_have_their_total_effects_in_the_replacement(kind: str) -> None:
    model = hooked(random_gemma("grouped", dtype=torch.float64), "bridge")
    ids, coders = random_tokens(model, batch=1, length=6)[0], mixtures(model)[kind]
    graph = gs.attribution_graph(model, ids, coders, logits=2)
    step = 1e-5  # switches no latent, and is large beside rounding
    table = measured_effects(model, graph, coders, sources=5, targets=12, scale=1 + step)
    found = table[table["measured_in"] == "replacement"]
    error = (found["predicted"] - found["measured"]).abs().max()
    assert error < 1e-8 * found["measured"].abs().max()  # rounding of values near 1, divided by the step
    ablated = measured_effects(model, graph, coders, sources=5, targets=12)
    assert correlations(ablated)["n"].sum() == len(ablated)


def test_total_effects_solve_the_graph_and_are_measured_as_plain_hooks_do() -> None:
    plain = random_gemma("gemma3", dtype=torch.float64)
    model = hooked(random_gemma("gemma3", dtype=torch.float64), "bridge")
    ids, (coder,) = random_tokens(model, batch=1, length=6)[0], mixtures(model)["crosscoder"]
    graph = gs.attribution_graph(model, ids, coder, logits=2, centred=False)
    latents = (graph.nodes["kind"] == "latent").to_numpy()
    row = graph.nodes[latents & (graph.nodes["layer"] == 0).to_numpy()].iloc[3]
    table = measured_effects(model, graph, coder, sources=row["node_id"], targets=8)
    total = table[table["measured_in"] == "model"].set_index("target")

    dense, inverse = graph.weights.toarray(), np.where(latents, 1 / np.where(latents, graph.nodes["activation"], 1), 0)
    start = -(graph.nodes["node_id"] == row["node_id"]).to_numpy().astype(float)
    solved = np.linalg.solve(np.eye(len(graph)) - dense * inverse, dense @ start)
    predicted = [solved[graph.number_of(one)] for one in total.index]
    np.testing.assert_allclose(total["predicted"], predicted, rtol=1e-9, atol=1e-12)

    written = -row["activation"] * coder.W_dec[0][int(row["latent"])].detach()  # [layers, d]
    with torch.no_grad():
        clean = plain(ids[None]).logits[0, -1]
        for plane, layer in enumerate(coder.layers):
            change = torch.zeros(6, 64, dtype=torch.float64)
            change[int(row["position"])] = written[plane]
            plain.model.layers[layer].register_forward_hook(lambda m, a, out, change=change: out + change)
        changes = plain(ids[None]).logits[0, -1] - clean
    logits = graph.nodes[graph.nodes["kind"] == "logit"]
    wanted = changes[logits["token_id"].astype(int).tolist()].numpy()
    got = total.loc[logits["node_id"], "measured"]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())  # plain norms are float32


def test_what_is_no_intervention_raises() -> None:
    model = hooked(random_gemma("gemma3", dtype=torch.float64), "hooked_transformer")
    ids, coder = random_tokens(model, batch=1, length=4)[0], mixtures(model)["crosscoder"]
    graph = gs.attribution_graph(model, ids, coder, logits=1)
    with pytest.raises(UnknownNameError, match="latent of the graph"):
        measured_effects(model, graph, coder, sources=graph.nodes["node_id"].iloc[-1])
    with pytest.raises(UnknownNameError, match="Unknown node"):
        measured_effects(model, graph, coder, sources=["0_1_99"])
    with pytest.raises(GemmaScopeError, match="targets"):
        measured_effects(model, graph, coder, targets=0)


@pytest.mark.slow
def test_effects_correlate_in_a_trained_model() -> None:
    model = gs.load_model("bundled-gemma3")
    coders = [gs.load_sae("bundled-gemma3", "transcoder", layer, "256", affine=True) for layer in range(6)]
    graph = gs.attribution_graph(model, "In the beginning God created the heaven", coders)
    table = measured_effects(model, graph, coders, sources=8, targets=16)
    found = correlations(table)
    latents = found[found["target"] == "latents"].set_index("measured_in")
    assert latents["largest_error"].to_dict()["frozen"] < 1e-4  # float32
    pearson = latents["pearson"].to_dict()
    assert pearson["replacement"] > 0.8 and pearson["model"] > 0.5
