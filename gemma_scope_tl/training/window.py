"""What a trainer counts between two reports, and the check of a state that it is given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.training.shard import Shard

DEAD_STEPS = 1_000
"""A latent is dead if it was active in none of this many batches. As in the paper, dead latents are not resampled."""


class Window:
    """Counts of one SAE between two reports, for the latents that this process has.

    Attributes:
        sums: ``[3]`` in float64: steps, and the sums of error and L0 over them.
        fired: ``[latents]``, whether each latent was active since the last report.
        last_fired: ``[latents]``, the last step (from 1) in which each latent was active; 0 for never.
    """

    def __init__(self, latents: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.fired = torch.zeros(latents, dtype=torch.bool, device=device)
        self.last_fired = torch.zeros(latents, dtype=torch.int64, device=device)

    def update(self, step: int, error: float, l0: float, fired: Tensor) -> None:
        """Add step ``step`` (from 1); ``fired [latents]`` counts activations."""
        self.sums += torch.tensor((1.0, error, l0), dtype=torch.float64)
        active = fired > 0
        self.fired |= active
        self.last_fired.masked_fill_(active, step)

    def report(self, step: int, d_sae: int, shard: Shard) -> dict[str, float]:
        """Means since the last report, and the shares of silent and dead latents; resets the counts."""
        steps, error, l0 = self.sums.tolist()
        dead = self.last_fired <= step - DEAD_STEPS
        counts = shard.sum_latents(torch.stack([(~self.fired).sum(), dead.sum()]).double()).tolist()
        self.sums.zero_()
        self.fired.zero_()
        mean = (error / steps, l0 / steps) if steps else (float("nan"), float("nan"))
        return {"error": mean[0], "l0": mean[1], "silent": counts[0] / d_sae, "dead": counts[1] / d_sae}

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that a resumed run needs, by name."""
        return {"window": self.sums, "fired": self.fired, "last_fired": self.last_fired}


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Check the tensors of a trainer's state by name, shape, dtype and value.

    Raises:
        UnknownNameError: the state has a tensor that is not expected.
        GemmaScopeError: a tensor is missing, its shape or dtype is wrong, or a value is not finite.
    """
    for name in state:
        if name not in expected:
            raise unknown_name("tensor of a trainer's state", name, expected)
    missing = [name for name in expected if name not in state]
    if missing:
        raise GemmaScopeError(f"The trainer's state lacks {missing[0]} and {len(missing) - 1} others.")
    for name, (shape, dtype) in expected.items():
        value = state[name]
        if value.shape != shape or value.dtype != dtype:
            text = f"{value.dtype} {list(value.shape)}, not {dtype} {list(shape)}"
            raise GemmaScopeError(f"{name} in the trainer's state is {text}.")
        if not bool(torch.isfinite(value).all()):
            raise GemmaScopeError(f"{name} in the trainer's state has values that are not finite.")
