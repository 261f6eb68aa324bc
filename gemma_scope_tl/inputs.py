"""What users give: texts as token ids with a mask, SAEs as a list, latents as ints. One way in for every function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from jaxtyping import Bool, Int

from gemma_scope_tl.tokens import text_mask

Text = str | Sequence[str] | torch.Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Token ids, and which of them are text.

    Attributes:
        ids: ``[batch, pos]``, on the model's device.
        mask: True at text, False at padding, on either side; a row of padding alone is False throughout.
    """

    ids: Int[torch.Tensor, "batch pos"]
    mask: Bool[torch.Tensor, "batch pos"]


def as_batch(model: Any, text: Any, attention_mask: Any = None) -> TokenBatch:
    """Token ids and mask of whatever stands for texts.

    Args:
        model: from ``load_model``.
        text: a text, several, or token ids.
        attention_mask: ``[batch, pos]``, 1 at text; by default the mask follows from padding.
    """
    ids: Any = text if isinstance(text, torch.Tensor) else model.to_tokens(text)
    ids = (ids[None] if ids.ndim == 1 else ids).to(model.cfg.device)
    if attention_mask is not None:
        return TokenBatch(ids, torch.as_tensor(attention_mask, device=ids.device).bool())
    return TokenBatch(ids, text_mask(ids, getattr(model, "tokenizer", None)))


def as_saes(saes: Any) -> list[Any]:
    """One SAE (or transcoder, or loaded latents), several, a mapping of them or a suite as a list."""
    from gemma_scope_tl.sae.latents import Latents

    if isinstance(saes, (torch.nn.Module, Latents)):
        return [saes]
    given: Iterable[Any] = saes.values() if isinstance(saes, Mapping) else saes
    return list(given)


def as_indices(latents: Any) -> list[int]:
    """One latent or several as ints: Python's, NumPy's, torch's (0-d too)."""
    try:
        return [index(latents)]
    except TypeError:
        return [index(latent) for latent in latents]
