"""The sparsity coefficient of a run: fixed, or steered so that training ends near a wanted L0."""

from __future__ import annotations

import math

from gemma_scope_tl.training.recipe import Recipe
from gemma_scope_tl.training.spec import SAESpec


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

    def saw(self, step: int, l0: float) -> None:
        """Take note of the L0 of step ``step``."""
        if self.target is None:
            return
        error = max(-1.0, min(1.0, math.log(max(l0, 1e-3) / self.target)))
        self.error += self.SMOOTHING * (error - self.error)
        if step >= self.recipe.l0_warm_up_steps:
            self.base *= math.exp(self.INTEGRAL * self.error)
