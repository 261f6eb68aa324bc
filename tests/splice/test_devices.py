"""What is attached to or used with a model goes to the model's device: on a GPU, and on a device of our making.

Each test compares with the same call on a processor alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import Any

import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import DeviceError
from gemma_scope_tl.interventions import ablate, clamp, mean_norms, scale, steer
from gemma_scope_tl.sae.choices import bring
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sites import BACKENDS
from tests.fake_device import DEVICE, Elsewhere, fake_device
from tests.helpers import hooked, random_gemma, random_sae, random_tokens
from tests.splice.world import stock_sae

DEVICES = ["elsewhere", *(["cuda"] if torch.cuda.is_available() else [])]
KINDS: list[tuple[str, int | None]] = [("res", 1), ("mlp", 0), ("att", 1), ("embedding", None), ("transcoder", 1)]
TEXT = "hello there"
EXACT = {"elsewhere": 0.0, "cuda": 2e-4}  # there the same kernels run; CUDA's float32 sums have another order


@pytest.fixture(params=DEVICES, scope="module")
def there(request: pytest.FixtureRequest) -> Generator[torch.device]:
    with fake_device() if request.param == "elsewhere" else nullcontext():
        yield DEVICE if request.param == "elsewhere" else torch.device("cuda", 0)


@pytest.fixture(params=BACKENDS, scope="module")
def models(request: pytest.FixtureRequest, there: torch.device) -> tuple[Any, Any]:
    """The same model here and there."""
    here, moved = (hooked(random_gemma("narrow-heads"), request.param, device="cpu") for _ in range(2))
    return here, moved.to(there)


def close(got: Any, wanted: torch.Tensor, there: torch.device) -> bool:
    limit = EXACT["cuda" if there.type == "cuda" else "elsewhere"]
    return float((got.cpu() - wanted).abs().max()) <= limit * max(1.0, float(wanted.abs().max()))


def on(module: torch.nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in module.parameters()}


def some_latents(sae: Any) -> Latents:
    chosen = [9, 2, 40]
    arrays = {"W_enc": sae.W_enc[:, chosen], "b_dec": sae.b_dec, "site": sae.site, "layer": sae.layer}
    return Latents(tuple(chosen), sae.W_dec[chosen], sae.b_enc[chosen], sae.threshold[chosen], **arrays)


@pytest.mark.slow
@pytest.mark.parametrize(("site", "layer"), KINDS)
@torch.no_grad()
def test_a_spliced_sae_moves_once_and_in_place(models: Any, there: torch.device, site: str, layer: int | None) -> None:
    here, moved = models
    tokens, sae = random_tokens(here, length=6), random_sae(here.dims, site, layer, d_sae=64)
    for options in ({}, {"error_term": True}, {"positions": [2, -1]}):
        wanted = here.run_with_saes(tokens, saes=sae, **options)
        assert on(sae) == {torch.device("cpu")}
        with gs.splice(moved, sae, **options):
            assert on(sae) == {there}  # when it is attached, so that a lack of memory shows there
            assert sae.device == there
            parameters = [parameter.data_ptr() for parameter in sae.parameters()] if there.type == "cuda" else []
            assert close(moved(tokens.to(there)), wanted, there)
        assert parameters == ([p.data_ptr() for p in sae.parameters()] if there.type == "cuda" else [])
        sae.to("cpu")
    cache = moved.run_with_cache_with_saes(tokens.to(there), saes=sae)[1]
    assert close(cache[f"{moved.get_sae_hook_name(sae)}"], sae.encode(cache_of(moved, sae, tokens, there)).cpu(), there)


def cache_of(model: Any, sae: Any, tokens: torch.Tensor, there: torch.device) -> torch.Tensor:
    name = f"{model.get_sae_hook_name(sae, 'hook_sae_input')}"
    return model.run_with_cache_with_saes(tokens.to(there), saes=sae, names_filter=name)[1][name]


@torch.no_grad()
def test_an_attached_sae_follows_its_model(there: torch.device) -> None:
    for backend in BACKENDS:
        model = hooked(random_gemma("narrow-heads"), backend, device="cpu")
        tokens, saes = random_tokens(model, length=6), [random_sae(model.dims, *place, d_sae=64) for place in KINDS[:3]]
        saes.append(stock_sae(model.dims))
        for sae in saes[:2] + saes[3:]:
            model.add_sae(sae)
        wanted = model(tokens)
        model.to(there)
        assert close(model(tokens.to(there)), wanted, there)
        assert all(on(sae) == {there} for sae in saes[:2] + saes[3:])
        if there.type == "cuda":  # a fake device has no way back for a whole model
            model.to("cpu")
            assert close(model(tokens), wanted, there)


def test_moved_in_inference_mode_it_still_has_gradients(models: Any, there: torch.device) -> None:
    here, moved = models
    for source in (random_sae(here.dims, "res", 1, d_sae=64), some_latents(random_sae(here.dims, "res", 1, d_sae=64))):
        with torch.inference_mode():
            bring(source, moved.device_of(1))
        tensors = source.W_dec, source.b_enc, source.threshold
        assert all(one.device == there and not one.is_inference() for one in tensors)


EDITS: dict[str, Callable[..., Any]] = {
    "steer": lambda source, **how: steer(source, [9, 2], 5.0, **how),
    "steer by norm": lambda source, **how: steer(source, [9, 2], 0.5, unit="norm", **how),
    "clamp": lambda source, **how: clamp(source, [9, 2], [3.0, 4.0], **how),
    "scale": lambda source, **how: scale(source, [9, 2], torch.tensor([3.0, 4.0]), **how),
    "ablate": lambda source, **how: ablate(source, [9, 2], **how),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_interventions(models: Any, there: torch.device, edit: str) -> None:
    here, moved = models
    tokens, sae = random_tokens(here, length=6), random_sae(here.dims, "res", 1, d_sae=64)
    for source in (sae, some_latents(sae)):
        pair = EDITS[edit](source)
        wanted = here.run_with_hooks(tokens, fwd_hooks=[pair])
        for _ in range(2):
            assert close(moved.run_with_hooks(tokens.to(there), fwd_hooks=[pair]), wanted, there)
        assert close(here.run_with_hooks(tokens, fwd_hooks=[pair]), wanted, there)  # and back again
    if edit != "steer by norm":
        pair = EDITS[edit](sae, on="features")
        wanted = here.run_with_hooks_with_saes(tokens, saes=sae, fwd_hooks=[pair])
        got = moved.run_with_hooks_with_saes(tokens.to(there), saes=sae, fwd_hooks=[pair])
        assert close(got, wanted, there)


def same(got: pd.DataFrame, wanted: pd.DataFrame, there: torch.device) -> None:
    pd.testing.assert_frame_equal(got, wanted, rtol=1e-3 if there.type == "cuda" else 0, atol=1e-4)


@pytest.mark.slow
def test_tables(models: Any, there: torch.device) -> None:
    here, moved = models
    for source in (random_sae(here.dims, "res", 1, d_sae=64), random_sae(here.dims, "transcoder", 0, d_sae=64)):
        for one in (source, some_latents(source)):
            for function in (
                lambda model, one: gs.features(model, [TEXT, "hi"], one),
                lambda model, one: gs.top_tokens(model, one, 9, k=3),
            ):
                wanted = function(here, one)
                same(function(moved, one), wanted, there)
                function(here, one)
    same(mean_norms(moved, TEXT), mean_norms(here, TEXT), there)


def test_attributions(models: Any, there: torch.device) -> None:
    from gemma_scope_tl.attributions.targets import logit

    here, moved = models
    saes = [random_sae(here.dims, "res", layer, d_sae=64, seed=layer) for layer in (0, 1)]
    wanted = gs.attribute(here, TEXT, saes, logit(40))
    same(gs.attribute(moved, TEXT, saes, logit(40)), wanted, there)
    assert all(on(sae) == {there} for sae in saes)
    gs.circuit(moved, TEXT, [sae.to("cpu") for sae in saes], logit(40), nodes=3)
    assert all(on(sae) == {there} for sae in saes)


@pytest.mark.slow
def test_evaluation_and_pages(models: Any, there: torch.device) -> None:
    here, moved = models
    tokens = random_tokens(here, batch=2, length=12)
    for sae in (random_sae(here.dims, "res", 1, d_sae=64), random_sae(here.dims, "att", 0, d_sae=64)):
        wanted = gs.evaluate(here, sae, tokens)
        assert on(sae) == {torch.device("cpu")}
        got = gs.evaluate(moved, sae, tokens)
        assert on(sae) == {there}
        for name in ("fvu", "delta_loss", "l0"):
            assert float(got[name].iloc[0]) == pytest.approx(float(wanted[name].iloc[0]), rel=1e-3, abs=1e-5)
        page = gs.feature_page(moved, sae.to("cpu"), 9, tokens)
        assert on(sae) == {there}
        assert page is not None


@pytest.mark.slow
def test_no_second_copy_stays_behind(models: Any, there: torch.device) -> None:
    here, moved = models
    sae = random_sae(here.dims, "res", 1, d_sae=77)
    latents = some_latents(sae)
    tokens = random_tokens(here, length=6).to(there)
    with torch.no_grad():
        for _ in range(3):
            moved.run_with_saes(tokens, saes=sae)
            moved.run_with_hooks(tokens, fwd_hooks=[ablate(latents, 9)])
    gc.collect()
    like = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.shape == sae.W_dec.shape]
    inside = {id(one.held) for one in like if isinstance(one, Elsewhere)}  # where the fake device keeps its numbers
    assert {one.device for one in like if id(one) not in inside} == {there}
    assert latents.W_dec.device == there
    assert latents.W_enc is not None
    assert latents.W_enc.device == there


def test_a_tensor_elsewhere_is_refused_in_words(there: torch.device) -> None:
    model = hooked(random_gemma("narrow-heads"), "bridge", device="cpu")
    sae = random_sae(model.dims, "res", 1, d_sae=64)
    x, acts = torch.zeros(2, 64).to(there), torch.zeros(2, 64).to(there)
    for call in (sae, sae.encode, some_latents(sae).encode, lambda x: sae.encode(x, latents=[1])):
        with pytest.raises(DeviceError, match=r"is on cpu, but the given tensor is on"):
            call(x)
    with pytest.raises(DeviceError, match=r"is on cpu"):
        sae.decode(acts)
    assert sae.to(there)(x).device == there
