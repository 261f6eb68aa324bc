"""SAEs as users give them: one or several, in a mapping, a list or an array, on any device; and positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sae.arguments import shown
from gemma_scope_tl.sae.latents import Latents

T = TypeVar("T")


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
    array: Any = saes
    if getattr(saes, "ndim", 1) == 2 and array.shape[1] == 3 and all(_is_sae(one) for one in array[:, 0]):
        saes = array[:, 0]  # NumPy has unpacked SAEs into (SAE, configuration, sparsity), as SAELens's older users do
    if getattr(saes, "ndim", 1) != 1:
        raise SpliceError(
            f"SAEs come one after the other, not in an array of shape {list(getattr(saes, 'shape', []))}."
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


def bring(source: T, device: torch.device) -> T:
    """Move an SAE, a transcoder or loaded latents to the device of a model's tensors, and return it.

    What is used with a model goes to the model's device when it is first used there. It is moved in place, as
    ``nn.Module.to`` does, so no second copy stays behind, and everyone who holds it finds it there. An SAE that is used
    with models on two devices moves at every change; give each model its own copy then.

    Raises:
        SpliceError: for the meta device, where the weights would be lost.
    """
    moved: Any = source
    if moved.W_dec.device == device:
        return source
    if device.type == "meta":
        raise SpliceError(
            "The model's tensors are on the meta device, which holds no numbers; an SAE moved there would lose its "
            "weights. Load the model's weights, or move the SAE there yourself."
        )
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode would stay unfit for gradients
        if isinstance(moved, Latents):
            for name, value in vars(moved).items():
                if isinstance(value, torch.Tensor):
                    object.__setattr__(moved, name, value.to(device))
        else:
            moved.to(device)
    return source


def checked_positions(positions: Any) -> Any:
    """Positions as they were given, when they are of a kind that exists. Which of them exist only a pass knows.

    Raises:
        SpliceError: what is neither None, an int, a slice, a list of ints nor a boolean mask.
    """
    if positions is None or isinstance(positions, slice):
        return positions
    try:
        found = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or (found.numel() and (found.is_floating_point() or found.is_complex())):
        raise SpliceError(
            f"Positions are an int, a slice, a list of ints, or a boolean mask [pos] or [batch, pos]; given: "
            f"{shown(positions)}."
        )
    return positions


def _is_sae(value: Any) -> bool:
    whole = isinstance(value, torch.nn.Module) and hasattr(value, "encode") and hasattr(value, "cfg")
    return whole or isinstance(value, Latents)
