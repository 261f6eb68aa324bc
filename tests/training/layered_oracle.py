"""Training of a coder over several layers in NumPy, written from the equations: dense, float64, its own Adam."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gemma_scope_tl.training.recipe import Recipe

Arrays = dict[str, np.ndarray]


class LayeredOracle:
    """A crosscoder or a CLT.

    ``start`` has ``E [K, m, d_in]``, ``W [K, m, K, d_out]`` (output planes of earlier layers are 0 and stay so),
    ``b [K, m]``, ``log_theta [K, m]``, ``c [K, d_out]`` and for a CLT with skip ``S [K, d_in, d_out]``.
    """

    def __init__(
        self, start: Arrays, recipe: Recipe, l0: tuple[float, float, int], steps: int, *, centred: bool
    ) -> None:
        self.p = {name: value.copy() for name, value in start.items()}
        self.m = {name: np.zeros_like(value) for name, value in start.items()}
        self.v = {name: np.zeros_like(value) for name, value in start.items()}
        self.recipe, self.l0_plan, self.steps, self.centred = recipe, l0, steps, centred
        self.t = self.idle = 0
        self.touched: np.ndarray = np.zeros(0)

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pre-activations, gates ``[K, n, m]`` and thresholds for ``x [K, n, d_in]``."""
        p, theta = self.p, np.exp(self.p["log_theta"])
        shift = p["c"][:, None, :] if self.centred else 0.0
        pre = np.einsum("knd,kmd->knm", x - shift, p["E"]) + p["b"][:, None, :]
        return pre, (pre > theta[:, None, :]).astype(float), theta

    def outputs(self, x: np.ndarray, f: np.ndarray) -> np.ndarray:
        """``y_hat [K, n, d_out]``."""
        out = np.einsum("jnm,jmkd->knd", f, self.p["W"]) + self.p["c"][:, None, :]
        return out + np.einsum("knd,kde->kne", x, self.p["S"]) if "S" in self.p else out

    def gradients(self, x: np.ndarray, y: np.ndarray) -> Arrays:
        """Gradients of the loss ``mean_p mean_t sum_k |y_k - y_hat_k|^2`` and of the penalties."""
        r, p, (count, n, _) = self.recipe, self.p, x.shape
        latents = p["b"].shape[1]
        pre, on, theta = self.forward(x)
        f = pre * on
        kernel = (np.abs((pre - theta[:, None, :]) / r.bandwidth) < 0.5).astype(float)
        grads = {name: np.zeros_like(value) for name, value in p.items()}
        d_f = np.zeros_like(f)
        sizes = [round(share * latents) for share in r.matryoshka] + [latents]
        error = np.zeros_like(y)
        for size in sizes:
            part = np.where(np.arange(latents) < size, f, 0.0)
            error = self.outputs(x, part) - y
            d_hat = 2.0 * error / (n * len(sizes))
            grads["c"] += d_hat.sum(1)
            if "S" in p:
                grads["S"] += np.einsum("knd,kne->kde", x, d_hat)
            for j in range(count):
                for k in range(j, count):
                    grads["W"][j, :, k] += part[j].T @ d_hat[k]
                    d_f[j, :, :size] += d_hat[k] @ p["W"][j, :size, k].T
        self.errors, self.l0s = (error**2).sum((1, 2)) / n, on.sum((1, 2)) / n
        warm = min(1.0, self.t / r.l0_warm_up_steps)
        first, last, over = self.l0_plan
        self.target = last + (first - last) * max(0.0, 1.0 - self.t / over)
        active = on.sum((0, 2))
        d_on = r.l0_coefficient * warm * (2.0 / self.target) * 2.0 * (active - self.target) / n
        d_on = np.broadcast_to(d_on[None, :, None], on.shape)
        often = (on.mean(1) > r.frequency_limit)[:, None, :]
        d_on = d_on + r.frequency_coefficient * warm * often / n
        d_theta = -(theta[:, None, :] * d_f + d_on) * kernel / r.bandwidth
        grads["log_theta"] = d_theta.sum(1) * theta
        d_pre = d_f * on
        if r.ste_to_input:
            fade = max(0.0, 1.0 - self.t / (r.ste_to_input_fade * self.steps))
            d_pre = d_pre - r.ste_to_input * fade * d_theta
        self.touched = np.asarray(((on + kernel) > 0).any(1))
        self.idle += int((~self.touched).sum())
        shift = p["c"][:, None, :] if self.centred else 0.0
        grads["E"] = np.einsum("knm,knd->kmd", d_pre, x - shift)
        grads["b"] = d_pre.sum(1)
        if self.centred:
            grads["c"] -= np.einsum("knm,kmd->kd", d_pre, p["E"])
        return grads

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """Adam, with rows of ``W`` on the sphere of all that a latent writes."""
        r = self.recipe
        if self.t == 0 and r.b_dec_start == "mean":
            self.p["c"] = y.mean(1)
        grads = self.gradients(x, y)
        w = self.p["W"]
        grads["W"] = grads["W"] - (grads["W"] * w).sum((2, 3), keepdims=True) * w
        lr = r.lr
        if self.t < r.lr_warm_up_steps:
            lr *= 0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * self.t / r.lr_warm_up_steps))
        lr *= min(1.0, (self.steps - self.t) / (r.lr_decay * self.steps))
        self.t += 1
        one, two = r.betas
        moved: dict[str, Any] = {"E": self.touched[..., None], "W": self.touched[..., None, None], "c": True, "S": True}
        for name, g in grads.items():
            self.m[name] = one * self.m[name] + (1 - one) * g
            self.v[name] = two * self.v[name] + (1 - two) * g**2
            m, v = self.m[name] / (1 - one**self.t), self.v[name] / (1 - two**self.t)
            self.p[name] = self.p[name] - moved.get(name, self.touched) * lr * m / (np.sqrt(v) + 1e-8)
        self.p["W"] /= np.sqrt((self.p["W"] ** 2).sum((2, 3), keepdims=True))
