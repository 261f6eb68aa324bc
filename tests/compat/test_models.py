"""What TransformerLens's and SAELens's users do with a model: once on their class, once on ours, with equal results.

Each behaviour is a function of a :class:`~tests.compat.pairs.Side` that returns tensors, numbers, words, or lists and
dicts of them. Our caches may hold more names than theirs; everything else must be equal, and tensors equal to the bit
but where two sums are taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from gemma_scope_tl.sites import BACKENDS
from tests.compat.pairs import Side, make_pair

TOLERANCE = 2e-5  # on logits of 1 to 30, in float32
RESID = {"hooked_transformer": "blocks.{}.hook_resid_post", "bridge": "blocks.{}.hook_out"}
PATTERN = "blocks.1.attn.hook_pattern"
Behaviour = Callable[[Side], Any]


@pytest.fixture(scope="module", params=BACKENDS)
def sides(request: Any) -> tuple[Side, Side]:
    return make_pair(request.param)


def resid(side: Side, layer: int) -> str:
    """The residual stream's own name on this backend."""
    return RESID["bridge" if hasattr(side.model, "original_model") else "hooked_transformer"].format(layer)


def equal(theirs: Any, ours: Any, where: str = "") -> None:
    """Assert that two results are the same; a mapping of ours may have more keys."""
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape, where
        assert ours.dtype == theirs.dtype, where
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=TOLERANCE, atol=TOLERANCE, msg=where)
    elif isinstance(theirs, Mapping):
        assert set(theirs) <= set(ours), (where, set(theirs) - set(ours))
        for key, value in theirs.items():
            equal(value, ours[key], f"{where}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(theirs) == len(ours), where
        for i, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            equal(one, other, f"{where}[{i}]")
    else:
        assert theirs == ours, where


def check(behaviour: Behaviour, sides: tuple[Side, Side]) -> None:
    theirs, ours = sides
    try:
        equal(behaviour(theirs), behaviour(ours))
    finally:
        for side in sides:
            side.model.reset_hooks()
            side.model.zero_grad()


# -- passes ------------------------------------------------------------------------------------------------------------


def cached(side: Side, *args: Any, **kwargs: Any) -> Any:
    """``run_with_cache``: its output and the cache as a dict."""
    out, cache = side.model.run_with_cache(*(args or (side.tokens,)), **kwargs)
    return [out, dict(cache)]


def loss_and_gradient(s: Side) -> Any:
    loss = s.model(s.tokens, return_type="loss")
    loss.backward()
    return [loss, next(p.grad for p in s.model.parameters() if p.grad is not None)]


PASSES: dict[str, Behaviour] = {
    "logits": lambda s: s.model(s.tokens),
    "one row": lambda s: s.model(s.tokens[0]),
    "a text": lambda s: s.model("And God said"),
    "texts of a length": lambda s: s.model(["And God", "Let the"]),
    "a text without BOS": lambda s: s.model("And God said", prepend_bos=False),
    "return_type logits": lambda s: s.model(s.tokens, return_type="logits"),
    "return_type loss": lambda s: s.model(s.tokens, return_type="loss"),
    "return_type both": lambda s: list(s.model(s.tokens, return_type="both")),
    "return_type None": lambda s: s.model(s.tokens, return_type=None),
    "loss_per_token": lambda s: s.model(s.tokens, return_type="loss", loss_per_token=True),
    "stop_at_layer": lambda s: s.model(s.tokens, stop_at_layer=1),
    "stop_at_layer from the end": lambda s: s.model(s.tokens, stop_at_layer=-1),
    "backward": loss_and_gradient,
    "to_tokens": lambda s: [
        s.model.to_tokens("In the"),
        s.model.to_tokens(["In the", "And"]),
        s.model.to_tokens("In the", prepend_bos=False),
        s.model.to_tokens(["In the", "And"], padding_side="right"),
    ],
    "to_string": lambda s: [s.model.to_string(s.tokens), s.model.to_string(s.tokens[0]), s.model.to_string([5, 6])],
    "to_single_token": lambda s: [s.model.to_single_token("a"), s.model.to_single_str_token(40)],
    "get_token_position": lambda s: s.model.get_token_position("d", "And God"),
    "token directions": lambda s: [s.model.tokens_to_residual_directions(t) for t in (7, s.tokens)],
    "weights": lambda s: [s.model.W_E, s.model.W_U, s.model.W_Q, s.model.W_O, s.model.blocks[1].attn.W_V],
    "sizes": lambda s: [
        getattr(s.model.cfg, n) for n in ("n_layers", "d_model", "n_heads", "d_head", "d_vocab", "n_ctx")
    ],
    "cache": cached,
    "cache of a text": lambda s: cached(s, "And God"),
    "cache and loss": lambda s: cached(s, return_type="loss"),
    "cache, a name": lambda s: cached(s, names_filter=resid(s, 1)),
    "cache, names": lambda s: cached(s, names_filter=[resid(s, 0), PATTERN]),
    "cache, a function": lambda s: cached(s, names_filter=lambda name: name.endswith("hook_pattern")),
    "cache, no batch": lambda s: cached(s, s.tokens[:1], remove_batch_dim=True),
    "cache as a dict": lambda s: [type(s.model.run_with_cache(s.tokens, return_cache_object=False)[1]) is dict],
    "cache and a stop": lambda s: cached(s, stop_at_layer=1, names_filter=lambda name: "attn" in name),
}


@pytest.mark.parametrize("name", PASSES)
def test_passes(sides: tuple[Side, Side], name: str) -> None:
    check(PASSES[name], sides)


def residual_methods(s: Side) -> Any:
    _, cache = s.model.run_with_cache(s.tokens)
    return [cache.accumulated_resid(-1), cache.stack_activation("pattern"), cache["resid_post", 1], cache["pattern", 0]]


@pytest.mark.parametrize("sides", ["hooked_transformer"], indirect=True)
def test_what_the_hooked_transformer_alone_has(sides: tuple[Side, Side]) -> None:
    """Names, to the last one; start_at_layer; methods of caches; levels of hooks."""
    theirs, ours = sides
    for behaviour in (residual_methods, levels_and_order, caching_hooks):
        check(behaviour, sides)
    check(lambda s: s.model(s.model(s.tokens, stop_at_layer=1), start_at_layer=1), sides)
    assert set(ours.model.run_with_cache(ours.tokens)[1]) == set(theirs.model.run_with_cache(theirs.tokens)[1])
    assert set(ours.model.hook_dict) == set(theirs.model.hook_dict)


# -- hooks -------------------------------------------------------------------------------------------------------------


def halve(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value / 2


class Seen:
    """A hook that notes the names and the mean of what it is shown."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def __call__(self, value: Any, hook: Any) -> None:
        tensor = value if isinstance(value, torch.Tensor) else value[0]
        self.notes.append([hook.name, tensor.detach().clone()])


def runs(s: Side, *passes: Callable[[], Any]) -> list[Any]:
    """The logits after each of some steps."""
    found = []
    for step in passes:
        step()
        found.append(s.model(s.tokens))
    return found


def hooks_of_run(s: Side) -> Any:
    seen, name = Seen(), resid(s, 0)
    edited = s.model.run_with_hooks(s.tokens, fwd_hooks=[(name, halve), (name, seen)])
    return [edited, seen.notes, s.model(s.tokens), len(seen.notes)]


def hooks_that_stay(s: Side) -> Any:
    s.model.run_with_hooks(s.tokens, fwd_hooks=[(resid(s, 0), halve)], reset_hooks_end=False)
    return runs(s, lambda: None, lambda: s.model.reset_hooks())


def hooks_of_a_block_that_stay(s: Side) -> Any:
    with s.model.hooks(fwd_hooks=[(resid(s, 0), halve)], reset_hooks_end=False):
        pass
    return runs(s, lambda: None, lambda: s.model.reset_hooks())


def hooks_by_function(s: Side) -> Any:
    seen = Seen()
    s.model.run_with_hooks(s.tokens, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), seen)])
    return seen.notes


def backward_hooks(s: Side) -> Any:
    seen, name = Seen(), resid(s, 0)
    with s.model.hooks(bwd_hooks=[(name, seen)]):
        s.model(s.tokens, return_type="loss").backward()
    s.model(s.tokens, return_type="loss").backward()
    return seen.notes


def nested_blocks(s: Side) -> Any:
    outer, inner, found = Seen(), Seen(), []
    with s.model.hooks(fwd_hooks=[(resid(s, 0), outer)]):
        with s.model.hooks(fwd_hooks=[(resid(s, 1), inner), (resid(s, 0), halve)]):
            found.append(s.model(s.tokens))
        found.append(s.model(s.tokens))
    found.append(s.model(s.tokens))
    return [found, outer.notes, inner.notes]


def a_block_that_fails(s: Side) -> Any:
    with pytest.raises(ZeroDivisionError), s.model.hooks(fwd_hooks=[(resid(s, 0), halve)]):
        raise ZeroDivisionError
    return s.model(s.tokens)


def lifetimes(s: Side) -> Any:
    name = resid(s, 0)
    return runs(
        s,
        lambda: s.model.add_hook(name, halve),
        lambda: s.model.add_hook(resid(s, 1), halve, is_permanent=True),
        lambda: s.model.reset_hooks(),
        lambda: s.model.reset_hooks(including_permanent=True),
        lambda: s.model.add_hook(name, halve, dir="bwd"),
        lambda: s.model.reset_hooks(direction="fwd"),
        lambda: s.model.reset_hooks(level=1),
    )


def levels_and_order(s: Side) -> Any:
    """A hook may have a level, and may be put before those that are there."""
    name, seen = resid(s, 0), Seen()
    s.model.add_hook(name, halve)
    s.model.add_hook(name, seen)
    s.model.add_hook(name, lambda value, hook: value + 1, prepend=True)
    s.model.add_hook(resid(s, 1), halve, level=2)
    return [
        runs(s, lambda: None, lambda: s.model.reset_hooks(level=1), lambda: s.model.reset_hooks(level=2)),
        seen.notes,
    ]


def hooks_know_their_place(s: Side) -> Any:
    found: list[Any] = []
    s.model.run_with_hooks(
        s.tokens, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), lambda v, hook: found.append(hook.layer()))]
    )
    return found


def contexts(s: Side) -> Any:
    def keep(value: torch.Tensor, hook: Any) -> None:
        hook.ctx["mean"] = value.mean()

    s.model.run_with_hooks(s.tokens, fwd_hooks=[(resid(s, 0), keep)])
    point = s.model.hook_dict[resid(s, 0)]
    before = dict(point.ctx)
    s.model.reset_hooks(clear_contexts=True)
    return [before, len(point.ctx)]


def hooks_while_caching(s: Side) -> Any:
    with s.model.hooks(fwd_hooks=[(resid(s, 0), halve)]):
        return cached(s, names_filter=[resid(s, 0), resid(s, 1)])


def caching_with_gradients(s: Side) -> Any:
    _, cache = s.model.run_with_cache(
        s.tokens, return_type="loss", incl_bwd=True, names_filter=lambda n: n == resid(s, 1)
    )
    return {name: value for name, value in cache.items() if name in (resid(s, 1), f"{resid(s, 1)}_grad")}


def caching_hooks(s: Side) -> Any:
    cache, fwd, bwd = s.model.get_caching_hooks(lambda name: name == resid(s, 1), incl_bwd=True)
    with s.model.hooks(fwd_hooks=fwd, bwd_hooks=bwd):
        s.model(s.tokens, return_type="loss").backward()
    return dict(cache)


HOOKS: dict[str, Behaviour] = {
    fn.__name__: fn
    for fn in (
        hooks_of_run,
        hooks_that_stay,
        hooks_of_a_block_that_stay,
        hooks_by_function,
        backward_hooks,
        nested_blocks,
        a_block_that_fails,
        lifetimes,
        hooks_know_their_place,
        contexts,
        hooks_while_caching,
        caching_with_gradients,
    )
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks(sides: tuple[Side, Side], name: str) -> None:
    check(HOOKS[name], sides)


# -- generation --------------------------------------------------------------------------------------------------------

# Without a cache: the bridge's own cached passes are wrong with transformers 5.24.
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "use_past_kv_cache": False, "verbose": False}


def sampled(s: Side, **options: Any) -> Any:
    torch.manual_seed(0)
    return s.model.generate(s.tokens, **{**GREEDY, "do_sample": True, "stop_at_eos": False, **options})


def ended(side: Side) -> Any:
    """A row that ends at once, beside one that goes on; behind an end ours has padding and TransformerLens its EOS."""
    stop = int(side.model(side.tokens)[0, -1].argmax())
    out = side.model.generate(side.tokens, **GREEDY, eos_token_id=stop)
    ends = (out == stop) | (out == 0) if side.plain else out == stop
    return out.masked_fill(ends, -1)


GENERATION: dict[str, Behaviour] = {
    "ids": lambda s: s.model.generate(s.tokens, **GREEDY, stop_at_eos=False),
    "one text": lambda s: s.model.generate("And God", **GREEDY, stop_at_eos=False),
    "text to ids": lambda s: s.model.generate("And God", **GREEDY, stop_at_eos=False, return_type="tokens"),
    "no BOS": lambda s: s.model.generate("And God", **GREEDY, stop_at_eos=False, prepend_bos=False),
    "an end": ended,
    "temperature": lambda s: sampled(s, temperature=0.7),
    "top_k": lambda s: sampled(s, top_k=3),
    "top_p": lambda s: sampled(s, top_p=0.8),
}


@pytest.mark.parametrize("name", GENERATION)
@torch.no_grad()
def test_generation(sides: tuple[Side, Side], name: str) -> None:
    check(GENERATION[name], sides)


# -- the differences on purpose, as docs/coming-from.md has them -------------------------------------------------------


def test_names_and_keywords_that_do_not_exist_raise(sides: tuple[Side, Side]) -> None:
    _, ours = sides
    model, ids = ours.model, ours.tokens
    for wrong in (
        lambda: model.run_with_hooks(ids, fwd_hooks=[("blocks.0.no_such_hook", halve)]),
        lambda: model.run_with_cache(ids, names_filter="blocks.0.no_such_hook"),
        lambda: model.run_with_cache(ids, name_filter="blocks.0.hook_out"),
        lambda: model.run_with_saes(ids, sae=ours.saes["res"]),
    ):
        with pytest.raises((KeyError, TypeError), match=r"no_such_hook|name_filter|sae"):
            wrong()
