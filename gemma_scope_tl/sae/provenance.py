"""Detection of changed weights, to which the facts of the loaded file no longer apply.

The values in the registry, such as the L0, do not describe a fine-tuned SAE. PyTorch counts in-place writes to each
parameter, and a sample of the values shows writes that it does not count (through ``.data``). Both checks are fast
compared with a pass.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

FACTS = ("release", "id", "l0", "neuronpedia_id")
"""Metadata that apply only to the loaded weights. Site, layer, width and model apply to changed weights too."""
_SAMPLE, _WHOLE = 64, 1 << 16  # entries of a matrix in the sample; vectors up to this length are compared completely
_STEP, _STEP_2 = 7919, 6007  # primes, which spread the columns of the sample

Marks = dict[str, tuple[int, int, bytes]]


@torch.no_grad()
def marks_of(module: nn.Module) -> Marks:
    """A mark of the current values of each parameter, which differs after a change."""
    return {name: _mark(parameter) for name, parameter in module.named_parameters()}


def _mark(parameter: torch.Tensor) -> tuple[int, int, bytes]:
    written = 0 if parameter.is_inference() else parameter._version
    return id(parameter), written, _sample(parameter.detach())


def _sample(values: torch.Tensor) -> bytes:
    """A hash of some entries, or of no entries on the meta device, which has no values."""
    if values.is_meta or not values.numel():
        return b""
    if values.ndim > 1:  # also of a view with strides, which flattening would copy
        at = torch.arange(_SAMPLE, device=values.device)
        spread = (at * step % size for step, size in zip((_STEP, _STEP_2), values.shape[1:], strict=False))
        chosen = values[at * values.shape[0] // _SAMPLE, *spread]
    else:
        chosen = values.flatten()[:: max(1, values.numel() // _WHOLE)]
    return hashlib.blake2b(chosen.double().cpu().numpy().tobytes(), digest_size=16).digest()


def facts_of(metadata: Any) -> dict[str, Any]:
    """The entries of :data:`FACTS` in metadata."""
    return {name: metadata.get(name) for name in FACTS}


def still_said(sae: Any, name: str) -> Any:
    """One of :data:`FACTS` from the metadata of an SAE, or None if the weights have been changed.

    A value that a user has written into the metadata after loading is returned in any case.
    """
    said = sae.cfg.metadata.get(name)
    stale = not getattr(sae, "as_loaded", True) and said == sae.facts_when_loaded.get(name)
    return None if stale else said


def config_of(sae: Any) -> dict[str, Any]:
    """The configuration of an SAE for saving, without facts that do not apply to changed weights."""
    given: dict[str, Any] = sae.cfg.to_dict()
    gone = [name for name in FACTS if sae.cfg.metadata.get(name) is not None and still_said(sae, name) is None]
    return {**given, "metadata": {key: value for key, value in given["metadata"].items() if key not in gone}}
