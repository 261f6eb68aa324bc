"""Numbers and switches at the entry points: a wrong one raises an error of this package that names the argument."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError, WeightsError
from gemma_scope_tl.evals.metrics import Bootstrap
from gemma_scope_tl.evals.next_token import sampled_positions
from gemma_scope_tl.registry import locate
from gemma_scope_tl.registry.catalog import find, resolve
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.sites import BACKENDS, get_site
from tests.helpers import random_sae, random_tokens, shared_model


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("narrow-heads", request.param)


@pytest.fixture
def sae(model: Any) -> Any:
    return random_sae(model.dims, "res", 1, d_sae=64)


BAD_SLICES = [slice(1.5, 3), slice(True, 3), slice("a", None), slice(0, 4, 1.0)]
BAD_POSITIONS = [True, torch.tensor(False), [True, 1], *BAD_SLICES]


@pytest.mark.parametrize("positions", BAD_POSITIONS, ids=repr)
def test_positions(model: Any, sae: Any, positions: Any) -> None:
    tokens = random_tokens(model, length=6)
    with pytest.raises(SpliceError, match="ositions"):
        model.run_with_saes(tokens, saes=[sae], positions=positions)
    with pytest.raises(SpliceError, match="ositions"):
        gs.steer(sae, 3, 1.0, positions=positions)
    with pytest.raises(SpliceError, match="ositions"):
        gs.features(model, tokens, sae, positions=positions)


@torch.no_grad()
def test_slices_of_other_integers(model: Any, sae: Any) -> None:
    """Equal to the bit: the same operations run."""
    tokens = random_tokens(model, length=6)
    plain, other = slice(1, 3), slice(np.int64(1), torch.tensor(3))
    runs = [model.run_with_saes(tokens, saes=[sae], positions=one) for one in (plain, other)]
    assert torch.equal(*runs) and not torch.equal(runs[0], model(tokens))


SWITCHES = [("error_term", "no"), ("error_term", 1), ("use_error_term", "no"), ("chain", "x"), ("chain", None)]


@pytest.mark.parametrize(("name", "value"), [*SWITCHES, ("reset_saes_end", "no"), ("exclude_special_tokens", [10**30])])
def test_switches_of_a_splice(model: Any, sae: Any, name: str, value: Any) -> None:
    with pytest.raises(SpliceError, match=name):
        model.run_with_saes(random_tokens(model, length=6), saes=[sae], **{name: value})
    assert not model.acts_to_saes


COUNTS = [True, 2.5, "2", 0, -1]


@pytest.mark.parametrize("value", COUNTS, ids=repr)
def test_counts(model: Any, sae: Any, value: Any) -> None:
    tokens = random_tokens(model, length=6)
    calls: dict[str, Callable[[], Any]] = {
        "batch_size": lambda: gs.evaluate(model, sae, tokens, batch_size=value, progress=False),
        "batch_size ": lambda: gs.features(model, tokens, sae, batch_size=value),
        " batch_size": lambda: gs.mean_norms(model, tokens, batch_size=value),
        "top": lambda: gs.features(model, tokens, sae, top=value),
        "resamples": lambda: gs.evaluate(model, sae, tokens, resamples=value, progress=False),
        "max_new_tokens": lambda: model.generate(tokens, max_new_tokens=value),
        "max_new_tokens ": lambda: list(model.generate_stream(tokens, max_new_tokens=value)),
    }
    for name, call in calls.items():
        with pytest.raises(GemmaScopeError, match=name.strip()):
            call()


def test_other_numbers(model: Any, sae: Any) -> None:
    tokens = random_tokens(model, length=6)
    for name, value in [("seed", -1), ("seed", True), ("uniformity", True), ("uniformity", -1), ("confidence", "a")]:
        with pytest.raises(GemmaScopeError, match=f"{name} must be"):
            gs.evaluate(model, sae, tokens, progress=False, **{name: value})
    for value in ("a", None, True, float("nan"), -1):
        with pytest.raises(GemmaScopeError, match="min_activation must be"):
            gs.features(model, tokens, sae, min_activation=value)  # pyright: ignore[reportArgumentType]


def test_more_samples_than_positions() -> None:
    """All positions are drawn, in memory of the size of the row."""
    scored = torch.tensor([[True, False, True], [False, True, True]])
    found = sampled_positions(scored, torch.arange(2), 10**9)
    assert found.shape == (2, 3) and [sorted(row) for row in found.tolist()] == [[-1, 0, 2], [-1, 1, 2]]


def test_any_seed_of_numpy() -> None:
    assert Bootstrap(3, seed=2**70).rows == 3


def test_decode(sae: Any) -> None:
    for x in (torch.zeros(3, 63), torch.tensor(1.0), torch.zeros(0)):
        with pytest.raises(SpliceError, match=r"decodes \[\.\.\., 64\]"):
            sae.decode(x)
    with pytest.raises(SpliceError, match="no such layout"):
        sae.decode(torch.zeros(2, 64), like=torch.zeros(2, 7))
    assert sae.decode(torch.zeros(0, 64)).shape == (0, sae.cfg.d_in)


@pytest.mark.parametrize("layer", [True, "1", 1.5, -1, [1]], ids=repr)
@pytest.mark.parametrize("site", ["res", None])
def test_layers_of_saes(sae: Any, layer: Any, site: Any, tmp_path: Path) -> None:
    arrays = {name: value.detach() for name, value in sae.state_dict().items()}
    with pytest.raises(SpliceError, match="a layer is an integer from 0"):
        gs.JumpReLUSAE.from_arrays(arrays, site=site, layer=layer)
    gs.save_sae(sae, tmp_path / "sae")
    with pytest.raises(SpliceError, match="a layer is an integer from 0"):
        gs.JumpReLUSAE.from_folder(tmp_path / "sae", site=site, layer=layer)
    with pytest.raises(SpliceError, match="a layer is an integer from 0"):
        get_site("res").hook_name(layer)
    sae.layer = layer
    for form in ("gemma-scope", "gemma_scope_2"):
        with pytest.raises(SpliceError, match="a layer is an integer from 0"):
            gs.save_sae(sae, tmp_path / form, format=form)
        assert not list((tmp_path / form).glob("*"))


def test_numpy_layers_are_ints(sae: Any) -> None:
    arrays = {name: value.detach() for name, value in sae.state_dict().items()}
    found = gs.JumpReLUSAE.from_arrays(arrays, site="res", layer=np.int64(1))  # pyright: ignore[reportArgumentType]
    assert type(found.layer) is int and type(found.cfg.metadata.hook_layer) is int


def _refused(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UnknownNameError):
        call(*args, **kwargs)


def test_lookups() -> None:
    for args in [("gemma-2-2b", "res", "20"), ("gemma-2-2b", "res", 20.5), ("gemma-2-2b", "res", True)]:
        _refused(find, *args)
    for args in [(None, "res", 20), ("gemma-2-2b", ["res"], 20), (5, "res", 20)]:
        _refused(find, *args)
        _refused(gs.load_sae, *args)
    for name, value in [("l0", 10**400), ("l0", b"71"), ("seed", True), ("affine", 1), ("affine", "x")]:
        _refused(find, "gemma-2-2b", "res", 20, **{name: value})
    for name, value in [("layer", -1), ("model", 5), ("site", [None]), ("affine", "x"), ("pattern", 5)]:
        _refused(select_rows, **{name: value})
    for sae_id in (None, 5, ["a"]):
        _refused(resolve, "bundled-res", sae_id)
    with pytest.raises(GemmaScopeError, match="A width is a label"):
        select_rows(width=1.5)  # pyright: ignore[reportArgumentType]


def test_layers_of_suites() -> None:
    for layers in (1.5, True, [True], ["1"], [1.5], b"1"):
        _refused(gs.load_suite, "bundled", "res", layers, "1k")
    suite = gs.load_suite("bundled", "res", [np.int64(1), 2], "1k")  # pyright: ignore[reportArgumentType]
    assert list(suite) == [("res", 1), ("res", 2)] and all(type(layer) is int for _, layer in suite)
    for key in [("res", True), ("res", 1.5), ["res", 1], "res"]:
        _refused(suite.__getitem__, key)
    for memory in (-1, True, "a"):
        with pytest.raises(GemmaScopeError, match="memory must be"):
            gs.load_suite("bundled", "res", 1, "1k", memory=memory)  # pyright: ignore[reportArgumentType]


def test_loaded_latents() -> None:
    row = find("bundled", "res", 1, "1k")
    with pytest.raises(SpliceError, match="Latent 5 is given twice"):
        gs.load_latents(row.release, row.id, latents=[5, 6, 5])
    with pytest.raises(SpliceError, match="name at least one"):
        gs.load_latents(row.release, row.id, latents=[])


def test_loaded_latents_refuse_values_beyond_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the whole SAE does: 1e6 is infinite in float16."""
    state = gs.load_sae("bundled", "res", 1, "1k").state_dict()
    arrays = {name: value.detach().clone() for name, value in state.items()}
    arrays["W_dec"][5, 3] = 1e6
    (d_in, d_sae), place = arrays["W_enc"].shape, "layer_1/width_1k/average_l0_10"
    gs.save_sae(gs.JumpReLUSAE.from_arrays(arrays, model="my-model", site="res", layer=1), tmp_path / "s" / place)
    row = {"id": place, "site": "res", "layer": 1, "width": "1k", "d_sae": d_sae, "d_in": d_in, "l0": 10, "path": place}
    head = {"release": "large", "repo": "./s", "model": "my-model", "license": "MIT", "description": "Made up"}
    (tmp_path / "large.yaml").write_text(json.dumps({**head, "saes": [row]}))
    monkeypatch.setattr(locate, "_registered", {})
    gs.register_release(tmp_path / "large.yaml")
    try:
        with pytest.raises(WeightsError, match="W_dec too large for float16"):
            gs.load_sae("my-model", "res", 1, "1k", 10, dtype="float16")
        with pytest.raises(WeightsError, match="W_dec too large for float16"):
            gs.load_latents("large", place, latents=[5, 6], dtype="float16")
        assert bool(gs.load_latents("large", place, latents=[6], dtype="float16").W_dec.isfinite().all())
    finally:
        monkeypatch.undo()
        gs.registry.clear_cache()
