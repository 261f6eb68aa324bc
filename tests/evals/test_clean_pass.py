"""Passes restarted behind a site against whole passes with TransformerLens's own hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import AdapterMismatch
from gemma_scope_tl.evals.clean_pass import (
    CleanPass,
    clean_batches,
    read_batches,
    rows_that_fit,
    run_to_final_norm,
)
from gemma_scope_tl.evals.next_token import LogitHead
from gemma_scope_tl.evals.saes import latents_and_output
from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.interventions import steer
from gemma_scope_tl.model.counted import CountedBatch
from gemma_scope_tl.sites import BACKENDS, Place, get_site
from tests.helpers import hooked, random_gemma, random_sae, random_tokens, shared_model

LAYERS = range(4)
WRITTEN = [Place("embedding", None), *(Place(site, layer) for layer in LAYERS for site in ("res", "mlp", "att"))]


def _padded_tokens(model: Any) -> torch.Tensor:
    tokens = random_tokens(model, batch=3)
    tokens[1, :6] = 0
    tokens[1, 6] = 2
    return tokens


def _counted(tokens: torch.Tensor) -> CountedBatch:
    return CountedBatch(tokens, tokens != 0, tokens > 2)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_restarts_equal_whole_passes_at_every_place(backend: str) -> None:
    model = shared_model("grouped", backend)
    tokens = _padded_tokens(model)  # rows of 24 tokens, a sliding window of 8: masks differ by layer and by row
    head = LogitHead(model, 1 << 20)
    clean = CleanPass.run(model, tokens, WRITTEN)
    real = tokens != 0
    assert torch.equal(clean.final, run_to_final_norm(model, tokens))
    for place in WRITTEN:
        value = clean.values[place]
        changed = value + torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        name = get_site(place.site).hook_name(place.layer, model.backend)
        wanted = model.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda seen, hook, changed=changed: changed.reshape(seen.shape))]
        )
        normed = head.normed(clean.restart(place, changed))[real]
        torch.testing.assert_close(head.logits(normed), wanted[real], rtol=0, atol=1e-5, msg=place.key)
    clean.check(WRITTEN)


def _hooks(model: Any) -> dict[str, int]:
    return {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_stays_on_the_model(backend: str) -> None:
    model = shared_model("grouped", backend)
    before, tokens = _hooks(model), random_tokens(model)
    for batch in clean_batches(model, _counted(tokens), WRITTEN, batch_size=1):
        batch.spliced(Place("att", 1), batch.activations(Place("att", 1)))
    assert _hooks(model) == before
    with pytest.raises(Exception, match="Token ids are from"):
        CleanPass.run(model, tokens + 10_000, WRITTEN)
    assert _hooks(model) == before


def test_users_hooks_act_in_restarts_too() -> None:
    model = hooked(random_gemma(), "bridge")
    tokens = random_tokens(model)
    model.add_hook("blocks.2.hook_mlp_out", lambda value, hook: value * 1.5)
    with torch.no_grad():
        clean = CleanPass.run(model, tokens, WRITTEN)
        clean.check([*WRITTEN, *reversed(WRITTEN)])
        for place in WRITTEN:
            assert torch.equal(clean.restart(place, clean.values[place]), clean.final)


def test_a_pass_that_cannot_be_repeated_is_noticed() -> None:
    model = hooked(random_gemma(), "bridge")
    calls: list[int] = []
    model.add_hook("blocks.3.hook_mlp_out", lambda value, hook: calls.append(1) or value * len(calls))
    with torch.no_grad():
        clean = CleanPass.run(model, random_tokens(model), WRITTEN)
        with pytest.raises(AdapterMismatch, match="restarted behind res/layer_1 differs"):
            clean.check([Place("res", 1)])


def test_batches_know_their_rows_and_leave_special_tokens_out() -> None:
    model = shared_model("grouped", "bridge")
    tokens = _padded_tokens(model)
    tokens[0, 5] = 1
    batches = list(clean_batches(model, _counted(tokens), [Place("transcoder", 1)], batch_size=2))
    assert [batch.start for batch in batches] == [0, 2]
    assert [batch.rows.tolist() for batch in batches] == [[1, 0], [2]]  # the shortest text first
    for batch in batches:
        assert torch.equal(batch.counted, tokens[batch.rows] > 2)
    first = batches[0]
    assert first.activations(Place("mlp", 1)).shape == (int((tokens[:2] > 2).sum()), 64)  # the target is kept too
    assert first.targets().min() > 2
    later = list(clean_batches(model, _counted(tokens), [Place("res", 0)], batch_size=2, start=2))
    assert torch.equal(later[0].tokens, tokens[2:])


def test_rows_that_fit_grow_with_the_budget_and_stop_at_the_batch() -> None:
    model = shared_model("grouped", "bridge")
    fitting = [rows_that_fit(model, WRITTEN, 24, 8, memory) for memory in (1, 5 << 17, 5 << 18, 1 << 30)]
    assert fitting[0] == 1
    assert fitting[-1] == 8
    assert fitting[0] < fitting[1] < fitting[2] < fitting[3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_that_are_only_read_have_the_same_bits_and_end_at_the_last_place(backend: str) -> None:
    model, ran = shared_model("grouped", backend), list[int]()
    tokens, places = _padded_tokens(model), [Place("transcoder", 1), Place("att", 2), Place("embedding", None)]
    whole = list(clean_batches(model, _counted(tokens), places, batch_size=2))
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(model.blocks)
    ]
    unembed = model.unembed.register_forward_hook(lambda *_: ran.append(-1))
    try:
        read = list(read_batches(model, _counted(tokens), places, batch_size=2))
    finally:
        for handle in (*handles, unembed):
            handle.remove()
    assert ran == [0, 1, 0, 1]  # two batches, and the heads of layer 2 are inside it
    for one, other in zip(read, whole, strict=True):
        assert one.start == other.start and torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.counted, other.counted)
        for place in places:
            assert torch.equal(one.activations(place), other.activations(place)), place


def _with_both(model: Any, tokens: torch.Tensor, saes: list[Any], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.run_with_saes(tokens, saes=saes, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"positions": slice(-4, None)}, {"exclude_special_tokens": [2, 7]}])
def test_a_splice_behind_the_site_knows_the_tokens_of_its_rows(backend: str, options: dict[str, Any]) -> None:
    """Special tokens, padding and positions, of each batch of rows, while other batches and passes were run."""
    model = shared_model("grouped", backend)
    tokens = _padded_tokens(model)
    later = random_sae(model.dims, "res", 2, seed=1)
    head, real = LogitHead(model, 1 << 20), tokens != 0
    for site, layer in (("mlp", 1), ("att", 2), ("mlp", 2), ("res", 1), ("embedding", None)):
        place, first = Place(site, layer), random_sae(model.dims, site, layer, seed=2)
        counted = real & ~torch.isin(tokens, torch.tensor(options.get("exclude_special_tokens", [0, 1, 2])))
        if "positions" in options:
            counted[:, :-4] = False
        wanted = _with_both(model, tokens, [first, later], **options)
        with model.saes([later], **options):
            batches = list(clean_batches(model, CountedBatch(tokens, real, counted), [place], batch_size=2))
            model(random_tokens(model, batch=2, seed=5))  # restarts must not read this pass's tokens
            for batch in batches:
                with torch.no_grad():
                    rows, (_, out) = batch.rows, latents_and_output(first, batch.activations(place))
                    logits = head.logits(head.normed(batch.spliced(place, out)))
                # float32 logits up to 30 through other products than the whole pass's
                seen = real[rows]
                torch.testing.assert_close(logits[seen], wanted[rows][seen], rtol=0, atol=1e-5, msg=place.key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["splice", "steering"])
def test_evaluate_under_a_splice_or_a_hook_behind_the_site(backend: str, kind: str) -> None:
    model = shared_model("grouped", backend)
    tokens = random_tokens(model, batch=3)
    first, later = random_sae(model.dims, "mlp", 1, seed=2), random_sae(model.dims, "res", 2, seed=1)
    context = model.saes([later]) if kind == "splice" else model.hooks([steer(later, 5, 3.0)])
    with context, torch.no_grad():
        found = evaluate(model, first, tokens, progress=False, ablations=(), resamples=2)
        clean, both = model(tokens), model.run_with_saes(tokens, saes=[first])
    scored, after = tokens[:, :-1] > 2, tokens[:, 1:, None]
    for name, logits in (("loss_clean", clean), ("loss_spliced", both)):
        losses = -logits[:, :-1].double().log_softmax(-1).gather(-1, after).squeeze(-1)
        assert found[name][0] == pytest.approx(float(losses[scored].mean()), abs=1e-6)  # float32 logits up to 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_restart_leaves_the_text_of_a_running_pass(backend: str) -> None:
    """A hook that restarts another pass gives the pass it runs in its own tokens back."""
    model = shared_model("grouped", backend)
    tokens, place = _padded_tokens(model), Place("mlp", 0)
    sae = random_sae(model.dims, "res", 2, seed=1)
    wanted = _with_both(model, tokens, [sae])

    def restart(_value: torch.Tensor, hook: Any) -> None:
        clean.restart(place, clean.values[place])

    with torch.no_grad(), model.saes([sae]):
        clean = CleanPass.run(model, random_tokens(model, batch=3, seed=4), [place])
        name = get_site("mlp").hook_name(0, model.backend)  # which the restart does not run again
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, restart)]), wanted)
