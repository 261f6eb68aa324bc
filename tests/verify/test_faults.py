"""Planted faults are named: each by the alternative that fits better, or by what is compared directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import AdapterMismatch
from gemma_scope_tl.sites import Place
from gemma_scope_tl.verification.diagnosis import Diagnosis, diagnose
from gemma_scope_tl.verification.model_checks import check_model, embedding_scale
from gemma_scope_tl.verification.probe import Probe
from tests.helpers import hooked
from tests.verify.world import SPECIAL, World, fitted, row_of, sae_of, small_gemma

PLACES = [("res", 1), ("res", 2), ("mlp", 1), ("att", 2), ("embedding", None), ("transcoder", 1)]


def diagnosed(small: World, site: str, layer: int | None, arrays: dict[str, Any], **given: Any) -> Diagnosis:
    """The diagnosis of an SAE of these arrays under this place."""
    model = given.pop("model", small.model)
    special = given.pop("special", SPECIAL)
    probe = Probe(model, small.tokens(), special)
    row = row_of(site, layer, arrays, small.l0(arrays, site, layer))
    return diagnose(model, sae_of(site, layer, arrays), row, probe, **given)


@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_a_right_sae_fits_its_own_place_best(small: World, site: str, layer: int | None) -> None:
    found = diagnosed(small, site, layer, small.arrays(site, layer))
    assert found.faults == () and found.best is None and found.own.fvu < 0.9
    assert found.tried >= (4 if site == "att" else 3 if layer is None else 10)


def test_its_own_fit_is_what_numpy_computes(small: World) -> None:
    """Against NumPy's arithmetic in float64: a float32 pass of 64 dimensions agrees to 1e-5."""
    arrays = small.arrays("res", 2)
    x = Probe(small.model, small.tokens(), SPECIAL).at(Place("res", 2)).double().numpy()
    w = {name: array.double().numpy() for name, array in arrays.items()}
    pre = x @ w["W_enc"] + w["b_enc"]
    out = (pre * (pre > w["threshold"])) @ w["W_dec"] + w["b_dec"]
    wanted = ((x - out) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    own = diagnosed(small, "res", 2, arrays).own
    assert own.fvu == pytest.approx(wanted, rel=1e-5)
    assert own.l0 == pytest.approx((pre > w["threshold"]).sum(1).mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("site", "mine", "theirs"), [("res", 1, 2), ("mlp", 2, 1), ("att", 0, 3), ("transcoder", 1, 2)]
)
def test_swapped_layers(small: World, site: str, mine: int, theirs: int) -> None:
    (fault,) = diagnosed(small, site, mine, small.arrays(site, theirs)).faults
    assert fault.kind == "layer" and f"fits {site}/layer_{theirs} better than {site}/layer_{mine}" in fault.text


@pytest.mark.parametrize(
    ("site", "hook", "named"),
    [
        ("mlp", "blocks.1.ln2_post.hook_in", "blocks.1.ln2_post.hook_in"),  # before the post-MLP norm
        ("mlp", "blocks.1.hook_out", "site 'res'"),
        ("res", "blocks.1.ln2.hook_in", "blocks.1.ln2.hook_in"),  # before the MLP
        ("att", "blocks.1.attn.q.hook_out", "blocks.1.attn.q.hook_out"),
    ],
)
def test_a_wrong_hook(small: World, site: str, hook: str, named: str) -> None:
    x = small.probe.hook(hook)
    (fault,) = diagnosed(small, site, 1, fitted(x, x)).faults
    assert fault.kind == "hook" and named in fault.text and f"better than {site}/layer_1" in fault.text


def test_a_transcoder_of_the_input_with_the_norms_gain(small: World) -> None:
    arrays = fitted(small.probe.hook("blocks.1.ln2.hook_out"), small.probe.at(Place("mlp", 1)))
    (fault,) = diagnosed(small, "transcoder", 1, arrays).faults
    assert fault.kind == "hook" and "blocks.1.ln2.hook_out" in fault.text and "it reads that tensor" in fault.text


@pytest.mark.parametrize("hook", ["blocks.1.ln2_post.hook_in", "blocks.1.hook_out"])
def test_a_transcoder_of_another_target(small: World, hook: str) -> None:
    arrays = fitted(small.probe.at(Place("transcoder", 1)), small.probe.hook(hook))
    (fault,) = diagnosed(small, "transcoder", 1, arrays).faults
    assert fault.kind == "target" and hook in fault.text and "better than mlp/layer_1" in fault.text


@pytest.mark.parametrize("kind", ["not-folded", "folded-twice"])
@pytest.mark.parametrize("site", ["res", "transcoder"])
def test_the_scale_of_training(small: World, kind: str, site: str) -> None:
    arrays = small.arrays(site, 1)
    scale = float(small.probe.at(Place(site, 1)).square().sum(-1).mean().sqrt())
    factor = 1 / scale if kind == "not-folded" else scale
    arrays |= {name: arrays[name] * factor for name in ("b_enc", "b_dec", "threshold")}
    (fault,) = diagnosed(small, site, 1, arrays).faults
    assert fault.kind == kind and "appendix A" in fault.text


def test_the_bias_of_the_decoder(small: World) -> None:
    arrays = small.arrays("res", 1)
    arrays["b_enc"] += arrays["b_dec"] @ arrays["W_enc"]  # as trained, with b_dec subtracted from the input
    (fault,) = diagnosed(small, "res", 1, arrays).faults
    assert fault.kind == "bias-not-folded"


def test_an_embedding_sae_in_the_units_of_the_table(small: World) -> None:
    arrays = small.arrays("embedding", None)
    arrays |= {name: arrays[name] / 8 for name in ("b_enc", "b_dec", "threshold")}  # sqrt(64)
    (fault,) = diagnosed(small, "embedding", None, arrays).faults
    assert fault.kind == "not-folded"


@pytest.mark.parametrize("site", ["res", "embedding"])
def test_bos_counted(small: World, site: str) -> None:
    layer = 2 if site == "res" else None
    found = diagnosed(small, site, layer, small.arrays(site, layer), special=(0, 1))
    assert [fault.kind for fault in found.faults] == ["first-token"]
    assert "(id 2) is counted" in found.faults[0].text
    right = diagnosed(small, site, layer, small.arrays(site, layer)).own
    assert found.own.fvu == pytest.approx(right.fvu, rel=0.05)  # of 11 tokens fewer


def test_bos_counted_and_layers_swapped(small: World) -> None:
    found = diagnosed(small, "res", 2, small.arrays("res", 1), special=(0, 1))
    assert [fault.kind for fault in found.faults] == ["first-token", "layer"]


def unscaled() -> Any:
    hf_model = small_gemma()
    hf_model.model.embed_tokens.embed_scale.fill_(1.0)
    return hf_model


@pytest.mark.parametrize("backend", ["bridge", "hooked_transformer"])
def test_a_missing_scale_of_the_embedding(small: World, backend: str) -> None:
    """On the bridge both models lack the scale, so the check after loading cannot see it."""
    if backend == "hooked_transformer":  # its own conversion has the scale, so the two differ
        with pytest.raises(AdapterMismatch, match="hook_embed"):
            hooked(unscaled(), backend)
        right = hooked(small_gemma(), backend)
        assert embedding_scale(right, Probe(right, small.tokens(), SPECIAL)) == pytest.approx(8.0, rel=1e-5)
        return
    model = hooked(unscaled(), backend)
    probe = Probe(model, small.tokens(), SPECIAL)
    checks = check_model(model, probe)
    (fault,) = checks.faults
    assert fault.kind == "embedding-scale" and "by 1 in place of 8" in fault.text
    assert checks.embedding_factor == pytest.approx(8.0, rel=1e-4)
    corrected = Probe(model, small.tokens(), SPECIAL, embedding_factor=checks.embedding_factor)
    found = diagnosed(small, "res", 1, small.arrays("res", 1), model=model, corrected=corrected)
    assert [fault.kind for fault in found.faults] == ["embedding-scale"]
    assert found.best is not None
    assert found.best.fvu == pytest.approx(diagnosed(small, "res", 1, small.arrays("res", 1)).own.fvu, rel=1e-3)


def test_a_right_model_has_no_fault(small: World) -> None:
    checks = check_model(small.model, Probe(small.model, small.tokens(), SPECIAL))
    assert checks.faults == () and checks.facts["norms"] == {"checked": 16, "wrong": 0}  # four a layer
    assert checks.facts["embedding_scale"]["measured"] == pytest.approx(8.0, rel=1e-5)


def _without_offset(module: Any) -> None:
    module.forward = lambda x: module._norm(x.float()).type_as(x) * module.weight


def _unit(module: Any) -> None:
    module.forward = lambda x: module._norm(x.float()).type_as(x)


def _nothing(module: Any) -> None:
    module.forward = lambda x: x


@pytest.mark.parametrize(
    ("fault", "says"),
    [(_without_offset, "without adding 1"), (_unit, "does not multiply by its gain"), (_nothing, "unchanged")],
)
def test_a_wrong_norm(small: World, fault: Any, says: str) -> None:
    hf_model = small_gemma()
    fault(hf_model.model.layers[1].post_feedforward_layernorm)
    model = hooked(hf_model, "bridge", check=False)
    (found,) = check_model(model, Probe(model, small.tokens(), SPECIAL)).faults
    assert found.kind == "norm" and "layers.1.post_feedforward_layernorm" in found.text and says in found.text


def test_activations_that_overflow(small: World) -> None:
    hf_model = small_gemma()
    with torch.no_grad():
        hf_model.get_input_embeddings().weight *= 3e4
    model = hooked(hf_model.half(), "bridge", check=False)
    (fault,) = diagnosed(small, "res", 1, small.arrays("res", 1), model=model).faults
    assert fault.kind == "not-finite" and "float16" in fault.text and "bfloat16" in fault.text
