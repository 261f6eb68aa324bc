"""Options of attribution graphs: what is chosen, where coders apply, how much memory is used, what raises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.attributions.placing import Reader
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError
from tests.attribution.graph_coders import layered_of, mixtures, sae_of
from tests.helpers import hooked, random_gemma, random_tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return hooked(random_gemma("grouped", dtype=torch.float64), "bridge")


@pytest.fixture(scope="module")
def ids(model: Any) -> torch.Tensor:
    return random_tokens(model, batch=1, length=6)[0]


def _between(graph: AttributionGraph, nodes: list[str]) -> Any:
    rows = [graph.number_of(one) for one in nodes]
    return graph.weights.toarray()[rows][:, rows]


def test_fewer_latents_are_the_most_influential_and_keep_their_edges(model: Any, ids: torch.Tensor) -> None:
    coders = mixtures(model)["mixture"]
    whole = gs.attribution_graph(model, ids, coders, logits=2)
    few = gs.attribution_graph(model, ids, coders, logits=2, max_latent_nodes=24, batch_size=3)
    kept = few.nodes["node_id"].tolist()
    np.testing.assert_allclose(_between(whole, kept), few.weights.toarray(), rtol=0, atol=1e-13)
    latents = few.nodes[few.nodes["kind"] == "latent"]
    active = whole.settings["active_latents"]
    assert len(latents) == 24 and few.settings["latents_left_out"] == active - 24 > 10
    by_influence = whole.nodes[whole.nodes["kind"] == "latent"].nlargest(24, "influence")["node_id"]
    assert len(set(by_influence) & set(latents["node_id"])) >= 18  # chosen in turns, by the effects known until then
    assert few.checks["missing_share"].max() < 1e-13  # of all parts, also of those that were left out


def test_any_budget_gives_the_same_graph_and_bounds_what_is_gathered(
    model: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    coders = mixtures(model)["clt"]
    gathered: list[int] = []
    rows = Reader.rows

    def counted(self: Reader, plane: int, latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        found = rows(self, plane, latents, like)
        gathered.append(found.numel())
        return found

    monkeypatch.setattr(Reader, "rows", counted)
    graphs: dict[int, AttributionGraph] = {}
    largest: dict[int, int] = {}
    for budget in (1 << 30, 60_000, 1):
        gathered.clear()
        graphs[budget] = gs.attribution_graph(model, ids, coders, logits=2, budget=budget)
        largest[budget] = max(gathered)
    one_position = 14 * 64  # the latents of the widest layer, which a position needs at once
    assert largest[60_000] <= 60_000 // 16 < largest[1 << 30] and largest[1] <= one_position
    for budget in (60_000, 1):  # the effects are in a file
        same = graphs[budget].weights - graphs[1 << 30].weights
        assert abs(same).max() < 1e-13
        assert graphs[budget].settings["batch_size"] < graphs[1 << 30].settings["batch_size"]


@pytest.mark.parametrize(
    ("centred", "soft_cap"), [(True, "ratio"), (False, "ratio"), (True, "before"), (False, "before")]
)
def test_logit_nodes_have_the_models_logits(model: Any, ids: torch.Tensor, centred: bool, soft_cap: str) -> None:
    graph = gs.attribution_graph(model, ids, sae_of(model, "res", 1), logits=4, centred=centred, soft_cap=soft_cap)
    with torch.no_grad():
        logits = model(ids[None])[0, -1]
    probabilities = logits.softmax(0)
    wanted = logits if soft_cap == "ratio" else 30 * (logits / 30).atanh()
    wanted = wanted - wanted.mean() if centred else wanted
    nodes = graph.nodes[graph.nodes["kind"] == "logit"]
    chosen = nodes["token_id"].astype(int).tolist()
    np.testing.assert_allclose(nodes["activation"], wanted[chosen], rtol=0, atol=1e-5)  # the model's norms are float32
    np.testing.assert_allclose(nodes["probability"], probabilities[chosen], rtol=1e-5)
    enough = int((probabilities.sort(descending=True).values.cumsum(0) < 0.95).sum()) + 1
    assert chosen == probabilities.topk(min(4, enough)).indices.tolist()
    assert graph.checks["missing_share"].max() < 1e-13


def test_logits_by_share_words_and_position(model: Any, ids: torch.Tensor) -> None:
    sae = sae_of(model, "att", 1)
    assert (gs.attribution_graph(model, ids, sae, probability=0.0).nodes["kind"] == "logit").sum() == 1
    words = gs.attribution_graph(model, "hello", sae, logits=["a", 40], position=2)
    assert words.nodes["node_id"].tolist()[-2:] == [f"logit_{model.to_single_token('a')}_2", "logit_40_2"]
    assert words.tokens == ("<bos>", *"hello") and words.text == "hello"
    later = words.nodes[words.nodes["position"] > 2]["node_id"]
    assert not set(words.edges().query("target.str.startswith('logit')")["source"]) & set(later)
    for bad, message in (
        (["a", "a"], "different"),
        ([], "Give one token"),
        ([96], "vocabulary"),
        (0, "logits"),
        (["ab"], "2 tokens"),
    ):
        with pytest.raises(GemmaScopeError, match=message):
            gs.attribution_graph(model, ids, sae, logits=bad)


def test_where_no_coder_applies_the_tensor_is_one_error(model: Any, ids: torch.Tensor) -> None:
    sae = sae_of(model, "res", 1)
    some = gs.attribution_graph(model, ids, sae, logits=1, positions=[1, 4])
    assert set(some.nodes[some.nodes["kind"] == "latent"]["position"]) == {1, 4}
    assert set(some.nodes[some.nodes["kind"] == "error"].query("site == 'res'")["position"]) == set(range(6))
    all_of_it = gs.attribution_graph(model, ids, sae, logits=1, exclude_special_tokens=False)
    assert 0 in set(all_of_it.nodes[all_of_it.nodes["kind"] == "latent"]["position"])
    for graph in (some, all_of_it):
        assert graph.checks["missing_share"].max() < 1e-13


def test_padding_and_names_change_nothing(model: Any, ids: torch.Tensor) -> None:
    sae = sae_of(model, "transcoder", 1)
    wanted = gs.attribution_graph(model, ids, sae, logits=2)
    for pads in ((3, 0), (0, 2)):
        found = gs.attribution_graph(model, torch.nn.functional.pad(ids, pads), {"mine": sae}, logits=2)
        assert found.nodes["node_id"].tolist() == wanted.nodes["node_id"].tolist()
        np.testing.assert_allclose(found.weights.toarray(), wanted.weights.toarray(), rtol=0, atol=1e-6)
        assert set(found.nodes["coder"].dropna()) == {"mine"}


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
def test_labels_name_the_kind_of_coder(kind: str, model: Any, ids: torch.Tensor) -> None:
    nodes = gs.attribution_graph(model, ids, layered_of(model, kind, [0, 1]), logits=1).nodes
    latents = nodes[nodes["kind"] == "latent"]
    assert len(latents)
    for layer, latent, label in zip(latents["layer"], latents["latent"], latents["label"], strict=True):
        assert label == f"{kind} {layer} #{latent}"


def test_small_edges_are_left_out_and_said(model: Any, ids: torch.Tensor) -> None:
    sae, seen = sae_of(model, "transcoder", 1), list[tuple[int, int]]()
    whole = gs.attribution_graph(model, ids, sae, logits=2, progress=lambda done, total: seen.append((done, total)))
    fewer = gs.attribution_graph(model, ids, sae, logits=2, smallest_edge=0.01)
    assert fewer.settings["edges_left_out"] == whole.weights.nnz - fewer.weights.nnz > 0
    assert fewer.checks.equals(whole.checks)
    assert seen[-1][0] == seen[-1][1] == len(whole.checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_add_up_for_models_of_any_dtype(dtype: torch.dtype) -> None:
    model = hooked(random_gemma("gemma3", dtype=dtype), "bridge")
    coders = [one.to(dtype) for one in mixtures(model)["mixture"]]
    graph = gs.attribution_graph(model, random_tokens(model, batch=1, length=8)[0], coders, logits=2)
    assert graph.settings["dtype"] == "float32" and graph.checks["missing_share"].max() < 1e-6
    assert graph.settings["deviation"] < (1e-4 if dtype == torch.float32 else 0.1)


def test_what_cannot_be_a_graph_raises(model: Any, ids: torch.Tensor) -> None:
    sae = sae_of(model, "res", 1)
    for coders, message in (
        ([sae, sae_of(model, "res", 1, seed=2)], "Two coders are called"),
        ({"a": sae, "b": sae_of(model, "res", 1, seed=2)}, "res/layer_1 is taken: a and b"),
        ([sae_of(model, "mlp", 1), sae_of(model, "transcoder", 1)], "mlp/layer_1 is taken"),
        ([sae, mixtures(model)["crosscoder"][0], sae_of(model, "res", 2)], "res/layer_2 is taken"),
        ([], "No SAE was given"),
        ({}, "No SAE was given"),
        ("res", "One or several SAEs"),
        ([sae, 1], "not an SAE"),
    ):
        with pytest.raises(SpliceError, match=message):
            gs.attribution_graph(model, ids, coders)
    with pytest.raises(UnknownNameError, match="soft_cap 'none'"):
        gs.attribution_graph(model, ids, sae, soft_cap="none")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"dtype": "bfloat16"}, "float32 or float64"),
        ({"position": 6}, "No position 6"),
        ({"position": -9}, "No position -9"),
        ({"position": 1.5}, "position must be"),
        ({"logits": True}, "number of tokens, or tokens"),
        ({"logits": 2.0}, "number of tokens, or tokens"),
        ({"probability": 1.5}, "probability must be at most 1"),
        ({"smallest_edge": 2}, "smallest_edge must be below 1"),
        ({"budget": 0}, "budget"),
        ({"max_latent_nodes": 0}, "max_latent_nodes"),
        ({"centred": "yes"}, "centred"),
        ({"smallest_edge": -1}, "smallest_edge"),
        ({"batch_size": True}, "batch_size"),
    )
    for how, message in wrong:
        with pytest.raises(GemmaScopeError, match=message):
            gs.attribution_graph(model, ids, sae, **how)
    with pytest.raises(GemmaScopeError, match="2 were given"):
        gs.attribution_graph(model, ids.expand(2, -1), sae)
    with gs.splice(model, sae_of(model, "res", 0)), pytest.raises(SpliceError, match="attached"):
        gs.attribution_graph(model, ids, sae)
    doubled = model.hooks([("blocks.1.hook_resid_post", lambda x, hook: 2 * x)])
    with doubled, pytest.raises(GemmaScopeError, match="does not reproduce"):
        gs.attribution_graph(model, ids, sae)


@pytest.mark.parametrize("array", ["W_enc", "W_dec", "b_dec", "W_skip"])
def test_weights_that_are_not_finite_raise(model: Any, ids: torch.Tensor, array: str) -> None:
    (coder,) = mixtures(model)["clt"]
    getattr(coder, array)[1].data.fill_(float("nan"))
    with pytest.raises(GemmaScopeError, match="NaN or infinite"):
        gs.attribution_graph(model, ids, coder)
