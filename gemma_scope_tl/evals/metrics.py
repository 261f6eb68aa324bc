"""The paper's metrics as pure functions. Their sums over a dataset are in :mod:`gemma_scope_tl.evals.accumulators`.

Activations have shape ``[n, d]``, with one row per token that counts; the caller leaves out special tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from gemma_scope_tl.counts import checked_count, checked_real
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sae import sparse_ops
from gemma_scope_tl.sae.sparse import SparseActs

DENSE_FREQUENCY = 0.1
"""A latent that fires on more than this share of tokens is dense (JumpReLU paper, section 5.3)."""


def l0(acts: Float[torch.Tensor, "n d_sae"] | SparseActs) -> Float[torch.Tensor, " n"]:
    """Number of active latents of each token (section 4.1): ``‖f(x)‖₀``. NaN counts as active."""
    if isinstance(acts, torch.Tensor):
        return (acts != 0).sum(-1).double()
    if bool((acts.values != 0).all()):
        return acts.offsets.diff().double()
    return acts.tokens()[acts.values != 0].bincount(minlength=acts.n_tokens).double()


def squared_error(x: Float[torch.Tensor, "n d"], x_hat: Float[torch.Tensor, "n d"]) -> Float[torch.Tensor, " n"]:
    """``‖x - x̂‖²`` of each token in float64: the numerator of FVU (section 4.1)."""
    return (x.double() - x_hat.double()).square_().sum(-1)


def fvu(error: float, deviation: float) -> float:
    """``Σ‖x - x̂‖² / Σ‖x - mean(x)‖²`` with the dataset's mean (section 4.1); NaN if the variance is zero."""
    return error / deviation if deviation > 0 else math.nan


def next_token_losses(
    logits: Float[torch.Tensor, "batch pos vocab"], tokens: Int[torch.Tensor, "batch pos"]
) -> Float[torch.Tensor, "batch pos-1"]:
    """Cross-entropy of every next token in nats, computed in float32 whatever the model's dtype."""
    flat = logits[:, :-1].float().flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(flat, targets, reduction="none").view(tokens.shape[0], -1)


def scored_positions(counted: Bool[torch.Tensor, "batch pos"]) -> Bool[torch.Tensor, "batch pos-1"]:
    """Predictions that count: from a counted token to a counted token (the paper masks BOS, EOS and padding)."""
    return counted[:, :-1] & counted[:, 1:]


def loss_recovered(clean: float, spliced: float, ablated: float) -> float:
    """``(ablated - spliced) / (ablated - clean)``: 1 when splicing leaves the loss unchanged,
    0 when it raises the loss as much as the ablation does.

    NaN if the ablation (by zeros or by the mean) does not raise the loss.
    """
    gap = ablated - clean
    return (ablated - spliced) / gap if gap > 0 else math.nan


def latent_importance(
    acts: SparseActs, gradient: Float[torch.Tensor, "n d_out"], w_dec: Float[torch.Tensor, "d_sae d_out"]
) -> Float[torch.Tensor, " nnz"]:
    """Attributed effect of every active latent (appendix C.3): ``y = f(x) ⊙ (W_decᵀ ∇_x 𝓛)``; 0 for inactive latents.

    Args:
        acts: latents of n tokens.
        gradient: ``∇_x 𝓛`` of each token at the tensor that the SAE reconstructs; 𝓛 is the mean-centred logit of the
            correct next token.
        w_dec: the decoder, with one latent per row.
    """
    along = sparse_ops.sampled(acts.offsets, acts.latents, gradient.to(w_dec.dtype), w_dec)
    return acts.values.double() * along.double()


def uniformity(importance: Float[torch.Tensor, " nnz"], acts: SparseActs) -> Float[torch.Tensor, " n"]:
    """Uniformity of active latent importance of each token (appendix C.3).

    ``p = |y| / ‖y‖₁`` and ``r_L0 = exp(S(p)) / ‖y‖₀``, with the entropy ``S(p) = -Σ p log p``: the effective number of
    latents as a share of those with an effect. ``1 / ‖y‖₀ ≤ r_L0 ≤ 1``. It is 1 if all effects are equal, and NaN if
    there are none.
    """
    tokens, size = acts.tokens(), importance.abs()
    zeros = torch.zeros(acts.n_tokens, dtype=size.dtype, device=size.device)
    p = size / zeros.index_add(0, tokens, size)[tokens]
    entropy = -zeros.index_add(0, tokens, torch.special.xlogy(p, p))
    count = zeros.index_add(0, tokens, (size > 0).to(size.dtype))
    return torch.where(count > 0, entropy.exp() / count, torch.nan)


def max_cosine(w_dec: Float[torch.Tensor, "d_sae d"], chunk: int = 1024) -> Float[torch.Tensor, " d_sae"]:
    """Largest cosine of each latent's decoder row with that of another latent, in float32.

    High values indicate near duplicates, which feature splitting and absorption produce.

    Args:
        w_dec: the decoder, with one latent per row.
        chunk: number of rows that are compared with all others at a time, which takes ``chunk * d_sae`` values.

    Returns:
        One value per latent. A latent whose row is zero has NaN, and is compared with no other.

    Raises:
        GemmaScopeError: there are fewer than two latents.
    """
    if w_dec.ndim != 2 or w_dec.shape[0] < 2:
        raise GemmaScopeError(f"A decoder must be [d_sae, d] with two latents or more, not {list(w_dec.shape)}.")
    wide = w_dec.detach().float()
    norms = wide.norm(dim=1, keepdim=True)
    unit, empty = wide / norms.clamp_min(1e-30), norms.squeeze(1) == 0
    out = torch.empty(unit.shape[0], device=unit.device)
    for start in range(0, unit.shape[0], chunk):
        rows = unit[start : start + chunk]
        cosines = rows @ unit.T
        here = torch.arange(rows.shape[0], device=unit.device)
        cosines[here, here + start] = -torch.inf
        cosines[:, empty] = -torch.inf
        out[start : start + chunk] = cosines.amax(1)
    return out.masked_fill(empty | (out == -torch.inf), torch.nan)


def check_intervals(resamples: int, level: float, seed: int) -> tuple[int, int]:
    """Check the parameters of :class:`Bootstrap`, and return resamples and seed as ints.

    Raises:
        GemmaScopeError: as :class:`Bootstrap`.
    """
    if not checked_real(level, "confidence", above=0) < 1:
        raise GemmaScopeError(f"confidence must be above 0 and below 1, not {level}.")
    return checked_count(resamples, "resamples"), checked_count(seed, "seed", least=0, most=None)


class Bootstrap:
    """Resamples of the same sequences for every metric, so that differences are paired.

    A metric is a function of sums over sequences. Each resample draws as many sequences as there are, with replacement,
    and the interval lies between two quantiles of the metric over the resamples (percentile bootstrap).

    Args:
        rows: number of sequences.
        resamples: number of draws.
        level: confidence level of the interval, between 0 and 1.
        seed: seed of the draws.

    Raises:
        GemmaScopeError: the level is outside (0, 1), there are no resamples, or the seed is negative.
    """

    def __init__(self, rows: int, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> None:
        resamples, seed = check_intervals(resamples, level, seed)
        self.rows, self.level = rows, level
        draws = np.random.default_rng(seed)
        self._weights = draws.multinomial(rows, np.full(rows, 1 / rows), resamples) if rows else np.zeros((1, 0))

    def interval(self, metric: Callable[..., Any], *by_row: torch.Tensor) -> tuple[float, float]:
        """Bounds of a metric; NaN if the metric is NaN on all resamples.

        Args:
            metric: a function of arrays that hold the sums of each resample.
            by_row: the values of each sequence, ``[rows]``; ``metric`` receives their sums.
        """
        sums = [self._weights @ values.double().numpy() for values in by_row]
        with np.errstate(all="ignore"):
            values = np.asarray(metric(*sums), dtype=np.float64)
        finite = values[np.isfinite(values)]
        if not finite.size:
            return math.nan, math.nan
        low, high = np.quantile(finite, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)
