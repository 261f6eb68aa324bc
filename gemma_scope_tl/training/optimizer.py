"""What a step needs besides gradients: penalties as prices, the sparsity coefficient, and Adam on a few rows at a time.

Step ``t`` (from 1) moves a parameter with gradient ``g`` by ::

    m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

With ``beta1 = 0`` (the paper's) ``m = g``, so a row whose gradient is 0 does not move, and its ``v`` shrinks by
``beta2``. Such rows are not read at all: a counter holds the step up to which each row's moments are up to date, and at
the next gradient they are first multiplied by ``beta1^skipped`` and ``beta2^skipped``. The result equals that of a
dense Adam up to rounding.

With momentum a dense Adam would go on moving rows without a gradient. Here it does not: latents none of whose
pre-activations in the batch lie above the lower end of the threshold's kernel keep all their parameters in that step,
as without momentum, while their moments shrink. So a latent moves only in steps that say something about it, and a step
costs what its active latents cost.

Rows are updated in chunks that fit into a core's cache with their gradients, so that memory is read and written once a
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_scope_tl.training.loop import project_out_rows_, unit_rows_
from gemma_scope_tl.training.recipe import Recipe


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
        to_input: the factor with which the threshold's estimator also passes a gradient to the pre-activations.
    """

    l0: float
    around: float | None = None
    frequency: float = 0.0
    limit: float = 1.0
    to_input: float = 0.0

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
    warm-up ``base`` is multiplied by ``exp(I e)`` each step, so that the penalty rises as long as L0 is too high. In a
    run of fewer than 2,000 steps I is larger, because a miss must be corrected in fewer steps. This controller is not
    the paper's, which trains with fixed coefficients.

    Attributes:
        base: the slowly moving factor.
        error: the averaged ``e``.
    """

    PROPORTIONAL, INTEGRAL, SMOOTHING, FULL_LENGTH = 1.0, 0.005, 0.1, 2_000

    def __init__(self, recipe: Recipe, target: float | None, total_steps: int | None = None) -> None:
        """
        Args:
            recipe: the recipe.
            target: the wanted L0; None keeps lambda fixed.
            total_steps: length of the run; None for a long one.
        """
        self.recipe = recipe
        length = self.FULL_LENGTH if total_steps is None else min(total_steps, self.FULL_LENGTH)
        self.integral = self.INTEGRAL * self.FULL_LENGTH / length
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
            self.base *= math.exp(self.integral * self.error)


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
        lr, beta1, beta2, eps: learning rate of this step, and the recipe's ``betas`` and ``eps``.
        step: number of this step, counted from 1.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int

    def stale(self, last: Tensor) -> Stale | None:
        """The factors of the moments of rows that are those of step ``last``; None if all are of the last step."""
        skipped = self.step - last
        if bool((skipped == 1).all()):
            return None
        powers = skipped.double().unsqueeze(1)
        return Stale(torch.pow(self.beta1, powers) if self.beta1 else None, torch.pow(self.beta2, powers))

    def correction(self, beta: float) -> float:
        """``1 - beta^t``, by which a moment is divided because it started from 0."""
        return -math.expm1(self.step * math.log(beta)) if beta > 0.0 else 1.0


class Stale(NamedTuple):
    """Factors for rows that were not touched for some steps, in float64, ``[rows, 1]``."""

    first: Tensor | None
    """``beta1^skipped``; None without momentum."""
    second: Tensor
    """``beta2^skipped``."""


class Moments(NamedTuple):
    """Adam's moments of a parameter, of its shape."""

    first: Tensor | None
    """None without momentum."""
    second: Tensor


def adam_(
    param: Tensor,
    moments: Moments,
    grad: Tensor,
    rate: Rate,
    *,
    stale: Stale | None = None,
    moved: Tensor | None = None,
) -> None:
    """Step a parameter in place; ``grad`` may be overwritten.

    The correction ``c = sqrt(1 - beta2^t)`` is moved out of the root: ``lr c m / (sqrt(v) + eps c)``.

    Args:
        stale: factors of the moments; None for ``beta1`` and ``beta2``.
        moved: 1 for the rows that move and 0 for those that do not, in the dtype of ``param`` and of a shape that
            multiplies it; None if all move.
    """
    first, second = moments
    second.mul_(rate.beta2 if stale is None else stale.second.to(second.dtype))
    second.addcmul_(grad, grad, value=1.0 - rate.beta2)
    correction = math.sqrt(rate.correction(rate.beta2))
    denominator = second.sqrt().add_(rate.eps * correction)
    step = rate.lr * correction
    if first is not None and rate.beta1:
        factor = None if stale is None else stale.first
        first.mul_(rate.beta1 if factor is None else factor.to(first.dtype)).add_(grad, alpha=1.0 - rate.beta1)
        step /= rate.correction(rate.beta1)
        grad = first if moved is None else torch.mul(first, moved, out=grad)
    param.addcdiv_(grad, denominator, value=-step)


class Matrix(NamedTuple):
    """A matrix with a row for each latent, and how it is stepped."""

    param: Tensor
    moments: Moments
    update: Callable[..., None]
    """:func:`adam_` or :func:`on_sphere_`."""


def update_rows_(
    matrices: Iterable[tuple[Matrix, Tensor]],
    last: Tensor,
    touched: Tensor | None,
    rate: Rate,
    moved: Tensor | None,
) -> None:
    """Step some rows of matrices in place, and note the step in ``last``.

    Args:
        matrices: each matrix with its gradient: of all rows, or of the touched ones.
        last: ``[rows]``, the last step in which each row was read.
        touched: which rows have gradients, ``[k]``; None for all.
        moved: ``[rows]``, as for :func:`adam_`; touched rows move, all of them.
    """
    seen = last if touched is None else last.index_select(0, touched)
    stale = rate.stale(seen)
    column = None if moved is None or touched is not None else moved.unsqueeze(1)
    for (whole, moments, update), grad in matrices:
        if touched is None:
            update(whole, moments, grad, rate, stale=stale, moved=column)
            continue
        part, first = whole.index_select(0, touched), moments.first
        own = Moments(
            None if first is None else first.index_select(0, touched), moments.second.index_select(0, touched)
        )
        update(part, own, grad, rate, stale=stale)
        whole.index_copy_(0, touched, part)
        moments.second.index_copy_(0, touched, own.second)
        if first is not None and own.first is not None:
            first.index_copy_(0, touched, own.first)
    if touched is None:
        last.fill_(rate.step)
    else:
        last.index_fill_(0, touched, rate.step)


def on_sphere_(
    rows: Tensor,
    moments: Moments,
    grad: Tensor,
    rate: Rate,
    *,
    stale: Stale | None = None,
    moved: Tensor | None = None,
) -> None:
    """:func:`adam_` of rows that stay at unit length (paper, section 3.2).

    The component of the gradient along each row is removed first; after the step each row is scaled to length 1.
    """
    project_out_rows_(grad, rows)
    adam_(rows, moments, grad, rate, stale=stale, moved=moved)
    unit_rows_(rows)
