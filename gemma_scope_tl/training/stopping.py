"""Ctrl-C and SIGTERM as a wish that is granted between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from gemma_scope_tl.errors import GemmaScopeError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(GemmaScopeError):
    """A run was stopped by a signal, after its checkpoint was written.

    Attributes:
        signal: the signal's number; command lines exit with 128 more.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class StopSignals:
    """Within the context, the first SIGINT or SIGTERM is remembered; a second one does what it always did.

    In other threads than the main one signals cannot be caught, and nothing is changed.

    Attributes:
        seen: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.seen: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _take_note(self, number: int, _frame: FrameType | None) -> None:
        self.seen = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
