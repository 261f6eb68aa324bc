"""JumpReLU and the Heaviside step, with the pseudo-derivatives of the JumpReLU paper for their thresholds.

Both functions jump at the threshold, so the derivative with respect to it is zero almost everywhere. The JumpReLU paper
(section 3, equations 11 and 12) replaces it by an estimate of the gradient of the *expected* loss. The estimate uses a
kernel density estimate, with kernel K and bandwidth epsilon, of the pre-activations at the threshold::

    JumpReLU_theta(z) = z H(z - theta)          H(u) = 1 if u > 0 else 0, so H(0) = 0

    d JumpReLU / d theta := -(theta / epsilon) K((z - theta) / epsilon)
    d H        / d theta := -(1     / epsilon) K((z - theta) / epsilon)

    d JumpReLU / d z  = H(z - theta)            the jump itself has no gradient for z
    d H        / d z := 0

The jump depends on ``z - theta`` only. With ``to_input`` (c) the estimate is therefore also passed to z, as SAELens's
``jumprelu_ste_to_input`` does; the paper's c is 0::

    d JumpReLU / d z := H(z - theta) + c (theta / epsilon) K((z - theta) / epsilon)
    d H        / d z := c (1 / epsilon) K((z - theta) / epsilon)

    K(u) = 1 if |u| < 1/2 else 0                the rectangle

Shapes: ``z [..., d_sae]`` and ``threshold [d_sae]``; the gradient of the threshold is summed over the leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rectangle(u: Tensor) -> Tensor:
    """The kernel K: 1 on the open interval (-1/2, 1/2), 0 elsewhere.

    >>> rectangle(torch.tensor([-0.5, -0.4, 0.0, 0.5])).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    return (u.abs() < 0.5).to(u.dtype)


class JumpReLU(torch.autograd.Function):
    """``z H(z - theta)``; use :func:`jumprelu`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, to_input: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grad_outputs
        z, threshold = ctx.saved_tensors
        near = rectangle((z - threshold) / ctx.bandwidth) * grad
        grad_threshold = -(threshold / ctx.bandwidth) * _sum_leading(near)
        grad_z = grad * (z > threshold)
        if ctx.to_input:
            grad_z = grad_z + near * (threshold * (ctx.to_input / ctx.bandwidth))
        return grad_z, grad_threshold, None, None


class Step(torch.autograd.Function):
    """``H(z - theta)``; use :func:`step`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, to_input: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (grad,) = grad_outputs
        z, threshold = ctx.saved_tensors
        near = rectangle((z - threshold) / ctx.bandwidth) * grad
        grad_z = near * (ctx.to_input / ctx.bandwidth) if ctx.to_input else None
        return grad_z, -_sum_leading(near) / ctx.bandwidth, None, None


def jumprelu(z: Tensor, threshold: Tensor, bandwidth: float, to_input: float = 0.0) -> Tensor:
    """JumpReLU with the pseudo-derivative for its threshold.

    Args:
        z: pre-activations ``[..., d_sae]``.
        threshold: ``[d_sae]``, positive.
        bandwidth: epsilon, in the units of ``z``.
        to_input: the factor of the estimate's gradient to ``z``.

    >>> jumprelu(torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]), 0.1).tolist()
    [0.0, 0.0, 2.0]
    """
    return JumpReLU.apply(z, threshold, bandwidth, to_input)  # type: ignore[return-value]


def step(z: Tensor, threshold: Tensor, bandwidth: float, to_input: float = 0.0) -> Tensor:
    """The Heaviside step ``H(z - theta)``, 0 at the threshold, whose sum over latents is L0.

    The arguments are those of :func:`jumprelu`.

    >>> step(torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]), 0.1).tolist()
    [0.0, 0.0, 1.0]
    """
    return Step.apply(z, threshold, bandwidth, to_input)  # type: ignore[return-value]


def _sum_leading(values: Tensor) -> Tensor:
    """Sum over all axes but the last."""
    return values.reshape(-1, values.shape[-1]).sum(0)
