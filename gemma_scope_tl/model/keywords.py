"""Checks of the keywords of each method of a hooked model.

TransformerLens's bridge ignores unknown keywords. Without a check, a misspelt keyword such as ``sae=`` would silently
run a pass without the SAE.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from gemma_scope_tl.errors import GemmaScopeError, KeywordError, SpliceError, UnknownKeywordError, unknown_keyword

# Keywords of other methods, with the method to use.
ELSEWHERE = {
    "saes": "run_with_saes(), or gs.splice() around this call",
    "sae": "run_with_saes(saes=), or gs.splice() around this call",
    "error_term": "run_with_saes(), or gs.splice() around this call",
    "use_error_term": "run_with_saes(), or gs.splice() around this call",
    "fwd_hooks": "run_with_hooks() or run_with_hooks_with_saes(), or model.hooks() around this call",
    "bwd_hooks": "run_with_hooks() or run_with_hooks_with_saes(), or model.hooks() around this call",
    "streamer": "generate_stream(), or hf_generate() on the bridge",
    "num_return_sequences": "hf_generate() on the bridge",
    "num_beams": "hf_generate() on the bridge",
    "names_filter": "run_with_cache() or run_with_cache_with_saes()",
}
# TransformerBridge accepts these for models of other kinds; here they would have no effect.
_OTHER_MODELS = {"pixel_values", "input_values", "decoder_input", "multimodal_kwargs", "forced_bos_token_id"}
_CACHE_NAMES = {"past_key_values", "cache", "use_past_kv_cache", "one_zero_attention_mask"}
_INPUTS = {"input_ids", "inputs_embeds"}
_INPUT_NAMES = ("input", "input_ids", "inputs_embeds")


def named(model: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call except the first, by name, after a check that the method accepts them.

    Raises:
        UnknownKeywordError: for a keyword that the method does not accept, with the nearest one that it accepts.
        TypeError: for too many positional arguments, or an argument that is given twice.
    """
    names = [name for name in _parameter_names(_below(model), method) if name != "input"]
    if len(args) > len(names):
        raise TypeError(f"{method}() takes {len(names) + 1} positional arguments at most; given: {len(args) + 1}.")
    call = dict(zip(names, args, strict=False))
    if twice := call.keys() & kwargs.keys():
        raise TypeError(f"{method}() got two values for {sorted(twice)[0]!r}.")
    check_keywords(model, method, kwargs)
    return {**call, **kwargs}


def taken_input(method: str, given: Any, call: dict[str, Any]) -> Any:
    """The input of a call: the first argument, or the keyword ``input_ids`` or ``inputs_embeds`` of Hugging Face.

    Args:
        method: the name of the method, for the message.
        given: the first argument, None if it was left out.
        call: the other arguments by name; those that name an input are removed.

    Raises:
        GemmaScopeError: for no input. The methods of TransformerLens would fail, or generate from an empty prompt.
        KeywordError: for two inputs.
    """
    found = {"the first argument": given, **{name: call.pop(name, None) for name in _INPUT_NAMES}}
    found = {name: value for name, value in found.items() if value is not None}
    if not found:
        raise GemmaScopeError(
            f"{method}() was given no input: give texts, token ids, the output of a tokenizer, or input_ids=."
        )
    if len(found) > 1:
        raise KeywordError(f"{method}() was given several inputs: {' and '.join(found)}. Give one.")
    return next(iter(found.values()))


def check_keywords(model: Any, method: str, given: Mapping[str, Any]) -> None:
    """Raise for a keyword that a method of the model does not accept.

    Raises:
        UnknownKeywordError: with the nearest keyword of the method, or the method that accepts this keyword.
    """
    hf_model = None if model.backend == "hooked_transformer" else type(model.original_model)
    valid = accepted(_below(model), hf_model, method)
    for keyword in given:
        if keyword not in valid:
            if keyword in ELSEWHERE:
                raise UnknownKeywordError(f"{method}() takes no keyword {keyword!r}: use {ELSEWHERE[keyword]}.")
            raise unknown_keyword(method, keyword, valid)


def check_layers(model: Any, call: Mapping[str, Any], embedded: bool) -> None:
    """Check the layers at which a pass begins and ends.

    Args:
        model: the model of the pass.
        call: its arguments by name.
        embedded: whether its input is embeddings or the residual stream.

    Raises:
        SpliceError: for a layer that does not exist, or at which this backend or input cannot begin.
    """
    count = model.dims.n_layers
    for name in ("start_at_layer", "stop_at_layer"):
        layer = call.get(name)
        if layer is not None and not -count <= layer <= count:
            raise SpliceError(f"{name}={layer} does not exist: the model's layers are 0..{count - 1}.")
    if call.get("start_at_layer") is None:
        return
    if model.backend == "bridge":
        raise SpliceError(
            "start_at_layer= takes the residual stream before a layer, but Hugging Face's forward pass, which the "
            'bridge runs, begins at the embedding: load with backend="hooked_transformer".'
        )
    if not embedded:
        raise SpliceError("start_at_layer= takes the residual stream before that layer, [batch, pos, d_model].")


@cache
def accepted(model_class: type, hf_class: type | None, method: str) -> frozenset[str]:
    """The keywords of a method of TransformerLens's model class, and of the functions to which it passes keywords."""
    valid = set(_parameter_names(model_class, method))
    if method == "forward":
        valid |= _INPUTS | (set() if hf_class is None else _CACHE_NAMES | _hf_forward(hf_class))
    elif method in ("run_with_cache", "run_with_hooks"):
        valid |= accepted(model_class, hf_class, "forward")
        if method == "run_with_cache":
            valid |= {"names_filter", "device", "incl_bwd", "reset_hooks_end", "clear_contexts", "pos_slice"}
        elif hf_class is not None:
            valid -= {"names_filter"}  # the bridge accepts it without effect
    elif method in ("generate", "generate_stream"):
        valid |= {"attention_mask"} | _INPUTS
        if method == "generate" and hf_class is None:
            valid |= {"output_logits", "return_dict_in_generate"}
    elif method == "hf_generate" and hf_class is not None:
        valid |= _hf_generate(hf_class) | _hf_forward(hf_class) | {"past_key_values"}
    return frozenset(valid - _OTHER_MODELS)


def _below(model: Any) -> type:
    """TransformerLens's class of the model."""
    return next(one for one in type(model).__mro__ if one.__module__.startswith("transformer_lens."))


@cache
def _parameter_names(model_class: type, method: str) -> tuple[str, ...]:
    function = getattr(model_class, method)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = inspect.signature(function).parameters
    return tuple(name for name, one in found.items() if one.kind not in kinds and name != "self")


@cache
def cache_name(hf_class: type) -> str:
    """The name of the key-value cache among the arguments of a Hugging Face forward pass."""
    parameters = inspect.signature(hf_class.forward).parameters  # pyright: ignore[reportAttributeAccessIssue]
    return "cache" if "cache" in parameters else "past_key_values"


@cache
def _hf_forward(hf_class: type) -> set[str]:
    """Keywords of a Hugging Face forward pass, including those that it declares as a typed dict."""
    parameters = inspect.signature(hf_class.forward).parameters  # pyright: ignore[reportAttributeAccessIssue]
    names = {name for name, one in parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
    from transformers.utils import generic

    return (names | set(generic.TransformersKwargs.__annotations__)) - {"self"}


@cache
def _hf_generate(hf_class: type) -> set[str]:
    from transformers import GenerationConfig

    names = set(inspect.signature(hf_class.generate).parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return (names | set(GenerationConfig().to_dict())) - {"self", "kwargs", "inputs"}
