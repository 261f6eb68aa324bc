"""Steering and editing latents of layered coders, against plain additions at every layer that they write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import SpliceError, UnknownNameError
from gemma_scope_tl.interventions import ablate, clamp, mean_norms, scale, steer
from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.sites import BACKENDS, get_site
from tests.helpers import random_layered, random_tokens, shared_model

ROUNDING = 1e-5
LAYERS = (1, 2, 4)


@pytest.fixture(params=BACKENDS)
def model(request: Any) -> Any:
    return shared_model("gemma3", request.param)


@pytest.fixture(params=["clt", "crosscoder"])
def coder(request: Any, model: Any) -> Any:
    return random_layered(model.dims, request.param, LAYERS, skip=request.param == "clt", model_name="gemma-3-1b")


def written(coder: Any, layer: int) -> str:
    return get_site(coder.site, "gemma3").hook_name_out(layer, "hooked_transformer")


def added(row: torch.Tensor, keep: torch.Tensor) -> Any:
    return lambda value, hook: value + keep.unsqueeze(-1) * row


def test_steering_adds_the_direction_of_every_layer(model: Any, coder: Any) -> None:
    tokens = random_tokens(model, length=8)
    keep, rows = tokens > 2, coder.W_dec[1][17]
    with torch.no_grad():
        got = model.run_with_hooks(tokens, fwd_hooks=steer(coder, (2, 17), 3.0))
        plain = [(written(coder, layer), added(3.0 * row, keep)) for layer, row in zip((2, 4), rows, strict=True)]
        assert relative_difference(got, model.run_with_hooks(tokens, fwd_hooks=plain)) < ROUNDING
        one = model.run_with_hooks(tokens, fwd_hooks=[steer(coder, (2, 17), 3.0, layers=4)])
        assert relative_difference(one, model.run_with_hooks(tokens, fwd_hooks=plain[1:])) < ROUNDING
        two = model.run_with_hooks(tokens, fwd_hooks=steer(coder, [(2, 17), (1, 5)], [3.0, -2.0], positions=[3]))
        chosen = torch.zeros_like(keep)
        chosen[:, 3] = True
        vectors = {layer: -2.0 * row for layer, row in zip(LAYERS, coder.W_dec[0][5], strict=True)}
        vectors[2] = vectors[2] + 3.0 * rows[0]
        vectors[4] = vectors[4] + 3.0 * rows[1]
        plain = [(written(coder, layer), added(vector, chosen)) for layer, vector in vectors.items()]
        assert relative_difference(two, model.run_with_hooks(tokens, fwd_hooks=plain)) < ROUNDING


def test_units(model: Any, coder: Any) -> None:
    tokens = random_tokens(model, length=8)
    norms = mean_norms(model, tokens, "mlp" if coder.kind == "clt" else "res", layers=[2, 4])
    whole = norms["mean_norm"].pow(2).sum() ** 0.5 / coder.W_dec[1][17].norm().item()
    with torch.no_grad():
        wanted = model.run_with_hooks(tokens, fwd_hooks=steer(coder, (2, 17), 0.5 * whole))
        got = model.run_with_hooks(tokens, fwd_hooks=steer(coder, (2, 17), 0.5, unit="mean_norm", mean_norm=norms))
        assert relative_difference(got, wanted) < ROUNDING
        row, keep = coder.W_dec[1][17, 1], (tokens > 2).unsqueeze(-1)

        def by_norm(value: torch.Tensor, hook: Any) -> torch.Tensor:
            return value + keep * 0.5 * value.norm(dim=-1, keepdim=True) * row / row.norm()

        wanted = model.run_with_hooks(tokens, fwd_hooks=[(written(coder, 4), by_norm)])
        got = model.run_with_hooks(tokens, fwd_hooks=steer(coder, (2, 17), 0.5, unit="norm", layers=[4]))
        assert relative_difference(got, wanted) < ROUNDING
    with pytest.raises(SpliceError, match='unit="norm" is of one layer'):
        steer(coder, (2, 17), 0.5, unit="norm")
    with pytest.raises(SpliceError, match="needs mean_norm="):
        steer(coder, (2, 17), 0.5, unit="mean_norm")


def edits(coder: Any, names: Any, **options: Any) -> dict[str, Any]:
    return {
        "ablate": ablate(coder, names, **options),
        "clamp": clamp(coder, names, [0.5, 2.0], **options),
        "scale": scale(coder, names, [3.0, 0.0], **options),
        "steer": steer(coder, names, [1.0, -2.0], **options),
    }


def test_edits_of_a_plain_model_are_those_of_a_splice_with_error_terms(model: Any, coder: Any) -> None:
    tokens = random_tokens(model, length=8)
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(tokens, saes=coder)
        first, second = (int(cache[model.get_sae_hook_name(coder, layer=layer)][0, 5].argmax()) for layer in (1, 2))
        names = [(1, first), (2, second)]
        clean = model(tokens)
        plain = {name: model.run_with_hooks(tokens, fwd_hooks=[one]) for name, one in edits(coder, names).items()}
        with gs.splice(model, coder, error_term=True):
            for name, pairs in edits(coder, names, on="features").items():
                assert relative_difference(model.run_with_hooks(tokens, fwd_hooks=[pairs]), plain[name]) < ROUNDING, (
                    name
                )
                assert relative_difference(plain[name], clean) > 1e-4
        zeroed = model.run_with_hooks(tokens, fwd_hooks=clamp(coder, names, 0.0))
        assert torch.equal(zeroed, plain["ablate"])


def test_chosen_layers_and_positions_of_an_ablation(model: Any, coder: Any) -> None:
    tokens = random_tokens(model, length=8)
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(tokens, saes=coder, error_term=True)
        acts = cache[model.get_sae_hook_name(coder, layer=1)]
        latent = int(acts[0, 5].argmax())
        got = model.run_with_hooks(tokens, fwd_hooks=ablate(coder, (1, latent), layers=4, positions=slice(4, 7)))
        keep = torch.zeros(2, 8, dtype=torch.bool)
        keep[:, 4:7] = True
        part = (acts[..., latent] * keep).unsqueeze(-1) * coder.W_dec[0][latent, 2]
        wanted = model.run_with_hooks(tokens, fwd_hooks=[(written(coder, 4), lambda value, hook: value - part)])
    assert relative_difference(got, wanted) < ROUNDING


def test_generation_with_a_cache(model: Any, coder: Any) -> None:
    prompt = random_tokens(model, batch=1, length=5)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    hooks = [steer(coder, (1, 3), 4.0), scale(coder, [(1, 7), (4, 2)], 5.0)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        cached = model.generate(prompt, use_past_kv_cache=True, **options)
        assert torch.equal(cached, model.generate(prompt, use_past_kv_cache=False, **options))


def test_names_and_numbers_are_checked() -> None:
    coder = random_layered(shared_model("gemma3", "bridge").dims, "clt", LAYERS)
    with pytest.raises(SpliceError, match="The model of this clt is unknown"):
        ablate(coder, (1, 3))
    coder.family = "gemma3"
    assert len(steer(coder, np.array([[1, 3], [2, 5]]), 1.0)) == 3
    assert len(steer(coder, torch.tensor([4, 3]), 1.0)) == 1
    wrong: Any
    for wrong, message in [
        (3, "pair of a layer and an index"),
        ([1, 2, 3], "pair of a layer and an index"),
        ((3, 5), "layers \\[1, 2, 4\\], not 3"),
        ((1, 96), "latents 0..95"),
        ((1, -1), "latents 0..95"),
        ((1, 2.0), "pair of a layer|integer"),
        ([], "No latents"),
        ([(1, 2), (1, 2)], "given twice"),
    ]:
        with pytest.raises(SpliceError, match=message):
            ablate(coder, wrong)
    for layers, message in [(1, "write no earlier layer"), (3, "not 3"), ([], "No latents|at least one")]:
        with pytest.raises(SpliceError, match=message):
            ablate(coder, (2, 5), layers=layers)
    with pytest.raises(SpliceError, match="writes none of"):
        ablate(coder, [(1, 5), (4, 5)], layers=2)
    with pytest.raises(SpliceError, match="layers= needs"):
        ablate(coder, (2, 5), layers=4, on="features")
    with pytest.raises(SpliceError, match="one for each of the 1"):
        clamp(coder, (2, 5), [1.0, 2.0])
    unknown: Any = "latents"
    with pytest.raises(UnknownNameError):
        clamp(coder, (2, 5), 1.0, on=unknown)


def test_edits_need_the_pass_of_their_latents(model: Any, coder: Any) -> None:
    tokens = random_tokens(model, length=6)
    hooks = ablate(coder, (1, 3), exclude_special_tokens=False)
    if model.backend == "hooked_transformer":  # passes of the bridge begin at the embedding
        with pytest.raises(SpliceError, match="did not run in this pass"), torch.no_grad():
            model.run_with_hooks(torch.zeros(2, 6, 64), start_at_layer=2, fwd_hooks=hooks)
    (name, reader), *_ = hooks
    with pytest.raises(SpliceError, match="from load_model"):
        reader(torch.zeros(1, 3, 64))
    other = random_layered(model.dims, coder.kind, LAYERS, model_name="gemma-2-2b")
    with pytest.raises(SpliceError, match="gemma-2-2b|Gemma 2"):
        model.run_with_hooks(tokens, fwd_hooks=steer(other, (1, 3), 1.0))
    assert name
