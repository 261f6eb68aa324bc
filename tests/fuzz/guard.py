"""What a reader must not do while it reads: open or write other files, execute, take long, or take much memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

FORBIDDEN = ("pickle.", "os.", "subprocess.", "shutil.", "socket.", "ctypes.", "exec", "glob.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "socket.__new__")
SECONDS = 2.0  # of processor time, for a file of less than 64 KiB
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
HANG = 30  # seconds by the clock
GROWTH = 1 << 29  # bytes; a file of 64 KiB may inflate to 64 MiB, of which a few conversions may exist


class Violation(Exception):
    """A reader broke its contract. ``key`` is the same for what is probably the same defect."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


class Hang(BaseException):
    """Nobody catches this one by accident."""


class Guard:
    """Watches the process through an audit hook, the clock, and the peak of its memory."""

    watching: Guard | None = None
    hooked = False

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.seen: list[str] = []
        self.slowest = 0.0
        if not Guard.hooked:  # a hook cannot be taken back, so the process has one
            sys.addaudithook(_audit)
            Guard.hooked = True

    @contextmanager
    def watch(self, size: int) -> Iterator[None]:
        """Raise a :class:`Violation` for whatever the body does that a reader of ``size`` bytes must not do."""
        self.seen.clear()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = time.process_time()
        signal.signal(signal.SIGALRM, _hang)
        signal.setitimer(signal.ITIMER_REAL, HANG)
        Guard.watching = self
        try:
            yield
        except Hang:
            raise Violation("hang", f"still not done after {HANG} s") from None
        finally:
            Guard.watching = None
            signal.setitimer(signal.ITIMER_REAL, 0)
        took = time.process_time() - before
        self.slowest = max(self.slowest, took)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * UNIT
        if self.seen:
            raise Violation(f"audit {self.seen[0]}", f"the reader did: {'; '.join(self.seen)}")
        if took > SECONDS * max(1.0, size / (1 << 16)):
            raise Violation("slow", f"took {took:.1f} s for {size} bytes")
        if grown > GROWTH + 16 * size:
            raise Violation("memory", f"the peak grew by {grown >> 20} MiB for {size} bytes")

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """Keep what is forbidden of what happens."""
        if event.startswith("os.") and args and self._in_cache(args[0]):
            return
        if event == "open":
            if not self._may_open(args[0], args[1], args[2]):
                self.seen.append(f"open {str(args[0])[:200]!r}")
        elif event.startswith(FORBIDDEN) and event not in HARMLESS and not (event == "exec" and _is_import(args)):
            self.seen.append(event)

    def _may_open(self, path: Any, mode: Any, flags: Any) -> bool:
        writes = any(c in str(mode or "") for c in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not isinstance(path, (str, bytes)):
            return not writes  # a descriptor that is open already
        real = os.path.realpath(os.fsdecode(path))
        return self._in_cache(path) or (
            not writes and (real.startswith(self.folder) or real.endswith((".py", ".pyc", ".so")))
        )

    def _in_cache(self, path: Any) -> bool:
        """Whether a path is in the package's own cache, where stamps are written."""
        return isinstance(path, (str, bytes)) and os.path.realpath(os.fsdecode(path)).startswith(f"{self.folder}/cache")


def _audit(event: str, args: tuple[Any, ...]) -> None:
    guard = Guard.watching
    if guard is not None:
        guard.hear(event, args)


def _is_import(args: tuple[Any, ...]) -> bool:
    """Whether what is executed is a module that Python imports."""
    name = getattr(args[0], "co_filename", "") if args else ""
    return name.endswith(".py") or name.startswith("<frozen")


def _hang(signum: int, frame: FrameType | None) -> None:
    raise Hang
