"""A keyword that a method does not take raises, on both backends: nothing is silently left out of a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, UnknownKeywordError, UnknownNameError
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_gemma, random_sae, random_tokens, shared_model


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("narrow-heads", request.param)


CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "an SAE by the wrong name": ("run_with_saes", {"sae": "SAE"}, "saes"),
    "hooks in a splice": ("run_with_saes", {"saes": "SAE", "fwd_hooks": []}, "run_with_hooks_with_saes"),
    "SAEs in a plain pass": ("forward", {"saes": ["SAE"]}, "run_with_saes"),
    "SAEs in generate": ("generate", {"saes": ["SAE"]}, "run_with_saes"),
    "SAEs in generate_stream": ("generate_stream", {"saes": ["SAE"]}, "run_with_saes"),
    "a filter's name": ("run_with_cache", {"name_filter": "hook_embed"}, "names_filter"),
    "hooks' name": ("run_with_hooks", {"fwd_hook": []}, "fwd_hooks"),
    "a filter where none acts": ("run_with_hooks", {"names_filter": "hook_embed"}, "run_with_cache"),
    "a filter in a pass": ("forward", {"names_filter": "hook_embed"}, "run_with_cache"),
    "a return type's name": ("forward", {"returntype": "loss"}, "return_type"),
    "in a cached splice": ("run_with_cache_with_saes", {"saes": "SAE", "name_filter": "x"}, "names_filter"),
    "in a hooked splice": ("run_with_hooks_with_saes", {"saes": "SAE", "fwd_hook": []}, "fwd_hooks"),
    "tokens to generate": ("generate", {"max_new_token": 3}, "max_new_tokens"),
    "tokens to stream": ("generate_stream", {"max_new_token": 3}, "max_new_tokens"),
    "hooks in generate": ("generate", {"fwd_hooks": []}, "model.hooks"),
    "a streamer": ("generate", {"streamer": None}, "generate_stream"),
    "pictures": ("forward", {"pixel_values": None}, "forward"),
    "Hugging Face's generate": ("hf_generate", {"max_new_token": 3}, "max_new_tokens"),
    "SAEs in Hugging Face's": ("hf_generate", {"saes": ["SAE"]}, "run_with_saes"),
}


@pytest.mark.parametrize("case", CALLS)
def test_unknown_keywords_raise_with_the_right_one(model: Any, case: str) -> None:
    method, given, hint = CALLS[case]
    if method == "hf_generate" and model.backend == "hooked_transformer":
        assert not hasattr(model, method)
        return
    sae = random_sae(model.dims, "res", 0)
    kwargs = {name: sae if value == "SAE" else [sae] if value == ["SAE"] else value for name, value in given.items()}
    with pytest.raises(UnknownKeywordError, match=hint) as raised:
        result = getattr(model, method)(random_tokens(model), **kwargs)
        list(result)
    assert isinstance(raised.value, TypeError)
    assert not model.acts_to_saes  # and nothing stays attached


def test_valid_keywords_pass(model: Any) -> None:
    """Also those that Hugging Face's pass takes, and positional ones."""
    tokens = random_tokens(model)
    with torch.no_grad():
        loss = model(tokens, return_type="loss")
        assert model(tokens, "loss").item() == loss.item()
        assert model.run_with_hooks(tokens, fwd_hooks=[], return_type="loss").item() == loss.item()
        per_token = model(tokens, "loss", True)
        assert per_token.shape == (2, 23) and per_token.mean().item() == pytest.approx(loss.item(), abs=1e-6)
        if model.backend == "bridge":
            model(tokens, output_hidden_states=True, use_cache=False)
            model.run_with_cache(tokens, output_attentions=True)


def test_a_call_with_too_much_or_a_value_twice(model: Any) -> None:
    tokens = random_tokens(model)
    with pytest.raises(TypeError, match="two values for 'return_type'"):
        model(tokens, "loss", return_type="loss")
    with pytest.raises(TypeError, match="positional"):
        model(tokens, *range(40))


def test_one_hook_needs_no_list(model: Any) -> None:
    """As ``steer`` gives it; what is no hook at all raises in words."""
    tokens, pair = random_tokens(model), gs.steer(random_sae(model.dims, "res", 0), 3, 5.0)
    with torch.no_grad():
        wanted = model.run_with_hooks(tokens, fwd_hooks=[pair])
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=pair), wanted)
        assert torch.equal(model.run_with_hooks(tokens, pair), wanted)
        with model.hooks(pair):
            assert torch.equal(model(tokens), wanted)
        sae = random_sae(model.dims, "res", 1)
        for call in (model.run_with_hooks, model.run_with_hooks_with_saes):
            with pytest.raises(GemmaScopeError):
                call(tokens, [sae])
        for call in (model.run_with_cache, model.run_with_cache_with_saes):
            with pytest.raises((GemmaScopeError, TypeError)):
                call(tokens, [sae])


def test_text_needs_a_tokenizer_everywhere() -> None:
    """Both ways between texts and ids, in a pass too."""
    for backend in BACKENDS:
        model = gs.load_model(hf_model=random_gemma("narrow-heads"), backend=backend)
        ids = random_tokens(model)
        for call in (
            lambda model=model: model("text"),
            lambda model=model: model.run_with_cache("text"),
            lambda model=model: model.generate("text"),
            lambda model=model: model.to_tokens("text"),
            lambda model=model, ids=ids: model.to_string(ids),
            lambda model=model, ids=ids: model.to_str_tokens(ids[0]),
        ):
            with pytest.raises(GemmaScopeError, match="no tokenizer"):
                call()


def test_what_follows_the_input_by_mistake_is_said(model: Any) -> None:
    """SAEs in the place of return_type; ids by the name that Hugging Face gives them are the input."""
    tokens, sae = random_tokens(model), random_sae(model.dims, "res", 0)
    with pytest.raises(UnknownNameError, match=r"a list.*saes="):
        model.run_with_saes(tokens, [sae])
    with torch.no_grad():
        got = model.run_with_cache(input_ids=tokens, names_filter="hook_embed")[0]
        assert torch.equal(got, model(input_ids=tokens))


def test_values_that_mean_nothing_raise(model: Any) -> None:
    tokens = random_tokens(model)
    with pytest.raises(UnknownNameError, match="Nearest: loss"):
        model(tokens, return_type="losss")
    for method in ("generate", "generate_stream"):
        with pytest.raises(GemmaScopeError, match="max_new_tokens must be 1 or more"):
            list(getattr(model, method)(tokens, max_new_tokens=0))
