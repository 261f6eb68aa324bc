"""SAEs as users give them: one or several, in whatever holds them; latents alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sae.indices import as_index, as_indices, is_index, shown
from gemma_scope_tl.sae.latents import Latents

__all__ = ["as_index", "as_indices", "as_saes", "is_index", "shown"]


def as_saes(saes: Any, empty: bool = False, whole: bool = False) -> list[Any]:
    """One SAE (or transcoder, or loaded latents), several, a mapping of them or a suite as a list.

    Args:
        saes: what the user gave.
        empty: accept none at all.
        whole: refuse loaded latents, of which only some are there.

    Raises:
        SpliceError: none (unless ``empty``), or what is no SAE.
    """
    if _is_sae(saes):
        saes = [saes]
    if saes is None or isinstance(saes, (str, bytes, torch.nn.Module, torch.Tensor)) or not isinstance(saes, Iterable):
        raise SpliceError(
            f"An SAE was expected, or several; given: {shown(saes)}. Load one with load_sae, many with load_suite."
        )
    several: list[Any] = list(saes.values() if isinstance(saes, Mapping) else saes)
    for number, one in enumerate(several):
        if not _is_sae(one):
            raise SpliceError(f"Number {number} of the SAEs is none: {shown(one)}. Load them with load_sae.")
        if whole and isinstance(one, Latents):
            raise SpliceError("These are some latents of an SAE, and the whole SAE is needed: load it with load_sae.")
    if not several and not empty:
        raise SpliceError("No SAE was given: give one or several.")
    return several


def _is_sae(value: Any) -> bool:
    whole = isinstance(value, torch.nn.Module) and hasattr(value, "encode") and hasattr(value, "cfg")
    return whole or isinstance(value, Latents)
