"""A stream's batches are a function of the seed and of their number, and are the model's own activations."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from gemma_scope_tl.model.plain import run_reference
from gemma_scope_tl.text.token_rows import TokenRows

import gemma_scope_tl as gs
from gemma_scope_tl.activations.buckets import bucket_order
from gemma_scope_tl.activations.source import Source
from gemma_scope_tl.activations.streaming import StreamSource
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place
from tests.helpers import random_gemma

PLACES = [Place("res", 1), Place("transcoder", 0)]
ALL = [*PLACES, Place("mlp", 0)]


@pytest.fixture(scope="module")
def model() -> Any:
    return gs.load_model(hf_model=random_gemma("narrow-heads"))


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    tokens = torch.randint(1, 96, (11, 16), generator=torch.Generator().manual_seed(1))
    tokens[:, 0], tokens[3, 9:], tokens[4:6, 1:] = 2, 0, 1  # a padded row, and a whole pass with nothing to keep
    return TokenRows.from_ids(tokens, (2, 1, 0))


def stream(model: Any, rows: TokenRows, **options: Any) -> StreamSource:
    return StreamSource(model, rows, PLACES, **{"bucket_rows": 40, "seed": 7, "batch_rows": 2, **options})


def expected(rows: TokenRows) -> dict[Place, torch.Tensor]:
    """All activations in order, from the plain model, by the same passes."""
    passes: dict[Place, list[torch.Tensor]] = {place: [] for place in ALL}
    for at in range(0, len(rows), 2):
        tokens = rows[at : at + 2]
        keep = (tokens != 0) & (tokens != 1) & (tokens != 2)
        sites = run_reference(random_gemma("narrow-heads"), tokens).sites
        for place, found in passes.items():
            found.append(sites[place.site, place.layer][keep])
    return {place: torch.cat(found) for place, found in passes.items()}


def test_batches_are_the_plain_models_activations_in_the_order_of_buckets(model: Any, rows: TokenRows) -> None:
    source: Source = stream(model, rows)
    wanted = expected(rows)
    total = len(wanted[PLACES[0]])
    assert source.rows == total and total % 40 and source.widths == dict.fromkeys(ALL, 64)
    served = list(islice(source.batches(8), 5 * 9))  # nine buckets: the data ends within one of them, twice
    assert 2 * total < 9 * 40
    for number in range(9):
        bucket = (number * 40 + bucket_order(7, number, 40).numpy()) % total
        for place in ALL:
            got = torch.cat([batch[place] for batch in served[5 * number : 5 * number + 5]])
            assert torch.equal(got, wanted[place][bucket])


@pytest.mark.parametrize("start", [0, 1, 4, 5, 16, 17, 30, 44])
def test_resuming_gives_the_same_bits(model: Any, rows: TokenRows, start: int) -> None:
    whole = list(islice(stream(model, rows).batches(8), start + 8))[start:]
    resumed = list(islice(stream(model, rows).batches(8, start), 8))
    assert all(torch.equal(a[place], b[place]) for a, b in zip(whole, resumed, strict=True) for place in ALL)


@pytest.mark.parametrize(("bucket_rows", "batch_rows"), [(7, 1), (33, 3), (500, 11), (500, 64)])
def test_odd_sizes(model: Any, rows: TokenRows, bucket_rows: int, batch_rows: int) -> None:
    source = stream(model, rows, bucket_rows=bucket_rows, batch_rows=batch_rows)
    wanted = expected(rows)[PLACES[0]]
    first = next(iter(source.batches(bucket_rows)))[PLACES[0]]
    order = bucket_order(7, 0, bucket_rows).numpy() % len(wanted)
    torch.testing.assert_close(first, wanted[order], rtol=2e-5, atol=2e-5)  # other pass sizes: other rounding


def test_a_pass_on_the_border_of_buckets_runs_once(
    model: Any, rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stream(model, rows)
    ran: list[int] = []
    run = source.harvester.run
    monkeypatch.setattr(source.harvester, "run", lambda tokens, keep: (ran.append(len(tokens)), run(tokens, keep))[1])
    list(islice(source.batches(8), 5 * 3))
    assert 3 * 40 <= source.rows < 4 * 40  # three buckets end in the last pass
    assert ran == [2, 2, 2, 2, 1]  # six passes; the one with nothing to keep never runs


def test_storing_in_bfloat16_rounds_and_serves_float32(model: Any, rows: TokenRows) -> None:
    full = next(iter(stream(model, rows).batches(40)))
    half = next(iter(stream(model, rows, dtype=torch.bfloat16).batches(40)))
    for place in ALL:
        assert half[place].dtype == torch.float32
        assert torch.equal(half[place], full[place].bfloat16().float())


def test_mean_squares_are_those_of_the_first_rows_and_disturb_nothing(model: Any, rows: TokenRows) -> None:
    source, wanted = stream(model, rows), expected(rows)
    batches = source.batches(8)
    seen = [next(batches) for _ in range(2)]
    for count in (33, 10**6):
        for place, mean in source.mean_squares(count).items():
            exact = (wanted[place][:count].double() ** 2).sum(1).mean().item()
            assert mean == pytest.approx(exact, rel=1e-13)
    seen += [next(batches) for _ in range(10)]
    again = list(islice(stream(model, rows).batches(8), 12))
    assert all(torch.equal(a[place], b[place]) for a, b in zip(seen, again, strict=True) for place in ALL)


def test_one_iteration_at_a_time(model: Any, rows: TokenRows) -> None:
    source = stream(model, rows)
    older = source.batches(8)
    next(older)
    newer = source.batches(8)
    next(newer)
    with pytest.raises(GemmaScopeError, match="Another iteration"):
        next(older)
    next(newer)


def test_bad_input_is_refused(model: Any, rows: TokenRows) -> None:
    for size, start in ((7, 0), (0, 0), (8, -1), (41, 0)):
        with pytest.raises(GemmaScopeError, match="divide"):
            stream(model, rows).batches(size, start)
    for options in ({"bucket_rows": 0}, {"seed": -1}, {"batch_rows": 0}):
        with pytest.raises(GemmaScopeError):
            stream(model, rows, **options)
    with pytest.raises(GemmaScopeError, match="0 rows"):
        stream(model, TokenRows.from_ids(torch.tensor([[2, 1, 0]]), (2, 1, 0)))


def test_activations_that_are_not_finite_are_refused(rows: TokenRows) -> None:
    hf = random_gemma("narrow-heads")
    hf.model.embed_tokens.weight.data[50] = torch.nan
    tokens = rows[0:2].clone()
    tokens[1, 5] = 50
    source = stream(gs.load_model(hf_model=hf, check=False), TokenRows.from_ids(tokens, (2, 1, 0)))
    with pytest.raises(GemmaScopeError, match="token rows 0 to 1 are not finite"):
        next(source.batches(8))
