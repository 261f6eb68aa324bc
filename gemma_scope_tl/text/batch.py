"""Conversion of texts in any form that users pass to token ids with a mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from jaxtyping import Bool, Int

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sae.arguments import as_index, is_index, shown, to_tensor
from gemma_scope_tl.text.tokenizing import pad_id, padded, rendered, tokenize, too_long
from gemma_scope_tl.text.tokens import special_mask, text_mask

Text = Any
"""The arguments that :func:`as_batch` accepts: a text, several (list, array, Series, column of a data set, iterator),
chat messages, token ids, a mapping with ``input_ids``, or a :class:`TokenBatch`."""

_TAKEN = (
    "Give a text, several texts, chat messages ({'role', 'content'}), token ids [pos] or [batch, pos], or the "
    "output of a tokenizer (a mapping with input_ids)."
)


@dataclass(frozen=True)
class TokenBatch:
    """Token ids, and which of them are text.

    Attributes:
        ids: ``[batch, pos]``, on the model's device.
        mask: True at text, False at padding on either side. A row of padding alone is all False.
    """

    ids: Int[torch.Tensor, "batch pos"]
    mask: Bool[torch.Tensor, "batch pos"]

    @property
    def start(self) -> Int[torch.Tensor, " batch"]:
        """The column of the first token of text in each row; 0 in a row without text."""
        return self.mask.int().argmax(-1)

    @property
    def length(self) -> Int[torch.Tensor, " batch"]:
        """Number of tokens of text in each row."""
        return self.mask.sum(-1)

    @property
    def attention_mask(self) -> Int[torch.Tensor, "batch pos"]:
        """The mask in the form that models accept: 1 at text."""
        return self.mask.long()

    @property
    def place(self) -> Int[torch.Tensor, "batch pos"]:
        """The position of each column in the text of its row, from 0. Undefined where the mask is False."""
        return torch.arange(self.mask.shape[1], device=self.mask.device) - self.start[:, None]

    def ordinary(self, special: Iterable[int]) -> Bool[torch.Tensor, "batch pos"]:
        """True at text whose id is not in ``special``."""
        return self.mask & ~special_mask(self.ids, special)

    @property
    def ragged(self) -> bool:
        """Whether the texts have several lengths."""
        return bool((self.length != self.length[:1]).any())

    def part(self, rows: Int[torch.Tensor, " part"], columns: slice = slice(None)) -> Self:
        """Some rows and columns, in every field."""
        return type(self)(*(getattr(self, field.name)[rows, columns] for field in fields(self)))

    def parts(self, size: int, start: int = 0) -> Iterator[tuple[Int[torch.Tensor, " part"], slice]]:
        """The rows of each forward pass, texts of similar length together, and the columns that hold their text.

        So one long text does not pad all others to its length. Whoever runs the passes puts their results in the order
        of the rows. Rows of padding alone are left out. Rows of one length keep their order, and so do all rows if one
        pass takes them.

        Args:
            size: number of rows in a pass.
            start: number of rows, in the order of the passes, to leave out at the beginning.
        """
        order = (self.length > 0).nonzero().flatten()
        if len(order) > size:
            order = order[self.length[order].argsort(stable=True)]
        for rows in order[start:].split(size):
            used = self.mask[rows].any(0).nonzero()
            if len(used):  # split() of nothing is one empty part
                yield rows, slice(int(used[0]), int(used[-1]) + 1)


def as_batch(
    model: Any,
    text: Text,
    attention_mask: Any = None,
    *,
    prepend_bos: bool | None = None,
    padding_side: str | None = "left",
    truncate: bool = False,
    add_generation_prompt: bool | None = False,
) -> TokenBatch:
    """Convert texts in any form to token ids and a mask.

    BOS is put before texts that do not begin with it. Texts and id lists of several lengths are padded on the left by
    default. Chat messages are rendered by the tokenizer's chat template; a list of lists of messages is a batch.

    Args:
        model: from ``load_model``.
        text: a text, or several: a list, tuple, array, pandas Series, column of a data set, iterator; one conversation
            or several; token ids as a tensor or array ``[pos]`` or ``[batch, pos]`` of any integer dtype, as a list, or
            lists of several lengths; a mapping with ``input_ids``, whose ``attention_mask`` is used; a
            :class:`TokenBatch`.
        attention_mask: 1 or True at text, in the shape of the ids; it replaces every other mask. The default is the
            mask of the texts or the mapping. For ids, padding on either side is found by the tokenizer's padding id.
        prepend_bos: whether to put BOS before texts; None for the model's default, which is True.
        padding_side: side for texts and lists of ids of several lengths; None for the tokenizer's.
        truncate: whether to cut texts to the model's context instead of raising.
        add_generation_prompt: whether to end chat messages with the start of an answer; None for True unless the last
            message is the model's.

    Raises:
        GemmaScopeError: for an empty input; an input that is neither text nor ids; several kinds in one list; a text
            that is not valid Unicode or is longer than the context; ids that are not integers, have another shape or
            are outside the vocabulary; text for a model without a tokenizer; a mask of another shape, with other
            values or with holes.
    """
    mask, tokenizer = attention_mask, getattr(model, "tokenizer", None)
    if isinstance(text, TokenBatch):
        text, mask = text.ids, text.mask if mask is None else mask
    elif isinstance(text, Mapping) and "role" in text:
        text = [text]
    elif isinstance(text, Mapping):
        if "input_ids" not in text:
            raise GemmaScopeError(f"A mapping with the keys {list(text)[:8]} has no input_ids. {_TAKEN}")
        mask = text.get("attention_mask") if mask is None else mask
        text = text["input_ids"]
    ids, known = _array(text), None  # known: the mask, if it does not follow from padding ids
    if ids is None:
        given, kind = _texts_of(tokenizer, _listed(text), add_generation_prompt)
        if kind == "text":
            ids, known = _from_texts(model, given, prepend_bos, padding_side, truncate)
        else:
            rows = [_row(one) or [] for one in (given if kind == "row" else [given])]
            ids, filled = padded(rows, pad_id(tokenizer), padding_side or "left")
            known, mask = None if bool(filled.all()) else filled, _padded_mask(mask, rows, padding_side or "left")
    ids = _checked_ids(model, ids)
    if mask is not None:
        known = _checked_mask(mask, ids)
    elif known is None:
        known = text_mask(ids, tokenizer)
    return TokenBatch(ids.to(model.cfg.device), known.to(model.cfg.device))


def _texts_of(tokenizer: Any, given: list[Any], add_generation_prompt: bool | None) -> tuple[list[Any], str]:
    """``given`` with conversations rendered as texts, and its kind."""
    kind = _common_kind(given)
    if kind not in ("message", "conversation"):
        return given, kind
    conversations = [given] if kind == "message" else given
    return [rendered(tokenizer, one, add_generation_prompt) for one in conversations], "text"


def _from_texts(
    model: Any, texts: list[str], prepend_bos: bool | None, padding_side: str | None, truncate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokenize(model, texts, prepend_bos, padding_side, truncate)
    if over := too_long(model, [row[at].tolist() for row, at in zip(ids, mask, strict=True)]):
        raise GemmaScopeError(
            f"{over}. Cut it into several texts, or give its beginning: model.to_tokens(text, truncate=True)."
        )
    return ids, mask


# -- kinds of input ---------------------------------------------------------------------------------------------------


def _array(text: Any) -> torch.Tensor | None:
    """Convert an array of numbers to a tensor; None for anything else."""
    if isinstance(text, torch.Tensor):
        return text
    if not hasattr(text, "__array__") or getattr(getattr(text, "dtype", None), "kind", "O") not in "iufcb":
        return None
    import numpy as np

    array: Any = np.array(text)  # a copy, since tables return views that torch must not write to
    if array.dtype.kind == "O":  # a nullable column with missing values
        return None
    return torch.as_tensor(array.astype("int64") if array.dtype.kind == "u" else array)


def _listed(text: Any) -> list[Any]:
    """Convert one text or several items to a list that is not empty."""
    if isinstance(text, str):
        return [text]
    shape: list[int] = list(getattr(text, "shape", [1]))
    table = hasattr(text, "iloc") and len(shape) != 1
    several = hasattr(text, "__iter__") or hasattr(text, "__getitem__")
    if table or not several or isinstance(text, (bytes, bytearray, memoryview, AbstractSet)):
        raise GemmaScopeError(f"{shown(text)} is neither text nor token ids. {_TAKEN}")
    plain: Any = text
    if len(shape) > 1:
        raise GemmaScopeError(f"Texts must be a flat list, not an array of shape {shape}.")
    given: list[Any] = list(plain) if shape else [plain.item()]
    if not given:
        raise GemmaScopeError(f"An empty {type(plain).__name__} was given: there is no text. {_TAKEN}")
    return given


def _common_kind(given: list[Any]) -> str:
    """The kind of the items: ``text``, ``id``, ``row`` (of ids), ``message`` or ``conversation``.

    Raises:
        GemmaScopeError: for items of another kind, or of several kinds.
    """
    first = _kind(given[0])
    for number, one in enumerate(given):
        kind = _kind(one)
        if kind is None and isinstance(one, Mapping):
            raise GemmaScopeError(
                f"Records with the keys {list(one)[:8]} are not texts: give the column that contains the texts."
            )
        if kind is None:
            raise GemmaScopeError(f"Item {number} of the input is neither text nor ids: {shown(one)}. {_TAKEN}")
        if kind != first:
            raise GemmaScopeError(
                f"The first item of the input is {shown(given[0])}, but item {number} is {shown(one)}: give one kind."
            )
    return str(first)


def _kind(one: Any) -> str | None:
    if isinstance(one, str):
        return "text"
    if isinstance(one, Mapping):
        return "message" if "role" in one else None
    if is_index(one):
        return "id"
    if isinstance(one, (list, tuple)) and one and all(isinstance(part, Mapping) and "role" in part for part in one):
        return "conversation"
    return None if _row(one) is None else "row"


def _row(one: Any) -> list[int] | None:
    """The ids in a list, a tuple, or an array of one dimension; None for anything else."""
    if isinstance(one, torch.Tensor) or hasattr(one, "__array__"):
        array = _array(one)
        plain = array is not None and array.ndim == 1 and not (array.is_floating_point() or array.is_complex())
        return array.tolist() if array is not None and plain and array.dtype != torch.bool else None
    if not isinstance(one, (list, tuple)):
        return None
    if all(type(part) is int for part in one):
        return list(one)
    return [as_index(part) for part in one] if all(is_index(part) for part in one) else None


# -- checks -----------------------------------------------------------------------------------------------------------


def _padded_mask(mask: Any, rows: list[list[int]], side: str) -> Any:
    """The masks of lists of ids, padded like the ids."""
    if isinstance(mask, (list, tuple)):
        masks = [_row(one) for one in mask]
        if all(one is not None for one in masks) and list(map(len, mask)) == list(map(len, rows)):
            return padded([one or [] for one in masks], 0, side)[0]
    return mask


def _checked_ids(model: Any, ids: torch.Tensor) -> torch.Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise GemmaScopeError(f"Token ids must be integers, not {ids.dtype}. Pass embeddings as inputs_embeds=.")
    if ids.ndim not in (1, 2) or not ids.numel():
        raise GemmaScopeError(
            f"Token ids must be [pos] or [batch, pos], with at least one token; given: shape {list(ids.shape)}."
        )
    ids = (ids[None] if ids.ndim == 1 else ids).long()
    if ids.is_meta:
        return ids
    vocabulary, (low, high) = int(model.cfg.d_vocab), (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise GemmaScopeError(
            f"Token ids are from {low} to {high}, but the model has 0..{vocabulary - 1}. (Padding is marked by the "
            "mask or by the tokenizer's padding id, not by a negative number.)"
        )
    if getattr(model, "backend", None) == "hooked_transformer" and (over := too_long(model, ids)):
        raise GemmaScopeError(f"{over}: give fewer tokens.")  # the bridge has no such limit
    return ids


def _checked_mask(mask: Any, ids: torch.Tensor) -> torch.Tensor:
    try:
        tensor = to_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise GemmaScopeError(f"attention_mask is not an array of numbers: {shown(mask)}.") from error
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    if tensor.shape != ids.shape:
        raise GemmaScopeError(
            f"attention_mask has the shape {list(tensor.shape)}, but the token ids have {list(ids.shape)}."
        )
    if tensor.is_meta:
        return tensor.bool()
    if tensor.dtype != torch.bool and not bool(((tensor == 0) | (tensor == 1)).all()):
        raise GemmaScopeError("attention_mask must be 1 at text and 0 at padding, but it has other values.")
    tensor = tensor.bool()
    begins = tensor.clone()
    begins[:, 1:] &= ~tensor[:, :-1]
    holes = begins.sum(-1) > 1
    if bool(holes.any()):
        raise GemmaScopeError(
            f"Row {int(holes.nonzero()[0])} of attention_mask has a hole: text must be one run of tokens, with padding "
            "before or after it."
        )
    return tensor.to(ids.device)
