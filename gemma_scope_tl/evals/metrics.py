"""The paper's metrics as pure functions and mergeable accumulators (section 4.1).

Activations come as ``[n, d]``: one row per token that counts, special tokens left out by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int


@dataclass
class Mean:
    """A running mean in float64."""

    total: float = 0.0
    count: int = 0

    def update(self, values: torch.Tensor) -> None:
        """Take in every entry of ``values``."""
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        """The mean, NaN before any value."""
        return self.total / self.count if self.count else math.nan


@dataclass
class FVU:
    """Fraction of variance unexplained over a dataset (section 4.1).

    ``FVU = mean ‖x - x̂‖² / mean ‖x - mean(x)‖²``: 1 for predicting the dataset's mean, 0 for the identity. Sums are
    float64; the denominator is ``Σ‖x‖² - n ‖mean‖²``.
    """

    n: int = 0
    error: float = 0.0
    square: float = 0.0
    sums: Float[torch.Tensor, " d"] | None = field(default=None, repr=False)

    def update(self, x: Float[torch.Tensor, "n d"], x_hat: Float[torch.Tensor, "n d"]) -> None:
        """Take in activations and their reconstructions."""
        x, x_hat = x.double(), x_hat.double()
        self.n += x.shape[0]
        self.error += float((x - x_hat).square().sum())
        self.square += float(x.square().sum())
        self.sums = x.sum(0) if self.sums is None else self.sums + x.sum(0)

    @property
    def value(self) -> float:
        """The fraction so far, NaN while there is no variance."""
        if self.sums is None:
            return math.nan
        variance = self.square - float(self.sums.square().sum()) / self.n
        return self.error / variance if variance > 0 else math.nan


def l0(acts: Float[torch.Tensor, "n d_sae"]) -> Float[torch.Tensor, " n"]:
    """Number of active latents of each token (section 4.1): ``‖f(x)‖₀``."""
    return (acts != 0).sum(-1).double()


def next_token_losses(
    logits: Float[torch.Tensor, "batch pos vocab"], tokens: Int[torch.Tensor, "batch pos"]
) -> Float[torch.Tensor, "batch pos-1"]:
    """Cross-entropy of every next token in nats, computed in float32 whatever the model's dtype."""
    flat = logits[:, :-1].float().flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(flat, targets, reduction="none").view(tokens.shape[0], -1)


def scored_positions(special: Bool[torch.Tensor, "batch pos"]) -> Bool[torch.Tensor, "batch pos-1"]:
    """Predictions that count: from an ordinary token to an ordinary token (the paper masks BOS, EOS and padding)."""
    return ~special[:, :-1] & ~special[:, 1:]


def loss_recovered(clean: float, spliced: float, zeroed: float) -> float:
    """``(zeroed - spliced) / (zeroed - clean)``: 1 when splicing costs nothing, 0 when it is as bad as zeros.

    NaN where zeroing the site does not raise the loss, because then there is nothing to recover.
    """
    gap = zeroed - clean
    return (zeroed - spliced) / gap if gap > 0 else math.nan
