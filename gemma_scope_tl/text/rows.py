"""Rows of token ids in memory, for measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from gemma_scope_tl.counts import whole_number
from gemma_scope_tl.errors import GemmaScopeError, brief
from gemma_scope_tl.text.batch import Text, TokenBatch, as_batch
from gemma_scope_tl.text.token_rows import cut_rows
from gemma_scope_tl.text.tokenizing import pad_id, text_ids, without_bos
from gemma_scope_tl.text.tokens import special_token_ids


def pack_texts(
    tokenizer: Any, texts: Iterable[str], context: int, limit: int | None = None
) -> Int[torch.Tensor, "rows context"]:
    """Pack texts, separated by EOS, into rows of BOS and ``context - 1`` consecutive tokens.

    A leading BOS of a text is left out, because every row begins with BOS.

    Args:
        tokenizer: the tokenizer of the model.
        texts: read one by one, as far as needed.
        context: tokens in a row.
        limit: the largest number of rows.

    Raises:
        GemmaScopeError: for less text than one row, a value that is not text, no tokenizer or one without BOS or EOS,
            or a context below 2.
    """
    if tokenizer is None:
        raise GemmaScopeError("The model has no tokenizer: give token ids instead of texts.")
    if whole_number(context) is None or context < 2:
        raise GemmaScopeError(f"A row has BOS and at least one token, so context cannot be {brief(context)}.")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise GemmaScopeError("Texts are packed between BOS and EOS, but this tokenizer lacks one: give token ids.")
    stream: list[int] = []
    body = context - 1
    for number, text in enumerate(texts):
        (ids,) = text_ids(tokenizer, [text], number)
        stream += [*without_bos(tokenizer, ids), tokenizer.eos_token_id]
        if limit is not None and len(stream) >= limit * body:
            break
    rows, _ = cut_rows(np.array(stream), context, tokenizer.bos_token_id)
    if not len(rows):
        raise GemmaScopeError(
            f"The texts have {len(stream)} tokens, less than one row of {body}: give more, or a smaller context."
        )
    return torch.from_numpy(rows[:limit])


def as_rows(model: Any, data: Text, context: int, attention_mask: Any = None, limit: int | None = None) -> TokenBatch:
    """Make rows for a measurement: texts are packed by :func:`pack_texts`, and any other input has one row per text.

    The text of a row begins in column 0, so that a column is a position in the text and no token attends to padding.

    Args:
        model, data, context, attention_mask, limit: as for :func:`given_rows`, which also raises.

    Returns:
        Ids and mask on the CPU, padded on the right.
    """
    return aligned(given_rows(model, data, context, attention_mask, limit), pad_id(model.tokenizer))[0]


def given_rows(
    model: Any, data: Text, context: int, attention_mask: Any = None, limit: int | None = None
) -> TokenBatch:
    """The rows of :func:`as_rows` with the padding that they were given with.

    Args:
        model: from ``load_model``.
        data: texts, read one by one; or token ids, conversations, a mapping with ``input_ids``
            (:func:`~gemma_scope_tl.text.batch.as_batch`).
        context: tokens in a row of packed texts.
        attention_mask: mask of token ids, 1 at text.
        limit: the largest number of rows.

    Returns:
        Ids and mask on the CPU.

    Raises:
        GemmaScopeError: as :func:`pack_texts` and :func:`~gemma_scope_tl.text.batch.as_batch`; also for rows of one
            token and for a context longer than the model's.
    """
    data, texts = _told_apart(data)
    if texts is not None:
        if attention_mask is not None:
            raise GemmaScopeError(
                "Texts are packed into rows without padding: give attention_mask= only with token ids."
            )
        if context > model.cfg.n_ctx:
            raise GemmaScopeError(f"Rows of {context} tokens are longer than the model's context, {model.cfg.n_ctx}.")
        ids = pack_texts(model.tokenizer, texts, context, limit)
        return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))
    whole = as_batch(model, data, attention_mask)
    ids, mask = whole.ids[:limit].cpu(), whole.mask[:limit].cpu()
    given = TokenBatch(ids, mask)
    width = int(given.length.max())
    if width < 2:
        raise GemmaScopeError(f"Rows need at least two tokens to predict one, but the longest row has {width}.")
    return given


def aligned(
    given: TokenBatch, pad: int, marks: Bool[torch.Tensor, "rows pos"] | None = None
) -> tuple[TokenBatch, Bool[torch.Tensor, "rows width"]]:
    """Rows whose text begins in column 0, without columns that are padding in all of them.

    Args:
        given: rows with padding on either side.
        pad: the id of padding.
        marks: True at some tokens of ``given``, by default at all of the text.

    Returns:
        The rows, and the marks on the text at the same tokens.
    """
    columns = torch.arange(int(given.length.max()))
    mask = columns < given.length[:, None]
    at = (given.start[:, None] + columns).clamp(max=given.ids.shape[1] - 1)
    batch = TokenBatch(given.ids.gather(1, at).masked_fill(~mask, pad), mask)
    return batch, mask if marks is None else marks.gather(1, at) & mask


def as_tokens(
    model: Any, data: Text, context: int, attention_mask: Any = None, limit: int | None = None
) -> Int[torch.Tensor, "rows pos"]:
    """The ids of :func:`as_rows`, padded with the tokenizer's padding id."""
    return as_rows(model, data, context, attention_mask, limit).ids


def special_ids(model: Any) -> tuple[int, ...]:
    """Ids of BOS, EOS and padding, which measurements leave out.

    Raises:
        GemmaScopeError: when the model has no tokenizer, so the ids are unknown.
    """
    if ids := special_token_ids(model.tokenizer):
        return ids
    raise GemmaScopeError(
        "The model has no tokenizer, so BOS, EOS and padding are unknown: give load_model its tokenizer=."
    )


def _told_apart(data: Any) -> tuple[Any, Iterable[str] | None]:
    """The data in a form that can be iterated over again, and its texts, or None if it has no texts."""
    if isinstance(data, str):
        return data, [data]
    whole = isinstance(data, (torch.Tensor, TokenBatch, Mapping)) or not hasattr(data, "__iter__")
    if whole or getattr(data, "ndim", 1) != 1:
        return data, None
    plain: Any = data
    found = iter(plain)
    first: list[Any] = list(islice(found, 1))
    if first and isinstance(first[0], str):
        return data, chain(first, found)
    if first and isinstance(first[0], Mapping) and "role" not in first[0]:
        return first, None  # possibly infinite records, which as_batch refuses at the first one
    return ([*first, *found] if found is plain else plain), None
