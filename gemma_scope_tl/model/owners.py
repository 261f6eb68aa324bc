"""Ownership of hooks and SAEs by threads and tasks.

All threads share the lists of hooks of a model. To keep a splice in one thread from changing passes of another thread,
every attached object is owned by a context, and a pass of another context that reaches the object raises. A copy of a
context (``contextvars.copy_context().run``, ``asyncio.to_thread``) owns the same objects.
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
from gemma_scope_tl.model.protocol import BindsToPass, HasSites

_held: ContextVar[frozenset[Owner]] = ContextVar("gemma_scope_tl_held", default=frozenset())

ADVICE = (
    "enter splice() or hooks() in the thread that runs the model, start that thread with "
    "contextvars.copy_context().run, or give each thread its own copy of the model"
)


class Owner:
    """An owner, which is the context that creates it.

    Args:
        thread: whether the whole thread is the owner, and not only this context, as for objects without a ``with``
            block.
    """

    def __init__(self, thread: bool = False) -> None:
        self._made_by: weakref.ref[threading.Thread] = weakref.ref(threading.current_thread())
        self._thread = thread
        _held.set(_held.get() | {self})

    def here(self) -> bool:
        """Whether the current context is the owner, or the current thread if the whole thread is the owner."""
        return self in _held.get() or (self._thread and self._made_by() is threading.current_thread())

    def check(self, what: str) -> None:
        """Raise :class:`SpliceError` if the current context is not the owner."""
        if not self.here() and not _recomputing():
            raise SpliceError(f"{what} by another thread or task, but this pass would run through it: {ADVICE}.")

    def may_undo(self) -> bool:
        """Whether the object may be removed here, also by other contexts of the thread, or after the thread ended."""
        made_by = self._made_by()
        return self in _held.get() or made_by is None or made_by is threading.current_thread() or not made_by.is_alive()

    def keep(self) -> None:
        """Make the whole thread the owner."""
        self._thread = True

    def release(self) -> None:
        """End the ownership of this context."""
        _held.set(_held.get() - {self})

    def __deepcopy__(self, memo: Any) -> Owner:
        return Owner(thread=True)


class OwnedHook:
    """A hook function that raises in a pass of another context than its owner."""

    def __init__(self, fn: Callable[..., Any], owner: Owner) -> None:
        self.fn, self.owner = fn, owner

    def __call__(self, value: Any, hook: Any) -> Any:
        """The result of the function."""
        self.owner.check("A hook was put here")
        return self.fn(value, hook=hook)

    def __repr__(self) -> str:
        return repr(self.fn)

    def bound_to(self, model: HasSites) -> OwnedHook:
        """The same hook, with the function bound to a pass if it needs that."""
        bound = self.fn.bound_to(model) if isinstance(self.fn, BindsToPass) else self.fn
        return OwnedHook(bound, self.owner)

    def __deepcopy__(self, memo: Any) -> OwnedHook:
        """Copy the hook for a copied model. Functions are shared, and objects that are bound to a model are copied."""
        fn = copy.deepcopy(self.fn, memo) if isinstance(self.fn, BindsToPass) else self.fn
        return OwnedHook(fn, copy.deepcopy(self.owner, memo))


class Turns:
    """A lock that lets one context at a time hook a model, without passes of other contexts during that time.

    TransformerLens counts nested blocks of hooks on the model, and fills caches by hooks. Simultaneous blocks of two
    threads would remove each other's hooks and fill each other's caches.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scopes: list[Owner] = []
        self._passes: dict[int, int] = {}  # the number of active nested passes, by thread

    @contextmanager
    def scope(self) -> Generator[Owner]:
        """Enter a block of hooks.

        Raises:
            SpliceError: while another context has a block, or runs a pass.
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
        """Enter a forward pass.

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
    """Whether this is a thread of autograd, which repeats parts of a checkpointed pass."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
