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

from gemma_scope_tl.training.recipe import project_out_rows_, unit_rows_

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
