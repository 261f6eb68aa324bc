"""Adam without a first moment, on some rows of a matrix at a time.

With ``beta1 = 0`` (the paper's), step ``t`` (from 1) moves a parameter with gradient ``g`` by ::

    v <- beta2 v + (1 - beta2) g^2        p <- p - lr g / (sqrt(v / (1 - beta2^t)) + eps)

so a row whose gradient is 0 does not move, and its ``v`` shrinks by ``beta2``. Such rows are not read at all: a counter
holds the step up to which each row's ``v`` is right, and the next gradient finds ``v`` times ``beta2^skipped``. The
result is that of a dense Adam but for rounding. Rows are worked on in chunks that stay in a core's cache with their
gradients, so that the memory is passed over once a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_scope_tl.training.recipe import Recipe, project_out_rows_, unit_rows_
from gemma_scope_tl.training.spec import SAESpec


@dataclass(frozen=True)
class Prices:
    """The penalties of one SAE at one step.

    With ``L_t`` the number of active latents of activation ``t``, ``p_i`` the share of the batch on which latent ``i``
    is active and ``n`` activations, summed over all processes::

        linear      lambda mean_t L_t                          price of H_ti: lambda / n
        quadratic   lambda (2 / L0*) mean_t (L_t - L0*)^2      price of H_ti: lambda (4 / L0*) (L_t - L0*) / n
        frequency   mu sum_i max(0, p_i - limit)               price of H_ti: mu / n where p_i > limit

    Attributes:
        l0: lambda.
        around: ``L0*`` of the quadratic penalty; None for the linear one.
        frequency: mu.
        limit: the share above which a latent is charged for its frequency.
    """

    l0: float
    around: float | None = None
    frequency: float = 0.0
    limit: float = 1.0

    def of_rows(self, l0: Tensor, n: int) -> Tensor:
        """The L0 penalty's price for each activation, given its L0."""
        if self.around is None:
            return l0.new_full((), self.l0 / n).expand(l0.shape)
        return (l0 - self.around) * (4.0 * self.l0 / (self.around * n))

    def of_latents(self, fired: Tensor, n: int) -> Tensor:
        """The frequency penalty's price for each latent, given on how many of ``n`` activations it was active."""
        return (fired > self.limit * n).to(fired.dtype) * (self.frequency / n)


class Lambda:
    """The sparsity coefficient of one SAE, with the recipe's warm-up.

    Without a target, or with the quadratic penalty (which has the target in it), it is the recipe's. Otherwise, with
    ``e = log(L0 / target)`` clipped to [-1, 1] and averaged exponentially, ``lambda = base exp(P e)``; after the
    warm-up ``base`` grows by the factor ``exp(I e)`` a step: where L0 stays too high the penalty rises until it is not.
    The controller is ours; the paper trains with fixed coefficients.

    Attributes:
        base: the slowly moving part.
        error: the averaged ``e``.
    """

    PROPORTIONAL, INTEGRAL, SMOOTHING = 1.0, 0.005, 0.1

    def __init__(self, recipe: Recipe, target: float | None) -> None:
        self.recipe = recipe
        self.target = target if recipe.l0_penalty == "linear" else None
        self.base = recipe.l0_coefficient
        self.error = 0.0

    @classmethod
    def of(cls, spec: SAESpec) -> Lambda:
        """That of an SAE."""
        return cls(spec.recipe, spec.target_l0)

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
"""A chunk's share of each array. On a processor parameter, second moment, gradient and working space fit 2 MB of cache
together; a GPU wants few kernels that are large, as long as the working space is small beside the weights."""


def chunk_rows(like: Tensor, width: int) -> int:
    """Rows of ``width`` values that make a chunk, in the dtype and on the device of ``like``."""
    size = CHUNK_BYTES["cuda" if like.is_cuda else "cpu"]
    return max(1, size // (width * like.element_size()))


@dataclass(frozen=True)
class Rate:
    """Adam's numbers at one step.

    Attributes:
        lr, beta2, eps: the recipe's, the rate being this step's.
        step: this step, from 1.
    """

    lr: float
    beta2: float
    eps: float
    step: int

    def decay(self, last: Tensor) -> Tensor:
        """``beta2^skipped`` for rows whose second moments are right up to step ``last``: float64, ``[rows, 1]``."""
        return torch.pow(self.beta2, (self.step - last).double()).unsqueeze(1)


def adam_(param: Tensor, second: Tensor, grad: Tensor, rate: Rate, decay: Tensor | None = None) -> None:
    """One step of a parameter in place; ``grad`` is lost.

    The bias correction ``c = sqrt(1 - beta2^t)`` is moved out of the root: ``lr c g / (sqrt(v) + eps c)``.

    Args:
        decay: what ``second`` shrinks by, ``[rows, 1]``; None for ``beta2``.
    """
    second.mul_(rate.beta2 if decay is None else decay.to(second.dtype))
    second.addcmul_(grad, grad, value=1.0 - rate.beta2)
    correction = math.sqrt(-math.expm1(rate.step * math.log(rate.beta2))) if rate.beta2 > 0.0 else 1.0
    denominator = second.sqrt().add_(rate.eps * correction)
    param.addcdiv_(grad, denominator, value=-rate.lr * correction)


def on_sphere_(rows: Tensor, second: Tensor, grad: Tensor, rate: Rate, decay: Tensor | None = None) -> None:
    """:func:`adam_` of rows that stay at unit length (paper, section 3.2).

    The gradient first loses its part along each row; after the step the row is scaled to length 1.
    """
    project_out_rows_(grad, rows)
    adam_(rows, second, grad, rate, decay)
    unit_rows_(rows)
