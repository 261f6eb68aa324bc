"""Tensors as users give them to an SAE or to loaded latents: one check for every method that takes one."""

from __future__ import annotations

from typing import Any

import torch

from gemma_scope_tl.errors import SpliceError, device_mismatch
from gemma_scope_tl.sae.indices import shown


def checked_tensor(x: Any, name: str, device: torch.device) -> torch.Tensor:
    """``x`` itself.

    Args:
        x: what was given.
        name: of what it was given to, for the message.
        device: where that is.

    Raises:
        SpliceError: what is no tensor; complex numbers, whose imaginary part a cast would drop.
        DeviceError: a tensor that is elsewhere.
    """
    if not isinstance(x, torch.Tensor):
        raise SpliceError(f"{name} takes a tensor; given: {shown(x)}. Make one of numbers with torch.as_tensor(x).")
    if x.is_complex():
        raise SpliceError(f"{name} takes real numbers, the tensor given is {x.dtype}.")
    if x.device != device:
        raise device_mismatch(name, device, x.device)
    return x
