"""Which positions hold special tokens, and which token ids a hooked forward pass is looking at.

Gemma Scope was not trained on BOS, EOS or padding (paper, section 3.1): at those positions an SAE gives nonsense (a BOS
token can activate thousands of latents), so splicing and metrics leave them alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
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


def left_padding_mask(tokens: Int[torch.Tensor, "batch pos"], tokenizer: Any) -> Int[torch.Tensor, "batch pos"] | None:
    """Attention mask (1 = attend) of left-padded rows, or None when no row starts with padding.

    Where the padding token is also BOS, the last of the leading run is taken for the real BOS.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or tokens.ndim != 2 or tokens.shape[1] < 2:
        return None
    leading = (tokens == pad).long().cumprod(dim=-1)
    if pad == getattr(tokenizer, "bos_token_id", None):
        leading = torch.cat([leading[:, 1:], torch.zeros_like(leading[:, :1])], dim=1)
    if not bool(leading.any()) or bool(leading.all(dim=-1).any()):
        return None
    return 1 - leading


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


class TokenTracker:
    """Remembers the token ids that last entered the model's embedding, also through cached generation.

    Generation with a cache embeds one new token at a time, and ``HookedTransformer.generate`` embeds only the new token
    even without a cache while it runs the whole sequence; so inside :meth:`generation` single tokens are appended, and
    :meth:`tokens` gives the last ``n`` of them.
    """

    def __init__(self) -> None:
        self._ids: torch.Tensor | None = None
        self._masks: dict[tuple[tuple[int, ...], int], torch.Tensor] = {}
        self._prompt: int | None = None
        self.generating = False

    def observe(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Forward pre-hook for the embedding module: its input is a ``[batch, pos]`` tensor of ids."""
        ids = args[0] if args else next(iter((kwargs or {}).values()))
        if ids.ndim == 1:
            ids = ids[None]
        if self.generating and self._ids is not None and ids.shape == (self._ids.shape[0], 1):
            ids = torch.cat([self._ids, ids], dim=1)
        if not self.generating or self._prompt is None:
            self._prompt = ids.shape[1]
        self._set(ids)

    @contextmanager
    def generation(self) -> Generator[None]:
        """Append single tokens while inside, forget everything on entry and exit."""
        self._set(None)
        self._prompt, self.generating = None, True
        try:
            yield
        finally:
            self._set(None)
            self._prompt, self.generating = None, False

    def clear(self) -> None:
        """Forget the ids, so that a pass from embeddings cannot use those of an earlier pass."""
        self._set(None)

    def sequence(self, like: torch.Tensor) -> tuple[Int[torch.Tensor, "batch total"], int] | None:
        """The ids of the whole text that ``like`` (``[batch, pos, …]``) holds the last positions of, and how many of
        them came with the prompt: all of them outside :meth:`generation`. None in a pass that began from embeddings.

        Raises:
            SpliceError: when generation began from embeddings: where a new token stands is then unknown.
        """
        ids, (batch, pos) = self._ids, like.shape[:2]
        known = ids is not None and ids.shape[1] >= pos and ids.shape[0] in (1, batch)
        if ids is not None and self._prompt is not None and known:
            return ids.expand(batch, -1).to(like.device), self._prompt
        if self.generating:
            raise SpliceError(
                "Generation began from embeddings, so positions in the text are unknown: generate from token ids, or "
                "pass positions=None."
            )
        return None

    def _set(self, ids: torch.Tensor | None) -> None:
        self._ids = ids
        self._masks.clear()

    def mask(self, like: torch.Tensor, ids: tuple[int, ...]) -> Bool[torch.Tensor, "batch pos"]:
        """True at the positions of ``like`` that hold one of ``ids``; computed once a forward pass for all SAEs.

        Raises:
            SpliceError: as :meth:`tokens`.
        """
        key = (ids, like.shape[1])
        if key not in self._masks or self._masks[key].device != like.device:
            self._masks[key] = special_mask(self.tokens(like), ids)
        return self._masks[key]

    def tokens(self, like: torch.Tensor) -> Int[torch.Tensor, "batch pos"]:
        """The ids at the positions of ``like`` (``[batch, pos, …]``).

        Raises:
            SpliceError: when the pass did not start from token ids.
        """
        batch, pos = like.shape[:2]
        ids = self._ids
        if ids is None or ids.shape[1] < pos or ids.shape[0] not in (1, batch):
            raise SpliceError(
                "The model runs on embeddings, not on token ids, so special tokens cannot be told apart. "
                "Pass exclude_special_tokens=False to splice at every position."
            )
        return ids[:, -pos:].expand(batch, pos).to(like.device)
