"""One training step of the paper's SAE with gradients by hand and sparse kernels, for CPUs.

Only the encoder's product is dense. Every other product of the step needs the pre-activations that lie above the
threshold, or within half a bandwidth below it: a few dozen of thousands of latents. Decoding and the gradients of both
matrices are weighted sums of rows, the gradients of the latents a sampled product (``sae/sparse_ops.py``).

The numbers are those of :class:`~gemma_scope_tl.sae.training.GemmaScopeTrainingSAE` under autograd; a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.training.recipe import Recipe, unit_rows_


@dataclass
class Weights:
    """The trained parameters of one SAE, a row of both matrices for each latent.

    Attributes:
        enc: ``W_enc`` transposed, ``[d_sae, d_in]``.
        dec: ``W_dec [d_sae, d_in]``, rows of unit length.
        b_enc: ``[d_sae]``.
        b_dec: ``[d_in]``.
        log_threshold: ``[d_sae]``.
    """

    enc: Tensor
    dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    log_threshold: Tensor

    @classmethod
    def initial(cls, d_in: int, d_sae: int, recipe: Recipe, generator: torch.Generator) -> Weights:
        """The paper's initialisation: He-uniform decoder with unit rows, encoder its transpose, biases 0."""
        dec = unit_rows_(2.0 * torch.rand(d_sae, d_in, generator=generator) - 1.0)  # the unit row forgets He's bound
        log_threshold = torch.full((d_sae,), recipe.init_threshold).log()
        return cls(dec.clone(), dec, torch.zeros(d_sae), torch.zeros(d_in), log_threshold)

    def tensors(self) -> list[Tensor]:
        """The five parameters, in the order of the fields."""
        return [self.enc, self.dec, self.b_enc, self.b_dec, self.log_threshold]

    def named(self) -> dict[str, Tensor]:
        """Under Gemma Scope's names, for :func:`gemma_scope_tl.weights.fold.fold`."""
        return {
            "W_enc": self.enc.T,
            "W_dec": self.dec,
            "b_enc": self.b_enc,
            "b_dec": self.b_dec,
            "threshold": self.log_threshold.exp(),
        }


@dataclass(frozen=True)
class StepResult:
    """What one batch gave.

    Attributes:
        error: mean over the batch of ``||x - x_hat||^2``.
        l0: mean number of active latents.
        grads: gradients of ``error + lambda l0`` in the order of :meth:`Weights.tensors`.
        fired: ``[d_sae]``, how often each latent was active.
    """

    error: float
    l0: float
    grads: list[Tensor]
    fired: Tensor


@torch.no_grad()
def loss_and_gradients(w: Weights, x: Tensor, l0_coefficient: float, bandwidth: float) -> StepResult:
    """Loss ``mean(||x - x_hat||^2 + lambda ||f||_0)`` of a batch ``x [batch, d_in]`` and its gradients.

    With ``e = x_hat - x``, ``n`` the batch, ``g = (2 / n) e . d_i`` the gradient of latent i of one activation,
    ``on`` its being active and ``K`` the kernel at its pre-activation, the sums running over the batch::

        d W_dec_i = sum (2 / n) f_i e                 d b_dec = sum (2 / n) e - sum_i W_enc_i (sum on g)
        d W_enc_i = sum on g (x - b_dec)              d b_enc = sum on g
        d log theta_i = -(theta_i / epsilon) sum K (theta_i g + lambda / n)
    """
    n, d_sae = x.shape[0], w.enc.shape[0]
    theta = w.log_threshold.exp()
    offsets, latents, z = ops.encode(x, w.enc.T, w.b_enc - w.enc @ w.b_dec, theta - 0.5 * bandwidth)
    theta_at = theta.index_select(0, latents)
    on = z > theta_at
    near = (z - theta_at) < 0.5 * bandwidth
    f = z * on

    error = ops.row_sums(offsets, latents, f, w.dec) + w.b_dec - x
    g_out = error * (2.0 / n)
    g = ops.sampled(offsets, latents, g_out, w.dec)
    g_pre = g * on
    g_dec = ops.latent_sums(offsets, latents, f, d_sae, g_out)
    g_enc = ops.latent_sums(offsets, latents, g_pre, d_sae, x)

    zeros = torch.zeros_like(theta)
    g_b_enc = zeros.index_add(0, latents, g_pre)
    g_enc.addr_(g_b_enc, w.b_dec, alpha=-1.0)
    g_b_dec = g_out.sum(0) - w.enc.T @ g_b_enc
    g_log_theta = zeros.index_add(0, latents, near * (theta_at * g + l0_coefficient / n)) * (-theta / bandwidth)
    fired = zeros.index_add(0, latents, on.to(zeros.dtype))
    squared = error.square().sum().item() / n
    return StepResult(squared, fired.sum().item() / n, [g_enc, g_dec, g_b_enc, g_b_dec, g_log_theta], fired)
