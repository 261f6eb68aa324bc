"""Which text a hooked model reads: token ids, padding and prompt, through key-value caches and generation.

Both backends generate from single tokens, and users write cached passes of their own, while masks and positions are
about the whole text. A pass tells the tracker what enters the model, and a key-value cache is marked with the text that
it holds.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.text.tokens import TextRead, joined_mask, special_mask, text_mask


@dataclass
class Generation:
    """One generation, which may be paused: what it has read, and whether its prompt has entered the model.

    One that has no ids begins from embeddings.

    Attributes:
        by_hugging_face: whether its passes are made by Hugging Face's ``generate`` instead of TransformerLens's.
    """

    read: TextRead = field(default_factory=TextRead)
    entered: bool = False
    by_hugging_face: bool = False

    def __post_init__(self) -> None:
        self.prompt = self.read.ids

    @property
    def from_embeddings(self) -> bool:
        """Whether its prompt has no token ids."""
        return self.prompt is None

    def makes(self, ids: Int[torch.Tensor, "batch pos"]) -> bool:
        """Whether a pass of this generation without a cache reads ``ids``: the prompt, and what was generated."""
        if self.prompt is None or ids.shape[0] % self.prompt.shape[0]:
            return False
        width = min(ids.shape[1], self.prompt.shape[1])
        may_begin_with_a_part = self.by_hugging_face and not self.entered  # Hugging Face can split a long prompt
        if width < self.prompt.shape[1] and not may_begin_with_a_part:
            return False
        prompt = self.prompt[:, :width].repeat_interleave(ids.shape[0] // self.prompt.shape[0], dim=0)
        return torch.equal(prompt.to(ids.device), ids[:, :width])


@dataclass
class ExpectedPass:
    """What is known of a pass before its ids enter the model.

    Attributes:
        mask: over the whole text, None when unknown.
        cache: the key-value cache that it reads.
        seen: how many positions that holds.
        own: whether the running generation makes the pass.
        came: whether the ids have entered.
    """

    mask: Bool[torch.Tensor, "batch total"] | None
    cache: Any
    seen: int
    own: bool
    came: bool = False


_ON_CACHE = "_gemma_scope_text"  # an attribute of key-value caches, so that copies of a cache have it too


class TokenTracker:
    """Remembers the token ids that last entered the model, separately for each thread.

    A pass without a key-value cache begins a text. A pass with one continues the text that the cache holds, whatever
    the model has read in between. While a generation is :meth:`running`, hooks and logits processors may make passes of
    their own; the caller, the cache and the text of a pass say which it is. The end of the prompt does not move.
    """

    def __init__(self) -> None:
        self._here = threading.local()

    def __reduce__(self) -> tuple[type[TokenTracker], tuple[()]]:
        """Copies and pickles begin empty."""
        return TokenTracker, ()

    @property
    def read(self) -> TextRead:
        """What this thread's last pass has read."""
        return getattr(self._here, "read", None) or TextRead()

    @property
    def _generation(self) -> Generation | None:
        return getattr(self._here, "generation", None)

    @property
    def generating(self) -> bool:
        """Whether this thread is inside :meth:`running`."""
        return self._generation is not None

    @property
    def _depth(self) -> int:
        """How many nested passes are under way."""
        return getattr(self._here, "depth", 0)

    @property
    def expected(self) -> ExpectedPass | None:
        """What :meth:`expecting` announced for the next ids; None once they came, or without an announcement."""
        found: ExpectedPass | None = getattr(self._here, "expected", None)
        return None if found is None or found.came else found

    # -- what enters the model ----------------------------------------------------------------------------------------

    def observe(
        self,
        ids: Int[torch.Tensor, "batch pos"] | None,
        mask: Bool[torch.Tensor, "batch width"] | None = None,
        cache: Any = None,
        seen: int = 0,
        by_column: bool = False,
    ) -> None:
        """Record what enters the model.

        Args:
            ids: None for embeddings.
            mask: True at text, over these ids or over the whole text; None when unknown.
            cache: the key-value cache that the pass reads, if any.
            seen: how many positions are in the model already.
            by_column: see :class:`TextRead`.
        """
        generation, expected = self._generation, self.expected
        if expected is not None:
            expected.came = True
        if ids is None or (generation is not None and generation.from_embeddings and expected is None):
            self._set(TextRead())
            return
        ids = ids[None] if ids.ndim == 1 else ids
        own = self._owns(ids, by_hugging_face=True) if expected is None else expected.own
        before = self.history(ids, cache, seen, own)
        prompt = before.prompt if before.growing or (seen and ids.shape[1] == 1) else None
        if seen and before.ids is not None:
            rows = ids.shape[0] // before.ids.shape[0]
            ids = torch.cat([before.ids[:, :seen].repeat_interleave(rows, dim=0).to(ids.device), ids], dim=1)
        prompt = ids.shape[1] if prompt is None else prompt
        whole_mask = joined_mask(ids, mask, before, known_first=before.growing and generation is not None)
        by_column = before.by_column if seen else by_column
        read = TextRead(ids, whole_mask, prompt, before.moved, before.whole, before.growing, by_column)
        self._set(read)
        if generation is not None and before.growing:
            generation.entered = True
            if generation.read.ids is not None and ids.shape[1] >= generation.read.ids.shape[1]:
                generation.read = read  # a part of the prompt leaves the whole known
        self.remember(cache)

    def observe_embedded(self, ids: Int[torch.Tensor, "batch pos"], tokenizer: Any) -> None:
        """:meth:`observe` at the embedding of a backend that may embed tokens outside of a pass, one by one.

        Inside :meth:`expecting` they belong to that pass; otherwise, in a generation, they continue it.
        """
        generation, expected = self._generation, self.expected
        if expected is not None:
            self.observe(ids, expected.mask, expected.cache, expected.seen)
        elif self._depth:  # a hook embeds other ids during a pass
            return
        elif generation is None:
            self.observe(ids, text_mask(ids, tokenizer))
        else:
            known = generation.read.ids if generation.entered else None
            self._here.expected = ExpectedPass(None, None, 0, own=known is not None or self._owns(ids, False))
            try:
                self.observe(ids, seen=0 if known is None else known.shape[1])
            finally:
                self._here.expected = None

    def expected_mask(self, ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
        """The mask that :meth:`expecting` announced for ``ids``; otherwise that of their padding."""
        mask = None if self.expected is None else self.expected.mask
        return text_mask(ids, tokenizer) if mask is None else mask

    @contextmanager
    def expecting(self, mask: torch.Tensor | None, cache: Any, seen: int, own: bool = False) -> Generator[None]:
        """Announce the pass that is made inside: its mask, its key-value cache, how many positions that holds, and
        whether the running generation makes the pass."""
        outer = getattr(self._here, "expected", None)
        self._here.expected = ExpectedPass(mask, cache, seen, own)
        try:
            with self.under_way():
                yield
        finally:
            self._here.expected = outer

    @contextmanager
    def under_way(self) -> Generator[None]:
        """A pass of which nothing has to be announced."""
        depth = self._depth
        self.enter()
        try:
            yield
        finally:
            self.leave(depth)

    def enter(self) -> None:
        """Begin a pass, which :meth:`leave` must end. A pass inside another one, made by a hook, does not change what
        the outer one has read."""
        stack: list[TextRead] = self._here.__dict__.setdefault("stack", [])
        stack.append(self.read)
        self._here.depth = self._depth + 1

    def leave(self, depth: int | None = None) -> None:
        """End the pass that began last, or all beyond a depth, some of which may have been interrupted."""
        stack: list[TextRead] = self._here.__dict__.setdefault("stack", [])
        down_to = self._depth - 1 if depth is None else depth
        while stack and self._depth > down_to:
            read = stack.pop()
            self._here.depth = self._depth - 1
            if self._depth or self.generating:
                self._set(read)

    def _owns(self, ids: Int[torch.Tensor, "batch pos"], by_hugging_face: bool) -> bool:
        """Whether the running generation makes the pass that begins now, without a cache."""
        generation = self._generation
        if generation is None or generation.by_hugging_face != by_hugging_face:
            return False
        nested = self._depth > by_hugging_face  # a pass of Hugging Face's has begun already
        return not nested and generation.makes(ids)

    def history(self, ids: Int[torch.Tensor, "batch pos"], cache: Any, seen: int, own: bool) -> TextRead:
        """The text that a pass over ``ids`` continues: empty where a text begins, not ``whole`` after an unknown
        text."""
        generation, batch = self._generation, ids.shape[0]
        of_generation = TextRead() if generation is None else generation.read
        if not seen:
            return of_generation if own else TextRead()
        if cache is None:
            return of_generation
        if generation is not None and not generation.entered and of_generation.ends(ids, seen):
            return of_generation  # a prompt whose beginning the cache holds already
        known, keys = getattr(cache, _ON_CACHE, (TextRead(), None))
        cropped = known.ids is not None and seen < known.ids.shape[1]
        if known.serves(batch, seen) and (keys is None or cropped or keys is _keys(cache)):
            return known
        goes_on = known.growing or (of_generation.ids is not None and of_generation.ids.shape[1] >= seen + ids.shape[1])
        return of_generation if goes_on and of_generation.serves(batch, seen) else TextRead(whole=False)

    def remember(self, cache: Any) -> None:
        """Mark a key-value cache with the text that was read last."""
        with suppress(AttributeError):  # tuples, as older libraries have: positions are unknown in the next pass
            if cache is not None and self.read.ids is not None:
                setattr(cache, _ON_CACHE, (self.read, _keys(cache)))

    @contextmanager
    def running(self, generation: Generation) -> Generator[None]:
        """Continue a generation inside the block, and restore this thread's state at its end."""
        outer, expected = self._generation, getattr(self._here, "expected", None)
        before, depth = self.read, self._depth
        self._here.generation, self._here.expected, self._here.depth = generation, None, 0
        self._set(generation.read)
        try:
            yield
        finally:
            self._here.generation, self._here.expected, self._here.depth = outer, expected, depth
            self._set(before)

    def goes_on(self, ids: Int[torch.Tensor, "batch pos"]) -> bool:
        """Whether a pass over ``ids`` without a cache, which is about to begin, is the next step of the running
        generation, made by TransformerLens."""
        return self._owns(ids, by_hugging_face=False)

    def growing_mask(self, total: int) -> Bool[torch.Tensor, "batch total"] | None:
        """The mask of the running generation if it has read ``total`` columns, otherwise None."""
        generation = self._generation
        mask = None if generation is None or self._depth else generation.read.mask
        return mask if mask is not None and mask.shape[1] == total else None

    def holds_padding(self, cache: Any) -> bool:
        """Whether a key-value cache held padding when it was last marked."""
        known, _ = getattr(cache, _ON_CACHE, (TextRead(), None))
        return known.mask is not None and not bool(known.mask.all())

    def is_running(self, ids: torch.Tensor) -> bool:
        """Whether a generation from this tensor of ids is running whose first pass has not been made."""
        generation = self._generation
        return generation is not None and generation.read.ids is ids and not generation.entered

    def clear(self) -> None:
        """Forget the ids, so that a pass from embeddings cannot use those of an earlier pass."""
        self._set(TextRead())

    def _set(self, read: TextRead) -> None:
        self._here.read, self._here.masks = read, {}

    # -- what hooks ask -----------------------------------------------------------------------------------------------

    def sequence(self, like: torch.Tensor) -> tuple[Bool[torch.Tensor, "batch total"], int] | None:
        """The mask of the whole text, whose last positions are those of ``like`` (``[batch, pos, …]``), and the number
        of columns of the prompt. None in a pass that began from embeddings.

        Raises:
            SpliceError: when generation began from embeddings, or a cache holds a text that is unknown: positions
                are then unknown.
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

    def mask(self, like: torch.Tensor, ids: tuple[int, ...], padding: bool) -> Bool[torch.Tensor, "batch pos"]:
        """True at the positions of ``like`` that hold one of ``ids``, or padding of any id; computed once in a pass.

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


def _keys(cache: Any) -> Any:
    """The keys of the first layer in a cache: another tensor once the rows of the cache were reordered."""
    layers = getattr(cache, "layers", None)
    return getattr(layers[0], "keys", None) if layers else None
