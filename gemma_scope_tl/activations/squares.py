"""Mean squared norms, from which the scale of a place follows: it divides activations by ``sqrt(E ||x||^2)``."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float

from gemma_scope_tl.activations.source import Place
from gemma_scope_tl.errors import GemmaScopeError

_BLOCK = 4096


class MeanSquares:
    """``E ||x||^2`` of rows that arrive in pieces. However they are cut, the result is the same to the bit.

    A row's square is summed in float64 by itself; rows are summed in blocks counted from the first, without rounding
    between (``math.fsum``).
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """``dtype`` is what the rows are stored in: they are rounded to it first, so that the mean is of what is
        served, and a stream and a store agree."""
        self.dtype = dtype
        self.rows = 0
        self._open: dict[Place, list[float]] = {}
        self._blocks: dict[Place, list[float]] = {}

    def add(self, values: Mapping[Place, Float[torch.Tensor, "n d"]]) -> None:
        """Count the next rows of all places.

        Raises:
            GemmaScopeError: an infinite value or NaN.
        """
        for place, value in values.items():
            x = value.to(self.dtype).to(device="cpu", dtype=torch.float64).numpy()
            squares = np.einsum("nd,nd->n", x, x)
            if not np.isfinite(squares).all():
                raise GemmaScopeError(f"{place.key}: activations in {self.dtype} are not finite.")
            waiting = self._open.setdefault(place, [])
            waiting += squares.tolist()
            blocks = self._blocks.setdefault(place, [])
            while len(waiting) >= _BLOCK:
                blocks.append(math.fsum(waiting[:_BLOCK]))
                del waiting[:_BLOCK]
        self.rows += len(next(iter(values.values())))

    def means(self) -> dict[Place, float]:
        """The mean of every place.

        Raises:
            GemmaScopeError: no rows were added.
        """
        if not self.rows:
            raise GemmaScopeError("The mean of no rows: ask for one at least.")
        return {
            place: math.fsum([*self._blocks[place], math.fsum(waiting)]) / self.rows
            for place, waiting in self._open.items()
        }
