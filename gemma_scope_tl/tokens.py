"""Which positions hold special tokens, and which token ids a hooked forward pass is looking at.

Gemma Scope was not trained on BOS, EOS or padding (paper, section 3.1): at those positions an SAE gives nonsense (a BOS
token can activate thousands of latents), so splicing and metrics leave them alone.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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


def left_padding_mask(tokens: Int[torch.Tensor, "batch pos"], tokenizer: Any) -> Int[torch.Tensor, "batch pos"] | None:
    """Attention mask (1 = attend) of padded rows, or None when none is padded."""
    mask = text_mask(tokens, tokenizer)
    return None if bool(mask.all()) else attendable(mask).long()


def attendable(mask: Bool[torch.Tensor, "batch pos"]) -> Bool[torch.Tensor, "batch pos"]:
    """A mask for attention, which must find something: True all over in a row of padding alone."""
    return mask | ~mask.any(dim=-1, keepdim=True)


@dataclass
class TextRead:
    """The text that a forward pass, or one generation, has read so far.

    Attributes:
        ids: ``[batch, total]``, None in a pass that began from embeddings.
        mask: ``[batch, total]``, True at text, False at padding.
        prompt: how many columns came with the prompt; the rest was generated.
        moved: ``[batch]``, by how many columns generation moved each row of the prompt to the right, None for not at
            all: new tokens follow on the last column, so padding on the right has to go to the left.
        whole: False where a key-value cache holds columns before these that are unknown.
    """

    ids: Int[torch.Tensor, "batch total"] | None = None
    mask: Bool[torch.Tensor, "batch total"] | None = None
    prompt: int | None = None
    moved: Int[torch.Tensor, " batch"] | None = None
    whole: bool = True

    def mask_over(self, total: int, batch: int) -> Bool[torch.Tensor, "batch total"] | None:
        """The mask of ``total`` columns, those behind the known ones being text; None when it is unknown."""
        if self.mask is None or batch % self.mask.shape[0] or not self.whole:
            return None
        known = self.mask[:, :total].repeat_interleave(batch // self.mask.shape[0], dim=0)
        return torch.nn.functional.pad(known, (0, total - known.shape[1]), value=True)


@dataclass
class Generation:
    """One generation, which may be paused: what it has read, and whether its prompt has entered the model.

    Without ids it begins from embeddings.
    """

    read: TextRead = field(default_factory=TextRead)
    entered: bool = False

    @property
    def from_embeddings(self) -> bool:
        """Whether its prompt has no token ids."""
        return self.read.ids is None


_ON_CACHE = "_gemma_scope_text"  # a key-value cache carries what it holds, so that copies of it do too


class TokenTracker:
    """Remembers the token ids that last entered the model, also through cached generation; for each thread its own.

    A pass without a key-value cache begins a text. A pass with one goes on with the text that the cache holds, whatever
    the model has read in between. While a generation is :meth:`running`, the prompt's end stays where it was.
    """

    def __init__(self) -> None:
        self._here = threading.local()

    def __reduce__(self) -> tuple[type[TokenTracker], tuple[()]]:
        """Copies and pickles have read nothing yet."""
        return TokenTracker, ()

    @property
    def read(self) -> TextRead:
        """What this thread's last pass has read."""
        return getattr(self._here, "read", None) or TextRead()

    @property
    def generating(self) -> bool:
        """Whether this thread is inside :meth:`running`."""
        return getattr(self._here, "generation", None) is not None

    def observe(
        self,
        ids: Int[torch.Tensor, "batch pos"] | None,
        mask: Bool[torch.Tensor, "batch width"] | None = None,
        cache: Any = None,
        seen: int = 0,
    ) -> None:
        """Take note of what enters the model.

        Args:
            ids: None for embeddings.
            mask: True at text, over these ids or over the whole text; None when unknown.
            cache: the key-value cache that the pass reads, if any.
            seen: how many positions are in the model already.
        """
        generation: Generation | None = getattr(self._here, "generation", None)
        if ids is None or (generation is not None and generation.from_embeddings):
            self._set(TextRead())
            return
        ids = ids[None] if ids.ndim == 1 else ids
        before = self._history(ids.shape[0], cache, seen)
        prompt = before.prompt if self.generating or (seen and ids.shape[1] == 1) else None
        if seen and before.ids is not None:
            rows = ids.shape[0] // before.ids.shape[0]
            ids = torch.cat([before.ids[:, :seen].repeat_interleave(rows, dim=0).to(ids.device), ids], dim=1)
        prompt = ids.shape[1] if prompt is None else prompt
        moved = before.moved if self.generating else None
        self._set(TextRead(ids, self._whole_mask(ids, mask, before), prompt, moved, before.whole))
        if generation is not None:
            generation.entered = True
        self.remember(cache)

    def observe_embedded(self, ids: Int[torch.Tensor, "batch pos"], tokenizer: Any) -> None:
        """:meth:`observe` at the embedding of a backend that may embed tokens outside of a pass, one by one.

        Inside :meth:`expecting` they belong to that pass; else, in a generation, they go on with it.
        """
        if (expected := self.expected) is not None:
            self.observe(ids, *expected)
            return
        generation: Generation | None = getattr(self._here, "generation", None)
        known = self.read.ids
        if generation is not None and generation.entered and known is not None:
            self.observe(ids, seen=known.shape[1])
        else:
            self.observe(ids, text_mask(ids, tokenizer))

    @property
    def expected(self) -> tuple[torch.Tensor | None, Any, int] | None:
        """What :meth:`expecting` announced for the pass at hand; None for a pass that nobody announced."""
        return getattr(self._here, "expected", None)

    def expected_mask(self, ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
        """The mask that :meth:`expecting` announced for ``ids``; without it, what their padding says."""
        mask = None if self.expected is None else self.expected[0]
        return text_mask(ids, tokenizer) if mask is None else mask

    @contextmanager
    def expecting(self, mask: torch.Tensor | None, cache: Any, seen: int) -> Generator[None]:
        """Announce the mask, the key-value cache and the positions already seen of the pass made inside."""
        before, self._here.expected = self.expected, (mask, cache, seen)
        try:
            yield
        finally:
            self._here.expected = before

    def mask_of_next(self, ids: Int[torch.Tensor, "batch pos"], cache: Any, seen: int) -> torch.Tensor | None:
        """The mask of a text with ``ids`` behind the ``seen`` positions of its cache; None when it is unknown."""
        mask = self._history(ids.shape[0], cache, seen).mask_over(seen + ids.shape[1], ids.shape[0])
        return None if mask is None else mask.to(ids.device)

    def _history(self, batch: int, cache: Any, seen: int) -> TextRead:
        """What was read before; not whole where that is unknown."""
        if not seen:
            return self.read if self.generating else TextRead()
        for read in (self.read if self.generating else TextRead(), getattr(cache, _ON_CACHE, TextRead())):
            if read.ids is None or not read.whole:
                continue
            if batch % read.ids.shape[0] == 0 and read.ids.shape[1] >= seen:
                return read
        return TextRead(whole=False)

    def _whole_mask(self, ids: torch.Tensor, mask: torch.Tensor | None, before: TextRead) -> torch.Tensor:
        """The mask over all of ``ids`` from the one given and that of the text before."""
        batch, total = ids.shape
        known = before.mask_over(total, batch)
        if self.generating and known is not None:
            return known.to(ids.device)
        if mask is not None and mask.shape[0] == batch and mask.shape[1] >= total:
            return mask[:, -total:].bool().to(ids.device)
        whole = torch.ones_like(ids, dtype=torch.bool) if known is None else known.to(ids.device)
        if mask is not None and mask.shape[0] == batch:  # of the new columns alone
            whole[:, -mask.shape[1] :] = mask.bool().to(ids.device)
        return whole

    def remember(self, cache: Any) -> None:
        """Note on a key-value cache that it holds the text read last."""
        with suppress(AttributeError):  # tuples, as older libraries have: positions are unknown in the next pass
            if cache is not None:
                setattr(cache, _ON_CACHE, self.read)

    @contextmanager
    def running(self, generation: Generation) -> Generator[None]:
        """Go on with a generation: its prompt stays the prompt. Afterwards this thread has read what it had before.

        Inside another one nothing changes.
        """
        if self.generating:
            yield
            return
        before = self.read
        self._here.generation = generation
        self._set(generation.read)
        try:
            yield
        finally:
            generation.read, self._here.generation = self.read, None
            self._set(before)

    def clear(self) -> None:
        """Forget the ids, so that a pass from embeddings cannot use those of an earlier pass."""
        self._set(TextRead())

    def sequence(self, like: torch.Tensor) -> tuple[Bool[torch.Tensor, "batch total"], int] | None:
        """Where the whole text that ``like`` (``[batch, pos, …]``) holds the last positions of is text and not padding,
        and how many columns came with the prompt. None in a pass that began from embeddings.

        Raises:
            SpliceError: when generation began from embeddings, or a cache holds a text that is unknown: where a token
                stands is then unknown.
        """
        read, (batch, pos) = self.read, like.shape[:2]
        mask = read.mask
        if mask is not None and mask.shape[1] >= pos and mask.shape[0] in (1, batch) and read.prompt is not None:
            if read.whole:
                return mask.expand(batch, -1).to(like.device), read.prompt
            raise SpliceError(
                "The pass goes on from a key-value cache whose text is unknown, so positions in the text are too: make "
                "the cache with this model, use generate, or pass positions=None."
            )
        if self.generating:
            raise SpliceError(
                "Generation began from embeddings, so positions in the text are unknown: generate from token ids, or "
                "pass positions=None."
            )
        return None

    def _set(self, read: TextRead) -> None:
        self._here.read, self._here.masks = read, {}

    def mask(self, like: torch.Tensor, ids: tuple[int, ...], padding: bool) -> Bool[torch.Tensor, "batch pos"]:
        """True at the positions of ``like`` that hold one of ``ids``, or padding of any id; computed once a pass.

        Raises:
            SpliceError: as :meth:`tokens`.
        """
        tokens = self.tokens(like)
        masks: dict[Any, torch.Tensor] = self._here.masks
        key = (ids, padding, like.shape[:2], like.device)
        if key not in masks:
            masks[key] = special_mask(tokens, ids)
            if padding and self.read.mask is not None:
                masks[key] |= ~self.read.mask[:, -like.shape[1] :].to(like.device)
        return masks[key]

    def tokens(self, like: torch.Tensor) -> Int[torch.Tensor, "batch pos"]:
        """The ids at the positions of ``like`` (``[batch, pos, …]``).

        Raises:
            SpliceError: when the pass did not start from token ids.
        """
        batch, pos = like.shape[:2]
        ids = self.read.ids
        if ids is None or ids.shape[1] < pos or ids.shape[0] not in (1, batch):
            raise SpliceError(
                "The model runs on embeddings, not on token ids, so special tokens cannot be told apart. "
                "Pass exclude_special_tokens=False to splice at every position."
            )
        return ids[:, -pos:].expand(batch, pos).to(like.device)
