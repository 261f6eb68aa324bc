"""Whether an SAE's weights are those that were loaded, and so whether the facts of its file still hold.

A fine-tuned SAE is no longer the one that the registry measured. PyTorch counts writes in place to each parameter, and
a sample of the values shows writes that it does not count (through ``.data``). Both are cheap beside a pass.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

FACTS = ("release", "id", "l0", "neuronpedia_id")
"""Metadata that hold for the loaded weights alone; site, layer, width and model hold for changed ones too."""
_SAMPLE, _WHOLE = 64, 1 << 16  # entries of a matrix that are looked at; vectors up to this length are looked at whole
_STEP = 7919  # a prime, so that the sample's columns spread

Marks = dict[str, tuple[int, int, bytes]]


@torch.no_grad()
def marks_of(module: nn.Module) -> Marks:
    """A mark of each parameter's present values, which differs once they are changed."""
    return {name: _mark(parameter) for name, parameter in module.named_parameters()}


def _mark(parameter: torch.Tensor) -> tuple[int, int, bytes]:
    written = 0 if parameter.is_inference() else parameter._version
    return id(parameter), written, _sample(parameter.detach())


def _sample(values: torch.Tensor) -> bytes:
    """A hash of some entries; of none on the meta device, which has no values."""
    if values.is_meta or not values.numel():
        return b""
    if values.ndim == 2:
        at = torch.arange(_SAMPLE, device=values.device)
        chosen = values[at * values.shape[0] // _SAMPLE, at * _STEP % values.shape[1]]
    else:
        chosen = values.flatten()[:: max(1, values.numel() // _WHOLE)]
    return hashlib.blake2b(chosen.double().cpu().numpy().tobytes(), digest_size=16).digest()


def facts_of(metadata: Any) -> dict[str, Any]:
    """:data:`FACTS` as metadata say them."""
    return {name: metadata.get(name) for name in FACTS}


def still_said(sae: Any, name: str) -> Any:
    """One of :data:`FACTS` from an SAE's metadata, or None where the weights that it describes have been changed.

    A value that a user has written there since loading holds.
    """
    said = sae.cfg.metadata.get(name)
    stale = not getattr(sae, "as_loaded", True) and said == sae.facts_when_loaded.get(name)
    return None if stale else said


def config_of(sae: Any) -> dict[str, Any]:
    """An SAE's configuration for saving, without the facts that no longer hold for its weights."""
    given: dict[str, Any] = sae.cfg.to_dict()
    gone = [name for name in FACTS if sae.cfg.metadata.get(name) is not None and still_said(sae, name) is None]
    return {**given, "metadata": {key: value for key, value in given["metadata"].items() if key not in gone}}
