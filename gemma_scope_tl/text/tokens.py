"""Special tokens, padding, and the text that a forward pass has read.

Gemma Scope was not trained on BOS, EOS or padding (paper, section 3.1), so the output of an SAE at these positions is
meaningless (a BOS token can activate thousands of latents). Splicing and metrics therefore skip them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from jaxtyping import Bool, Int

from gemma_scope_tl.errors import SpliceError, brief

ExcludeTokens = bool | Iterable[int] | torch.Tensor
_IDS = 1 << 31  # every token id is below


def special_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Sorted ids of BOS, EOS and padding in ``tokenizer``; empty without a tokenizer."""
    if tokenizer is None:
        return ()
    ids = {getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    return tuple(sorted(i for i in ids if i is not None))


def excluded_choice(exclude: Any) -> bool | tuple[int, ...]:
    """Normalise a value of ``exclude_special_tokens`` to True, False, or sorted token ids.

    Raises:
        SpliceError: for anything but a bool or an iterable of ids, such as a single int, a mask, or a number that is
            no id.
    """
    single = exclude.item() if getattr(exclude, "ndim", None) == 0 else exclude
    if isinstance(single, bool):
        return single
    try:
        given = exclude.tolist() if hasattr(exclude, "tolist") else list(exclude)
        if isinstance(exclude, (str, bytes)) or any(isinstance(one, bool) for one in given):
            raise TypeError
        ids = sorted({index(one) for one in given})
    except TypeError:
        ids = [-1]
    if ids and not 0 <= ids[0] <= ids[-1] < _IDS:
        raise SpliceError(
            "exclude_special_tokens takes True (BOS, EOS and padding), False, or token ids such as [0, 1, 2]; given: "
            f"{brief(exclude)}."
        )
    return tuple(ids)


def excluded_ids(tokenizer: Any, exclude: ExcludeTokens, must_know: bool = False) -> tuple[int, ...]:
    """The token ids for a value of ``exclude_special_tokens``.

    Args:
        tokenizer: the tokenizer of the model, or None.
        exclude: True for BOS, EOS and padding of ``tokenizer`` (no ids without a tokenizer), False for no ids, or any
            iterable of ids, including those of NumPy and torch.
        must_know: whether to raise for True without a tokenizer, instead of excluding no ids.

    Returns:
        The sorted ids.

    Raises:
        SpliceError: as :func:`excluded_choice`, and with ``must_know`` for True without a tokenizer.
    """
    choice = excluded_choice(exclude)
    if not isinstance(choice, bool):
        return choice
    special = special_token_ids(tokenizer) if choice else ()
    if choice and must_know and not special:
        raise SpliceError(
            "The model has no tokenizer, so BOS, EOS and padding are unknown: pass their ids, or "
            "exclude_special_tokens=False."
        )
    return special


def special_mask(tokens: Int[torch.Tensor, "batch pos"], ids: Iterable[int]) -> Bool[torch.Tensor, "batch pos"]:
    """True where a token is one of ``ids``."""
    wanted = torch.tensor(sorted(ids), device=tokens.device, dtype=tokens.dtype)
    return torch.isin(tokens, wanted)


def text_mask(tokens: Int[torch.Tensor, "batch pos"], tokenizer: Any) -> Bool[torch.Tensor, "batch pos"]:
    """True at text, False at the padding on either side of a row. A row of padding alone is all False.

    If the padding token is also BOS, the last one of a leading run is the BOS of the text. If it is also EOS, the first
    one of a trailing run is the EOS of the text.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    is_pad = tokens == pad
    leading = is_pad.long().cumprod(dim=-1).bool()
    trailing = is_pad.flip(-1).long().cumprod(dim=-1).flip(-1).bool()
    none = torch.zeros_like(is_pad[:, :1])
    if pad == getattr(tokenizer, "bos_token_id", None):
        leading = torch.cat([leading[:, 1:], none], dim=1)
    if pad == getattr(tokenizer, "eos_token_id", None):
        trailing = torch.cat([none, trailing[:, :-1]], dim=1)
    return ~(leading | trailing | is_pad.all(dim=-1, keepdim=True))


def continued_mask(
    mask: Bool[torch.Tensor, "batch total"], ids: Int[torch.Tensor, "batch new"], tokenizer: Any
) -> Bool[torch.Tensor, "batch total"]:
    """The mask of a text whose last columns are ``ids``. A row may have only padding before them."""
    before = mask.shape[1] - ids.shape[1]
    empty = ~mask[:, :before].any(dim=-1, keepdim=True)
    new = torch.where(empty, text_mask(ids, tokenizer), mask[:, before:])
    return torch.cat([mask[:, :before], new], dim=1)


def attendable(mask: Bool[torch.Tensor, "batch pos"]) -> Bool[torch.Tensor, "batch pos"]:
    """A mask for attention, which needs at least one position per row: all True in a row of padding alone."""
    return mask | ~mask.any(dim=-1, keepdim=True)


@dataclass
class TextRead:
    """The text that a forward pass, or one generation, has read so far.

    Attributes:
        ids: ``[batch, total]``, None in a pass that starts from embeddings.
        mask: ``[batch, total]``, True at text, False at padding.
        prompt: number of columns of the prompt; the other columns were generated.
        moved: ``[batch]``, the number of columns by which generation moved each row of the prompt to the right, or None
            for no move. New tokens are added after the last column, so padding on the right is moved to the left.
        whole: False if a key-value cache has unknown columns before these.
        growing: whether the text is that of a generation, whose prompt does not change.
        by_column: whether the model numbered positions by column, padding included, as Hugging Face does by default.
    """

    ids: Int[torch.Tensor, "batch total"] | None = None
    mask: Bool[torch.Tensor, "batch total"] | None = None
    prompt: int | None = None
    moved: Int[torch.Tensor, " batch"] | None = None
    whole: bool = True
    growing: bool = False
    by_column: bool = False

    def serves(self, batch: int, seen: int) -> bool:
        """Whether a pass over ``batch`` rows can continue after the first ``seen`` columns of this text."""
        return self.ids is not None and self.whole and batch % self.ids.shape[0] == 0 and self.ids.shape[1] >= seen

    def mask_over(self, total: int, batch: int) -> Bool[torch.Tensor, "batch total"] | None:
        """The mask of ``total`` columns, with text in all columns after the known ones; None if it is unknown."""
        if self.mask is None or batch % self.mask.shape[0] or not self.whole:
            return None
        known = self.mask[:, :total].repeat_interleave(batch // self.mask.shape[0], dim=0)
        return torch.nn.functional.pad(known, (0, total - known.shape[1]), value=True)

    def ends(self, ids: Int[torch.Tensor, "batch pos"], seen: int) -> bool:
        """Whether ``ids`` are exactly the columns after the first ``seen`` columns of this text."""
        if self.ids is None or self.ids.shape[1] != seen + ids.shape[1] or not self.serves(ids.shape[0], seen):
            return False
        known = self.ids[:, seen:].repeat_interleave(ids.shape[0] // self.ids.shape[0], dim=0)
        return torch.equal(known.to(ids.device), ids)


def joined_mask(ids: torch.Tensor, mask: torch.Tensor | None, before: TextRead, known_first: bool) -> torch.Tensor:
    """The mask over all of ``ids``, from a given mask and the mask of the preceding text.

    Args:
        ids: ``[batch, total]``, including the preceding text.
        mask: mask over all of ``ids`` or its last columns; may be None.
        before: the preceding text.
        known_first: whether the mask of the preceding text has priority over the given one.
    """
    batch, total = ids.shape
    known = before.mask_over(total, batch)
    if known_first and known is not None:
        return known.to(ids.device)
    if mask is not None and mask.shape[0] == batch and mask.shape[1] >= total:
        return mask[:, -total:].bool().to(ids.device)
    whole = torch.ones_like(ids, dtype=torch.bool) if known is None else known.to(ids.device)
    if mask is not None and mask.shape[0] == batch:  # a mask of the new columns only
        whole[:, -mask.shape[1] :] = mask.bool().to(ids.device)
    return whole
