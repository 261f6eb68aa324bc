"""SAEs and latents as users give them: one or several, in whatever holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

import torch

from gemma_scope_tl.errors import SpliceError


def as_saes(saes: Any, empty: bool = False) -> list[Any]:
    """One SAE (or transcoder, or loaded latents), several, a mapping of them or a suite as a list.

    Args:
        saes: what the user gave.
        empty: accept none at all.

    Raises:
        SpliceError: none (unless ``empty``), or what is no SAE.
    """
    if _is_sae(saes):
        return [saes]
    if saes is None or isinstance(saes, (str, bytes, torch.nn.Module, torch.Tensor)) or not isinstance(saes, Iterable):
        raise SpliceError(
            f"An SAE was expected, or several; given: {shown(saes)}. Load one with load_sae, many with load_saes."
        )
    several: list[Any] = list(saes.values() if isinstance(saes, Mapping) else saes)
    for number, one in enumerate(several):
        if not _is_sae(one):
            raise SpliceError(f"Number {number} of the SAEs is none: {shown(one)}. Load them with load_sae.")
    if not several and not empty:
        raise SpliceError("No SAE was given: give one or several.")
    return several


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


def _is_sae(value: Any) -> bool:
    from gemma_scope_tl.sae.latents import Latents

    whole = isinstance(value, torch.nn.Module) and hasattr(value, "encode") and hasattr(value, "cfg")
    return whole or isinstance(value, Latents)
