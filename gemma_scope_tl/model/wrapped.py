"""Text models inside Hugging Face models that read more than text, as the larger models of a family may be published.

``from_pretrained`` of a text model's class, called on the folder of such a wrapper, finds none of its weights, because
their names begin differently there, and continues with random ones.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from gemma_scope_tl.errors import AdapterError
from gemma_scope_tl.families import Family

_LOGGER = "transformers.modeling_utils"


def wrapper_class(family: Family) -> type | None:
    """The Hugging Face class of the family's wrapper; None when there is none in the installed transformers."""
    return None if family.wrapper is None else getattr(transformers, family.wrapper.architecture, None)


def text_model(hf_model: Any, family: Family) -> Any:
    """The text model of ``hf_model``: itself, or the one inside a wrapper, with the same modules and weights.

    Args:
        hf_model: a model of ``family`` with an unembedding. It is not changed.
        family: the family of the model.

    Raises:
        AdapterError: when the text model needs a module that the wrapper does not have.
    """
    outer, wrapper = wrapper_class(family), family.wrapper
    if outer is None or wrapper is None or not isinstance(hf_model, outer):
        return hf_model
    whole: Any = hf_model
    decoder = whole.get_submodule(wrapper.decoder)
    with torch.device("meta"):
        text = getattr(transformers, family.architecture)(decoder.config)
    unembedding = next(name for name, module in text.named_children() if module is text.get_output_embeddings())
    text.set_submodule(family.decoder, decoder)
    text.set_submodule(unembedding, whole.get_submodule(wrapper.unembedding))
    held = {id(weight) for weight in (*whole.parameters(), *whole.buffers())}
    named = (*text.named_parameters(), *text.named_buffers())
    lacking = [name for name, weight in named if id(weight) not in held]
    if lacking:
        raise AdapterError(f"The {type(hf_model).__name__} lacks weights of its text model: {', '.join(lacking[:3])}.")
    text.generation_config = copy.deepcopy(whole.generation_config)
    for name in ("hf_device_map", "hf_quantizer"):
        if hasattr(whole, name):
            setattr(text, name, getattr(whole, name))
    return text.train(whole.training)


def load_text_model(source: str, family: Family, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The text model in a folder or repository, and what ``from_pretrained`` says about its weights.

    Of a wrapper's files, only the weights of the text model are read.

    Args:
        source: folder or Hugging Face id.
        family: the family of the model.
        config: the configuration of the model, or of the wrapper.
        **options: further arguments of ``from_pretrained``.
    """
    text, wrapper = family.text_config(config), family.wrapper
    load = getattr(transformers, family.architecture).from_pretrained
    if text is config or wrapper is None:
        return load(source, config=config, output_loading_info=True, **options)
    with _without_report():
        return load(source, config=text, key_mapping=dict(wrapper.weights), output_loading_info=True, **options)


@contextmanager
def _without_report() -> Generator[None]:
    """Silence the table of the wrapper's other weights, which are left out on purpose; errors are still logged."""
    logger = logging.getLogger(_LOGGER)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
