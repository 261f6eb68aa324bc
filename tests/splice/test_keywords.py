"""One error term under two names, and no keyword of a splice swallowed, on either backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError, KeywordError, UnknownKeywordError, unknown_keyword
from gemma_scope_tl.model.splicing import SpliceMixin, splice
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_sae, random_tokens, shared_model

NAME = "blocks.1.hook_resid_post"


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("narrow-heads", request.param)


def _added(model: Any, tokens: torch.Tensor, sae: Any, **options: Any) -> torch.Tensor:
    model.add_sae(sae, **options)
    try:
        return model(tokens)
    finally:
        model.reset_saes()


def _inside(make: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    def run(model: Any, tokens: torch.Tensor, sae: Any, **options: Any) -> torch.Tensor:
        with make(model, sae, **options):
            return model(tokens)

    return run


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "add_sae": _added,
    "saes": _inside(lambda model, sae, **options: model.saes([sae], **options)),
    "splice": _inside(splice),
    "run_with_saes": lambda model, tokens, sae, **options: model.run_with_saes(tokens, saes=[sae], **options),
    "run_with_cache_with_saes": lambda model, tokens, sae, **options: model.run_with_cache_with_saes(
        tokens, saes=[sae], names_filter=NAME, **options
    )[0],
    "run_with_hooks_with_saes": lambda model, tokens, sae, **options: model.run_with_hooks_with_saes(
        tokens, saes=[sae], fwd_hooks=[], **options
    ),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_both_names_of_the_error_term(model: Any, way: str) -> None:
    tokens, sae = random_tokens(model, length=6), random_sae(model.dims, "res", 1, d_sae=64)
    run = WAYS[way]
    plain, without = model(tokens), run(model, tokens, sae)
    assert not torch.equal(plain, without)
    for name in ("error_term", "use_error_term"):
        assert torch.allclose(run(model, tokens, sae, **{name: True}), plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(run(model, tokens, sae, **{name: False}), without)
    both = run(model, tokens, sae, error_term=True, use_error_term=True)
    assert torch.allclose(both, plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(KeywordError, match="two names of one option") as caught:
        run(model, tokens, sae, error_term=True, use_error_term=False)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, GemmaScopeError)
    sae.use_error_term = True  # the SAE's own setting is the default
    assert torch.allclose(run(model, tokens, sae), plain, rtol=1e-4, atol=1e-4)
    assert not model.acts_to_saes


@pytest.mark.parametrize("way", WAYS)
def test_a_misspelt_keyword_names_the_right_one(model: Any, way: str) -> None:
    tokens, sae = random_tokens(model, length=6), random_sae(model.dims, "res", 1, d_sae=64)
    for wrong, right in (("position", "positions"), ("eror_term", "error_term"), ("exclude_special_token", "tokens")):
        with pytest.raises(UnknownKeywordError, match=f"{way}.*{wrong}.*did you mean '.*{right}'"):
            WAYS[way](model, tokens, sae, **{wrong: None})
    assert not model.acts_to_saes


def test_sae_is_saes(model: Any) -> None:
    tokens, sae = random_tokens(model, length=6), random_sae(model.dims, "res", 1, d_sae=64)
    for call in (
        model.run_with_saes,
        model.run_with_cache_with_saes,
        model.run_with_hooks_with_saes,
        lambda tokens, sae: model.saes(sae=sae).__enter__(),
    ):
        with pytest.raises(TypeError, match="did you mean 'saes'"):
            call(tokens, sae=sae)


def test_options_are_read_once_for_all_saes(model: Any) -> None:
    """An iterator of ids is used up by the first that reads it."""
    tokens = random_tokens(model, length=6)
    saes = [random_sae(model.dims, site, 1, d_sae=64) for site in ("res", "att")]
    ids = [int(tokens[0, 2])]
    with torch.no_grad():
        wanted = model.run_with_saes(tokens, saes=saes, exclude_special_tokens=ids)
        got = model.run_with_saes(tokens, saes=iter(saes), exclude_special_tokens=iter(ids))
    assert torch.equal(got, wanted)


def test_positional_order_is_saelens(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1, d_sae=64)
    model.add_sae(sae, True, [7])
    (attached,) = model._attached.values()
    assert (attached.error_term, attached.excluded) == (True, (7,))
    model.reset_saes()


def test_the_hint_without_a_near_name() -> None:
    assert str(unknown_keyword("f", "x", [])) == "f() takes no keyword 'x'."


def test_too_many_options_by_position(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1, d_sae=64)
    with pytest.raises(TypeError, match=r"add_sae\(\) takes 4 options by position at most; given: 5"):
        model.add_sae(sae, True, False, [1], True, 9)
    with pytest.raises(TypeError, match=r"add_sae\(\) got two values for 'error_term'"):
        model.add_sae(sae, True, error_term=True)
    assert not model.acts_to_saes


def test_help_names_the_options() -> None:
    for function in (splice, SpliceMixin.add_sae, SpliceMixin.saes):
        named = [*inspect.signature(function).parameters]
        assert named[-5:] == ["error_term", "exclude_special_tokens", "positions", "chain", "use_error_term"]
