"""Each metric against a hand-computed value, and the properties that define it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_scope_tl.evals.metrics import FVU, Mean, l0, loss_recovered, next_token_losses, scored_positions


def test_l0_counts_what_is_not_zero() -> None:
    assert l0(torch.tensor([[0.0, 1.5, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])).tolist() == [2.0, 0.0]


def test_fvu_by_hand() -> None:
    # x = 0, 2, 4 has mean 2 and squared deviations 4 + 0 + 4; the errors are 1, 0 and 1
    fvu = FVU()
    fvu.update(torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [2.0], [3.0]]))
    assert fvu.value == 2 / 8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 9))
def test_fvu_of_the_mean_is_one_of_the_identity_zero_and_batches_do_not_matter(seed: int, n: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(3.0, 2.0, (n, d))
    noisy = x + rng.normal(0.0, 0.5, (n, d))
    tensor = torch.from_numpy(x)
    perfect, mean, whole, parts = FVU(), FVU(), FVU(), FVU()
    perfect.update(tensor, tensor)
    mean.update(tensor, torch.from_numpy(np.broadcast_to(x.mean(0), x.shape).copy()))
    whole.update(tensor, torch.from_numpy(noisy))
    for row in range(n):
        parts.update(tensor[row : row + 1], torch.from_numpy(noisy[row : row + 1]))
    expected = ((x - noisy) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert perfect.value == 0
    assert mean.value == pytest.approx(1, rel=1e-9)
    assert whole.value == pytest.approx(expected, rel=1e-9)  # float64 sums in another order
    assert parts.value == pytest.approx(expected, rel=1e-9)


def test_fvu_survives_a_large_mean_in_float32() -> None:
    """Late residual streams have norms in the hundreds; the accumulator must not cancel."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) + 1000
    fvu = FVU()
    fvu.update(x, x + 0.1)
    exact = x.double().numpy()
    assert fvu.value == pytest.approx(
        ((exact - (x + 0.1).double().numpy()) ** 2).sum() / ((exact - exact.mean(0)) ** 2).sum(), rel=1e-6
    )


def test_next_token_losses_against_numpy_also_from_bfloat16() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) * 3
    tokens = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1))
    for given_logits in (logits, logits.bfloat16()):
        values = given_logits.float().numpy().astype(np.float64)
        log_z = np.log(np.exp(values).sum(-1))
        wanted = [[log_z[b, t] - values[b, t, tokens[b, t + 1]] for t in range(4)] for b in range(2)]
        got = next_token_losses(given_logits, tokens)
        assert got.dtype == torch.float32  # bfloat16 losses would move in steps of 1/64 nat
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5)


def test_predictions_from_or_to_special_tokens_do_not_count() -> None:
    special = torch.tensor([[True, False, False, True, False, False]])
    assert scored_positions(special).tolist() == [[False, True, False, False, True]]


def test_loss_recovered() -> None:
    assert loss_recovered(2.0, 2.0, 10.0) == 1
    assert loss_recovered(2.0, 10.0, 10.0) == 0
    assert loss_recovered(2.0, 2.8, 10.0) == pytest.approx(0.9)
    assert math.isnan(loss_recovered(2.0, 2.1, 1.9))  # zeroing helps: there is nothing to recover


def test_mean_is_nan_before_any_value_and_float64_after() -> None:
    mean = Mean()
    assert math.isnan(mean.value)
    mean.update(torch.full((10_000,), 0.1))
    mean.update(torch.full((10_000,), 0.3))
    assert mean.value == pytest.approx(0.2, rel=1e-7)
