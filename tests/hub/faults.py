"""What a test can make go wrong, for which files, and how often."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

Host = Literal["hub", "cdn"]


@dataclass
class Fault:
    """One thing that goes wrong. Several fields may be set.

    Attributes:
        times: for how many requests; None for all.
        methods: which requests it concerns.
        host: the Hub, the host that serves LFS files, or None for both.
        status: answer with this error and nothing else.
        headers: further headers of the answer (with or without ``status``).
        code: the Hub's word for the error (``X-Error-Code``), with ``status``.
        message: its text, with ``status``.
        cut_after: close the connection after this many bytes of the body.
        drop: leave out this many bytes at the end, in the headers as well.
        corrupt: flip the bits of the body's first byte.
        ignore_range: answer 200 with the whole file although a range was asked for.
        shift_range: claim a range this many bytes off.
        etag: another ETag than the file's.
        after: do what was asked, and only then answer with ``status``.
        cut_upload: take so many bytes of the request's body, then close the connection.
        stall: wait so many seconds before a request's body is read.
    """

    times: int | None = 1
    methods: tuple[str, ...] = ("GET",)
    host: Host | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    message: str = "Something went wrong"
    cut_after: int | None = None
    drop: int = 0
    corrupt: bool = False
    ignore_range: bool = False
    shift_range: int = 0
    etag: str | None = None
    after: bool = False
    cut_upload: int | None = None
    stall: float = 0.0


class FaultBook:
    """Faults by pattern of ``owner/name/file``; the first that applies and is not used up is taken."""

    def __init__(self) -> None:
        self._faults: list[tuple[str, Fault]] = []
        self._lock = threading.Lock()

    def add(self, pattern: str, fault: Fault) -> None:
        with self._lock:
            self._faults.append((pattern, fault))

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, path: str, method: str, host: Host) -> Fault:
        """The fault of a request; an empty one where nothing goes wrong."""
        with self._lock:
            for pattern, fault in self._faults:
                concerned = method in fault.methods and fault.host in (None, host) and fnmatchcase(path, pattern)
                if concerned and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return Fault()
