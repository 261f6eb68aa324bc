"""Tracking of the text that a hooked model reads: token ids, padding and prompt, with caches and generation.

Masks and positions refer to the whole text, but both backends generate from single tokens, and users write their own
cached passes. So every pass reports its input to the tracker, and a key-value cache is marked with the text that it
contains.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.text.tokens import TextRead, joined_mask, special_mask, text_mask


@dataclass
class Generation:
    """The state of one generation, which may be paused: the text so far, and whether the prompt was read.

    A generation without ids starts from embeddings.

    Attributes:
        by_hugging_face: whether its passes come from Hugging Face's ``generate`` instead of TransformerLens's.
    """

    read: TextRead = field(default_factory=TextRead)
    entered: bool = False
    by_hugging_face: bool = False

    def __post_init__(self) -> None:
        self.prompt = self.read.ids

    @property
    def from_embeddings(self) -> bool:
        """Whether the prompt has no token ids."""
        return self.prompt is None

    def makes(self, ids: Int[torch.Tensor, "batch pos"]) -> bool:
        """Whether ``ids`` are the input of a pass of this generation without a cache: the prompt and generated ids."""
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
    """The known properties of a pass before its ids enter the model.

    Attributes:
        mask: mask over the whole text, None if unknown.
        cache: the key-value cache of the pass.
        seen: number of positions in the cache.
        own: whether the running generation makes the pass.
        came: whether the ids have entered the model.
    """

    mask: Bool[torch.Tensor, "batch total"] | None
    cache: Any
    seen: int
    own: bool
    came: bool = False


_ON_CACHE = "_gemma_scope_text"  # an attribute of key-value caches, which copies of a cache inherit


class TokenTracker:
    """A record of the token ids that last entered the model, separately for each thread.

    A pass without a key-value cache begins a text. A pass with a cache continues the text of the cache, even after
    other passes. While a generation is :meth:`running`, hooks and logits processors may run other passes. The caller,
    the cache and the text of a pass distinguish them. The end of the prompt does not change.
    """

    def __init__(self) -> None:
        self._here = threading.local()

    def __reduce__(self) -> tuple[type[TokenTracker], tuple[()]]:
        """Copies and pickles have an empty record."""
        return TokenTracker, ()

    @property
    def read(self) -> TextRead:
        """The text that the last pass of this thread has read."""
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
        """Number of active nested passes."""
        return getattr(self._here, "depth", 0)

    @property
    def notes(self) -> dict[Any, Any] | None:
        """What hooks keep until the innermost active pass ends, also with an error; None outside of passes."""
        return self._here.stack[-1][1] if self._depth else None

    @property
    def expected(self) -> ExpectedPass | None:
        """The announcement of :meth:`expecting` for the next ids; None after they came, or without an announcement."""
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
        """Record the input of a pass.

        Args:
            ids: the token ids; None for embeddings.
            mask: True at text, over these ids or over the whole text; None if unknown.
            cache: the key-value cache of the pass, if any.
            seen: number of positions that the model has read before.
            by_column: as in :class:`TextRead`.
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
                generation.read = read  # a part of the prompt does not replace the known whole
        self.remember(cache)

    def observe_embedded(self, ids: Int[torch.Tensor, "batch pos"], tokenizer: Any) -> None:
        """Record the input at the embedding of a backend that may embed single tokens outside of a pass.

        Inside :meth:`expecting` the ids belong to that pass. Otherwise, in a generation, they continue it.
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
        """The mask that :meth:`expecting` announced for ``ids``, or else a mask of their padding."""
        mask = None if self.expected is None else self.expected.mask
        return text_mask(ids, tokenizer) if mask is None else mask

    @contextmanager
    def expecting(self, mask: torch.Tensor | None, cache: Any, seen: int, own: bool = False) -> Generator[None]:
        """Announce the pass inside the block: its mask, its key-value cache, the number of positions in the cache, and
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
        """Enter a pass without an announcement."""
        depth = self._depth
        self.enter()
        try:
            yield
        finally:
            self.leave(depth)

    @contextmanager
    def reading(self, read: TextRead) -> Generator[None]:
        """Run parts of the model again, on the text that an earlier pass has read; restores this thread's state."""
        outer, before, masks = getattr(self._here, "expected", None), self.read, getattr(self._here, "masks", {})
        self._here.expected = None
        try:
            with self.under_way():
                self._set(read)
                yield
        finally:
            self._here.expected, self._here.read, self._here.masks = outer, before, masks

    def enter(self) -> None:
        """Begin a pass, which :meth:`leave` must end.

        A pass inside another one, such as from a hook, does not change the text of the outer pass.
        """
        stack: list[tuple[TextRead, dict[Any, Any]]] = self._here.__dict__.setdefault("stack", [])
        stack.append((self.read, {}))
        self._here.depth = self._depth + 1

    def leave(self, depth: int | None = None) -> None:
        """End the last pass, or all passes beyond a depth, some of which may have been interrupted."""
        stack: list[tuple[TextRead, dict[Any, Any]]] = self._here.__dict__.setdefault("stack", [])
        down_to = self._depth - 1 if depth is None else depth
        while stack and self._depth > down_to:
            read, _ = stack.pop()
            self._here.depth = self._depth - 1
            if self._depth or self.generating:
                self._set(read)

    def _owns(self, ids: Int[torch.Tensor, "batch pos"], by_hugging_face: bool) -> bool:
        """Whether the pass that begins now, without a cache, belongs to the running generation."""
        generation = self._generation
        if generation is None or generation.by_hugging_face != by_hugging_face:
            return False
        nested = self._depth > by_hugging_face  # a pass of Hugging Face's has begun already
        return not nested and generation.makes(ids)

    def history(self, ids: Int[torch.Tensor, "batch pos"], cache: Any, seen: int, own: bool) -> TextRead:
        """The text that a pass over ``ids`` continues: empty for a new text, not ``whole`` after an unknown one."""
        generation, batch = self._generation, ids.shape[0]
        of_generation = TextRead() if generation is None else generation.read
        if not seen:
            return of_generation if own else TextRead()
        if cache is None:
            return of_generation
        if generation is not None and not generation.entered and of_generation.ends(ids, seen):
            return of_generation  # a prompt whose beginning is in the cache already
        known, keys = getattr(cache, _ON_CACHE, (TextRead(), None))
        cropped = known.ids is not None and seen < known.ids.shape[1]
        if known.serves(batch, seen) and (keys is None or cropped or keys is _keys(cache)):
            return known
        goes_on = known.growing or (of_generation.ids is not None and of_generation.ids.shape[1] >= seen + ids.shape[1])
        return of_generation if goes_on and of_generation.serves(batch, seen) else TextRead(whole=False)

    def remember(self, cache: Any) -> None:
        """Mark a key-value cache with the text of the last pass."""
        with suppress(AttributeError):  # tuples in older libraries: positions are unknown in the next pass
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
        """Whether the next pass, over ``ids`` and without a cache, is the next step of the running generation.

        This concerns generation by TransformerLens.
        """
        return self._owns(ids, by_hugging_face=False)

    def growing_mask(self, total: int) -> Bool[torch.Tensor, "batch total"] | None:
        """The mask of the running generation if it has read ``total`` columns, else None."""
        generation = self._generation
        mask = None if generation is None or self._depth else generation.read.mask
        return mask if mask is not None and mask.shape[1] == total else None

    def holds_padding(self, cache: Any) -> bool:
        """Whether a key-value cache had padding when it was last marked."""
        known, _ = getattr(cache, _ON_CACHE, (TextRead(), None))
        return known.mask is not None and not bool(known.mask.all())

    def is_running(self, ids: torch.Tensor) -> bool:
        """Whether a generation from this tensor of ids is running and has not made its first pass."""
        generation = self._generation
        return generation is not None and generation.read.ids is ids and not generation.entered

    def clear(self) -> None:
        """Delete the ids, so that a pass from embeddings cannot use those of an earlier pass."""
        self._set(TextRead())

    def _set(self, read: TextRead) -> None:
        self._here.read, self._here.masks = read, {}

    # -- queries of hooks ---------------------------------------------------------------------------------------------

    def sequence(self, like: torch.Tensor) -> tuple[Bool[torch.Tensor, "batch total"], int] | None:
        """The mask of the whole text, and the number of columns of the prompt. None in a pass from embeddings.

        The last positions of the text are those of ``like`` (``[batch, pos, …]``).

        Raises:
            SpliceError: when generation started from embeddings, or the text of a cache is unknown, so that positions
                are unknown.
        """
        read, (batch, pos) = self.read, like.shape[:2]
        mask = read.mask
        if mask is not None and mask.shape[1] >= pos and mask.shape[0] in (1, batch) and read.prompt is not None:
            if read.whole:
                return mask.expand(batch, -1).to(like.device), read.prompt
            raise SpliceError(
                "The pass continues a key-value cache whose text is unknown, so positions are unknown too: make "
                "the cache with this model, use generate, or pass positions=None."
            )
        if self.generating:
            raise SpliceError(
                "Generation started from embeddings, so positions in the text are unknown: generate from token ids, or "
                "pass positions=None."
            )
        return None

    def mask(self, like: torch.Tensor, ids: tuple[int, ...], padding: bool) -> Bool[torch.Tensor, "batch pos"]:
        """True at the positions of ``like`` with one of ``ids``, or with padding; computed once per pass.

        Raises:
            SpliceError: as :meth:`tokens`.
        """
        tokens = self.tokens(like)
        masks: dict[Any, Any] = self._here.masks
        key = (ids, padding, like.shape[:2], like.device)
        if key not in masks:
            masks[key] = special_mask(tokens, ids)
            if padding and self.read.mask is not None:
                masks[key] |= ~self.read.mask[:, -like.shape[1] :].to(like.device)
        return masks[key]

    def once(self, key: Any, holder: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``make`` returns, computed once for a ``key`` in a pass over known ids.

        Args:
            key: hashable; it may have the id of ``holder``, which is kept alive for as long as the key.
            holder: any object.
            make: a function of the text that the pass has read.
        """
        if self.read.ids is None:
            return make()
        masks: dict[Any, Any] = self._here.masks
        if key not in masks:
            masks[key] = make(), holder
        return masks[key][0]

    def tokens(self, like: torch.Tensor) -> Int[torch.Tensor, "batch pos"]:
        """The ids at the positions of ``like`` (``[batch, pos, …]``).

        Raises:
            SpliceError: when the pass did not start from token ids.
        """
        batch, pos = like.shape[:2]
        ids = self.read.ids
        if ids is None or ids.shape[1] < pos or ids.shape[0] not in (1, batch):
            raise SpliceError(
                "The model runs on embeddings, not on token ids, so special tokens cannot be recognised. "
                "Pass exclude_special_tokens=False to splice at every position."
            )
        return ids[:, -pos:].expand(batch, pos).to(like.device)


def _keys(cache: Any) -> Any:
    """The keys of the first layer in a cache, which are another tensor after the rows of the cache are reordered."""
    layers = getattr(cache, "layers", None)
    return getattr(layers[0], "keys", None) if layers else None
