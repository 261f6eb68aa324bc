"""Confidence intervals by resampling sequences (bootstrap): tokens of one sequence depend on each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gemma_scope_tl.errors import GemmaScopeError


class Bootstrap:
    """Resamples of the same sequences for every metric, so that differences are paired.

    A metric is a function of sums over sequences; each resample draws as many sequences as there are, with replacement,
    and the interval is between the quantiles of the metric over the resamples (percentile bootstrap).

    Args:
        rows: how many sequences there are.
        resamples: how many times they are drawn.
        level: of the interval, between 0 and 1.
        seed: of the draws.

    Raises:
        GemmaScopeError: for a level outside (0, 1), or no resamples.
    """

    def __init__(self, rows: int, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> None:
        if not 0 < level < 1 or resamples < 1:
            raise GemmaScopeError(f"Intervals need a level in (0, 1) and a resample or more: {level}, {resamples}.")
        self.rows, self.level = rows, level
        draws = np.random.default_rng(seed)
        self._weights = draws.multinomial(rows, np.full(rows, 1 / rows), resamples) if rows else np.zeros((1, 0))

    def interval(self, metric: Callable[..., Any], *by_row: torch.Tensor) -> tuple[float, float]:
        """Bounds of ``metric`` of the sums of these ``[rows]``; NaN where it is NaN on all resamples.

        ``metric`` takes arrays: the sums of each resample.
        """
        sums = [self._weights @ values.double().numpy() for values in by_row]
        with np.errstate(all="ignore"):
            values = np.asarray(metric(*sums), dtype=np.float64)
        finite = values[np.isfinite(values)]
        if not finite.size:
            return math.nan, math.nan
        low, high = np.quantile(finite, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)
