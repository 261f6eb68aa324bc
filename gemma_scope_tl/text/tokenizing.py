"""Tokenization of texts with one BOS and padding. Texts are never truncated silently."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.families import Family, families
from gemma_scope_tl.sae.arguments import shown

Padded = tuple[torch.Tensor, torch.Tensor]
"""Ids and mask, both ``[batch, pos]``."""


def tokenize(
    model: Any,
    texts: str | Sequence[str],
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    truncate: bool | None = None,
) -> Padded:
    """Token ids and mask of texts, each with exactly one BOS at the start, even if the text contains BOS itself.

    The empty text gives BOS alone.

    Args:
        model: from ``load_model``.
        texts: one or several.
        prepend_bos: None for the model's default, which is True; False does not change texts.
        padding_side: ``"left"`` or ``"right"``, None for the tokenizer's.
        truncate: True cuts a text that is longer than the context, None cuts it and warns, False does not cut it.

    Returns:
        Ids ``[batch, pos]`` on the CPU, and a mask that is True at text.

    Raises:
        GemmaScopeError: for no tokenizer, a value that is not text or not valid Unicode, or no token at all.
    """
    tokenizer, several = getattr(model, "tokenizer", None), _listed(texts)
    if not several:
        raise GemmaScopeError(f"An empty {type(texts).__name__} was given: there is no text.")
    rows = text_ids(tokenizer, several)
    bos = getattr(tokenizer, "bos_token_id", None)
    if prepend_bos is None:
        prepend_bos = getattr(model.cfg, "default_prepend_bos", True)
    if prepend_bos and bos is not None:
        rows = [[bos, *without_bos(tokenizer, row)] for row in rows]
    if not any(rows):
        why = "prepend_bos is False" if bos is not None else "the tokenizer has no BOS"
        raise GemmaScopeError(f"The texts have no tokens, and no BOS is added ({why}), so there is nothing to run on.")
    side = padding_side or getattr(tokenizer, "padding_side", None) or "left"
    if side not in ("left", "right"):
        raise GemmaScopeError(f"padding_side must be 'left' or 'right', not {padding_side!r}.")
    if truncate is not False and (over := too_long(model, rows)):
        if truncate is None:
            warnings.warn(f"{over}: the rest is cut off. Give truncate=True to silence this warning.", stacklevel=3)
        rows = [row[: int(model.cfg.n_ctx)] for row in rows]
    return padded(rows, pad_id(tokenizer), side)


def _listed(texts: Any) -> list[Any]:
    """Convert one text or several to a list. Mappings and tables are refused, since iteration gives their keys."""
    if getattr(texts, "ndim", 1) == 0:  # an array of one text
        texts = texts.item()
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, Mapping) or (hasattr(texts, "iloc") and texts.ndim != 1) or not hasattr(texts, "__iter__"):
        raise GemmaScopeError(
            f"to_tokens takes a text or several, not a {type(texts).__name__}. Give token ids, and the output of a "
            "tokenizer, to the model directly."
        )
    return list(texts)


def text_ids(tokenizer: Any, texts: Sequence[Any], first: int = 0) -> list[list[int]]:
    """Token ids of each text, without special tokens that the tokenizer would add.

    Args:
        tokenizer: the tokenizer of the model.
        texts: a part of the user's texts, or all of them.
        first: the number of the first of them among all texts, for messages.

    Raises:
        GemmaScopeError: for no tokenizer, a value that is not text, or a text that is not valid Unicode.
    """
    if tokenizer is None:
        raise GemmaScopeError("The model has no tokenizer: give token ids instead of text, or load it with tokenizer=.")
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise GemmaScopeError(f"Text {number} is {shown(text)}, not a str.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise GemmaScopeError(
                f"Text {number} is not valid Unicode: character {error.start} is the surrogate "
                f"{text[error.start]!a}. Read the text with errors='replace', or repair it."
            ) from None
    if not texts:
        return []
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [list(row) for row in found]


def without_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """``ids`` without a leading BOS, for callers that add BOS."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if bos is not None and ids[:1] == [bos] else ids


def rendered(tokenizer: Any, messages: Sequence[Any], add_generation_prompt: bool | None) -> str:
    """Render chat messages with the tokenizer's template, which may include BOS.

    By default (None) the start of an answer is added unless the last message is the model's.

    Raises:
        GemmaScopeError: for no template, a template that refuses these messages, or a message without role or content.
        UnknownNameError: for a message with a key that the template does not read.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise GemmaScopeError(
            "Chat messages need a tokenizer with a chat template, but this model has none: give text, or set "
            "model.tokenizer.chat_template."
        )
    check_messages(messages, str(tokenizer.chat_template))
    if add_generation_prompt is None:
        add_generation_prompt = str(messages[-1]["role"]) not in ("assistant", "model")
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return str(tokenizer.apply_chat_template(list(messages), **options))
    except Exception as error:  # templates may raise anything
        raise GemmaScopeError(f"The chat template refuses these messages: {error}") from error


def check_messages(messages: Sequence[Any], template: str) -> None:
    """Refuse messages with parts that a template would silently ignore. Keys that the template mentions are allowed.

    Raises:
        GemmaScopeError: for a message without role or content, or whose content is neither text nor a list of parts.
        UnknownNameError: for a key that the template does not read.
    """
    own = {"role", "content"}
    for number, message in enumerate(messages):
        more = {str(key) for key in message} - own
        for key in sorted(more):
            if not re.search(rf"\b{re.escape(key)}\b", template):
                raise unknown_name("key of a chat message", key, sorted(own), "A message has 'role' and 'content'.")
        missing = [key for key in ("role", "content") if message.get(key) is None]
        if missing and (not more or "role" in missing):  # a message that calls a tool may have no content
            raise GemmaScopeError(f"Message {number} has no {missing[0]!r}: give {{'role': …, 'content': …}}.")
        if not isinstance(message.get("content") or "", (str, list, tuple)):
            kind = type(message["content"]).__name__
            raise GemmaScopeError(f"The content of message {number} is a {kind}: give text, or a list of parts.")


def padded(rows: Sequence[Sequence[int]], pad: int, side: str = "left") -> Padded:
    """Pad rows of several lengths to one tensor, with a mask that is False at padding."""

    def stacked(parts: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)

    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    return stacked(ids, pad), stacked([torch.ones_like(row) for row in ids], 0).bool()


def decoded_ids(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each id alone, or the number without a tokenizer. Each different id is decoded once."""
    listed = list(ids)
    texts = {i: tokenizer.decode([i]) if tokenizer else str(i) for i in set(listed)}
    return [texts[i] for i in listed]


def pad_id(tokenizer: Any) -> int:
    """The id for padding: that of the padding token, else of EOS, else 0."""
    found = [getattr(tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos")]
    return next((i for i in found if i is not None), 0)


def too_long(model: Any, rows: Sequence[Sequence[int]] | torch.Tensor) -> str | None:
    """The start of a message about the first row that is longer than the model's context; None if all rows fit."""
    context = int(model.cfg.n_ctx)
    long = next((number for number, row in enumerate(rows) if len(row) > context), None)
    if long is None:
        return None
    which = f"Text {long} has" if len(rows) > 1 else "The text has"
    return f"{which} {len(rows[long])} tokens, more than the model's context of {context}"


_MARK = "DOCUMENT"


class Wrapping(NamedTuple):
    """Ids around a document.

    Attributes:
        prefix: ids between BOS and the document, such as ``<start_of_turn>user\\n``.
        suffix: ids after the document, such as ``<end_of_turn>\\n<start_of_turn>model\\n``.
    """

    prefix: list[int]
    suffix: list[int]


def chat_wrapping(tokenizer: Any) -> Wrapping:
    """The ids around a user's turn.

    They come from the tokenizer's chat template, or from the turn tokens of the first family whose tokens are in the
    vocabulary.

    Raises:
        GemmaScopeError: for a template whose output does not contain the document, or a tokenizer without a template
            and without the turn tokens of any family.
    """
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": _MARK}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        parts = text.removeprefix(tokenizer.bos_token or "").split(_MARK)
        if len(parts) != 2:
            raise GemmaScopeError(
                f"The tokenizer's chat template renders a turn as {text!r}, in which the document cannot be found."
            )
    else:
        family = _family_of_turns(tokenizer)
        start, end = family.turn_start, family.turn_end
        parts = [f"{start}user\n", f"{end}\n{start}{family.answer_role}\n"]
    return Wrapping(*(tokenizer.encode(part, add_special_tokens=False) for part in parts))


def turn_end_id(tokenizer: Any) -> int | None:
    """The id of the token that ends a turn of a chat, from the first family whose token is known; None without one."""
    known = tokenizer.get_vocab()
    return next((known[family.turn_end] for family in families() if family.turn_end in known), None)


def _family_of_turns(tokenizer: Any) -> Family:
    """The first family whose turn tokens the tokenizer knows."""
    known = tokenizer.get_vocab()
    lacking: list[str] = []
    for family in families():
        tokens = [token for token in (family.turn_start, family.turn_end) if token not in known]
        if not tokens:
            return family
        if (needed := " and ".join(tokens)) not in lacking:
            lacking.append(needed)
    raise GemmaScopeError(
        f"This tokenizer has no chat template and does not know {', or '.join(lacking)}: chat=True needs the tokenizer "
        "of an instruction-tuned model."
    )
