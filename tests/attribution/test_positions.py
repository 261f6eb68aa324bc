"""Attributions, circuits and ablations at chosen positions: against the whole call, and against hooks by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.gradients import ablation_effects
from gemma_scope_tl.attributions.graph import latent_edges
from gemma_scope_tl.attributions.targets import logit_difference
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import BACKENDS
from tests.attribution.test_attribute import double_model, double_sae
from tests.helpers import random_sae, random_tokens, shared_model

METRIC = logit_difference(40, 50)
LATER = slice(4, None)
KEYS = ["sequence", "position", "site", "layer", "kind", "latent", "activation", "attribution"]


def padded(model: Any, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, one of them padded by an ordinary id, and their mask."""
    tokens, mask = random_tokens(model, length=10), torch.ones(2, 10, dtype=torch.bool)
    if side == "left":
        tokens[1, :3], tokens[1, 3], mask[1, :3] = 9, 2, False
    else:
        tokens[1, 7:], mask[1, 7:] = 9, False
    return tokens, mask


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    return table[KEYS].sort_values(KEYS[:6], ignore_index=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", ["grouped", "gemma3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_at_the_positions_stay_and_all_others_become_one(backend: str, config: str, side: str) -> None:
    """The passes are the same, so what is left of the whole table is left to the bit."""
    model = shared_model(config, backend)
    saes = [random_sae(model.dims, "att", 1), random_sae(model.dims, "transcoder", 2, skip=True)]
    tokens, mask = padded(model, side)
    whole = gs.attribute(model, tokens, saes, METRIC, attention_mask=mask)
    some = gs.attribute(model, tokens, saes, METRIC, attention_mask=mask, positions=LATER)
    assert some.attrs == whole.attrs
    pd.testing.assert_frame_equal(
        ordered(some[some["kind"] != "unspliced"]), ordered(whole.query("position >= 4")), check_exact=True
    )
    one = some[some["kind"] == "unspliced"]
    assert sorted(one["position"].unique()) == [0, 1, 2, 3]
    for (sequence, position, site), rows in one.groupby(["sequence", "position", "site"]):
        same = whole[(whole["sequence"] == sequence) & (whole["position"] == position) & (whole["site"] == site)]
        assert len(rows) == 1
        total = same["attribution"].sum()  # a sum of some hundred float32 terms
        assert rows["attribution"].iloc[0] == pytest.approx(total, rel=1e-3, abs=1e-5 * same["attribution"].abs().sum())
    by_hand = mask & (torch.arange(10) - mask.int().argmax(-1, keepdim=True) >= 4)
    masked = gs.attribute(model, tokens, saes, METRIC, attention_mask=mask, positions=by_hand)
    pd.testing.assert_frame_equal(masked, some, check_exact=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_path_changes_only_the_positions(backend: str) -> None:
    model = double_model(backend)
    sae = double_sae(model, "mlp", 1)
    tokens = random_tokens(model, batch=1, length=8)

    def without_latents(value: torch.Tensor, hook: Any) -> torch.Tensor:
        out = value.clone()
        out[:, 4:] -= sae.encode(value[:, 4:]) @ sae.W_dec
        return out

    with torch.no_grad():
        wanted = METRIC(model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", without_latents)])).item()
    table = gs.attribute(model, tokens, sae, METRIC, method="integrated", steps=8, positions=LATER)
    assert table.attrs["baseline_metric"][0] == pytest.approx(wanted, rel=1e-5)  # norms are float32 in any dtype
    assert set(table[table["kind"] == "latent"]["position"]) <= set(range(4, 8))
    assert (table[table["kind"] != "latent"]["attribution"] == 0).all()
    other = random_tokens(model, batch=1, length=8, seed=1)
    against = gs.attribute(model, tokens, sae, METRIC, counterfactual=other, positions=LATER)
    assert set(against[against["kind"] == "unspliced"]["position"]) == {0, 1, 2, 3}


@pytest.mark.parametrize("backend", BACKENDS)
def test_ablations_act_at_the_positions_alone(backend: str) -> None:
    model = shared_model("grouped", backend)
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model, batch=1, length=9)
    listed = gs.features(model, tokens, sae).groupby("position").head(1)
    pairs = list(zip(listed["position"].tolist(), listed["latent"].tolist(), strict=True))
    whole = ablation_effects(model, tokens, sae, METRIC, pairs)
    some = ablation_effects(model, tokens, sae, METRIC, pairs, positions=LATER)
    later = np.array([position >= 4 for position, _ in pairs])
    assert np.abs(whole).min() > 1e-3
    assert (np.array(some)[~later] == 0).all()  # the same pass in every row of the batch
    # Elsewhere the error term, which has gone, only rounded.
    np.testing.assert_allclose(np.array(some)[later], np.array(whole)[later], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_circuits_add_up_with_whole_tensors_as_nodes(backend: str) -> None:
    """With all nodes, an attribution is the sum of a node's direct effects: the chain rule."""
    model = double_model(backend)
    saes = [double_sae(model, "res", layer, d_sae=12, seed=layer) for layer in (0, 2)]
    tokens = random_tokens(model, batch=1, length=7)
    found = gs.circuit(model, tokens, saes, METRIC, nodes=10_000, edges=1_000_000, positions=LATER)
    nodes = found.nodes
    kinds = nodes[nodes["kind"] != "metric"].groupby("position")["kind"].agg(set)
    assert all(kinds[at] == {"unspliced"} for at in range(4))
    assert all({"latent", "error"} <= kinds[at] and "unspliced" not in kinds[at] for at in range(4, 7))
    whole = gs.circuit(model, tokens, saes, METRIC, nodes=10_000, edges=1_000_000).nodes
    key = ["layer", "position", "latent"]
    some, same = (
        table[(table["kind"] == "latent") & (table["position"] >= 4)].set_index(key)["attribution"].sort_index()
        for table in (nodes, whole)
    )
    pd.testing.assert_series_equal(some, same, check_exact=True)
    # The bias of the later SAE is a constant, which is no node: nothing passes through it. What reaches the later SAE
    # at the chosen positions goes through its latents and its error, and elsewhere through its whole tensor.
    sums = found.edges.groupby("source")["effect"].sum()
    for number, node in nodes[nodes["kind"] != "metric"].iterrows():
        assert sums.get(number, 0.0) == pytest.approx(node["attribution"], rel=1e-5, abs=1e-7)  # float32 norms


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges_into_a_latent(backend: str) -> None:
    model = shared_model("grouped", backend)
    first, second = random_sae(model.dims, "res", 0), random_sae(model.dims, "mlp", 2)
    tokens = random_tokens(model, batch=1, length=8)
    listed = gs.features(model, tokens, second)
    late = listed[listed["position"] == 7].iloc[0]
    early = listed[listed["position"] == 2].iloc[0]
    target = [(7, int(late["latent"]))]
    whole = latent_edges(model, tokens, first, second, target)
    some = latent_edges(model, tokens, first, second, target, positions=LATER)
    pd.testing.assert_frame_equal(
        ordered(some[some["kind"] != "unspliced"]), ordered(whole.query("position >= 4")), check_exact=True
    )
    assert set(some[some["kind"] == "unspliced"]["position"]) == {0, 1, 2, 3}
    with pytest.raises(GemmaScopeError, match="is not active at position 2"):
        latent_edges(model, tokens, first, second, [(2, int(early["latent"]))], positions=LATER)
