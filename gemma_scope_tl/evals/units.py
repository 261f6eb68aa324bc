"""The pieces of an evaluation: each is measured once, kept under its own key, and shared by all that need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.accumulators import LatentCounts, TokenMean, VectorMean

Accumulator = TokenMean | LatentCounts | VectorMean
CLEAN = "clean"


@dataclass
class Unit:
    """Accumulators that belong together.

    Attributes:
        parts: by name.
        facts: what the numbers depend on, besides those of the whole evaluation.
        done: whether all data went in.
    """

    parts: dict[str, Accumulator]
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    done: bool = False

    def state(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """All parts as tensors."""
        return {
            f"{prefix}{name}/{key}": value for name, part in self.parts.items() for key, value in part.state().items()
        }

    def restore(self, state: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Take over what :meth:`state` gave.

        Raises:
            GemmaScopeError: when a part is missing.
        """
        for name, part in self.parts.items():
            start = f"{prefix}{name}/"
            mine = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            self.parts[name] = type(part).from_state(mine)

    def token_mean(self, name: str) -> TokenMean:
        """The part with this name."""
        part = self.parts[name]
        if not isinstance(part, TokenMean):
            raise GemmaScopeError(f"{name} is no mean over tokens.")
        return part

    def vector_mean(self) -> VectorMean:
        """The mean activation, of a unit that holds one."""
        part = self.parts["mean"]
        if not isinstance(part, VectorMean):
            raise GemmaScopeError("This piece of an evaluation holds no mean activation.")
        return part


def token_means(*names: str) -> dict[str, Accumulator]:
    """Empty means over tokens."""
    return {name: TokenMean() for name in names}
