"""Large local files, written around the page cache and hashed on the way."""

from __future__ import annotations

import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from gemma_scope_tl.files import sync_folder, writing

BLOCK = 4096
"""Direct writes begin and end at multiples of it."""
CHUNK = 1 << 22
"""Bytes handed to the system at a time."""
WRITERS = 4
"""Files written at a time; each has two chunks under way."""
GO_ON = "What was whole before stays; write again to go on."
_UNFINISHED = ".unfinished"


def unfinished(name: str) -> str:
    """What a local file is called until it is whole."""
    return name + _UNFINISHED


class _Staging:
    """Aligned chunks that bytes pass through on their way to the disk, and the threads that write them.

    Shared by all files of the process: ``2 * WRITERS`` chunks, of which a file holds two while it writes.
    """

    def __init__(self) -> None:
        self.pairs: SimpleQueue[tuple[memoryview, memoryview]] = SimpleQueue()
        for _ in range(WRITERS):
            self.pairs.put((memoryview(mmap.mmap(-1, CHUNK)), memoryview(mmap.mmap(-1, CHUNK))))
        self.threads = ThreadPoolExecutor(2 * WRITERS, "store-disk")


_staging: list[_Staging] = []


def _shared_staging() -> _Staging:
    if not _staging:
        _staging.append(_Staging())
    return _staging[0]


class DirectFile:
    """A file that is written from its beginning to its end, under another name until it is whole.

    Bytes gather in a chunk; while it is written, it is hashed and the next one fills. Direct writes are of whole
    blocks: what is left of one waits, at most ``BLOCK - 1`` bytes a file.

    Raises:
        GemmaScopeError: on every call that the system refuses, naming the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(unfinished(path.name))
        self._digest, self._at, self._rest = hashlib.sha256(), 0, b""
        self._staging = _shared_staging()
        with writing(path, GO_ON):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self._open()

    def _open(self) -> int:
        """With direct writes if one block can be written so; the block is written over later."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        if direct := getattr(os, "O_DIRECT", 0):
            with suppress(OSError):
                handle = os.open(self._temporary, flags | direct, 0o644)
                try:
                    os.pwrite(handle, mmap.mmap(-1, BLOCK), 0)
                    return handle
                except OSError:
                    os.close(handle)
        return os.open(self._temporary, flags, 0o644)

    def write(self, data: memoryview) -> None:
        """Append bytes, which are on their way to the disk or in memory of this object when it returns."""
        pair = self._staging.pairs.get()
        under_way: list[Future[None] | None] = [None, None]
        hashing: Future[None] | None = None
        turn = 0
        try:
            while len(data) and not _failed(under_way[turn]):
                chunk, held = pair[turn], len(self._rest)
                taken = min(len(data), CHUNK - held)
                chunk[:held] = self._rest
                chunk[held : held + taken] = data[:taken]
                data, filled = data[taken:], held + taken
                whole = filled - filled % BLOCK
                self._rest = bytes(chunk[whole:filled])
                if hashing is not None:  # one chunk after the other; so the other chunk is hashed before it fills
                    hashing.result()
                hashing = self._staging.threads.submit(self._digest.update, chunk[:whole])
                under_way[turn] = self._staging.threads.submit(_pwrite, self._handle, chunk[:whole], self._at)
                self._at, turn = self._at + whole, 1 - turn
        finally:
            error = _failed(hashing) or _failed(under_way[turn]) or _failed(under_way[1 - turn])
            self._staging.pairs.put(pair)
        if error is not None:
            with writing(self._path, GO_ON):
                raise error

    def commit(self) -> str:
        """Bring everything to the disk, give the file its name, and return its sha256."""
        size = self._at + len(self._rest)
        with writing(self._path, GO_ON):
            if self._rest:  # a whole block, because writes are direct; then cut off what is too much
                block = mmap.mmap(-1, BLOCK)
                block[: len(self._rest)] = self._rest
                _pwrite(self._handle, memoryview(block), self._at)
            self._digest.update(self._rest)
            os.ftruncate(self._handle, size)
            os.fsync(self._handle)
            os.close(self._handle)
            self._handle = -1
            self._temporary.replace(self._path)
            sync_folder(self._path.parent)
        return self._digest.hexdigest()

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._temporary.unlink(missing_ok=True)


def _pwrite(handle: int, view: memoryview, at: int) -> None:
    while len(view):
        count = os.pwrite(handle, view, at)
        view, at = view[count:], at + count


def _failed(future: Future[None] | None) -> BaseException | None:
    return None if future is None else future.exception()
