"""The gradients of ste.py against the paper's formulas, written in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemma_scope_tl.sae.ste import jumprelu, rectangle, step


def _kernel(z: np.ndarray, theta: np.ndarray, eps: float) -> np.ndarray:
    return (np.abs((z - theta) / eps) < 0.5).astype(np.float64)


def _floats(shape: tuple[int, ...], low: float, high: float) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, shape, elements=st.floats(low, high, allow_nan=False, width=64))


@st.composite
def _cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    batch, d_sae = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    z = draw(_floats((batch, d_sae), -2, 2))
    theta = draw(_floats((d_sae,), 1e-3, 2))
    grad = draw(_floats((batch, d_sae), -3, 3))
    return z, theta, grad, draw(st.sampled_from([1e-3, 0.05, 0.5, 3.0]))


def _torch_grads(function, z, theta, grad, eps):  # type: ignore[no-untyped-def]
    z_t, theta_t = torch.tensor(z, requires_grad=True), torch.tensor(theta, requires_grad=True)
    out = function(z_t, theta_t, eps)
    (out * torch.tensor(grad)).sum().backward()
    assert theta_t.grad is not None
    return out.detach().numpy(), z_t.grad, theta_t.grad.numpy()


@given(_cases())
@settings(max_examples=150, deadline=None)
def test_jumprelu_agrees_with_the_formulas(case: tuple[np.ndarray, np.ndarray, np.ndarray, float]) -> None:
    z, theta, grad, eps = case
    out, grad_z, grad_theta = _torch_grads(jumprelu, z, theta, grad, eps)
    np.testing.assert_array_equal(out, z * (z > theta))
    assert grad_z is not None
    np.testing.assert_array_equal(grad_z.numpy(), grad * (z > theta))
    expected = (-(theta / eps) * _kernel(z, theta, eps) * grad).sum(0)
    np.testing.assert_allclose(grad_theta, expected, rtol=1e-13, atol=1e-9)


@given(_cases())
@settings(max_examples=150, deadline=None)
def test_step_agrees_with_the_formulas(case: tuple[np.ndarray, np.ndarray, np.ndarray, float]) -> None:
    z, theta, grad, eps = case
    out, grad_z, grad_theta = _torch_grads(step, z, theta, grad, eps)
    np.testing.assert_array_equal(out, (z > theta).astype(np.float64))
    assert grad_z is None, "the step sends no gradient to its input"
    expected = (-(1 / eps) * _kernel(z, theta, eps) * grad).sum(0)
    np.testing.assert_allclose(grad_theta, expected, rtol=1e-13, atol=1e-9)


def test_the_jump_is_strict_and_the_kernel_open() -> None:
    at = torch.tensor([1.0], dtype=torch.float64)
    assert step(at, at, 0.1).item() == 0.0
    assert jumprelu(at, at, 0.1).item() == 0.0
    assert rectangle(torch.tensor([-0.5, 0.5])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
def test_leading_axes_are_summed(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, dtype=torch.float64)
    theta = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    (jumprelu(z, theta, 2.0).sum() + step(z, theta, 2.0).sum()).backward()
    near = (((z - 0.3) / 2.0).abs() < 0.5).double().reshape(-1, 4).sum(0)
    torch.testing.assert_close(theta.grad, -(0.3 + 1.0) / 2.0 * near)


def test_the_batch_gradient_estimates_the_gradient_of_the_expected_loss() -> None:
    """E[loss] as a function of theta has a true derivative; the mean pseudo-gradient must approach it."""
    torch.manual_seed(0)
    z, lam = torch.randn(2_000_000, 1, dtype=torch.float64), 0.3
    theta = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    loss = ((z - jumprelu(z, theta, 0.05)) ** 2 + lam * step(z, theta, 0.05)).mean()
    loss.backward()
    density = np.exp(-(0.7**2) / 2) / np.sqrt(2 * np.pi)
    # Raising theta past z gives up z^2 of the reconstruction and saves lambda.
    expected = density * (0.7 * 0.7 - lam)
    assert theta.grad is not None
    assert theta.grad.item() == pytest.approx(expected, rel=0.03)
