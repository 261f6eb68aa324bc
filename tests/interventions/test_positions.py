"""Positions count in each row's own text: in one pass, under padding, and while generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.interventions import ablate, clamp, scale, steer
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_sae, random_tokens, shared_model


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("grouped", request.param)


def _changed(model: Any, tokens: torch.Tensor, positions: Any, everywhere: bool = False) -> list[list[int]]:
    """Columns that steering changes, row by row."""
    pair = steer(random_sae(model.dims, "res", 1), 3, 5.0, positions, exclude_special_tokens=not everywhere)
    values: list[torch.Tensor] = []
    for hooks in ([], [pair]):
        with torch.no_grad(), model.hooks(hooks):
            values.append(model.run_with_cache(tokens, names_filter=pair[0])[1][pair[0]])
    return [row.nonzero().flatten().tolist() for row in (values[0] != values[1]).any(-1)]


ONE_ROW = [
    (None, range(1, 12)),
    (3, [3]),
    (-1, [11]),
    ([0, 5, -2], [5, 10]),
    ((4, 4), [4]),
    (slice(0, 3), [1, 2]),
    (slice(9, 99), [9, 10, 11]),
    (slice(-3, None), [9, 10, 11]),
    (slice(2, -6, 2), [2, 4]),
    (slice(5, 2), []),
    ([], []),
    ([False] * 4 + [True] + [False] * 7, [4]),
    (torch.tensor([7, 8]), [7, 8]),
    (torch.arange(12) % 5 == 0, [5, 10]),
    (torch.arange(12)[None] > 9, [10, 11]),
]


@pytest.mark.parametrize(("positions", "wanted"), ONE_ROW, ids=lambda value: str(value)[:24])
def test_in_one_pass(model: Any, positions: Any, wanted: Any) -> None:
    assert _changed(model, random_tokens(model, batch=1, length=12), positions) == [list(wanted)]


def test_special_tokens_on_request(model: Any) -> None:
    tokens = random_tokens(model, batch=1, length=12)
    assert _changed(model, tokens, slice(0, 3), everywhere=True) == [[0, 1, 2]]
    assert _changed(model, tokens, 0, everywhere=True) == [[0]]


def test_padded_rows_count_from_their_first_token(model: Any) -> None:
    tokens = random_tokens(model, length=12)
    tokens[1, :4], tokens[1, 4] = 0, 2  # padding, then BOS
    assert _changed(model, tokens, 3) == [[3], [7]]
    assert _changed(model, tokens, [2, -1]) == [[2, 11], [6, 11]]
    assert _changed(model, tokens, slice(1, 3)) == [[1, 2], [5, 6]]
    assert _changed(model, tokens, slice(0, 1), everywhere=True) == [[0], [4]]
    columns = torch.zeros(2, 12, dtype=torch.bool)
    columns[:, 5] = True
    assert _changed(model, tokens, columns) == [[5], [5]]  # a mask [batch, pos] lies over the ids


def test_padding_on_the_right_is_not_the_end(model: Any) -> None:
    tokens = random_tokens(model, length=12)
    tokens[1, 8:] = 0
    assert _changed(model, tokens, -1, everywhere=True) == [[11], [7]]
    assert _changed(model, tokens, slice(-2, None), everywhere=True) == [[10, 11], [6, 7]]


def test_what_does_not_exist_raises(model: Any) -> None:
    tokens = random_tokens(model, length=12)
    tokens[1, :4], tokens[1, 4] = 0, 2
    for positions, match in (
        (12, "No position 12: row 0 has 12 tokens"),
        (10, "No position 10: row 1 has 8 tokens"),
        ([1, -9], "No position -9: row 1 has 8 tokens"),
        (slice(None, None, -1), "positive step"),
        (torch.ones(2, 11, dtype=torch.bool), "but the batch of tokens"),
        ([0.5], "list of ints"),
        (True, "list of ints"),  # a mask of no dimension, which would select nothing
        (torch.ones(1, 1, 12, dtype=torch.bool), "list of ints"),
        ([[1, 2], [3, 4]], "list of ints"),
    ):
        with pytest.raises(SpliceError, match=match):
            _changed(model, tokens, positions)


GENERATED = [3, -1, [1, 6, 9], slice(2, None), slice(-2, None), slice(6, 8), slice(1, None, 3), torch.arange(9) > 5]


def _expected(model: Any, prompt: torch.Tensor, make: Any, fixed: Any, steps: int) -> torch.Tensor:
    """Greedy text from whole, uncached forward passes, each told its columns outright by a mask over all ids."""
    text = prompt
    with torch.no_grad():
        for _ in range(steps):
            pair = make(positions=fixed(text.shape[1]))
            text = torch.cat([text, model.run_with_hooks(text, fwd_hooks=[pair])[:, -1:].argmax(-1)], dim=1)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("positions", GENERATED, ids=str)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_while_generating(model: Any, positions: Any, use_cache: bool) -> None:
    """Positions stand in the whole text, negative ones from the prompt's end: the same tokens in every step."""
    sae, prompt, steps = random_sae(model.dims, "res", 1), random_tokens(model, batch=1, length=5), 7
    numbers = list(range(5 + steps))
    if isinstance(positions, slice):
        first = (positions.start or 0) + (5 if (positions.start or 0) < 0 else 0)
        columns = numbers[slice(first, positions.stop, positions.step)]
    elif isinstance(positions, torch.Tensor):
        columns = positions.nonzero().flatten().tolist()
    else:
        columns = [p + 5 if p < 0 else p for p in ([positions] if isinstance(positions, int) else positions)]

    def make(**where: Any) -> Any:
        return steer(sae, 7, 60.0, **where)

    def fixed(total: int) -> torch.Tensor:
        return torch.tensor([[n in columns for n in range(total)]])

    wanted = _expected(model, prompt, make, fixed, steps)
    pair, before, passes = make(positions=positions), [], []

    def remember(value: torch.Tensor, hook: Any) -> None:
        before.append(value.clone())

    def compare(value: torch.Tensor, hook: Any) -> None:
        passes.append((value != before[-1]).any(-1)[0].nonzero().flatten().tolist())

    with model.hooks([(pair[0], remember), pair, (pair[0], compare)]):
        got = model.generate(
            prompt, max_new_tokens=steps, do_sample=False, stop_at_eos=False, use_past_kv_cache=use_cache
        )
    assert got.tolist() == wanted.tolist()
    for step, changed in enumerate(passes):  # a tensor ends with the newest token and is as long as it is
        first = 5 + step - before[step].shape[1]
        assert [first + n for n in changed] == [n for n in columns if first <= n < 5 + step and n]  # BOS is left alone
    assert len(passes) == steps and before[-1].shape[1] == (1 if use_cache else 4 + steps)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_padded_generation_is_each_row_alone(model: Any, use_cache: bool) -> None:
    sae = random_sae(model.dims, "res", 1)
    rows = [random_tokens(model, batch=1, length=n, seed=n) for n in (9, 6)]
    batch = torch.cat([rows[0], torch.cat([torch.zeros(1, 3, dtype=torch.long), rows[1]], dim=1)])
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "use_past_kv_cache": use_cache}
    with model.hooks([steer(sae, 7, 60.0, positions=[2, -1, 8])]):
        together = model.generate(batch, **options)
        for i, row in enumerate(rows):
            assert together[i, -6:].tolist() == model.generate(row, **options)[0, -6:].tolist()


EDITS = {
    "steer": lambda sae, **kw: steer(sae, 7, 40.0, **kw),
    "steer-norm": lambda sae, **kw: steer(sae, 7, 2.0, unit="norm", **kw),
    "clamp": lambda sae, **kw: clamp(sae, [7, 8], 30.0, **kw),
    "scale": lambda sae, **kw: scale(sae, list(range(30)), 8.0, **kw),
    "ablate": lambda sae, **kw: ablate(sae, list(range(60)), **kw),
    "clamp-features": lambda sae, **kw: clamp(sae, [7, 8], 30.0, on="features", **kw),
    "steer-features": lambda sae, **kw: steer(sae, 7, 40.0, on="features", **kw),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_generates_the_same_with_a_cache_and_without(model: Any, edit: str) -> None:
    sae, prompt = random_sae(model.dims, "res", 2), random_tokens(model, batch=1, length=5)
    pair = EDITS[edit](sae)
    options = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False}
    with model.saes([sae] if "features" in edit else [], use_error_term=True):
        plain = model.generate(prompt, **options)
        with model.hooks([pair]):
            cached, uncached = (model.generate(prompt, use_past_kv_cache=cache, **options) for cache in (True, False))
        text = prompt
        with torch.no_grad():
            for _ in range(8):
                step = model.run_with_hooks(text, fwd_hooks=[pair])[:, -1:].argmax(-1)
                text = torch.cat([text, step], dim=1)
    assert cached.tolist() == uncached.tolist() == text.tolist() != plain.tolist()


def test_after_generating_a_plain_pass_counts_afresh(model: Any) -> None:
    tokens = random_tokens(model, batch=1, length=12)
    with model.hooks([steer(random_sae(model.dims, "res", 1), 3, 5.0, positions=slice(0, 99))]):
        model.generate(tokens[:, :5], max_new_tokens=3, do_sample=False, stop_at_eos=False)
    assert _changed(model, tokens, [3, -1]) == [[3, 11]]


def test_a_model_that_is_not_ours_counts_in_the_tensor_at_hand() -> None:
    from transformer_lens import HookedTransformer

    ours = shared_model("grouped", "hooked_transformer")
    plain: Any = HookedTransformer(ours.cfg)
    plain.load_state_dict(ours.state_dict(), strict=False)
    sae, tokens = random_sae(ours.dims, "res", 1), random_tokens(ours, length=6)
    for positions, wanted in ((None, range(6)), ([0, -1], [0, 5]), (slice(2, 4), [2, 3])):
        pair = steer(sae, 3, 5.0, positions)
        values: list[torch.Tensor] = []
        for hooks in ([], [pair]):
            with torch.no_grad(), plain.hooks(hooks):
                values.append(plain.run_with_cache(tokens, names_filter=pair[0])[1][pair[0]])
        assert (values[0] != values[1]).any(-1).all(0).nonzero().flatten().tolist() == list(wanted)
    with pytest.raises(SpliceError, match="start of the tensor"):
        plain.run_with_hooks(tokens, fwd_hooks=[steer(sae, 3, 5.0, 6)])


def test_generation_from_embeddings_cannot_place_tokens() -> None:
    model = shared_model("grouped", "hooked_transformer")
    embeds = model.embed(random_tokens(model, batch=1, length=5))
    pair = steer(random_sae(model.dims, "res", 1), 3, 5.0, positions=2, exclude_special_tokens=False)
    with model.hooks([pair]), pytest.raises(SpliceError, match="from token ids"):
        model.generate(embeds, max_new_tokens=2, do_sample=False, stop_at_eos=False, return_type="embeds")
