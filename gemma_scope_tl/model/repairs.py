"""Defects of the installed libraries that are mended on load, each after it was seen on the model at hand."""

from __future__ import annotations

import logging
from typing import Any

import torch

from gemma_scope_tl.errors import AdapterMismatch
from gemma_scope_tl.model.hooked import GemmaModel
from gemma_scope_tl.model.plain import cache_keyword, probe_tokens

logger = logging.getLogger(__name__)


def repair(model: GemmaModel) -> None:
    """Mend what is broken in ``model``; ``model.fixes`` says what was.

    Raises:
        AdapterMismatch: when a defect is there that the workaround does not mend.
    """
    read_cache_kwarg = getattr(model, "read_cache_kwarg", None)
    if read_cache_kwarg is None or attention_fills_cache(model):
        return
    read_cache_kwarg()
    if not attention_fills_cache(model):
        raise AdapterMismatch(
            "The installed transformer-lens and transformers do not agree on how attention gets its key-value cache, "
            "so generation would be wrong. Install the versions that `gemma-scope doctor` names as tested."
        )


@torch.no_grad()
def attention_fills_cache(model: Any) -> bool:
    """Whether every layer's attention puts a token into the key-value cache that the model is given.

    One token goes through the wrapped Hugging Face model: the way that its own ``generate`` goes too.
    """
    from transformers import DynamicCache

    hf_model = model.original_model
    cache = DynamicCache(config=hf_model.config)
    hf_model(probe_tokens(hf_model, 1), **{cache_keyword(hf_model): cache, "use_cache": True})
    model.token_tracker.clear()
    return all(cache.get_seq_length(layer) == 1 for layer in range(model.dims.n_layers))
