"""Edits at the embedding act in every step of a generation, on both backends and in every way to generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_sae, random_tokens, shared_model

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}
PROMPT = 7


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("narrow-heads", request.param)


@pytest.fixture(scope="module")
def sae(model: Any) -> Any:
    return random_sae(model.dims, "embedding", None)


def _prompts(model: Any) -> torch.Tensor:
    ids = random_tokens(model, 2, PROMPT)
    ids[1, :2], ids[1, 2] = 0, 2  # padding, then BOS
    return ids


def _generated(model: Any, ids: torch.Tensor, cache: bool) -> dict[str, torch.Tensor]:
    ways = {
        "generate": model.generate(ids, use_past_kv_cache=cache, **GREEDY),
        "stream": torch.cat(
            list(model.generate_stream(ids, max_tokens_per_yield=2, use_past_kv_cache=cache, **GREEDY)), dim=1
        ),
    }
    if model.backend == "bridge":
        ways["hf_generate"] = model.hf_generate(ids, use_past_kv_cache=cache, **GREEDY)
    return ways


def _by_passes(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Greedy generation by whole passes, which run every hook."""
    mask = (ids != 0).long()
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            new = model(ids, attention_mask=mask)[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return ids


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_a_hook_sees_the_columns_of_each_pass(model: Any, cache: bool) -> None:
    ids, seen = _prompts(model), []
    with model.hooks([("hook_embed", lambda value, hook: seen.append(list(value.shape)))]):
        for name in _generated(model, ids[:, :1], cache):
            assert name in ("generate", "stream", "hf_generate")
    widths = [1] * 4 if cache else [1, 2, 3, 4]
    assert seen == [[2, width, model.dims.d_model] for width in widths] * len(_generated(model, ids[:, :1], cache))


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("positions", [None, 2, [1, 4], slice(3, None)], ids=str)
def test_edits_act_as_in_whole_passes(model: Any, sae: Any, cache: bool, positions: Any) -> None:
    """Each greedy token is that of a whole pass over the text with the same edit."""
    ids, plain = _prompts(model), _by_passes(model, _prompts(model))
    name, hook = gs.steer(sae, 3, 40.0, positions=positions, exclude_special_tokens=False)
    with model.hooks([(name, hook)]):
        wanted = _by_passes(model, ids)
        assert not torch.equal(wanted, plain)  # the edit matters
        for way, got in _generated(model, ids, cache).items():
            assert torch.equal(got, wanted), way
    with gs.splice(model, sae, positions=positions):
        wanted = _by_passes(model, ids)
        for way, got in _generated(model, ids, cache).items():
            assert torch.equal(got, wanted), way
    for way, got in _generated(model, ids, cache).items():
        assert torch.equal(got, plain), way


def test_a_pass_from_embeddings_refuses_what_it_would_skip(model: Any, sae: Any) -> None:
    """A function that may only read is skipped, as in TransformerLens."""
    ids = random_tokens(model)
    with torch.no_grad():
        embeddings = model.run_with_cache(ids, names_filter="hook_embed")[1]["hook_embed"]
        wanted = model(ids)
        for edit in (gs.steer(sae, 3, 4.0), gs.ablate(sae, 3)):
            with model.hooks([edit]):
                for call in (model, model.run_with_cache, lambda given: model.generate(given, **GREEDY)):
                    with pytest.raises(SpliceError, match="skips the intervention"):
                        call(embeddings)
            with pytest.raises(SpliceError, match="skips the intervention"):
                model.run_with_hooks(inputs_embeds=embeddings, fwd_hooks=[edit])
        with gs.splice(model, sae, exclude_special_tokens=False), pytest.raises(SpliceError, match="skips the SAE"):
            model.generate(embeddings, **GREEDY)
        with model.hooks([("hook_embed", lambda value, hook: None)]):
            torch.testing.assert_close(model(embeddings), wanted, rtol=0, atol=1e-5)


def test_another_pass_from_inside_the_hook_is_its_own_text(model: Any, sae: Any) -> None:
    """Positions of the outer text hold after a pass that a hook on the embedding makes."""
    ids, other = _prompts(model), random_tokens(model, 3, 4, seed=2)
    edit = gs.steer(sae, 3, 40.0, positions=slice(3, None), exclude_special_tokens=False)
    inside = [False]

    def judge(value: torch.Tensor, hook: Any) -> None:
        if not inside[0]:
            inside[0] = True
            model(other)
            inside[0] = False

    with model.hooks([edit]):
        wanted = model.generate(ids, **GREEDY)
    with model.hooks([("hook_embed", judge), edit]):
        assert torch.equal(model.generate(ids, **GREEDY), wanted)
