"""What docs/paper.md says of appendix J's code: its gradients against those of the equations, which this package uses.

The code of the appendix applies a ReLU to the pre-activations, then JumpReLU; its L0 is the step of the latents.
"""

from __future__ import annotations

import pytest
import torch

from gemma_scope_tl.sae.ste import jumprelu, step

BANDWIDTH = 0.2


def _z() -> torch.Tensor:
    return torch.linspace(-1, 1, 4001, dtype=torch.float64).unsqueeze(1)  # no value is on an edge that is tested


def _gradient(theta: float, relu: bool, of_latents: bool) -> tuple[float, float]:
    """Gradients for the threshold of the sum of latents and of L0."""
    z = _z() + 1e-5
    found = []
    for kind in ("latents", "l0"):
        threshold = torch.tensor([theta], dtype=torch.float64, requires_grad=True)
        pre = z.relu() if relu else z
        latents = jumprelu(pre, threshold, BANDWIDTH)
        value = latents if kind == "latents" else step(latents.detach() if of_latents else pre, threshold, BANDWIDTH)
        (gradient,) = torch.autograd.grad(value.sum(), threshold)
        found.append(float(gradient))
    return found[0], found[1]


def _count(low: float, high: float) -> int:
    z = _z() + 1e-5
    return int(((z > low) & (z < high)).sum())


@pytest.mark.parametrize("theta", [0.1, 0.15, 0.5])
def test_from_half_the_bandwidth_on_the_relu_changes_nothing(theta: float) -> None:
    assert _gradient(theta, True, False) == _gradient(theta, False, False)


def test_below_half_the_bandwidth_the_relu_counts_all_negative_tokens() -> None:
    theta = 0.04
    with_relu, without = _gradient(theta, True, False), _gradient(theta, False, False)
    inside = _count(theta - BANDWIDTH / 2, theta + BANDWIDTH / 2)
    assert without == pytest.approx((-theta / BANDWIDTH * inside, -inside / BANDWIDTH))
    counted = _count(-2, theta + BANDWIDTH / 2)
    assert with_relu == pytest.approx((-theta / BANDWIDTH * counted, -counted / BANDWIDTH))
    assert counted > 3 * inside


@pytest.mark.parametrize("theta", [0.15, 0.5])
def test_the_step_of_latents_counts_the_upper_half_of_the_window(theta: float) -> None:
    upper, whole = _gradient(theta, True, True)[1], _gradient(theta, False, False)[1]
    assert upper == pytest.approx(-_count(theta, theta + BANDWIDTH / 2) / BANDWIDTH)
    assert upper == pytest.approx(whole / 2, rel=0.01)


def test_the_step_of_latents_below_half_the_bandwidth_counts_every_latent_that_is_off() -> None:
    theta = 0.04
    assert _gradient(theta, True, True)[1] == pytest.approx(-_count(-2, theta + BANDWIDTH / 2) / BANDWIDTH)
