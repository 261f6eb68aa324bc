"""Muon in fp32 (Jordan et al. 2024): momentum, then an approximately orthogonal update for matrices.

The update of a matrix with momentum-averaged gradient M = U S V^T is about U V^T, found with five steps of

    X <- a X + (b A + c A A) X,   A = X X^T,   (a, b, c) = (3.4445, -4.7750, 2.0315)

from X = M / |M|_F. `torch.optim.Muon` iterates in bf16, which is slow on CPUs without bf16 units.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix of [n, rows, cols]."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; matrices of one shape are updated as a batch."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                self._step_shape(shape, params, group["lr"], group["momentum"], group["weight_decay"])

    def _step_shape(self, shape: torch.Size, params: list[Tensor], lr: float, momentum: float, decay: float) -> None:
        updates = []
        for p in params:
            grad = p.grad
            assert grad is not None
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(grad, 1 - momentum)
            updates.append(grad.lerp(buffer, momentum))
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        for p, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
            p.mul_(1 - lr * decay).add_(update, alpha=-lr * scale)
