"""``hf_model=``: what can be wrapped, and what to give instead of what cannot."""

from __future__ import annotations

from typing import Any

import torch

from gemma_scope_tl.adapters.plain import is_quantized
from gemma_scope_tl.dtypes import DTYPES
from gemma_scope_tl.errors import AdapterError
from gemma_scope_tl.weights.modes import make_ordinary


def check_type(config: Any, source: str) -> None:
    """Raise :class:`AdapterError` unless ``config`` is Gemma 2's."""
    kind = getattr(config, "model_type", None)
    if kind != "gemma2":
        raise AdapterError(f"{source} is a {kind or 'model of unknown type'!r}, not a Gemma 2.")


def check_given(hf_model: Any, backend: str) -> None:
    """Raise unless ``hf_model`` is a ``Gemma2ForCausalLM`` as it was loaded; nothing is changed.

    Raises:
        AdapterError: for wrappers, other heads, weights that are not there, and models that are hooked already.
    """
    from transformers import Gemma2ForCausalLM

    kind = type(hf_model).__name__
    if not isinstance(hf_model, Gemma2ForCausalLM):
        raise AdapterError(_what_it_is(hf_model, kind))
    check_type(hf_model.config, kind)
    if any("model_bridge" in type(module).__module__ for module in hf_model.modules()):
        raise AdapterError("This hf_model is wrapped by a bridge already. Load it again.")
    if any(_compiled(module) for module in hf_model.modules()):
        raise AdapterError("This hf_model is compiled, and hooks need its plain modules. Give it before compiling.")
    weights = [*hf_model.parameters(), *hf_model.buffers()]
    if any(weight.is_meta for weight in weights):
        where = "offloaded" if getattr(hf_model, "hf_device_map", None) else 'on the "meta" device'
        raise AdapterError(f"Weights of this hf_model are {where}, so it has no values. Load it onto a device.")
    if backend == "hooked_transformer" and is_quantized(hf_model):
        raise AdapterError('HookedTransformer copies weights, which a quantised model packs. Use backend="bridge".')


def move_given(hf_model: Any, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Prepare a model that passed :func:`check_given`, in place: eager attention, evaluation mode, dtype, device.

    Raises:
        AdapterError: where its dtype is none that the package supports, or a quantised model cannot change.
    """
    try:
        if dtype is not None and dtype != hf_model.dtype:
            hf_model.to(dtype)
        if device is not None:
            hf_model.to(device)
    except ValueError as error:  # quantised or dispatched models refuse
        raise AdapterError(f"This hf_model stays as it is: {error}\nLeave dtype and device out.") from error
    if hf_model.dtype not in DTYPES.values():
        raise AdapterError(f"This hf_model is in {hf_model.dtype}. Pass dtype=, one of {', '.join(DTYPES)}.")
    make_ordinary(hf_model)  # it may have been loaded in inference mode
    hf_model.config._attn_implementation = "eager"
    hf_model.eval()


def _compiled(module: Any) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _what_it_is(given: Any, kind: str) -> str:
    """A sentence about something that is no ``Gemma2ForCausalLM``, which names where in it one is."""
    from transformers import Gemma2ForCausalLM

    if isinstance(given, (str, bytes)) or not hasattr(given, "__dict__"):
        return f"hf_model= takes a Gemma2ForCausalLM, not {given!r:.100}. A name or folder is the first argument."
    held = given if isinstance(given, torch.nn.Module) else getattr(given, "model", None)
    if isinstance(held, torch.nn.Module):
        for path, module in held.named_modules():
            if isinstance(module, Gemma2ForCausalLM):
                parts = [] if held is given else ["model"]
                place = ".".join(["hf_model", *parts, *(path.split(".") if path else [])])
                adapters = " Merge adapters first (merge_and_unload())." if hasattr(given, "merge_and_unload") else ""
                return f"hf_model is a {kind} around a Gemma2ForCausalLM. Give {place} instead.{adapters}"
    model_type = getattr(getattr(given, "config", None), "model_type", None)
    if model_type == "gemma2":
        return f"hf_model is a {kind}, which has no unembedding. Load it as a Gemma2ForCausalLM."
    if model_type is not None:
        return f"{kind} is a {model_type!r}, not a Gemma 2."
    return f"hf_model= takes a Gemma2ForCausalLM, not a {kind}."
