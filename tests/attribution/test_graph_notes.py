"""Notes on latents, against plain Hugging Face hooks on a random model, for a cross-layer transcoder and an SAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma_scope_tl.attributions.making import attribution_graph
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError
from gemma_scope_tl.viz.graph_notes import LatentKey, LatentNote, graph_notes
from gemma_scope_tl.viz.latent_facts import PageText
from tests.attribution.graph_coders import layered_of, sae_of
from tests.helpers import decoder_of, hooked, random_gemma, random_tokens

ROUNDING = 1e-4  # float32, on activations and logits of about 3; notes keep four digits of logits, three of activations


class World:
    """A model, its plain twin, coders, a text, and the tensors that the coders read in the twin."""

    def __init__(self) -> None:
        self.plain, self.model = random_gemma("gemma3"), hooked(random_gemma("gemma3"), "bridge")
        self.last = self.model.dims.n_layers - 1
        coders = {"layered": layered_of(self.model, "clt", [0, self.last]), "single": sae_of(self.model, "res", 1)}
        self.coders = {name: coder.float() for name, coder in coders.items()}
        self.ids = random_tokens(self.model, batch=5, length=12)
        self.graph = attribution_graph(self.model, self.ids[0], self.coders, logits=2)
        self.text = PageText(self.model, self.ids, batch_size=2)
        self.read: dict[LatentKey, torch.Tensor] = {}
        layers = decoder_of(self.plain).layers
        for name, layer, module in (
            ("layered", 0, layers[0].pre_feedforward_layernorm),
            ("layered", self.last, layers[self.last].pre_feedforward_layernorm),
            ("single", 1, layers[1]),
        ):
            self._record(module, (name, layer, -1))
        with torch.no_grad():
            self.plain(self.ids)

    def _record(self, module: Any, key: LatentKey) -> None:
        def keep(_: Any, __: Any, out: Any) -> None:
            self.read[key] = out[0] if isinstance(out, tuple) else out

        module.register_forward_hook(keep)

    def acts(self, key: LatentKey) -> torch.Tensor:
        """``[rows, pos]`` by the equation, 0 at BOS."""
        name, layer, latent = key
        coder = self.coders[name]
        if name == "layered":
            k = coder.layers.index(layer)
            W, b, threshold = coder.W_enc[k][:, latent], coder.b_enc[k][latent], coder.threshold[k][latent]
        else:
            W, b, threshold = coder.W_enc[:, latent], coder.b_enc[latent], coder.threshold[latent]
        z = self.read[name, layer, -1] @ W + b
        return torch.where((z > threshold) & (self.ids != 2), z, 0.0).detach()

    def logits(self, row: torch.Tensor) -> torch.Tensor:
        decoder = decoder_of(self.plain)
        return ((row * (1 + decoder.norm.weight)) @ self.plain.lm_head.weight.T).detach()


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def notes(world: World) -> dict[LatentKey, LatentNote]:
    return graph_notes(world.graph, world.model, world.coders, world.text, latents=1000, examples=3, around=2, k=4)


def test_all_latents_of_the_graph_have_a_note(world: World, notes: dict[LatentKey, LatentNote]) -> None:
    nodes = world.graph.nodes[world.graph.nodes["kind"] == "latent"]
    keys = {(c, int(n), int(i)) for c, n, i in zip(nodes["coder"], nodes["layer"], nodes["latent"], strict=True)}
    assert set(notes) == keys and {name for name, _, _ in keys} == {"layered", "single"}


def test_where_latents_fire(world: World, notes: dict[LatentKey, LatentNote]) -> None:
    for key, note in notes.items():
        acts = world.acts(key)
        assert note.tokens == int((world.ids != 2).sum()) and note.fired == int((acts > 0).sum())
        assert note.maximum == pytest.approx(float(acts.max()), abs=ROUNDING)
        strongest = acts.max(dim=1).values.sort(descending=True).values
        wanted = [float(v) for v in strongest[:3] if v > 0]
        peaks = [one["activations"][one["peak"]] for one in note.examples]
        assert peaks == pytest.approx(wanted, abs=1e-3)  # kept with three digits


def test_promoted_tokens_of_every_written_layer(world: World, notes: dict[LatentKey, LatentNote]) -> None:
    for (name, layer, latent), note in notes.items():
        coder = world.coders[name]
        if name == "layered":
            k = coder.layers.index(layer)
            rows, layers = coder.W_dec[k][latent], list(coder.layers[k:])
        else:
            rows, layers = coder.W_dec[latent][None], [1]
        assert [plane.layer for plane in note.planes] == layers
        for row, plane in zip(rows, note.planes, strict=True):
            logits = world.logits(row)
            for found, wanted in ((plane.promoted, logits.topk(4)), (plane.suppressed, logits.topk(4, largest=False))):
                assert [v for _, v in found] == pytest.approx(wanted.values.tolist(), abs=ROUNDING)
                assert [t for t, _ in found] == [world.model.tokenizer.decode([i]) for i in wanted.indices.tolist()]


def test_chosen_latents_labels_and_no_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = world.graph.nodes[world.graph.nodes["kind"] == "latent"].iloc[3]
    key = (node["coder"], int(node["layer"]), int(node["latent"]))
    monkeypatch.setattr(PageText, "parts", lambda self: pytest.fail("a pass was run"))
    found = graph_notes(
        world.graph, world.model, world.coders, world.text, latents=[node["node_id"]], labels={key: "cats"}, examples=0
    )
    assert list(found) == [key] and found[key].label == "cats" and found[key].fired is None
    most = graph_notes(world.graph, world.model, world.coders, latents=2, examples=0)
    influence = world.graph.influence()[world.graph.nodes["kind"] == "latent"]
    first = world.graph.nodes.loc[influence.idxmax()]
    assert next(iter(most)) == (first["coder"], int(first["layer"]), int(first["latent"]))


def test_wrong_calls(world: World) -> None:
    graph, model, coders = world.graph, world.model, world.coders
    with pytest.raises(UnknownNameError, match="Unknown coder of the graph 'single'"):
        graph_notes(graph, model, {"layered": coders["layered"], "other": coders["single"]}, examples=0)
    with pytest.raises(UnknownNameError, match="Unknown node"):
        graph_notes(graph, model, coders, latents=["nothing"])
    with pytest.raises(GemmaScopeError, match="is no latent"):
        graph_notes(graph, model, coders, latents=[graph.nodes["node_id"][graph.nodes["kind"] == "embedding"].iloc[0]])
    with pytest.raises(SpliceError, match="has no latent"):
        smaller = {**coders, "layered": layered_of(model, "clt", [0, world.last]).float()}
        narrow = sae_of(model, "res", 1).float()
        for array in ("W_enc", "b_enc", "threshold", "W_dec"):
            values = getattr(narrow, array).data
            getattr(narrow, array).data = values[:, :1] if array == "W_enc" else values[:1]
        graph_notes(graph, model, {**smaller, "single": narrow}, examples=0)
    for wrong in ({"latents": 0}, {"examples": -1}, {"k": 0}):
        with pytest.raises(GemmaScopeError):
            graph_notes(graph, model, coders, **wrong)
