"""What one SAE reports: means since the last report, and which of its latents are silent or dead."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gemma_scope_tl.training.shard import Shard

DEAD_STEPS = 1_000
"""A latent that was not active in any of the last so many batches is called dead. The paper resamples none."""

NAMES = ("steps", "error", "l0")


class Window:
    """Running sums for one SAE, of the latents that this process has.

    Attributes:
        sums: ``[3]`` in float64: steps, and the sums of error and L0 over them.
        fired: ``[latents]``, whether each was active since the last report.
        last_fired: ``[latents]``, the last step (from 1) in which it was active; 0 for never.
    """

    def __init__(self, latents: int, device: torch.device) -> None:
        self.sums = torch.zeros(len(NAMES), dtype=torch.float64)
        self.fired = torch.zeros(latents, dtype=torch.bool, device=device)
        self.last_fired = torch.zeros(latents, dtype=torch.int64, device=device)

    def saw(self, step: int, error: float, l0: float, fired: Tensor) -> None:
        """Add step ``step`` (from 1); ``fired [latents]`` counts activations."""
        self.sums += torch.tensor((1.0, error, l0), dtype=torch.float64)
        active = fired > 0
        self.fired |= active
        self.last_fired.masked_fill_(active, step)

    def report(self, step: int, d_sae: int, shard: Shard) -> dict[str, float]:
        """Means since the last report, and the shares of silent and dead latents; begins anew."""
        steps, error, l0 = self.sums.tolist()
        dead = self.last_fired <= step - DEAD_STEPS
        counts = shard.sum_latents(torch.stack([(~self.fired).sum(), dead.sum()]).double()).tolist()
        self.sums.zero_()
        self.fired.zero_()
        mean = (error / steps, l0 / steps) if steps else (float("nan"), float("nan"))
        return {"error": mean[0], "l0": mean[1], "silent": counts[0] / d_sae, "dead": counts[1] / d_sae}

    def tensors(self) -> Mapping[str, Tensor]:
        """What a resumed run needs."""
        return {"window": self.sums, "fired": self.fired, "last_fired": self.last_fired}
