"""A hook point answers to either backend's name: in caches, filters and hooks, as a string and to functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from gemma_scope_tl.errors import KeywordError, UnknownNameError
from gemma_scope_tl.sites import BACKENDS, SITES
from tests.helpers import random_sae, random_tokens, shared_model

HERE = {"res": 1, "mlp": 1, "att": 0, "embedding": None, "transcoder": 0}


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("narrow-heads", request.param)


def both_names(site: str, spliced: bool) -> list[str]:
    names = [SITES[site].hook_name_out(HERE[site], backend) for backend in BACKENDS]
    return [f"{name}.hook_sae_acts_post" for name in names] if spliced else names


@pytest.mark.parametrize("spliced", [True, False])
@pytest.mark.parametrize("site", HERE)
def test_caches_by_either_name(model: Any, site: str, spliced: bool) -> None:
    tokens, names = random_tokens(model, length=4), both_names(site, spliced)
    saes = [random_sae(model.dims, site, HERE[site], d_sae=64)] if spliced else []
    with torch.no_grad():
        for name in names:
            for asked in (name, [name], lambda given, name=name: given == name):
                cache = model.run_with_cache_with_saes(tokens, saes=saes, names_filter=asked)[1]
                assert name in cache
                assert set(cache) <= set(names)  # a string brings the name it has here along, as in TransformerLens
                assert not callable(asked) or list(cache) == [name]
        all_of_both = model.run_with_cache_with_saes(tokens, saes=saes, names_filter=lambda name: name in names)[1]
        assert set(all_of_both) == set(names)
        assert torch.equal(*(all_of_both[name] for name in names))
        if spliced:
            assert set(names) <= set(model.run_with_cache_with_saes(tokens, saes=saes)[1])


@pytest.mark.slow
@pytest.mark.parametrize("spliced", [True, False])
@pytest.mark.parametrize("site", HERE)
def test_hooks_by_either_name_act_once(model: Any, site: str, spliced: bool) -> None:
    tokens, names = random_tokens(model, length=4), both_names(site, spliced)
    calls: list[str] = []

    def double(value: torch.Tensor, hook: Any) -> torch.Tensor:
        calls.append(hook.name)
        return value * 2

    saes = [random_sae(model.dims, site, HERE[site], d_sae=64)] if spliced else []
    seen: list[torch.Tensor] = []
    with torch.no_grad(), model.saes(saes):
        for name in (*names, *(lambda given, name=name: given == name for name in names), lambda name: name in names):
            for _ in range(2):
                calls.clear()
                seen.append(model.run_with_hooks(tokens, fwd_hooks=[(name, double)]))
                assert len(calls) == 1
                with model.hooks([(name, double)]):
                    seen.append(model(tokens))
                assert len(calls) == 2
            model.add_hook(name, double)
            seen.append(model(tokens))
            model.reset_hooks()
    assert all(torch.equal(seen[0], one) for one in seen[1:])


def test_gradients_in_caches_by_either_name(model: Any) -> None:
    name = "blocks.1.hook_out.hook_sae_acts_post"
    tokens = random_tokens(model, length=4)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    cache = model.run_with_cache_with_saes(
        tokens,
        saes=[random_sae(model.dims, "res", 1, d_sae=64)],
        names_filter=lambda given: given == name,
        incl_bwd=True,
        return_type="loss",
    )[1]
    assert {name, f"{name}_grad"} == set(cache)


def test_a_name_that_nothing_has_raises(model: Any) -> None:
    with pytest.raises(UnknownNameError, match="No SAE with that hook"):
        model.run_with_cache(random_tokens(model, length=4), names_filter="blocks.1.hook_out.hook_sae_acts_post")


def test_hooks_may_follow_the_input(model: Any) -> None:
    """TransformerBridge.run_with_hooks takes them by position; HookedTransformer has the call's arguments there."""
    tokens, name = random_tokens(model, length=4), "blocks.1.hook_resid_post"
    edit, ran = (name, lambda value, hook: value * 2), []
    back = (name, lambda value, hook: ran.append(1))
    with torch.no_grad():
        wanted = model.run_with_hooks(tokens, fwd_hooks=[edit])
        assert torch.equal(model.run_with_hooks(tokens, [edit]), wanted)
        assert torch.equal(model.run_with_hooks(tokens, (edit,), []), wanted)
        assert not torch.equal(model.run_with_hooks(tokens), wanted)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.run_with_hooks(tokens, [edit], [back], reset_hooks_end=False, return_type="loss").backward()
    model.reset_hooks()
    assert ran == [1]
    with pytest.raises(KeywordError, match="fwd_hooks twice"):
        model.run_with_hooks(tokens, [edit], fwd_hooks=[edit])


def test_the_input_of_the_mlp_has_a_name(model: Any) -> None:
    """SAELens adds ``mlp.hook_in`` to HookedTransformer; the bridge has it."""
    tokens = random_tokens(model, length=4)
    with torch.no_grad():
        cache = model.run_with_cache(tokens)[1]
        edited = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_in", lambda value, hook: value * 0)])
    normalized = cache["blocks.1.ln2.hook_normalized"]
    gain = model.blocks[1].ln2.w + (1.0 if model.backend == "bridge" else 0.0)
    assert torch.allclose(cache["blocks.1.mlp.hook_in"], normalized * gain, rtol=1e-5, atol=1e-6)
    assert not torch.equal(edited, model(tokens))


@pytest.mark.parametrize("hooks", [1, 30])
def test_the_bridge_collects_its_names_no_oftener_for_many_hooks(monkeypatch: pytest.MonkeyPatch, hooks: int) -> None:
    model, calls = shared_model("narrow-heads", "bridge"), []
    collect = TransformerBridge._add_aliases_to_hooks

    def counted(bridge: Any, found: Any) -> None:
        calls.append(bridge)
        collect(bridge, found)

    monkeypatch.setattr(TransformerBridge, "_add_aliases_to_hooks", counted)
    seen: list[str] = []
    hook = ("blocks.0.hook_out", lambda x, hook: seen.append(hook.name))
    with model.hooks(fwd_hooks=[hook] * hooks):
        model(random_tokens(model, length=3))
    assert len(seen) == hooks
    assert len(calls) <= 4  # to check the names, to resolve them, and to add the hooks
    assert "_held_hooks" not in vars(model)
