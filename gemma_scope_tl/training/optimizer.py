"""What a step needs besides gradients: penalties as prices, the sparsity coefficient, and Adam on a few rows at a time.

With ``beta1 = 0`` (the paper's), step ``t`` (from 1) moves a parameter with gradient ``g`` by ::

    v <- beta2 v + (1 - beta2) g^2        p <- p - lr g / (sqrt(v / (1 - beta2^t)) + eps)

so a row whose gradient is 0 does not move, and its ``v`` shrinks by ``beta2``. Such rows are not read at all: a counter
holds the step up to which each row's ``v`` is up to date, and at the next gradient ``v`` is first multiplied by
``beta2^skipped``. The result equals that of a dense Adam up to rounding. Rows are updated in chunks that fit into a
core's cache with their gradients, so that memory is read and written once a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_scope_tl.training.recipe import Recipe, project_out_rows_, unit_rows_


@dataclass(frozen=True)
class Prices:
    """The penalties of one SAE at one step, as prices of its pre-activations ``H_ti`` being active.

    With ``L_t`` the number of active latents of activation ``t``, ``p_i`` the share of the batch on which latent ``i``
    is active and ``n`` activations, summed over all processes::

        linear      lambda mean_t L_t                          price of H_ti: lambda / n
        quadratic   lambda (2 / L0*) mean_t (L_t - L0*)^2      price of H_ti: lambda (4 / L0*) (L_t - L0*) / n
        frequency   mu sum_i max(0, p_i - limit)               price of H_ti: mu / n where p_i > limit

    Attributes:
        l0: lambda, the coefficient of the L0 penalty.
        around: ``L0*`` of the quadratic penalty; None for the linear one.
        frequency: mu, the coefficient of the frequency penalty.
        limit: the share of the batch above which a latent is penalised for its frequency.
    """

    l0: float
    around: float | None = None
    frequency: float = 0.0
    limit: float = 1.0

    def of_rows(self, l0: Tensor, n: int) -> Tensor:
        """The L0 penalty's price for each activation, given the activation's L0."""
        if self.around is None:
            return l0.new_full((), self.l0 / n).expand(l0.shape)
        return (l0 - self.around) * (4.0 * self.l0 / (self.around * n))

    def of_latents(self, fired: Tensor, n: int) -> Tensor:
        """The frequency penalty's price for each latent, given on how many of ``n`` activations it was active."""
        return (fired > self.limit * n).to(fired.dtype) * (self.frequency / n)


class Lambda:
    """The sparsity coefficient of one SAE, with the recipe's warm-up.

    Without a target, or with the quadratic penalty (which contains the target), lambda is the recipe's. Otherwise, with
    ``e = log(L0 / target)`` clipped to [-1, 1] and averaged exponentially, ``lambda = base exp(P e)``; after the
    warm-up ``base`` is multiplied by ``exp(I e)`` each step, so that the penalty rises as long as L0 is too high. This
    controller is not the paper's, which trains with fixed coefficients.

    Attributes:
        base: the slowly moving factor.
        error: the averaged ``e``.
    """

    PROPORTIONAL, INTEGRAL, SMOOTHING = 1.0, 0.005, 0.1

    def __init__(self, recipe: Recipe, target: float | None) -> None:
        self.recipe = recipe
        self.target = target if recipe.l0_penalty == "linear" else None
        self.base = recipe.l0_coefficient
        self.error = 0.0

    def at(self, step: int) -> float:
        """Lambda of step ``step`` (from 0)."""
        return self.base * math.exp(self.PROPORTIONAL * self.error) * self.recipe.warm_up_at(step)

    def update(self, step: int, l0: float) -> None:
        """Steer towards the target, given the L0 of step ``step``."""
        if self.target is None:
            return
        error = max(-1.0, min(1.0, math.log(max(l0, 1e-3) / self.target)))
        self.error += self.SMOOTHING * (error - self.error)
        if step >= self.recipe.l0_warm_up_steps:
            self.base *= math.exp(self.INTEGRAL * self.error)


CHUNK_BYTES = {"cpu": 512 << 10, "cuda": 64 << 20}
"""Bytes of a chunk in each array. On a processor, parameter, second moment, gradient and working space together fit
into 2 MB of cache; a GPU is faster with few large kernels, as long as the working space is small beside the weights."""


def chunk_rows(like: Tensor, width: int) -> int:
    """The number of rows of ``width`` values in a chunk, for the dtype and device of ``like``."""
    size = CHUNK_BYTES["cuda" if like.is_cuda else "cpu"]
    return max(1, size // (width * like.element_size()))


@dataclass(frozen=True)
class Rate:
    """Adam's numbers at one step.

    Attributes:
        lr, beta2, eps: learning rate of this step, and the recipe's ``beta2`` and ``eps``.
        step: number of this step, counted from 1.
    """

    lr: float
    beta2: float
    eps: float
    step: int

    def decay(self, last: Tensor) -> Tensor:
        """``beta2^skipped`` for rows whose second moments are those of step ``last``: float64, ``[rows, 1]``."""
        return torch.pow(self.beta2, (self.step - last).double()).unsqueeze(1)


def adam_(param: Tensor, second: Tensor, grad: Tensor, rate: Rate, decay: Tensor | None = None) -> None:
    """Step a parameter in place; ``grad`` may be overwritten.

    The bias correction ``c = sqrt(1 - beta2^t)`` is moved out of the root: ``lr c g / (sqrt(v) + eps c)``.

    Args:
        decay: factors of ``second``, ``[rows, 1]``; None for ``beta2``.
    """
    second.mul_(rate.beta2 if decay is None else decay.to(second.dtype))
    second.addcmul_(grad, grad, value=1.0 - rate.beta2)
    correction = math.sqrt(-math.expm1(rate.step * math.log(rate.beta2))) if rate.beta2 > 0.0 else 1.0
    denominator = second.sqrt().add_(rate.eps * correction)
    param.addcdiv_(grad, denominator, value=-rate.lr * correction)


def on_sphere_(rows: Tensor, second: Tensor, grad: Tensor, rate: Rate, decay: Tensor | None = None) -> None:
    """:func:`adam_` of rows that stay at unit length (paper, section 3.2).

    The component of the gradient along each row is removed first; after the step each row is scaled to length 1.
    """
    project_out_rows_(grad, rows)
    adam_(rows, second, grad, rate, decay)
    unit_rows_(rows)
