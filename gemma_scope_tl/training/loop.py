"""The paper's optimisation details (section 3.2 and the JumpReLU paper's appendix I), for any training loop.

A loop that follows them looks like this, for an SAE with ``W_dec [d_sae, d_in]`` of unit rows::

    rms = StreamingRMS()                        # a pass over some batches: rms.update(x); then x / rms.scale
    optimizer = adam(sae.parameters(), recipe)
    schedule = lr_schedule(optimizer, recipe, total_steps)
    with decoder_on_sphere(optimizer, lambda: sae.W_dec):
        ...                                     # loss.backward(); optimizer.step(); schedule.step()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.training.recipe import Recipe


def adam(params: Iterable[Tensor], recipe: Recipe, *, fused: bool | None = None) -> torch.optim.Adam:
    """Adam with the recipe's learning rate, betas and epsilon, without weight decay."""
    return torch.optim.Adam(params, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=fused)


def lr_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int | None = None, *, steps_done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler of the learning rate :meth:`Recipe.lr_at`; ``steps_done`` continues a run."""
    for group in optimizer.param_groups:
        group["initial_lr"] = recipe.lr
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.lr_at(step, total_steps) / recipe.lr, last_epoch=steps_done - 1
    )


def project_out_rows(grad: Tensor, rows: Tensor) -> Tensor:
    """The part of a gradient that is orthogonal to each row: ``g - (g.d / d.d) d``.

    Args:
        grad, rows: ``[d_sae, d_in]``.

    >>> project_out_rows(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])).tolist()
    [[3.0, 0.0]]
    """
    return project_out_rows_(grad.clone(), rows)


def project_out_rows_(grad: Tensor, rows: Tensor) -> Tensor:
    """:func:`project_out_rows` in place."""
    along = torch.linalg.vecdot(grad, rows) / torch.linalg.vecdot(rows, rows).clamp_min(1e-30)
    return grad.addcmul_(rows, along.unsqueeze(-1), value=-1.0)


def unit_rows_(rows: Tensor) -> Tensor:
    """Scale each row of ``[d_sae, d_in]`` to length 1, in place."""
    return rows.div_(torch.linalg.vecdot(rows, rows).sqrt_().clamp_min(1e-30).unsqueeze(-1))


@contextmanager
def decoder_on_sphere(
    optimizer: torch.optim.Optimizer, decoder: Callable[[], Tensor], *, grad_scale: float = 1.0
) -> Generator[None, None, None]:
    """Within the context, every ``optimizer.step()`` keeps the decoder's rows at unit length (paper, section 3.2).

    Before the update, gradients are divided by ``grad_scale``, and the component of the decoder's gradient along each
    row is removed. After the update, rows are scaled to length 1. Both are hooks of the optimizer, which are removed at
    the end of the context.

    Args:
        decoder: returns ``W_dec [d_sae, d_in]``; called at every step.
        grad_scale: the factor by which the gradients of the loss were multiplied; a power of two is exact.
    """

    @torch.no_grad()
    def before(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if grad_scale != 1.0:
            for grad in (p.grad for group in opt.param_groups for p in group["params"]):
                if grad is not None:
                    grad.div_(grad_scale)
        rows = decoder()
        if rows.grad is not None:
            project_out_rows_(rows.grad, rows)

    @torch.no_grad()
    def after(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        unit_rows_(decoder())

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class StreamingRMS:
    """``C = sqrt(E ||x||^2)``, the scalar by which a site's activations are divided, from a stream of batches.

    Only two numbers are kept. The scale is neither a mean of norms nor one per token, and activations are not centred
    (section 3.1).

    >>> rms = StreamingRMS()
    >>> rms.update(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> round(rms.scale, 4)
    3.5355
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def update(self, activations: Tensor) -> None:
        """Add a batch ``[..., d_in]`` of any dtype; the sum is kept in float64."""
        rows = activations.detach().reshape(-1, activations.shape[-1])
        norms = rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(-1)
        self.total += norms.double().sum().item()
        self.count += rows.shape[0]

    @property
    def scale(self) -> float:
        """The scale ``C``.

        Raises:
            GemmaScopeError: there were no activations, or they are all zero or not all finite.
        """
        if not (self.count and 0.0 < self.total < float("inf")):
            raise GemmaScopeError(f"{self.count} activations with a sum of squares of {self.total} give no scale.")
        return math.sqrt(self.total / self.count)
