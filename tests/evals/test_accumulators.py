"""Sums over a dataset: against NumPy, in parts, through their state, and with intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.accumulators import LatentCounts, Mean, TokenMean, VectorMean
from gemma_scope_tl.evals.metrics import Bootstrap
from gemma_scope_tl.sae.sparse import SparseActs


def _token_data(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    return values, torch.rand(rows, 5, generator=generator) < 0.7


def _fed(part: Any, start: int, stop: int) -> Any:
    """An accumulator that saw rows ``start`` to ``stop`` of the same data."""
    values, counted = _token_data(8)
    values, counted = values[start:stop], counted[start:stop]
    x = values.float() + 100
    if isinstance(part, TokenMean):
        part.update(values[counted], counted)
    elif isinstance(part, LatentCounts):
        part.update(SparseActs.from_dense(values.relu()))
    else:
        part.update(x)
    return part


def _flat(part: Any) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in part.state().items()}


NEW = [Mean, VectorMean, TokenMean, lambda: LatentCounts.empty(5)]
IDS = ["Mean", "VectorMean", "TokenMean", "LatentCounts"]


@pytest.mark.parametrize("new", NEW, ids=IDS)
def test_state_keeps_every_bit_and_goes_on(new: Any) -> None:
    part = _fed(new(), 0, 5)
    again = new()
    again.restore(part.state())
    _fed(part, 5, 8)
    _fed(again, 5, 8)
    for name, value in part.state().items():
        assert torch.equal(value, again.state()[name]), name
        assert value.dtype == again.state()[name].dtype


@pytest.mark.parametrize("new", NEW, ids=IDS)
def test_batches_add_up_to_the_whole(new: Any) -> None:
    whole, parts = _fed(new(), 0, 8), new()
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        _fed(parts, start, stop)
    wanted, got = _flat(whole), _flat(parts)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)  # float64 sums in another order


@pytest.mark.parametrize("new", NEW, ids=IDS)
def test_a_state_without_a_part_is_refused(new: Any) -> None:
    with pytest.raises(GemmaScopeError, match="The state of a .* lacks"):
        new().restore({"other": torch.zeros(1)})


def test_token_mean_against_numpy() -> None:
    values, counted = _token_data(6)
    mean = TokenMean()
    for rows in (slice(0, 4), slice(4, 6)):
        mean.update(values[rows][counted[rows]], counted[rows])
    v, c = values.numpy(), counted.numpy()
    assert mean.value == pytest.approx(v[c].mean(), rel=1e-12)
    assert mean.count == c.sum()
    np.testing.assert_allclose(mean.sums, np.where(c, v, 0).sum(1), rtol=1e-12)
    wanted = [v[c[:, t], t].mean() if c[:, t].any() else math.nan for t in range(5)]
    np.testing.assert_allclose(mean.by_position, wanted, rtol=1e-12)
    with pytest.raises(GemmaScopeError, match="tokens count"):
        mean.update(torch.zeros(99), counted[:1])


def test_rows_of_other_lengths_add_up_by_position() -> None:
    mean = TokenMean()
    mean.update(torch.tensor([1.0, 2.0]), torch.ones(1, 2, dtype=torch.bool))
    mean.update(torch.tensor([3.0, 4.0, 5.0]), torch.ones(1, 3, dtype=torch.bool))
    assert mean.position_sums.tolist() == [4, 6, 5]
    assert mean.position_counts.tolist() == [2, 2, 1]


def test_latent_counts_by_hand() -> None:
    acts = torch.tensor([[1.0, 0.0, 0.0, 2.0]] * 3 + [[0.0, 0.0, 0.5, 2.0]] + [[0.0, 0.0, 0.0, 2.0]] * 16)
    dense, sparse = LatentCounts.empty(4), LatentCounts.empty(4)
    dense.update(acts)
    sparse.update(SparseActs.from_dense(acts))
    assert dense.fired.tolist() == sparse.fired.tolist() == [3, 0, 1, 20]
    assert sparse.frequencies.tolist() == [0.15, 0.0, 0.05, 1.0]
    assert sparse.dead == 0.25
    assert sparse.dense == 0.5  # 0.15 and 1, of a limit of 0.1
    counts, edges = sparse.histogram(bins=2)
    assert edges.tolist() == pytest.approx([-math.log10(20), -math.log10(20) / 2, 0])
    assert counts.tolist() == [2, 1]  # log10 of 1/20 and 3/20 is -1.3 and -0.82, the middle edge -0.65
    with pytest.raises(GemmaScopeError, match="No token"):
        LatentCounts.empty(4).histogram()


def test_vector_mean_needs_a_token() -> None:
    with pytest.raises(GemmaScopeError, match="no ordinary token"):
        _ = VectorMean().value


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_an_interval_holds_the_mean_and_is_seeded(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = torch.from_numpy(rng.integers(5, 50, 60))
    sums = torch.from_numpy(rng.normal(2.0, 1.0, 60)) * counts
    low, high = Bootstrap(60, seed=1).interval(np.divide, sums, counts)
    assert low < float(sums.sum() / counts.sum()) < high
    assert (low, high) == Bootstrap(60, seed=1).interval(np.divide, sums, counts)
    narrow = Bootstrap(60, level=0.5, seed=1).interval(np.divide, sums, counts)
    assert low < narrow[0] < narrow[1] < high


def test_intervals_narrow_as_the_root_of_n_and_are_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 1600):
        values = torch.from_numpy(rng.normal(0.0, 1.0, n))
        low, high = Bootstrap(n, resamples=2000).interval(np.divide, values, torch.ones(n))
        widths.append((high - low) * n**0.5)
        assert widths[-1] == pytest.approx(2 * 1.96, rel=0.2)  # the sample's own deviation varies by 7% at n = 100
    assert widths[1] == pytest.approx(widths[0], rel=0.3)


def test_intervals_refuse_nonsense_and_pass_nan_on() -> None:
    with pytest.raises(GemmaScopeError, match="confidence must be above 0 and below 1"):
        Bootstrap(4, level=1.0)
    with pytest.raises(GemmaScopeError, match="resample"):
        Bootstrap(4, resamples=0)
    low, high = Bootstrap(4).interval(np.divide, torch.zeros(4), torch.zeros(4))
    assert math.isnan(low) and math.isnan(high)
