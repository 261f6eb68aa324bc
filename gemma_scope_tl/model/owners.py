"""Which thread or task may run through what is attached to a model: the one that attached it.

All threads share a model's lists of hooks. So that no pass is changed by another thread's splice, everything that is
attached has an owner, a context, and a pass of another context that reaches it raises. A context that is copied
(``contextvars.copy_context().run``, ``asyncio.to_thread``) owns what the original owned.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.model.protocol import BindsToPass

_held: ContextVar[frozenset[Owner]] = ContextVar("gemma_scope_tl_held", default=frozenset())

ADVICE = (
    "enter splice() or hooks() in the thread that runs the model, start that thread with "
    "contextvars.copy_context().run, or give each thread its own copy of the model"
)


class Owner:
    """The context in which it is made.

    Args:
        thread: whether the whole thread owns, and not only this context: for what stays until it is removed.
    """

    def __init__(self, thread: bool = False) -> None:
        self._made_by: weakref.ref[threading.Thread] = weakref.ref(threading.current_thread())
        self._thread = thread
        _held.set(_held.get() | {self})

    def here(self) -> bool:
        """Whether this context owns, or the thread where that suffices."""
        return self in _held.get() or (self._thread and self._made_by() is threading.current_thread())

    def check(self, what: str) -> None:
        """Raise :class:`SpliceError` in a pass of another context."""
        if not self.here() and not _recomputing():
            raise SpliceError(f"{what} by another thread or task, and this pass would run through it: {ADVICE}.")

    def may_undo(self) -> bool:
        """Whether what is owned may be removed here: also in another context of the thread, or once that has ended."""
        made_by = self._made_by()
        return self in _held.get() or made_by is None or made_by is threading.current_thread() or not made_by.is_alive()

    def keep(self) -> None:
        """Let the whole thread own from now on."""
        self._thread = True

    def release(self) -> None:
        """Let this context own no longer."""
        _held.set(_held.get() - {self})

    def __deepcopy__(self, memo: Any) -> Owner:
        return Owner(thread=True)


class OwnedHook:
    """A hook function that raises in a pass of another context."""

    def __init__(self, fn: Callable[..., Any], owner: Owner) -> None:
        self.fn, self.owner = fn, owner

    def __call__(self, value: Any, hook: Any) -> Any:
        """The function's result."""
        self.owner.check("A hook was put here")
        return self.fn(value, hook=hook)

    def __repr__(self) -> str:
        return repr(self.fn)

    def bound_to(self, tracker: Any, tokenizer: Any) -> OwnedHook:
        """The same hook around the function bound to a pass, where it needs that."""
        bound = self.fn.bound_to(tracker, tokenizer) if isinstance(self.fn, BindsToPass) else self.fn
        return OwnedHook(bound, self.owner)

    def __deepcopy__(self, memo: Any) -> OwnedHook:
        """For a copied model. Functions are shared; what is bound to a model is copied."""
        fn = copy.deepcopy(self.fn, memo) if isinstance(self.fn, BindsToPass) else self.fn
        return OwnedHook(fn, copy.deepcopy(self.owner, memo))


class Turns:
    """Lets one context at a time hook a model, and no pass of another context meanwhile.

    TransformerLens counts nested blocks of hooks on the model, and fills caches by hooks. Blocks of two threads at once
    would remove each other's hooks and fill each other's caches.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scopes: list[Owner] = []
        self._passes: dict[int, int] = {}  # by thread, how many nested passes are under way

    @contextmanager
    def scope(self) -> Generator[Owner]:
        """A block of hooks.

        Raises:
            SpliceError: while another context has one, or runs a pass.
        """
        with self._lock:
            busy = any(thread != threading.get_ident() for thread in self._passes)
            if busy or not all(owner.here() for owner in self._scopes):
                raise SpliceError(
                    f"Another thread or task is using this model, so hooks cannot be put on it: {ADVICE}."
                )
            owner = Owner()
            self._scopes.append(owner)
        try:
            yield owner
        finally:
            with self._lock:
                self._scopes.remove(owner)
            owner.release()

    @contextmanager
    def forward(self) -> Generator[None]:
        """A forward pass.

        Raises:
            SpliceError: while another context has a block of hooks.
        """
        thread = threading.get_ident()
        with self._lock:
            for owner in self._scopes:
                owner.check("Hooks were put on this model")
            self._passes[thread] = self._passes.get(thread, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._passes[thread] -= 1
                if not self._passes[thread]:
                    del self._passes[thread]

    def __deepcopy__(self, memo: Any) -> Turns:
        return Turns()

    def __reduce__(self) -> Any:
        return Turns, ()


def _recomputing() -> bool:
    """Whether this is autograd's own thread, which runs parts of a checkpointed pass again."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
