"""Where a spliced SAE acts: special tokens, padding and positions, in one pass and through generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.model.splicing import splice
from gemma_scope_tl.sites import BACKENDS, flatten_heads
from tests.helpers import random_sae, random_tokens, shared_model
from tests.parity.test_splice import by_hand

PLACES = [("res", 1), ("mlp", 1), ("att", 1), ("embedding", None), ("transcoder", 1)]
ROUNDING = 1e-5  # float32


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("grouped", request.param)


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    width = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=0) for row in rows])


class Changes:
    """Columns at which the site is not the model's own, row by row; all others are equal to the bit."""

    def __init__(self, model: Any, tokens: torch.Tensor, site: str = "res", layer: int | None = 1) -> None:
        self.model, self.tokens, self.sae = model, tokens, random_sae(model.dims, site, layer)
        self.write = model.get_sae_hook_name(self.sae).removesuffix(".hook_sae_acts_post")
        self.clean = self._value()

    @torch.no_grad()
    def _value(self) -> torch.Tensor:
        return flatten_heads(self.model.run_with_cache(self.tokens, names_filter=self.write)[1][self.write])

    def __call__(self, **options: Any) -> list[list[int]]:
        with splice(self.model, self.sae, **options):
            return [row.nonzero().flatten().tolist() for row in (self._value() != self.clean).any(-1)]


CASES: list[tuple[Any, list[list[int]]]] = [
    (None, [[1, 2, 3, 4, 5, 6, 8, 9], [4, 5, 6, 7, 8, 9]]),
    (2, [[2], [5]]),
    (-1, [[9], [9]]),
    ([1, -2, 0], [[1, 8], [4, 8]]),
    (slice(1, 3), [[1, 2], [4, 5]]),
    (slice(-4, None, 2), [[6, 8], [6, 8]]),
    (slice(5, None), [[5, 6, 8, 9], [8, 9]]),
    (torch.arange(7) == 4, [[4], [7]]),
    (torch.arange(10)[None] > 7, [[8, 9], [8, 9]]),
    (torch.stack([torch.arange(10) < 3, torch.arange(10) > 8]), [[1, 2], [9]]),
    ([], [[], []]),
]


def _two_rows(model: Any) -> torch.Tensor:
    """Row 0 has an EOS in column 7; row 1 begins with three columns of padding and a BOS."""
    tokens = random_tokens(model, length=10)
    tokens[0, 7], tokens[1, :3], tokens[1, 3] = 1, 0, 2
    return tokens


@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_positions_in_one_pass(model: Any, site: str, layer: int | None, subtests: pytest.Subtests) -> None:
    changed = Changes(model, _two_rows(model), site, layer)
    for positions, wanted in CASES:
        with subtests.test(positions=positions):
            assert changed(positions=positions) == wanted


def test_special_tokens_and_positions_together(model: Any) -> None:
    tokens = _two_rows(model)
    changed, everywhere = Changes(model, tokens), {"exclude_special_tokens": False}
    assert changed(**everywhere) == [list(range(10))] * 2
    assert changed(positions=[0, 7 - 1], **everywhere) == [[0, 6], [3, 9]]
    assert changed(positions=slice(None), **everywhere)[1] == list(range(3, 10))
    assert changed(exclude_special_tokens=[1]) == [[n for n in range(10) if n != 7], list(range(10))]
    padded = tokens.clone()
    padded[:, 8:] = 0  # padding on the right is padding too
    changed = Changes(model, padded)
    assert changed() == [[1, 2, 3, 4, 5, 6], [4, 5, 6, 7]]
    assert changed(positions=-1, **everywhere) == [[7], [7]]


def test_what_does_not_exist_raises_and_nothing_stays_attached(model: Any) -> None:
    tokens = random_tokens(model, length=10)
    for positions, match in (
        (10, "No position 10"),
        ([-11], "No position -11"),
        (torch.ones(3, 10) > 0, "batch of tokens is"),
    ):
        with pytest.raises(SpliceError, match=match):
            model.run_with_saes(tokens, saes=random_sae(model.dims, "res", 1), positions=positions)
        assert not model.acts_to_saes


@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_at_the_positions_is_the_reconstruction(model: Any, site: str, layer: int | None) -> None:
    """There ``x_hat``, elsewhere ``y`` to the bit; with the error term nothing anywhere, and edits there only."""
    sae, tokens = random_sae(model.dims, site, layer), random_tokens(model, length=10)
    name = model.get_sae_hook_name(sae)
    write = name.removesuffix(".hook_sae_acts_post")
    with torch.no_grad():
        y = flatten_heads(model.run_with_cache(tokens, names_filter=write)[1][write])
        with splice(model, sae, positions=[3, -1]):
            cache = model.run_with_cache(tokens, names_filter=[write, f"{write}.hook_sae_input"])[1]
        got, wanted = flatten_heads(cache[write]), by_hand(sae, cache[f"{write}.hook_sae_input"])
        assert relative_difference(got[:, [3, 9]], wanted[:, [3, 9]]) < ROUNDING
        others = [n for n in range(10) if n not in (3, 9)]
        assert torch.equal(got[:, others], y[:, others])
        with splice(model, sae, error_term=True, positions=[3, -1]), model.hooks([(name, lambda acts, hook: acts * 0)]):
            cache = model.run_with_cache(tokens, names_filter=[write, f"{write}.hook_sae_error"])[1]
    moved = flatten_heads(cache[write])
    removed = (sae.b_dec.double() - wanted)[:, [3, 9]]
    assert relative_difference((moved - y)[:, [3, 9]], removed) < 1e-4  # a difference of float32 numbers
    assert torch.equal(moved[:, others], y[:, others])
    assert not cache[f"{write}.hook_sae_error"][:, others].any()


def _loop(model: Any, prompt: torch.Tensor, steps: int, sae: Any, columns: list[int]) -> torch.Tensor:
    """Greedy text from whole passes without a cache, each told its columns by a mask over all ids."""
    text = prompt
    with torch.no_grad():
        for _ in range(steps):
            mask = torch.tensor([[i in columns for i in range(text.shape[1])]])
            with splice(model, sae, positions=mask):
                text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    return text


GENERATED: list[tuple[Any, list[int]]] = [
    (None, list(range(20))),
    (3, [3]),
    (-1, [4]),
    ([1, 6, 9], [1, 6, 9]),
    (slice(2, None), list(range(2, 20))),
    (slice(-2, None, 3), [3, 6, 9]),
    (slice(6, 8), [6, 7]),
    (torch.arange(9) > 5, [6, 7, 8]),
]


@pytest.mark.parametrize("site", ["res", "transcoder"])
def test_generation(model: Any, site: str, subtests: pytest.Subtests) -> None:
    """A position is the same token in every step; negative ones count from the end of the prompt of 5."""
    sae, prompt, steps = random_sae(model.dims, site, 1), random_tokens(model, batch=1, length=5), 6
    write = model.get_sae_hook_name(sae).removesuffix(".hook_sae_acts_post")
    seen: list[torch.Tensor] = []
    watch = [(write, lambda value, hook: seen.append(flatten_heads(value).clone()))]
    for positions, columns in GENERATED:
        wanted = _loop(model, prompt, steps, sae, columns)
        for use_cache in (True, False):
            seen.clear()
            with subtests.test(positions=positions, use_cache=use_cache):
                with model.hooks(watch), splice(model, sae, positions=positions), model.hooks(watch):
                    got = model.generate(
                        prompt, max_new_tokens=steps, do_sample=False, stop_at_eos=False, use_past_kv_cache=use_cache
                    )
                assert got.tolist() == wanted.tolist()
                for step in range(steps):  # what the hook before the SAE saw, and what the one after it saw
                    before, after = seen[2 * step], seen[2 * step + 1]
                    first = 5 + step - before.shape[1]
                    changed = [first + n for n in (before != after).any(-1)[0].nonzero().flatten().tolist()]
                    assert changed == [n for n in columns if max(first, 1) <= n < 5 + step and int(got[0, n]) > 2]
                assert len(seen) == 2 * steps


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("positions", [None, [2, -1, 8], slice(3, None, 2)], ids=str)
def test_a_padded_batch_is_each_row_alone(model: Any, positions: Any, use_cache: bool) -> None:
    """In one pass, by logits, and through generation, by tokens; with an edit and the error term as well."""
    rows = [random_tokens(model, batch=1, length=n, seed=n) for n in (9, 6, 5)]
    batch, sae = _padded(rows), random_sae(model.dims, "res", 1)
    within = [2, -1] if isinstance(positions, list) else positions  # in one pass position 8 of a row of 5 is none
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "use_past_kv_cache": use_cache}
    edit = [(model.get_sae_hook_name(sae), lambda acts, hook: acts * 3)]
    for error_term, hooks in ((False, []), (True, edit)):
        with torch.no_grad(), splice(model, sae, error_term, positions=within), model.hooks(hooks):
            together = model(batch)
            for i, row in enumerate(rows):
                assert relative_difference(together[i, -row.shape[1] :], model(row)[0]) < ROUNDING
        with splice(model, sae, error_term, positions=positions), model.hooks(hooks):
            text = model.generate(batch, **options)
            for i, row in enumerate(rows):
                assert text[i, -6:].tolist() == model.generate(row, **options)[0, -6:].tolist()


def test_generated_special_tokens_are_left_alone_too(model: Any) -> None:
    """A sampled EOS or padding token is excluded in the step that reads it, with a cache."""
    sae, prompt = random_sae(model.dims, "res", 1), random_tokens(model, batch=1, length=5)
    seen: list[torch.Tensor] = []
    watch = [("blocks.1.hook_resid_post", lambda value, hook: seen.append(value.clone()))]
    force = [("unembed.hook_out", lambda value, hook: value.index_fill(-1, torch.tensor(1), 1e9))]  # EOS, always
    with model.hooks(watch), model.saes([sae]), model.hooks([*watch, *force]):
        text = model.generate(prompt, max_new_tokens=3, do_sample=False, stop_at_eos=False, use_past_kv_cache=True)
    assert text[0, 5:].tolist() == [1, 1, 1]
    assert not torch.equal(seen[0], seen[1])
    for before, after in zip(seen[2::2], seen[3::2], strict=True):
        assert before.shape[1] == 1
        assert torch.equal(before, after)
