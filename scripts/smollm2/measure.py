"""Held-out L0, FVU and delta loss of SAEs of the middle residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.frontier import Arrays, Trained, measure
from gemma_scope_tl.evals.metrics import loss_recovered, next_token_losses
from scripts.smollm2.data import BATCH_ROWS, SEPARATOR_ID, kept
from scripts.smollm2.model import LAYER, Halves, load_model


@torch.no_grad()
def evaluated(folder: Path, rows: Tensor, trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """A row per SAE: L0 and FVU at the positions of :func:`~scripts.smollm2.data.kept`, and the losses in nats.

    A loss is the mean over predictions from such a position to an ordinary token; only these positions are replaced.

    Args:
        folder: folder of the model.
        rows: held-out token ids ``[n, 256]``.
        trained: SAEs for raw activations.
    """
    halves = Halves(load_model(folder), LAYER)
    losses = _Losses(halves)
    streams: list[Tensor] = []
    for batch in track(rows.split(BATCH_ROWS), "evaluating"):
        stream, mask = halves.stream(batch), kept(batch)
        streams.append(stream[mask])
        losses.add("clean", batch, stream)
        losses.add("zero", batch, _with(stream, mask, torch.zeros_like(streams[-1])))
        for number, one in enumerate(trained):
            losses.add(str(number), batch, _with(stream, mask, reconstructed(one.arrays, streams[-1])))
    x = torch.cat(streams)
    clean, zeroed = losses.mean("clean"), losses.mean("zero")
    return [
        {
            "recipe": one.recipe,
            **measure(one.arrays, x),
            "delta_loss": losses.mean(str(number)) - clean,
            "loss_recovered": loss_recovered(clean, losses.mean(str(number)), zeroed),
            "loss_clean": clean,
            "tokens": len(x),
            "seed": one.seed,
            "seconds": round(one.seconds, 1),
            "settings": one.settings,
        }
        for number, one in enumerate(trained)
    ]


def reconstructed(arrays: Arrays, x: Tensor) -> Tensor:
    """``x_hat = JumpReLU_theta(x W_enc + b_enc) W_dec + b_dec`` of ``x [n, d]``."""
    pre = x @ arrays["W_enc"] + arrays["b_enc"]
    return (pre * (pre > arrays["threshold"])) @ arrays["W_dec"] + arrays["b_dec"]


class _Losses:
    """Sums of next-token losses by name, in float64."""

    def __init__(self, halves: Halves) -> None:
        self.halves = halves
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, rows: Tensor, stream: Tensor) -> None:
        """Add the losses of ``rows`` for the residual stream ``stream``."""
        scored = kept(rows)[:, :-1] & (rows[:, 1:] != SEPARATOR_ID)
        found = next_token_losses(self.halves.logits(stream), rows)[scored]
        self.sums[name] = self.sums.get(name, 0.0) + float(found.double().sum())
        self.counts[name] = self.counts.get(name, 0) + int(scored.sum())

    def mean(self, name: str) -> float:
        """The mean loss in nats per prediction."""
        return self.sums[name] / self.counts[name]


def _with(stream: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    changed = stream.clone()
    changed[mask] = values
    return changed
