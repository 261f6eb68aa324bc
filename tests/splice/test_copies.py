"""Copies of a model with attached SAEs, in memory and pickled: each its own, and the original as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.interventions import steer
from gemma_scope_tl.model.splicing import splice
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import hooked, random_gemma, random_sae, random_tokens
from tests.splice.world import stock_sae

NAME = "blocks.1.hook_resid_post"


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
}
CASES = [("bridge", "deepcopy"), *(("hooked_transformer", way) for way in WAYS)]  # stock bridges cannot be pickled


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def made(request: pytest.FixtureRequest) -> tuple[Any, Callable[[Any], Any]]:
    backend, way = request.param
    return hooked(random_gemma("narrow-heads"), backend), WAYS[way]


def saes_of(model: Any) -> list[Any]:
    places = [("res", 1), ("res", 1), ("att", 0), ("transcoder", 1)]
    return [random_sae(model.dims, *place, d_sae=64, seed=i) for i, place in enumerate(places)]


@torch.no_grad()
def test_a_copy_is_spliced_as_the_original_and_independent(made: Any) -> None:
    model, way = made
    tokens, saes = random_tokens(model, length=6), saes_of(model)
    plain = model(tokens)
    for sae in saes:
        model.add_sae(sae, error_term=sae is saes[2], positions=slice(1, 5), chain=True)
    spliced = model(tokens)
    twin = way(model)
    assert torch.equal(twin(tokens), spliced)
    assert list(twin.acts_to_saes) == list(model.acts_to_saes)
    assert not {id(sae) for sae in twin.acts_to_saes.values()} & {id(sae) for sae in saes}
    for sae in twin.acts_to_saes.values():  # what a copy's SAE does is the copy's affair, and the reverse
        sae.W_dec.data.zero_()
    assert torch.equal(model(tokens), spliced)
    changed = twin(tokens)
    assert not torch.equal(changed, spliced)
    saes[0].b_dec.data += 1
    assert torch.equal(twin(tokens), changed)
    twin.reset_saes()
    assert torch.equal(twin(tokens), plain)
    assert list(model.acts_to_saes.values()) == saes
    model.reset_saes()
    assert torch.equal(model(tokens), plain)
    assert not model.acts_to_saes
    for one in (model, twin):
        assert not any(point.fwd_hooks for point in one.hook_dict.values())
        one.add_sae(saes[0])
        one.reset_saes()


@torch.no_grad()
def test_names_of_hook_points_in_original_and_copy(made: Any) -> None:
    model, way = made
    sae = saes_of(model)[0]
    model.add_sae(sae)
    twin = way(model)
    (theirs,) = twin.acts_to_saes.values()
    for one in (sae, theirs):
        assert one.hook_sae_acts_post.name == f"{NAME}.hook_sae_acts_post"
    model.reset_saes()
    assert sae.hook_sae_acts_post.name == "hook_sae_acts_post"
    cache = twin.run_with_cache(random_tokens(model, length=4), names_filter=f"{NAME}.hook_sae_acts_post")[1]
    assert cache[f"{NAME}.hook_sae_acts_post"].shape[-1] == 64
    twin.reset_saes()
    assert theirs.hook_sae_acts_post.name == "hook_sae_acts_post"


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_the_order_among_the_users_hooks_stays(backend: str) -> None:
    model = hooked(random_gemma("narrow-heads"), backend)
    tokens, seen = random_tokens(model, length=6), []
    look = lambda value, hook: seen.append(value.clone())  # noqa: E731
    model.add_hook(NAME, look, is_permanent=True)
    model.add_sae(saes_of(model)[0])
    model.add_hook(NAME, look, is_permanent=True)
    model(tokens)
    copy.deepcopy(model)(tokens)
    before, after, copied_before, copied_after = seen
    assert not torch.equal(before, after)
    assert torch.equal(before, copied_before)
    assert torch.equal(after, copied_after)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_each_knows_its_own_tokens(backend: str) -> None:
    """Splices and interventions of a copy leave the copy's special tokens alone, not those of the original's pass."""
    model = hooked(random_gemma("narrow-heads"), backend)
    model.add_sae(saes_of(model)[0])
    model.add_hook(*steer(saes_of(model)[0], 3, 5.0), is_permanent=True)
    tokens = random_tokens(model, length=6)
    other = tokens.clone()
    other[:, 2:4] = 1  # EOS, which is left alone
    wanted = [model(one) for one in (tokens, other)]
    twin = copy.deepcopy(model)
    for one, logits in zip((tokens, other), wanted, strict=True):
        model(other if one is tokens else tokens)
        assert torch.equal(twin(one), logits)


@torch.no_grad()
def test_a_copy_made_inside_a_block_keeps_its_saes() -> None:
    model = hooked(random_gemma("narrow-heads"), "bridge")
    tokens = random_tokens(model, length=6)
    plain = model(tokens)
    with model.saes(saes_of(model)[:1]):
        spliced, twin = model(tokens), copy.deepcopy(model)
        shallow = copy.copy(model)
        assert torch.equal(shallow(tokens), spliced)
    assert torch.equal(twin(tokens), spliced)
    assert torch.equal(model(tokens), plain)
    assert torch.equal(shallow(tokens), plain)
    twin.reset_saes()
    assert torch.equal(twin(tokens), plain)


@torch.no_grad()
def test_a_stock_sae_is_told_of_its_heads_again() -> None:
    model = hooked(random_gemma("narrow-heads"), "hooked_transformer")
    sae, tokens = stock_sae(model.dims), random_tokens(model, length=6)
    model.add_sae(sae)
    twin = copy.deepcopy(model)
    for one in (twin, model):
        (held,) = one.acts_to_saes.values()
        assert not held.hook_z_reshaping_mode
        one(tokens)
        one.reset_saes()
        assert held.hook_z_reshaping_mode


@pytest.mark.slow
@pytest.mark.parametrize("spliced", [False, True])
@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_what_cannot_be_pickled_says_why(way: str, spliced: bool) -> None:
    bridge, model = (hooked(random_gemma("narrow-heads"), backend) for backend in BACKENDS)
    if bridge.backend != "bridge":
        bridge, model = model, bridge
    sae = saes_of(model)[0]
    for one in (bridge, model) if spliced else ():
        one.add_sae(sae)
    held = [value for module in bridge.modules() for value in (module, *vars(module).values())]
    local = [value for value in held if "<locals>" in type(value).__qualname__]
    if local:  # otherwise TransformerLens makes its classes elsewhere, and there is nothing to refuse
        with pytest.raises(SpliceError, match=r"inside a function.*deepcopy.*save_pretrained.*hooked_transformer"):
            WAYS[way](bridge)
    else:
        WAYS[way](bridge)
    with model.hooks([steer(sae, 3, 5.0)]):
        with pytest.raises(SpliceError, match=rf"hook on {NAME}.*outside of model.hooks"):
            WAYS[way](model)
        copy.deepcopy(model)
    tokens = random_tokens(model, length=4)
    with torch.no_grad():
        assert torch.equal(WAYS[way](model)(tokens), model(tokens))


@torch.no_grad()
def test_a_model_pickled_before_there_were_families() -> None:
    model = hooked(random_gemma("narrow-heads"), "hooked_transformer")
    tokens, sae = random_tokens(model, length=4), saes_of(model)[0]
    earlier = copy.deepcopy(model)
    del earlier.family
    read = pickle.loads(pickle.dumps(earlier))
    assert read.family == model.family
    with splice(read, sae), splice(model, sae):
        assert torch.equal(read(tokens), model(tokens))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_detached_stays_known_and_the_model_is_plain(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hooked(random_gemma("narrow-heads"), backend)
    sae, other, tokens = stock_sae(model.dims), saes_of(model)[3], random_tokens(model, length=6)
    with torch.no_grad():
        plain = model(tokens)
    model.add_sae(sae)
    model.add_sae(other)

    def fail() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(sae, "turn_on_forward_pass_hook_z_reshaping", fail)
        with pytest.raises(ZeroDivisionError):
            model.reset_saes()
    assert list(model.acts_to_saes.values()) == [sae]
    with torch.no_grad():
        assert torch.equal(model(tokens), plain)
    model.reset_saes()
    assert not model.acts_to_saes
    assert sae.hook_z_reshaping_mode
    with pytest.raises(SpliceError, match="attached already"), model.saes([other, other]):
        pass
    assert not model.acts_to_saes


def test_a_copy_takes_saes_that_name_their_model(made: tuple[Any, Callable[[Any], Any]]) -> None:
    model, copied = made
    twin, sae = copied(model), random_sae(model.dims, "res", 1, d_sae=64)
    sae.cfg.metadata.model_name = "gemma-2-2b"
    tokens = random_tokens(model)
    with torch.no_grad():
        assert torch.equal(twin.run_with_saes(tokens, saes=[sae]), model.run_with_saes(tokens, saes=[sae]))
