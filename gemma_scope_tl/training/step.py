"""One training step of the paper's SAE with gradients by hand and sparse kernels, for CPUs.

Only the encoder's product is dense. Every other product of the step needs the pre-activations that lie above the
threshold, or within half a bandwidth below it: a few dozen of thousands of latents. Decoding and the gradients of both
matrices are weighted sums of rows (``embedding_bag``), the gradients of the latents a sampled product.

The numbers are those of :class:`~gemma_scope_tl.sae.training.GemmaScopeTrainingSAE` under autograd; a test compares.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gemma_scope_tl.training.recipe import Recipe, unit_rows_

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)


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
    pre = torch.addmm(w.b_enc - w.enc @ w.b_dec, x, w.enc.T)
    flat = (pre > theta - 0.5 * bandwidth).view(-1).nonzero().squeeze(1)
    rows = flat.div(d_sae, rounding_mode="floor")
    cols = flat - rows * d_sae
    starts = _starts(rows.bincount(minlength=n))
    z, theta_at = pre.view(-1).index_select(0, flat), theta.index_select(0, cols)
    on = z > theta_at
    near = (z - theta_at) < 0.5 * bandwidth
    f = z * on

    error = embedding_bag(cols, w.dec, starts[:-1], mode="sum", per_sample_weights=f) + w.b_dec - x
    g_out = error * (2.0 / n)
    pattern = torch.sparse_csr_tensor(starts, cols, torch.zeros_like(z), (n, d_sae), check_invariants=False)
    g = torch.sparse.sampled_addmm(pattern, g_out, w.dec.T, beta=0.0).values()
    g_pre = g * on

    order = cols.to(torch.int32).argsort(stable=True)
    rows, by_latent = rows.index_select(0, order), _starts(cols.bincount(minlength=d_sae))[:-1]
    g_dec = embedding_bag(rows, g_out, by_latent, mode="sum", per_sample_weights=f.index_select(0, order))
    g_enc = embedding_bag(rows, x, by_latent, mode="sum", per_sample_weights=g_pre.index_select(0, order))

    zeros = torch.zeros_like(theta)
    g_b_enc = zeros.index_add(0, cols, g_pre)
    g_enc.addr_(g_b_enc, w.b_dec, alpha=-1.0)
    g_b_dec = g_out.sum(0) - w.enc.T @ g_b_enc
    g_log_theta = zeros.index_add(0, cols, near * (theta_at * g + l0_coefficient / n)) * (-theta / bandwidth)
    fired = zeros.index_add(0, cols, on.to(zeros.dtype))
    squared = error.square().sum().item() / n
    return StepResult(squared, fired.sum().item() / n, [g_enc, g_dec, g_b_enc, g_b_dec, g_log_theta], fired)


def _starts(counts: Tensor) -> Tensor:
    """``[0, c0, c0 + c1, ...]``: where each group begins, and the end."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
