"""Each metric against a hand-computed value, and the properties that define it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.accumulators import Mean, TokenMean, VectorMean
from gemma_scope_tl.evals.metrics import (
    fvu,
    l0,
    latent_importance,
    loss_recovered,
    max_cosine,
    next_token_losses,
    scored_positions,
    squared_error,
    uniformity,
)
from gemma_scope_tl.sae.sparse import SparseActs


def test_l0_counts_what_is_not_zero() -> None:
    acts = torch.tensor([[0.0, 1.5, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert l0(acts).tolist() == [2.0, 0.0]
    assert l0(SparseActs.from_dense(acts)).tolist() == [2.0, 0.0]
    explicit = SparseActs.from_dense(acts).with_values(torch.tensor([0.0, 2.0]))  # a zero that is held is no latent
    assert l0(explicit).tolist() == [1.0, 0.0]


def _fvu(x: torch.Tensor, x_hat: torch.Tensor, batch: int | None = None) -> float:
    """FVU as ``evaluate`` computes it: the mean first, then the sums around it, in batches."""
    centre, error, deviation = VectorMean(), TokenMean(), TokenMean()
    pairs = list(zip(x.split(batch or len(x)), x_hat.split(batch or len(x)), strict=True))
    for rows, _ in pairs:
        centre.update(rows)
    for rows, rows_hat in pairs:
        counted = torch.ones(1, len(rows), dtype=torch.bool)
        error.update(squared_error(rows, rows_hat), counted)
        deviation.update(squared_error(rows, centre.value), counted)
    return fvu(error.total, deviation.total)


def test_fvu_by_hand() -> None:
    # x = 0, 2, 4 has mean 2 and squared deviations 4 + 0 + 4; the errors are 1, 0 and 1
    assert _fvu(torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [2.0], [3.0]])) == 2 / 8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 9))
def test_fvu_of_the_mean_is_one_of_the_identity_zero_and_batches_do_not_matter(seed: int, n: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(3.0, 2.0, (n, d))
    noisy = x + rng.normal(0.0, 0.5, (n, d))
    tensor = torch.from_numpy(x)
    noisy_tensor = torch.from_numpy(noisy)
    mean = torch.from_numpy(np.broadcast_to(x.mean(0), x.shape).copy())
    expected = ((x - noisy) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert _fvu(tensor, tensor) == 0
    assert _fvu(tensor, mean) == pytest.approx(1, rel=1e-9)
    assert _fvu(tensor, noisy_tensor) == pytest.approx(expected, rel=1e-9)  # float64 sums in another order
    assert _fvu(tensor, noisy_tensor, 1) == pytest.approx(expected, rel=1e-9)


def test_fvu_survives_a_large_mean_in_float32() -> None:
    """Late residual streams have norms in the hundreds; the accumulator must not cancel."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) + 1000
    exact = x.double().numpy()
    assert _fvu(x, x + 0.1, 512) == pytest.approx(
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
    assert scored_positions(~special).tolist() == [[False, True, False, False, True]]


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


def _uniformity(importance: list[list[float]]) -> list[float]:
    dense = torch.tensor(importance)
    acts = SparseActs.from_dense(dense)
    return uniformity(acts.values.double(), acts).tolist()


def test_uniformity_by_hand() -> None:
    # p = (1/2, 1/4, 1/4): S = 3/2 log 2, exp(S) = 2^1.5, of 3 active
    same, skewed, one = _uniformity([[3.0, -3.0, 3.0, 3.0], [-2.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, -0.1]])
    assert same == pytest.approx(1, rel=1e-12)
    assert skewed == pytest.approx(2**1.5 / 3, rel=1e-12)
    assert one == pytest.approx(1, rel=1e-12)
    assert math.isnan(_uniformity([[0.0, 0.0]])[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_uniformity_is_the_kl_divergence_from_uniform_and_has_its_bounds(seed: int, active: int) -> None:
    """The paper's other form: exp(-KL(p || uniform over the active latents)), between 1 / L0 and 1."""
    y = np.random.default_rng(seed).standard_cauchy(active)
    p = np.abs(y) / np.abs(y).sum()
    acts = SparseActs.from_dense(torch.from_numpy(y)[None])
    (value,) = uniformity(acts.values, acts).tolist()
    assert value == pytest.approx(np.exp(-(p * np.log(p * active)).sum()), rel=1e-9)
    assert 1 / active - 1e-12 <= value <= 1 + 1e-12


def test_latent_importance_is_the_gradient_of_a_linear_function_of_the_reconstruction() -> None:
    """With L = g . (f W_dec), f * dL/df is y; PyTorch's autograd differentiates."""
    generator = torch.Generator().manual_seed(0)
    f = (torch.rand(6, 40, generator=generator) - 0.6).relu().requires_grad_()
    w_dec, g = torch.randn(40, 8, generator=generator), torch.randn(6, 8, generator=generator)
    ((f @ w_dec) * g).sum().backward()
    assert f.grad is not None
    acts = SparseActs.from_dense(f.detach())
    got = acts.with_values(latent_importance(acts, g, w_dec)).to_dense()
    torch.testing.assert_close(got, (f * f.grad).detach().double(), rtol=1e-5, atol=1e-6)


def test_max_cosine_against_numpy_in_chunks() -> None:
    w = torch.randn(13, 5, generator=torch.Generator().manual_seed(0))
    w[4] = -3 * w[9]
    w[7] = 2 * w[2]
    unit = w.double().numpy() / np.linalg.norm(w.double().numpy(), axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    for chunk in (1, 4, 100):
        np.testing.assert_allclose(max_cosine(w, chunk), cosines.max(1), atol=1e-6)  # float32 products
    assert max_cosine(w)[2] == pytest.approx(1, abs=1e-6)


def test_a_latent_without_direction_has_no_cosine() -> None:
    got = max_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]))
    assert got[0] == got[2] == -1
    assert math.isnan(got[1])
    with pytest.raises(GemmaScopeError, match="two latents"):
        max_cosine(torch.zeros(1, 3))
