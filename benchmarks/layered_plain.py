"""Training of a crosscoder or a cross-layer transcoder in plain PyTorch: dense latents, autograd, fused Adam.

With ``f_j = z_j H(z_j - theta_j)``, ``z_j = (x_j - s_j) E_j^T + b_j`` (``s_j`` is the decoder's bias of layer j for a
crosscoder, and 0 for a CLT)::

    y_hat_k = c_k + sum_{j <= k} f_j W_j[:, k]
    loss = mean_t sum_k ||y_tk - y_hat_tk||^2 + lambda (2 / L0*) mean_t (L_t - L0*)^2

``L_t`` is the number of active latents of all layers. The threshold has the rectangle kernel's pseudo-derivative, in f
and in L. What a latent writes in all layers is one row of length 1. Planes of earlier layers are not held, and each
pair of layers is one product: the fastest of the ways tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemma_scope_tl.training.recipe import Recipe


class _Gate(torch.autograd.Function):
    """``z H(z - theta)`` and ``H(z - theta)``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        on = (z > theta).to(z.dtype)
        ctx.save_for_backward(z, theta, on)
        ctx.bandwidth = bandwidth
        return z * on, on

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, theta, on = ctx.saved_tensors
        of_f, of_on = grads
        kernel = (((z - theta) / ctx.bandwidth).abs() < 0.5).to(z.dtype)
        of_theta = -((theta * of_f + of_on) * kernel).sum(0) / ctx.bandwidth
        return of_f * on, of_theta, None


class PlainTrainer:
    """A coder with its optimizer.

    Args:
        start: the initial parameters, by the names of ``LayeredWeights.named``; copied.
        layers: number of layers.
        recipe: hyper-parameters, without Matryoshka prefixes, frequency penalty and further options.
        target: ``L0*``.
        kind: ``crosscoder`` or ``clt``.
    """

    def __init__(self, start: Mapping[str, Tensor], layers: int, recipe: Recipe, target: float, kind: str) -> None:
        assert recipe.l0_penalty == "quadratic" and not recipe.matryoshka and not recipe.frequency_coefficient
        self.recipe, self.target, self.centred, self.steps = recipe, target, kind == "crosscoder", 0
        self.params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        d = start["b_dec"].shape[1]
        for j in range(layers):
            whole = self.params.pop(f"{j}.dec").data
            self.params[f"{j}.dec"] = nn.Parameter(whole.view(len(whole), layers - j, d))
        self.layers = layers
        self.adam = torch.optim.Adam(
            list(self.params.values()), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True
        )

    def named(self) -> dict[str, Tensor]:
        """The parameters by the names and in the shapes of ``LayeredWeights.named``."""
        return {name: value.data.flatten(1) if value.ndim == 3 else value.data for name, value in self.params.items()}

    def kept_bytes(self) -> int:
        """Bytes of parameters and of Adam's moments."""
        moments = [one for state in self.adam.state.values() for one in state.values() if one.ndim]
        return sum(one.nbytes for one in [*self.params.values(), *moments])

    def step(self, x: Sequence[Tensor], y: Sequence[Tensor] | None) -> dict[str, float]:
        """Step once; the error summed over outputs, and the L0 of all layers together, both before the step."""
        p, recipe = self.params, self.recipe
        acts: list[Tensor] = []
        l0: Any = 0.0
        for j, rows in enumerate(x):
            shifted = rows - p["b_dec"][j] if self.centred else rows
            z = shifted @ p[f"{j}.enc"].T + p[f"{j}.b_enc"]
            f, on = _Gate.apply(z, p[f"{j}.log_threshold"].exp(), recipe.bandwidth)  # type: ignore[misc]
            acts.append(f)
            l0 = l0 + on.sum(1)
        error: Any = 0.0
        for k, target in enumerate(x if y is None else y):
            out: Any = p["b_dec"][k]
            for j, f in enumerate(acts[: k + 1]):
                out = out + f @ p[f"{j}.dec"][:, k - j]
            error = error + (target - out).square().sum(1).mean()
        penalty = recipe.l0_coefficient_at(self.steps) * (2.0 / self.target) * (l0 - self.target).square().mean()
        self.adam.zero_grad()
        (error + penalty).backward()
        self._project()
        for group in self.adam.param_groups:
            group["lr"] = recipe.lr_at(self.steps)
        self.adam.step()
        self._renormalise()
        self.steps += 1
        return {"error": float(error.detach()), "l0": float(l0.detach().mean())}

    @torch.no_grad()
    def _project(self) -> None:
        """Remove the part of each decoder row's gradient along the row."""
        for j in range(self.layers):
            rows = self.params[f"{j}.dec"]
            assert rows.grad is not None
            along = (rows.grad * rows).sum((1, 2), keepdim=True)
            rows.grad.addcmul_(rows, along, value=-1.0)

    @torch.no_grad()
    def _renormalise(self) -> None:
        for j in range(self.layers):
            rows = self.params[f"{j}.dec"]
            rows /= rows.flatten(1).norm(dim=1)[:, None, None]
