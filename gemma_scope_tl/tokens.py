"""Which positions hold special tokens, and which token ids a hooked forward pass is looking at.

Gemma Scope was not trained on BOS, EOS or padding (paper, section 3.1): at those positions an SAE gives nonsense (a BOS
token can activate thousands of latents), so splicing and metrics leave them alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any

import torch
from jaxtyping import Bool, Int

from gemma_scope_tl.errors import SpliceError

ExcludeTokens = bool | Iterable[int] | torch.Tensor


def special_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of BOS, EOS and padding in ``tokenizer``, sorted; empty without a tokenizer."""
    if tokenizer is None:
        return ()
    ids = {getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    return tuple(sorted(i for i in ids if i is not None))


def excluded_choice(exclude: Any) -> bool | tuple[int, ...]:
    """What ``exclude_special_tokens`` says, whatever it is given as: True, False, or token ids, sorted.

    Raises:
        SpliceError: for anything but a bool and an iterable of ids, such as one bare int, a mask, or a negative id.
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
    if ids and ids[0] < 0:
        raise SpliceError(
            "exclude_special_tokens takes True (BOS, EOS and padding), False, or token ids such as [0, 1, 2]; given: "
            f"{exclude!r}."
        )
    return tuple(ids)


def excluded_ids(tokenizer: Any, exclude: ExcludeTokens, must_know: bool = False) -> tuple[int, ...]:
    """The token ids that ``exclude_special_tokens`` names, for every function that has the argument.

    Args:
        tokenizer: of the model; may be None.
        exclude: True for BOS, EOS and padding of ``tokenizer`` (none without one), False for none, or the ids
            themselves: any iterable of ints, NumPy's and torch's included.
        must_know: refuse True where no tokenizer says which ids are special, instead of excluding none.

    Returns:
        The ids, sorted.

    Raises:
        SpliceError: as :func:`excluded_choice`; with ``must_know``, as above.
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
    """True at text, False at the padding on either side of a row; a row of padding alone is False throughout.

    Where the padding token is also BOS, the last of a leading run is the text's own BOS; where it is also EOS, the
    first of a trailing run is the text's own EOS.
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
    """The mask of a text whose last columns are ``ids``, where a row may have been padding alone until then."""
    before = mask.shape[1] - ids.shape[1]
    empty = ~mask[:, :before].any(dim=-1, keepdim=True)
    new = torch.where(empty, text_mask(ids, tokenizer), mask[:, before:])
    return torch.cat([mask[:, :before], new], dim=1)


def attendable(mask: Bool[torch.Tensor, "batch pos"]) -> Bool[torch.Tensor, "batch pos"]:
    """A mask for attention, which must find something: True all over in a row of padding alone."""
    return mask | ~mask.any(dim=-1, keepdim=True)
