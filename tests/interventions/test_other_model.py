"""SAEs of another model of the same width, whose numbers would have no meaning, are refused by every function.

The two bundled models have streams of one width, so that shapes do not tell their SAEs apart.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import shared_model

TEXT = "In the beginning God created the heaven and the earth."
ID = "layer_1_width_256_l0_small"
WAYS = ["run_with_hooks", "hooks", "add_hook"]


def edits(sae: Any) -> dict[str, Any]:
    return {
        "steer": gs.steer(sae, 3, 2.0),
        "steer-several": gs.steer(sae, [3, 5], 2.0),
        "ablate": gs.ablate(sae, 3),
        "clamp": gs.clamp(sae, 3, 2.0),
        "scale": gs.scale(sae, 3, 2.0),
        "on-features": gs.steer(sae, 3, 2.0, on="features"),
    }


def run(model: Any, way: str, hook: Any) -> None:
    if way == "run_with_hooks":
        model.run_with_hooks(TEXT, fwd_hooks=[hook])
    elif way == "hooks":
        with model.hooks([hook]):
            model(TEXT)
    else:
        model.add_hook(*hook)


@pytest.fixture(params=["sae", "latents", "saved"], scope="module")
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An SAE of the bundled Gemma 3 as it is loaded, a part of it, and one that names its model in its files alone."""
    if request.param == "latents":
        return gs.load_latents("bundled-gemma3-res", ID, [3, 5])
    sae = gs.JumpReLUSAE.from_pretrained("bundled-gemma3-res", ID)
    if request.param == "sae":
        return sae
    folder = tmp_path_factory.mktemp("saved")
    gs.save_sae(sae, folder, format="sae-lens")
    return gs.JumpReLUSAE.from_folder(folder)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_an_intervention_with_latents_of_another_model_is_refused(foreign: Any, backend: str, way: str) -> None:
    model = shared_model("bundled", backend)
    for name, hook in edits(foreign).items():
        if (name, way) == ("on-features", "add_hook"):
            continue  # which looks for the hook first, and only a spliced SAE has it
        with pytest.raises(SpliceError, match="trained on 'bundled-gemma3'; this model is 'bundled'"):
            run(model, way, hook)


def test_every_function_that_reads_latents_refuses_those_of_another_model(foreign: Any) -> None:
    model = shared_model("bundled", "bridge")
    calls = [
        lambda: gs.features(model, TEXT, foreign),
        lambda: gs.top_tokens(model, foreign, 3),
    ]
    if isinstance(foreign, torch.nn.Module):  # and not only a part of an SAE
        calls += [
            lambda: gs.feature_page(model, foreign, 3, [TEXT * 40]),
            lambda: gs.evaluate(model, foreign, [TEXT * 40], context=64, progress=False),
            lambda: model.run_with_saes(TEXT, saes=foreign),
        ]
    for call in calls:
        with pytest.raises(SpliceError, match="trained on 'bundled-gemma3'; this model is 'bundled'"):
            call()


@pytest.mark.parametrize("name", ["gemma-2-2b", "someone/their-model"])
def test_another_model_of_the_same_family_is_another_model(name: str) -> None:
    """As for splicing; without a name, or of a model whose name is unknown, an SAE may belong to any model."""
    model, ours = shared_model("bundled", "bridge"), gs.load_sae("bundled", "res", 1, "256", l0="closest:8")
    arrays = {n: p.detach() for n, p in ours.named_parameters()}
    named = gs.JumpReLUSAE.from_arrays(arrays, site="res", layer=1)
    gs.features(model, TEXT, named)
    run(model, "run_with_hooks", gs.steer(named, 3, 2.0))
    named.cfg.metadata.model_name = name
    for call in (
        lambda: gs.features(model, TEXT, named),
        lambda: gs.top_tokens(model, named, 3),
        lambda: run(model, "run_with_hooks", gs.steer(named, 3, 2.0)),
        lambda: model.run_with_saes(TEXT, saes=named),
    ):
        with pytest.raises(SpliceError, match=f"trained on '{name}'; this model is 'bundled'"):
            call()


@pytest.mark.parametrize(("model", "other"), [("bundled", "bundled-gemma3"), ("bundled-gemma3", "bundled")])
def test_a_suite_of_another_model_is_refused_before_anything_is_measured(model: str, other: str) -> None:
    """The Gemma 3 has more layers and the Gemma 2 fewer, which is not what is wrong."""
    suite = gs.load_suite(other, ["res", "att"], width="256", l0="closest:10")
    hooked = shared_model(model, "bridge") if model == "bundled" else gs.load_model(model)
    for place in ("res", "att"):
        with pytest.raises(SpliceError, match=f"trained on '{other}'; this model is '{model}'"):
            gs.evaluate(hooked, suite.select(place), [TEXT * 40], context=64, progress=False)
    assert not suite.loaded
