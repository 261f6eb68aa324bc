"""One rule of devices: what is used with a model goes to the model's device, in place, when it is first used there."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sae.latents import Latents

T = TypeVar("T")


def bring(source: T, device: torch.device) -> T:
    """Move an SAE, a transcoder or loaded latents to the device of a model's tensors, and return it.

    It is moved in place, as ``nn.Module.to`` does, so no second copy stays behind; whoever else holds it finds it
    there. One SAE that is used with models on two devices moves at every change; give each its own copy then.

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
