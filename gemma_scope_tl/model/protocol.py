"""What the parts of a hooked model need of each other, so that none has to import the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch

from gemma_scope_tl.families import Backend, Family
from gemma_scope_tl.model.tracker import TokenTracker


@runtime_checkable
class BindsToPass(Protocol):
    """A hook function that acts by position or token, and so has to know the pass that it runs in."""

    def bound_to(self, tracker: TokenTracker, tokenizer: Any) -> Callable[..., Any]:
        """The function for one model, whose tracker knows the token ids of a pass."""
        ...

    def __call__(self, value: torch.Tensor, hook: Any) -> Any:
        """The tensor that goes on, or None for the same."""
        ...


class HasSites(Protocol):
    """A model on whose sites SAEs can be hooked."""

    backend: Backend
    family: Family
    token_tracker: TokenTracker

    def site_hook_point(self, name: str) -> Any:
        """The ``HookPoint`` with this name."""
        ...
