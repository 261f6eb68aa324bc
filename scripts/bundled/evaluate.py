"""Held-out bits per byte of a language model, per domain."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.bundled.data import heldout_windows
from scripts.bundled.domains import WEIGHTS
from scripts.bundled.tokenizer import BOS


@torch.no_grad()
def nats_and_bytes(
    logits_of: Callable[[Tensor], Tensor], windows: Tensor, token_bytes: np.ndarray, batch: int
) -> dict[str, float]:
    """Summed nats, bytes and count over the text tokens of `windows` [n, context]; special tokens are not counted.

    `logits_of` maps int64 [batch, context] to [batch, context, vocab]; the last batch is padded with BOS rows.
    """
    sizes = torch.from_numpy(token_bytes)
    nats, total_bytes, count = 0.0, 0, 0
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch]
        padded = torch.cat([rows, torch.full((batch - len(rows), rows.shape[1]), BOS)]) if len(rows) < batch else rows
        logits = logits_of(padded)[: len(rows), :-1].float()
        targets = rows[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        is_text = (sizes[targets] > 0).flatten()
        nats += losses[is_text].double().sum().item()
        total_bytes += int(sizes[targets].sum())
        count += int(is_text.sum())
    return {"nats": nats, "bytes": total_bytes, "tokens": count}


def heldout_metrics(
    logits_of: Callable[[Tensor], Tensor],
    work: Path,
    token_bytes: np.ndarray,
    *,
    batch: int,
    context: int,
    limit: int | None,
) -> dict[str, dict[str, Any]]:
    """Per domain: bits per byte (nats / ln 2 / UTF-8 bytes), nats per token, tokens and bytes scored."""
    result: dict[str, dict[str, Any]] = {}
    for domain in WEIGHTS:
        sums = nats_and_bytes(logits_of, heldout_windows(work, domain, context, limit), token_bytes, batch)
        result[domain] = {
            "bits_per_byte": round(sums["nats"] / math.log(2) / sums["bytes"], 4),
            "nats_per_token": round(sums["nats"] / sums["tokens"], 4),
            "tokens": sums["tokens"],
            "bytes": sums["bytes"],
        }
    return result


def mean_bits_per_byte(metrics: dict[str, dict[str, Any]]) -> float:
    """Unweighted mean over domains."""
    return round(sum(row["bits_per_byte"] for row in metrics.values()) / len(metrics), 4)
