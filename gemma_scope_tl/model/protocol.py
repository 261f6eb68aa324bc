"""Protocols between the parts of a hooked model, so that no part has to import the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch

from gemma_scope_tl.families import Backend, Family
from gemma_scope_tl.model.tracker import TokenTracker


@runtime_checkable
class BindsToPass(Protocol):
    """A hook function that depends on positions or tokens, and so needs the pass in which it runs."""

    def bound_to(self, model: HasSites) -> Callable[..., Any]:
        """The function for one model, whose tracker has the token ids of a pass.

        Raises:
            SpliceError: when the function belongs to another model.
        """
        ...

    def __call__(self, value: torch.Tensor, hook: Any) -> Any:
        """The tensor with which the pass continues, or None for no change."""
        ...


class HasSites(Protocol):
    """A model with hook points at sites."""

    backend: Backend
    family: Family
    model_id: str | None
    token_tracker: TokenTracker
    tokenizer: Any

    def site_hook_point(self, name: str) -> Any:
        """The ``HookPoint`` with this name."""
        ...
