"""The columns of the tables of evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gemma_scope_tl.evals.accumulators import LatentCounts, TokenMean
from gemma_scope_tl.evals.metrics import Bootstrap, fvu, loss_recovered
from gemma_scope_tl.evals.run import ABLATIONS

RECOVERED = {"zero": "loss_recovered", "mean": "loss_recovered_mean"}
WITH_INTERVAL = ("l0", "fvu", "delta_loss", "loss_recovered", "kl", "loss_recovered_mean", "uniformity")


@dataclass(frozen=True)
class Measured:
    """The sums from which a row of a table is made.

    Attributes:
        named: the columns that identify what was measured.
        l0, fired: active latents of each token, and how often each latent is active.
        error, deviation: squared errors, and squared distances from the mean, of each tensor that is written.
        clean: the loss of the model alone.
        loss, kl: loss of the spliced model, and KL divergence; None where no pass was spliced.
        ablated: the loss by the kind of ablation.
        uniformity: uniformity of latent importance, if it was measured.
    """

    named: Mapping[str, Any]
    l0: TokenMean
    fired: LatentCounts
    error: Sequence[TokenMean]
    deviation: Sequence[TokenMean]
    clean: TokenMean
    loss: TokenMean | None
    kl: TokenMean | None
    ablated: Mapping[str, TokenMean] = field(default_factory=dict[str, TokenMean])
    uniformity: TokenMean | None = None

    def row(self, bootstrap: Bootstrap, sequences: int) -> dict[str, Any]:
        """All metrics over the dataset, and their intervals."""
        losses = {kind: self.ablated[kind].value if kind in self.ablated else math.nan for kind in ABLATIONS}
        spliced, kl = (math.nan if one is None else one.value for one in (self.loss, self.kl))
        recovered = {kind: loss_recovered(self.clean.value, spliced, loss) for kind, loss in losses.items()}
        row = {
            **self.named,
            "l0": self.l0.value,
            "fvu": fvu(sum(one.total for one in self.error), sum(one.total for one in self.deviation)),
            "loss_clean": self.clean.value,
            "loss_spliced": spliced,
            "delta_loss": spliced - self.clean.value,
            "loss_zero_ablated": losses["zero"],
            "loss_recovered": recovered["zero"],
            "tokens": self.l0.count,
            "kl": kl,
            "loss_mean_ablated": losses["mean"],
            "loss_recovered_mean": recovered["mean"],
            "dead": self.fired.dead,
            "dense": self.fired.dense,
            "uniformity": math.nan if self.uniformity is None else self.uniformity.value,
            "sequences": sequences,
        }
        bounds = self._bounds(bootstrap, recovered)
        for name in WITH_INTERVAL:
            row[f"{name}_low"], row[f"{name}_high"] = bounds.get(name, (math.nan, math.nan))
        return row

    def _bounds(self, bootstrap: Bootstrap, recovered: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        clean, error, deviation = self.clean, _by_sequence(self.error), _by_sequence(self.deviation)
        bounds = {"l0": bootstrap.interval(np.divide, self.l0.sums, self.l0.counts)}
        if self.kl is not None:
            bounds["kl"] = bootstrap.interval(np.divide, self.kl.sums, self.kl.counts)
        bounds["fvu"] = bootstrap.interval(np.divide, error, deviation)
        if self.loss is not None:
            bounds["delta_loss"] = bootstrap.interval(np.divide, self.loss.sums - clean.sums, clean.counts)
        if self.uniformity is not None:
            mean = self.uniformity
            bounds["uniformity"] = bootstrap.interval(np.divide, mean.sums, mean.counts)
        for kind, loss in self.ablated.items():
            if self.loss is not None and not math.isnan(recovered[kind]):
                bounds[RECOVERED[kind]] = bootstrap.interval(_recovered, clean.sums, self.loss.sums, loss.sums)
        return bounds

    def position_rows(self) -> list[dict[str, Any]]:
        """The metrics at each position: those of the dataset without the sum over positions."""
        length, clean = self.l0.position_counts.shape[0], self.clean.by_position
        nothing = torch.full_like(clean, math.nan)
        spliced, kl = (nothing if one is None else one.by_position for one in (self.loss, self.kl))
        error, deviation = (sum(one.position_sums for one in several) for several in (self.error, self.deviation))
        columns = {
            "position": torch.arange(length),
            "l0": self.l0.by_position,
            "squared_error": torch.as_tensor(error) / self.error[0].position_counts,
            "fvu": torch.as_tensor(error / deviation),
            "loss_clean": _padded(clean, length),
            "loss_spliced": _padded(spliced, length),
            "delta_loss": _padded(spliced - clean, length),
            "kl": _padded(kl, length),
            "tokens": self.l0.position_counts,
        }
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [{**self.named, **dict(zip(columns, row, strict=True))} for row in rows]


def _by_sequence(several: Sequence[TokenMean]) -> torch.Tensor:
    return torch.stack([one.sums for one in several]).sum(0)


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """Pad values of predictions with NaN to the number of tokens, since the last position predicts no token."""
    missing = torch.full((length - values.shape[0],), math.nan, dtype=values.dtype)
    return torch.cat([values, missing])


def _recovered(clean: Any, spliced: Any, ablated: Any) -> Any:
    """:func:`loss_recovered` of arrays of sums."""
    return np.where(ablated > clean, (ablated - spliced) / (ablated - clean), np.nan)
