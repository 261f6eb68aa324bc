"""Integers as users give them: latents, token ids, layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

import torch

from gemma_scope_tl.errors import SpliceError


def as_indices(latents: Any) -> list[int]:
    """One latent or several as ints: Python's, NumPy's, torch's (0-d too), a Series or an iterator of them.

    Raises:
        SpliceError: for what is not an integer: bools, floats, text; for an array of two dimensions.
    """
    dimensions = getattr(latents, "ndim", 1)
    if dimensions > 1:
        raise SpliceError(f"Latents are one index or a list of them; given: shape {list(latents.shape)}.")
    if dimensions == 0 or isinstance(latents, (str, bytes, Mapping)) or not isinstance(latents, Iterable):
        return [as_index(latents)]
    return [as_index(latent) for latent in latents]


def as_index(value: Any) -> int:
    """An integer of Python, NumPy or torch as an int.

    Raises:
        SpliceError: for anything else, bools and floats too.
    """
    kind = str(getattr(value, "dtype", ""))
    try:
        if isinstance(value, bool) or "bool" in kind or getattr(value, "ndim", 0):
            raise TypeError
        return index(value)
    except TypeError:
        raise SpliceError(f"An integer was expected; given: {shown(value)}.") from None


def is_index(value: Any) -> bool:
    """Whether :func:`as_index` takes it."""
    try:
        as_index(value)
    except SpliceError:
        return False
    return True


def shown(value: Any) -> str:
    """A value for a message: itself where it is short, and its type."""
    text, kind = repr(value), type(value).__name__
    return f"a {kind}" if isinstance(value, torch.nn.Module) or len(text) > 60 else f"{text} ({kind})"
