"""Checks of arguments that users give: indices of latents, and tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from gemma_scope_tl.counts import whole_number
from gemma_scope_tl.errors import SpliceError, device_mismatch


def checked_latents(latents: int | Iterable[int], d_sae: int) -> list[int]:
    """Indices of latents of an SAE as a list.

    Raises:
        SpliceError: for no latent, or an index that does not exist, is not an integer, or is given twice.
    """
    chosen = distinct_indices(latents)
    wrong = [latent for latent in chosen if not 0 <= latent < d_sae]
    if wrong:
        raise SpliceError(f"No latent {wrong[0]}: this SAE has latents 0..{d_sae - 1}.")
    return chosen


def distinct_indices(latents: int | Iterable[int]) -> list[int]:
    """Indices of latents as a list. Whether they exist is not checked.

    Raises:
        SpliceError: for no latent, or an index that is not an integer or is given twice.
    """
    chosen = as_indices(latents)
    if not chosen:
        raise SpliceError("No latents were given: name at least one.")
    if len(set(chosen)) < len(chosen):
        raise SpliceError(f"Latent {Counter(chosen).most_common(1)[0][0]} is given twice.")
    return chosen


def as_indices(latents: Any) -> list[int]:
    """Convert one index or several to a list of ints: from Python, NumPy or torch (also 0-d), a Series or an iterator.

    Raises:
        SpliceError: for values that are not integers (bools, floats, text), and for an array of two dimensions.
    """
    dimensions = getattr(latents, "ndim", 1)
    if dimensions > 1:
        raise SpliceError(f"Latents must be one index or a list of indices; given: shape {list(latents.shape)}.")
    if dimensions == 0 or isinstance(latents, (str, bytes, Mapping)) or not isinstance(latents, Iterable):
        return [as_index(latents)]
    return [as_index(latent) for latent in latents]


def as_index(value: Any) -> int:
    """Convert an integer of Python, NumPy or torch to an int.

    Raises:
        SpliceError: for anything else, including bools and floats.
    """
    number = whole_number(value)
    if number is None:
        raise SpliceError(f"An integer was expected; given: {shown(value)}.")
    return number


def is_index(value: Any) -> bool:
    """Whether :func:`as_index` accepts ``value``."""
    try:
        as_index(value)
    except SpliceError:
        return False
    return True


def to_tensor(values: Any) -> torch.Tensor:
    """Convert numbers in any form to a tensor, in their order: torch takes a Series by its labels, not its rows.

    Args:
        values: a number, a list (also of tensors), an array, a column of a table, any other iterable, or a tensor.

    Raises:
        TypeError, ValueError, RuntimeError: for anything else, as ``torch.as_tensor``, and for a set, without order.
    """
    if isinstance(values, torch.Tensor):
        return values
    if isinstance(values, (str, bytes, Mapping, set, frozenset)):
        raise TypeError(f"A {type(values).__name__} is not numbers.")
    if hasattr(values, "__array__"):
        array: Any = np.array(values)  # a copy, since tables return views that torch must not write to
        if array.dtype.kind == "O":  # of Python's numbers, or with a gap, which torch refuses
            return torch.as_tensor(array.tolist())
        return torch.as_tensor(array.astype("int64") if array.dtype.kind == "u" else array)
    return torch.as_tensor(list(values) if isinstance(values, Iterable) else values)


def listed(values: Any) -> Any:
    """Convert an array, a column of a table or an iterable to a list, or an array without dimensions to its value."""
    if hasattr(values, "__array__"):
        plain: Any = values if hasattr(values, "tolist") else np.asarray(values)
        return plain.tolist()
    kept = isinstance(values, (str, bytes, Mapping, list, set, frozenset)) or not isinstance(values, Iterable)
    return values if kept else list(values)


def checked_tensor(x: Any, name: str, device: torch.device) -> torch.Tensor:
    """Return ``x`` if it is a tensor of real numbers on ``device``.

    Args:
        x: the argument.
        name: the function or object that received it, for the message.
        device: the device of that object.

    Raises:
        SpliceError: for anything but a tensor, and for complex numbers, whose imaginary part a cast would drop.
        DeviceError: for a tensor on another device.
    """
    if not isinstance(x, torch.Tensor):
        raise SpliceError(f"{name} takes a tensor; given: {shown(x)}. Convert numbers with torch.as_tensor(x).")
    if x.is_complex():
        raise SpliceError(f"{name} takes real numbers, but the given tensor is {x.dtype}.")
    if x.device != device:
        raise device_mismatch(name, device, x.device)
    return x


def shown(value: Any) -> str:
    """The text of a value in a message: its type, with its ``repr`` if that is short."""
    text, kind = repr(value), type(value).__name__
    return f"a {kind}" if isinstance(value, torch.nn.Module) or len(text) > 60 else f"{text} ({kind})"
