"""Held-out measurements of SAEs as shipped: L0, FVU, delta loss, loss recovered, share of latents that fire.

Only text positions count: BOS, EOS and padding are neither replaced nor measured (paper, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM

from scripts.bundled.sae_data import Place, harvest, hook_site, hooked, is_text

Arrays = dict[str, np.ndarray]
BATCH = 32


@dataclass
class Shipped:
    """A folded SAE: `x_hat = JumpReLU_theta(x W_enc + b_enc) W_dec + b_dec`."""

    arrays: Arrays
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and reconstructions of `x [..., d_in]`."""
        t = self.tensors
        pre = x @ t["W_enc"] + t["b_enc"]
        f = pre * (pre > t["threshold"])
        return f, f @ t["W_dec"] + t["b_dec"]


@torch.no_grad()
def loss(model: Gemma2ForCausalLM, tokens: Tensor, place: Place | None = None, replace: Any = None) -> float:
    """Mean nats a token over text tokens that follow text, with `replace(x)` at the text positions of a place."""
    total, count = 0.0, 0
    for rows in tokens.split(BATCH):
        keep = is_text(rows)

        def swap(x: Tensor, keep: Tensor = keep) -> Tensor:
            return torch.where(keep[..., None], replace(x), x)

        with hooked([hook_site(model, place, swap)] if place else []):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        scored = keep[:, :-1] & keep[:, 1:]
        nats = torch.nn.functional.cross_entropy(logits[scored], rows[:, 1:][scored], reduction="sum")
        total += nats.item()
        count += int(scored.sum())
    return total / count


@torch.no_grad()
def activation_metrics(sae: Shipped, x: Tensor) -> dict[str, float]:
    """L0, FVU and the share of latents that fire at least once on activations `x [n, d]`.

    `FVU = sum ||x - x_hat||^2 / sum ||x - mean(x)||^2`.
    """
    active, squared, fired = 0.0, 0.0, torch.zeros(len(sae.tensors["b_enc"]), dtype=torch.bool)
    for part in x.split(4096):
        f, x_hat = sae(part)
        active += float((f > 0).sum())
        squared += (part - x_hat).double().square().sum().item()
        fired |= (f > 0).any(0)
    variance = (x - x.mean(0)).double().square().sum().item()
    return {"l0": active / len(x), "fvu": squared / variance, "alive": fired.double().mean().item()}


class Evaluator:
    """Measures SAEs of one model on one set of windows; the clean and the ablated losses are computed once."""

    def __init__(self, model: Gemma2ForCausalLM, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.clean = loss(model, tokens)
        self.zeroed: dict[Place, float] = {}
        self.activations: dict[Place, Tensor] = {}

    def prepare(self, places: list[Place]) -> None:
        """Collect the activations of all places, one forward pass for all."""
        parts = [harvest(self.model, rows, places) for rows in self.tokens.split(BATCH)]
        self.activations = {place: torch.cat([part[place] for part in parts]) for place in places}

    def __call__(self, place: Place, sae: Shipped, *, with_loss: bool = True) -> dict[str, float]:
        """All metrics of one SAE; `loss_recovered = (zero - spliced) / (zero - clean)`."""
        if place not in self.activations:
            self.prepare([place])
        row = activation_metrics(sae, self.activations[place])
        if with_loss:
            if place not in self.zeroed:
                self.zeroed[place] = loss(self.model, self.tokens, place, torch.zeros_like)
            spliced, zero = loss(self.model, self.tokens, place, lambda x: sae(x)[1]), self.zeroed[place]
            row |= {
                "delta_loss": spliced - self.clean,
                "zero_delta_loss": zero - self.clean,
                "loss_recovered": (zero - spliced) / (zero - self.clean),
            }
        return row
