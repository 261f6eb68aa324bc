"""Edges against finite differences, circuits against the chain rule; what is drawn is what was found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.graph import Circuit, circuit, latent_edges
from gemma_scope_tl.attributions.targets import logit_difference
from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.sites import BACKENDS
from gemma_scope_tl.viz.circuit_figure import draw_circuit, node_places
from gemma_scope_tl.viz.figures import new_figure, save_figure
from tests.helpers import hooked, random_gemma, random_sae, random_tokens, shared_model

METRIC = logit_difference(40, 50)
PAIRS = [
    (("res", 0), ("res", 2)),
    (("embedding", None), ("att", 1)),
    (("att", 1), ("transcoder", 1)),
    (("transcoder", 0), ("mlp", 2)),
    (("mlp", 1), ("res", 1)),
]


def double(backend: str) -> tuple[Any, torch.Tensor]:
    model = hooked(random_gemma(dtype=torch.float64), backend)
    return model, random_tokens(model, batch=1, length=8)


def double_sae(model: Any, place: tuple[str, int | None], **kwargs: Any) -> Any:
    return random_sae(model.dims, *place, **kwargs).double()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("up", "down"), PAIRS, ids=lambda place: f"{place[0]}{place[1]}")
def test_edges_are_finite_differences_of_the_downstream_pre_activation(up: Any, down: Any, backend: str) -> None:
    model, tokens = double(backend)
    upstream, downstream = double_sae(model, up, seed=1), double_sae(model, down, seed=2)
    listed = gs.features(model, tokens, downstream)
    targets = [(row.position, row.latent) for row in listed[listed["position"] >= 3].iloc[::60].head(3).itertuples()]
    table = latent_edges(model, tokens, upstream, downstream, targets)
    latents = table[table["kind"] == "latent"]
    read = f"{model.get_sae_hook_name(upstream)}"

    def pre_activations(position: int, latent: int, change: float) -> list[float]:
        """``z`` of every target while one upstream activation is changed through the splice."""
        seen: list[torch.Tensor] = []

        def change_one(acts: torch.Tensor, hook: Any) -> torch.Tensor:
            acts = acts.clone()
            acts[0, position, latent] += change
            return acts

        def keep(value: torch.Tensor, hook: Any) -> None:
            seen.append(value.reshape(1, 8, -1) @ downstream.W_enc + downstream.b_enc)

        from gemma_scope_tl.sites import get_site

        name = get_site(downstream.site).hook_name(downstream.layer, "hooked_transformer")
        with torch.no_grad():
            model.run_with_hooks_with_saes(
                tokens, saes=[upstream], use_error_term=True, fwd_hooks=[(read, change_one), (name, keep)]
            )
        return [seen[0][0, p, i].item() for p, i in targets]

    step = 1e-2  # rounding of the float32 norms over the step, and the step's square, are both near 1e-5
    checked = latents[latents["target_latent"] == targets[0][1]].head(4)
    checked = pd.concat([checked, latents[latents["target_latent"] == targets[-1][1]].head(4)])
    scale = latents["attribution"].abs().max()
    for row in checked.drop_duplicates(["position", "latent"]).itertuples():
        above, below = (pre_activations(row.position, row.latent, sign * step) for sign in (1, -1))
        for (position, latent), up_z, down_z in zip(targets, above, below, strict=True):
            mine = latents[
                (latents["target_position"] == position)
                & (latents["target_latent"] == latent)
                & (latents["position"] == row.position)
                & (latents["latent"] == row.latent)
            ]
            wanted = (up_z - down_z) / (2 * step) * row.activation
            assert mine["attribution"].item() == pytest.approx(wanted, rel=2e-3, abs=2e-4 * scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_all_nodes_in_effects_add_up_to_attributions(backend: str) -> None:
    """The chain rule: a node's attribution is its direct effect plus what goes through every node downstream."""
    model, tokens = double(backend)
    tokens = tokens[:, :4]
    places = [("embedding", None), ("att", 0), ("transcoder", 1), ("mlp", 2), ("res", 2)]
    saes = [double_sae(model, place, seed=i, d_sae=16) for i, place in enumerate(places)]
    saes.append(double_sae(model, ("transcoder", 0), seed=9, d_sae=16, skip=True))
    found = circuit(model, tokens, saes, METRIC, nodes=10_000, edges=1_000_000)
    inner = found.nodes[found.nodes["kind"] != "metric"]
    sums = found.edges.groupby("source")["effect"].sum().reindex(inner.index).fillna(0.0)
    np.testing.assert_allclose(sums, inner["attribution"], rtol=1e-5, atol=1e-6)  # the norms are float32
    assert {"latent", "error", "skip", "unspliced", "metric"} == set(found.nodes["kind"])
    ranks = found.nodes["rank"]
    assert (ranks[found.edges["source"]].to_numpy() < ranks[found.edges["target"]].to_numpy()).all()
    order = found.nodes.drop_duplicates("rank").sort_values("rank")["site"].tolist()
    assert order == ["embedding", "att", "transcoder", "transcoder", "mlp", "res", ""]
    # nothing goes around the residual stream: only its nodes touch the metric
    metric = int(found.nodes.index[-1])
    direct = found.nodes.loc[found.edges.loc[found.edges["target"] == metric, "source"], "site"]
    assert set(direct) == {"res"}


def test_nodes_and_edges_are_the_strongest() -> None:
    model = shared_model("grouped", "bridge")
    saes = [random_sae(model.dims, "mlp", 1), random_sae(model.dims, "res", 2, seed=1)]
    small, large = (circuit(model, "hello", saes, METRIC, nodes=n, edges=1000) for n in (10, 40))
    table = gs.attribute(model, "hello", saes, METRIC)
    strongest = table[table["kind"] != "bias"]["attribution"].abs().nlargest(10)
    np.testing.assert_allclose(small.nodes["attribution"].abs()[:-1], strongest, rtol=1e-6)
    pd.testing.assert_frame_equal(small.nodes.iloc[:-1], large.nodes.iloc[:10])
    assert small.metric == table.attrs["metric"] == small.nodes["attribution"].iloc[-1]
    assert small.tokens == ["<bos>", *"hello"]
    inside = large.edges[large.edges["source"].lt(10) & large.edges["target"].lt(10)].reset_index(drop=True)
    between = small.edges[small.edges["target"] < 10].reset_index(drop=True)
    pd.testing.assert_frame_equal(inside, between)
    few = circuit(model, "hello", saes, METRIC, nodes=10, edges=3)
    pd.testing.assert_frame_equal(few.edges, small.edges.head(3))
    assert small.edges["effect"].abs().is_monotonic_decreasing


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_is_left_as_it_was(backend: str) -> None:
    model = shared_model("grouped", backend)
    saes = [random_sae(model.dims, "mlp", 1), random_sae(model.dims, "res", 2, seed=1)]
    tokens = random_tokens(model, batch=1, length=6)
    hooks = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
    with torch.no_grad():
        before = model(tokens)
        found = circuit(model, tokens, saes, METRIC, nodes=6)
        with pytest.raises(GemmaScopeError, match="no gradient"):
            circuit(model, tokens, saes, lambda logits: logits.detach().sum())
        assert torch.equal(model(tokens), before)
    assert len(found.edges) > 0
    assert all(p.grad is None for p in model.parameters())
    assert any(p.requires_grad for p in model.parameters())
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == hooks


def test_what_has_no_circuit_raises() -> None:
    model = shared_model("grouped", "bridge")
    mlp, res = random_sae(model.dims, "mlp", 1), random_sae(model.dims, "res", 1)
    with pytest.raises(GemmaScopeError, match="2 were given"):
        circuit(model, ["hi", "hello"], mlp, METRIC)
    with pytest.raises(SpliceError, match="hook_mlp_out is taken: 2"):
        circuit(model, "hi", [mlp, random_sae(model.dims, "transcoder", 1)], METRIC)
    with pytest.raises(GemmaScopeError, match="nodes must be 1 or more, not 0"):
        circuit(model, "hi", mlp, METRIC, nodes=0)
    with pytest.raises(SpliceError, match=r"resid_post is not before .*hook_mlp_out .*swap"):
        latent_edges(model, "hello", res, mlp, [(1, 2)])
    with pytest.raises(GemmaScopeError, match="No targets"):
        latent_edges(model, "hello", mlp, res, [])
    with pytest.raises(SpliceError, match="No latent 256"):
        latent_edges(model, "hello", mlp, res, [(1, 256)])
    with pytest.raises(GemmaScopeError, match="No position 6"):
        latent_edges(model, "hello", mlp, res, [(6, 1)])
    active = set(gs.features(model, "hello", res).query("position == 3")["latent"])
    silent = next(i for i in range(256) if i not in active)
    with pytest.raises(GemmaScopeError, match=f"Latent {silent} is not active at position 3"):
        latent_edges(model, "hello", mlp, res, [(3, silent)])


def test_the_figure_shows_every_node_and_edge(tmp_path: Any) -> None:
    kinds = ["latent", "latent", "error", "metric"]
    nodes = pd.DataFrame(
        {
            "kind": kinds,
            "site": ["mlp", "mlp", "res", ""],
            "layer": pd.array([1, 1, 2, None], dtype="Int64"),
            "position": [1, 1, 2, 2],
            "latent": pd.array([7, 9, None, None], dtype="Int64"),
            "attribution": [1.0, -0.5, 0.2, 3.0],
            "rank": [1, 1, 3, 6],
        }
    )
    edges = pd.DataFrame({"source": [0, 1], "target": [2, 3], "weight": [1.0, 1.0], "effect": [0.4, -0.1]})
    _, (axes,) = new_figure(1)
    figure = axes.figure
    draw_circuit(axes, Circuit(nodes, edges, ["<bos>", "a", "$"], 3.0), "title")
    places = node_places(nodes, 3)  # columns of 0.5, 2 (two nodes side by side) and 1; the metric's line is third
    assert places == {0: (1.0, 0.0), 1: (2.0, 0.0), 2: (3.0, 1.0), 3: (3.0, 2.0)}
    lines = [np.column_stack(line.get_data()).tolist() for line in axes.lines]
    assert lines == [[list(places[0]), list(places[2])], [list(places[1]), list(places[3])]]
    assert axes.lines[0].get_linewidth() > axes.lines[1].get_linewidth()
    assert axes.lines[0].get_color() != axes.lines[1].get_color()
    assert [tuple(dots.get_offsets()[0]) for dots in axes.collections] == [places[i] for i in range(4)]
    assert [text.get_text() for text in axes.texts] == ["7", "9", "3.00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mlp 1", "res 2", "metric"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["<bos>", "a", r"\$"]
    assert axes.get_xticks().tolist() == [0.25, 1.5, 3.0]
    assert save_figure(figure, tmp_path / "circuit.png").read_bytes().startswith(b"\x89PNG")
