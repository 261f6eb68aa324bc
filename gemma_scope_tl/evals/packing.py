"""Evaluation data as fixed rows of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int

from gemma_scope_tl.errors import GemmaScopeError


def pack_texts(
    tokenizer: Any, texts: Iterable[str], context: int, limit: int | None = None
) -> Int[torch.Tensor, "rows context"]:
    """Rows of BOS and ``context - 1`` consecutive tokens; texts follow each other, separated by EOS.

    Args:
        tokenizer: of the model.
        texts: read one by one, no more than needed.
        context: tokens in a row.
        limit: rows at most.

    Raises:
        GemmaScopeError: when there is less text than one row, no tokenizer, or a context below 2.
    """
    if tokenizer is None:
        raise GemmaScopeError("The model has no tokenizer: give token ids instead of texts.")
    if context < 2:
        raise GemmaScopeError(f"A row holds BOS and a token at least, so context cannot be {context}.")
    stream: list[int] = []
    body = context - 1
    for text in texts:
        stream += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        if limit is not None and len(stream) >= limit * body:
            break
    rows = len(stream) // body if limit is None else min(limit, len(stream) // body)
    if rows == 0:
        raise GemmaScopeError(
            f"The texts hold {len(stream)} tokens, less than one row of {body}: give more, or a smaller context."
        )
    packed = torch.tensor(stream[: rows * body]).view(rows, body)
    return torch.cat([torch.full((rows, 1), tokenizer.bos_token_id), packed], dim=1)


def as_tokens(model: Any, data: Sequence[str] | torch.Tensor, context: int) -> Int[torch.Tensor, "rows pos"]:
    """Texts packed by :func:`pack_texts`, or token ids after a check.

    Raises:
        GemmaScopeError: for ids that are not ``[rows, pos]`` integers of the model's vocabulary.
    """
    if isinstance(data, str):
        return pack_texts(model.tokenizer, [data], context)
    if not isinstance(data, torch.Tensor):
        return pack_texts(model.tokenizer, data, context)
    if data.ndim != 2 or data.is_floating_point() or data.shape[0] < 1 or data.shape[1] < 2:
        raise GemmaScopeError(
            f"Token ids are integers of shape [rows, pos] with two positions or more, not {data.dtype} "
            f"{list(data.shape)}."
        )
    vocabulary = int(model.cfg.d_vocab)
    low, high = int(data.min()), int(data.max())
    if low < 0 or high >= vocabulary:
        raise GemmaScopeError(f"Token ids run from {low} to {high}; the model's are 0..{vocabulary - 1}.")
    return data.cpu().long()
