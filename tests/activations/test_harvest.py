"""Harvested tensors are the plain Hugging Face model's; the pass ends early and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.activations.harvest import Harvester
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError
from gemma_scope_tl.model.plain import Reference, run_reference
from gemma_scope_tl.sites import BACKENDS, Place, get_site
from tests.helpers import random_gemma, random_sae, shared_model

PLACES = [Place("embedding", None), *(Place(s, i) for i in range(4) for s in ("res", "mlp", "att", "transcoder"))]


def batch() -> torch.Tensor:
    tokens = torch.randint(3, 96, (3, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[1, 15:] = 2, 0
    return tokens


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    return gs.load_model(hf_model=random_gemma(), backend=request.param)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return run_reference(random_gemma(), batch())


def hook_counts(model: Any) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_every_place_is_the_plain_models_tensor(model: Any, reference: Reference) -> None:
    tokens = batch()
    keep = tokens > 2
    harvester = Harvester(model, PLACES)
    found = harvester.run(tokens, keep)
    assert list(found) == PLACES
    for place, x in found.items():
        wanted = reference.sites[place.site, place.layer][keep]
        assert x.shape == wanted.shape == (int(keep.sum()), harvester.widths[place])
        if model.backend == "bridge":  # it runs Hugging Face's own code
            assert torch.equal(x, wanted), place
        else:  # another order of operations: rounding of float32, relative to the largest value
            assert (x - wanted).abs().max() <= 3e-6 * wanted.abs().max(), place


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.key)
def test_a_place_alone_gives_the_same_bits_and_nothing_runs_after_it(model: Any, place: Place) -> None:
    tokens = batch()
    wanted = Harvester(model, PLACES).run(tokens, tokens > 2)[place]
    ran: list[str] = []
    names = {Place(s, i): get_site(s).hook_name(i, model.backend) for s, i in PLACES}
    handles = [
        model.site_hook_point(name).register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
        for name in names.values()
    ]
    unembed = model.unembed.register_forward_pre_hook(lambda _m, _i: ran.append("logits"))
    try:
        assert torch.equal(Harvester(model, [place]).run(tokens, tokens > 2)[place], wanted)
    finally:
        for handle in (*handles, unembed):
            handle.remove()
    assert ran[-1] == names[place] and ran.count(names[place]) == 1
    if place.site == "embedding":
        assert ran == [names[place]]


def test_the_same_batch_gives_the_same_bits(model: Any) -> None:
    tokens = batch()
    first, second = (Harvester(model, PLACES).run(tokens, tokens > 2) for _ in range(2))
    assert all(torch.equal(first[place], second[place]) for place in PLACES)


def test_padding_on_the_right_changes_nothing_before_it(model: Any) -> None:
    tokens = batch()[1:2]
    keep = tokens > 2
    other = torch.where(keep | (tokens == 2), tokens, 77)
    ours, theirs = (Harvester(model, PLACES).run(ids, keep) for ids in (tokens, other))
    assert all(torch.equal(ours[place], theirs[place]) for place in PLACES)


def test_no_hook_stays_whatever_happens(model: Any) -> None:
    before, tokens = hook_counts(model), batch()
    Harvester(model, PLACES).run(tokens, tokens > 2)
    assert hook_counts(model) == before
    embedding = model.embedding_module().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Harvester(model, PLACES).run(tokens, tokens > 2)
    embedding.remove()
    assert hook_counts(model) == before
    whole = model(tokens)  # the model still runs to its end
    assert whole.shape == (3, 24, 96) and torch.isfinite(whole).all()


def test_gradients_are_off_and_tensors_are_copies(model: Any) -> None:
    tokens, place = batch(), Place("res", 0)
    x = Harvester(model, [place]).run(tokens, tokens > 2)[place]
    assert not x.requires_grad and not x.is_inference() and x.untyped_storage().nbytes() == x.nbytes


def test_attached_saes_are_refused() -> None:
    model, tokens = shared_model("bundled", "bridge"), batch()
    harvester = Harvester(model, [Place("res", 3)])
    clean = harvester.run(tokens, tokens > 2)[Place("res", 3)]
    with gs.splice(model, random_sae(model.dims, "res", 1)), pytest.raises(SpliceError, match="reset_saes"):
        harvester.run(tokens, tokens > 2)
    assert torch.equal(harvester.run(tokens, tokens > 2)[Place("res", 3)], clean)


def test_bad_input_is_refused(model: Any) -> None:
    tokens = batch()
    harvester = Harvester(model, [Place("res", 0)])
    keep = tokens > 2
    for ids, mask, said in (
        (tokens.float(), keep, "integers"),
        (tokens[0], keep[0], "integers"),
        (tokens, keep[:, 1:], "bool"),
        (tokens, keep.long(), "bool"),
        (tokens + 90, keep, "0..95"),
        (tokens - 9, keep, "0..95"),
        (torch.full((1, 129), 2), torch.ones(1, 129, dtype=torch.bool), "context is 128"),
    ):
        with pytest.raises(GemmaScopeError, match=said):
            harvester.run(ids, mask)
    with pytest.raises(SpliceError, match="no layer 4"):
        Harvester(model, [Place("res", 4)])
    with pytest.raises(UnknownNameError):
        Harvester(model, [Place("ress", 0)])
    with pytest.raises(GemmaScopeError, match="places"):
        Harvester(model, [])
    with pytest.raises(SpliceError, match="load_model"):
        Harvester(random_gemma(), [Place("res", 0)])  # pyright: ignore[reportArgumentType]
