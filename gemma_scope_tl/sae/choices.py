"""Checks of SAEs and positions that users give. SAEs may come alone, or in a mapping, a list or an array."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch

from gemma_scope_tl.counts import whole_number
from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sae.arguments import shown, to_tensor
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sae.layered import LayeredCoder, not_of_several_layers

T = TypeVar("T")


def as_saes(saes: Any, empty: bool = False, whole: bool = False, layered: bool = False) -> list[Any]:
    """Convert one SAE (or transcoder, or loaded latents), several, a mapping of them or a suite to a list.

    Args:
        saes: the argument of the user.
        empty: whether to accept no SAE at all.
        whole: whether to refuse loaded latents, which are only a part of an SAE.
        layered: whether to accept crosscoders and cross-layer transcoders, which belong to several layers.

    Raises:
        SpliceError: for no SAE (unless ``empty``), or for another object.
    """
    if _is_sae(saes):
        saes = [saes]
    if saes is None or isinstance(saes, (str, bytes, torch.nn.Module, torch.Tensor)) or not isinstance(saes, Iterable):
        raise SpliceError(
            f"One or several SAEs were expected; given: {shown(saes)}. Load one with load_sae, or many with load_suite."
        )
    array: Any = saes
    if getattr(saes, "ndim", 1) == 2 and array.shape[1] == 3 and all(_is_sae(one) for one in array[:, 0]):
        saes = array[:, 0]  # NumPy unpacks an SAE into (SAE, configuration, sparsity), as older code for SAELens does
    if getattr(saes, "ndim", 1) != 1:
        raise SpliceError(f"SAEs must be a flat list, not an array of shape {list(getattr(saes, 'shape', []))}.")
    several: list[Any] = list(saes.values() if isinstance(saes, Mapping) else saes)
    for number, one in enumerate(several):
        if not _is_sae(one):
            raise SpliceError(f"Item {number} of the SAEs is not an SAE: {shown(one)}. Load SAEs with load_sae.")
        if whole and isinstance(one, Latents):
            raise SpliceError("The whole SAE is needed, not some of its latents: load it with load_sae.")
        if isinstance(one, LayeredCoder) and not layered:
            raise SpliceError(not_of_several_layers(one))
    if not several and not empty:
        raise SpliceError("No SAE was given: give one or several.")
    return several


def bring(source: T, device: torch.device) -> T:
    """Move an SAE, a transcoder, a layered coder or loaded latents to the device of a model's tensors, and return it.

    An object that is used with a model is moved to the device of the model on first use. It is moved in place, like
    ``nn.Module.to``, so no second copy remains, and every reference to it sees the move. An SAE that is used with two
    models on different devices is moved at every change; in that case, give each model its own copy.

    Raises:
        SpliceError: for the meta device, where the weights would be lost.
    """
    moved: Any = source
    if (moved if isinstance(source, LayeredCoder) else moved.W_dec).device == device:
        return source
    if device.type == "meta":
        raise SpliceError(
            "The model's tensors are on the meta device, which stores no values; an SAE moved there would lose its "
            "weights. Load the model's weights, or move the SAE there yourself."
        )
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode cannot have gradients
        if isinstance(moved, Latents):
            for name, value in vars(moved).items():
                if isinstance(value, torch.Tensor):
                    object.__setattr__(moved, name, value.to(device))
        else:
            moved.to(device)
    return source


def checked_positions(positions: Any) -> Any:
    """Return ``positions`` if they have a valid type. Whether the positions exist is known only in a pass.

    Arrays, columns of tables and iterators are converted to tensors, once for all passes.

    Raises:
        SpliceError: for anything but None, an int, a slice of ints, a list of ints or a boolean mask.
    """
    if isinstance(positions, slice):
        return _checked_slice(positions)
    if positions is None:
        return positions
    try:
        if isinstance(positions, (list, tuple)) and len({isinstance(one, bool) for one in positions}) == 2:
            raise TypeError  # torch reads True in [True, 3] as position 1
        found = to_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        found = None
    flat = found is not None and (found.ndim <= 1 if found.dtype != torch.bool else found.ndim in (1, 2))
    if found is None or not flat or (found.numel() and (found.is_floating_point() or found.is_complex())):
        raise SpliceError(
            f"Positions must be an int, a slice, a list of ints, or a boolean mask [pos] or [batch, pos]; given: "
            f"{shown(positions)}."
        )
    return positions if isinstance(positions, (int, list, tuple)) else found


def _checked_slice(positions: slice) -> slice:
    for bound in (positions.start, positions.stop, positions.step):
        if bound is not None and whole_number(bound) is None:
            raise SpliceError(f"A slice of positions has ints or None as bounds and step; given: {shown(positions)}.")
    if positions.step is not None and positions.step < 1:
        raise SpliceError(f"A slice of positions must have a positive step; given: step {positions.step}.")
    return positions


def _is_sae(value: Any) -> bool:
    whole = isinstance(value, torch.nn.Module) and hasattr(value, "encode") and hasattr(value, "cfg")
    return whole or isinstance(value, (Latents, LayeredCoder))
