"""Construction of an SAE object from checked arrays and their identity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.sae.config import Identity, make_config
from gemma_scope_tl.sae.sae_lens_config import check_architecture
from gemma_scope_tl.weights.checks import value_range

T = TypeVar("T", bound=type)

_CLASSES: dict[str, type] = {}


def builds(architecture: str) -> Callable[[T], T]:
    """A decorator that registers a class for one of SAELens's architecture names."""

    def register(cls: T) -> T:
        _CLASSES[architecture] = cls
        return cls

    return register


def class_of(architecture: str) -> Any:
    """The class for one of SAELens's architecture names.

    Raises:
        UnknownNameError: for architectures that are not JumpReLU.
    """
    check_architecture(architecture)
    return _CLASSES[architecture]


def build(arrays: Mapping[str, torch.Tensor], identity: Identity, device: torch.device, dtype: torch.dtype) -> Any:
    """Build the SAE, transcoder or skip transcoder of checked arrays.

    Args:
        arrays: by canonical name, in the units of the site's tensor. Arrays that already have the dtype and device
            become the parameters; the others are converted one by one, so that memory never holds two copies of all.
        identity: the model, site, layer and metadata of the SAE.
        device: device of the parameters.
        dtype: dtype of the parameters, except thresholds, which are float32 or wider.

    Raises:
        WeightsError: when a value is too large for the dtype.
        SpliceError: when a site that exists in every layer is given without a layer.
    """
    (d_in, d_sae), d_out, skip = arrays["W_enc"].shape, arrays["W_dec"].shape[-1], "W_skip" in arrays
    transcoder = identity.transcoder
    if transcoder is None:
        of_site = identity.site is not None and identity.family.site(identity.site).is_transcoder
        transcoder = skip or d_in != d_out or of_site
    sizes = {"d_in": d_in, "d_sae": d_sae, **({"d_out": d_out} if transcoder else {})}
    metadata = identity.sae_lens_metadata()
    cfg = make_config(sizes, skip, str(dtype).removeprefix("torch."), metadata, identity.reads_heads)
    cfg.device = "meta"  # allocate nothing: the arrays become the parameters
    sae = class_of(cfg.architecture())(cfg)
    wide = torch.promote_types(torch.float32, dtype)
    state = {
        name: cast_array(array, name, wide if name == "threshold" else dtype, identity.source).to(device)
        for name, array in arrays.items()
    }
    sae.load_state_dict(state, assign=True)
    sae.to(device=device)
    sae.eval()
    sae.site, sae.row = identity.site, identity.row
    sae.layer = metadata.layer if identity.site is not None else None
    sae.mark_as_loaded()
    return sae


def cast_array(array: torch.Tensor, name: str, dtype: torch.dtype, source: str) -> torch.Tensor:
    """An array of an SAE in another dtype.

    Args:
        array: the array.
        name: its canonical name, for the message.
        dtype: the dtype of the result.
        source: the origin of the array, for the message.

    Raises:
        WeightsError: when a value is too large for ``dtype``, where the result would have infinities.
    """
    cast = array.to(dtype)
    if dtype == torch.float16 and array.dtype != dtype and not math.isfinite(sum(value_range(cast))):
        raise WeightsError(f"{source} has values in {name} too large for float16. Use dtype='bfloat16' or 'float32'.")
    return cast
