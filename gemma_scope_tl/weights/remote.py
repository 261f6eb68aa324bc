"""Reading parts of a file on the Hub without downloading the rest.

The file of an SAE of a million latents has 19 GB, and ten of its decoder rows have 92 kB. :class:`RemoteFile` reads
such parts with HTTP range requests. It is a binary file object, so ``zipfile.ZipFile(RemoteFile(...))`` works.
"""

from __future__ import annotations

import io
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from gemma_scope_tl.weights.checks import weights_error
from gemma_scope_tl.weights.ranges import HubAddress, RangeReader

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

TAIL = 1 << 16  # bytes at the end of a file that are fetched together, because a zip has its index there
LEAST = 512  # bytes: a smaller request takes as long
GAP = 1 << 12  # bytes: ranges closer than this are fetched as one
THREADS = 8
_BLOCKS = 64
_LARGEST_BLOCK = 1 << 16


class RemoteFile(io.RawIOBase):
    """A file of a Hub repository, read by HTTP ranges: a seekable binary file object for several threads.

    The first read near the end fetches the last 64 KiB in one request. Any other read fetches the requested bytes, at
    least 512. Small parts are cached, so reading a header in steps needs one request. The revision is resolved once to
    a commit, so all parts come from the same version of the file.

    Args:
        repo: ``owner/name``.
        filename: the file's path inside the repository.
        revision: branch, tag or commit; None for the main branch.

    Attributes:
        size: bytes of the whole file.
        etag: the Hub's hash of the content, which is the sha256 for LFS files.
        commit: the commit that is read.
        source: the file's name, for messages.

    Raises:
        WeightsError: when the file does not exist or is not readable, or the Hub cannot be reached. Reads raise it too.
    """

    def __init__(self, repo: str, filename: str, revision: str | None = None) -> None:
        super().__init__()
        address = HubAddress(repo, filename, revision)
        self._reader = RangeReader(address)
        self.source = str(address)
        self.size = self._reader.size
        self.etag = self._reader.etag
        self.commit = self._reader.commit
        self._position = 0
        self._tail_start = max(self.size - TAIL, 0)
        self._tail: bytes | None = None
        self._tail_lock = threading.Lock()
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._blocks_lock = threading.Lock()

    @property
    def requests(self) -> int:
        """Number of HTTP requests so far, including failed tries."""
        return self._reader.requests

    @property
    def bytes_received(self) -> int:
        """Bytes of content received so far."""
        return self._reader.bytes_received

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``. The position of the file does not change.

        Raises:
            WeightsError: when the file has no such part, or it cannot be read.
        """
        _check_range(self.source, self.size, offset, length)
        if length == 0:
            return b""
        stop = offset + length
        if stop > self._tail_start:
            return self._read_into_tail(offset, stop)
        if (kept := self._kept(offset, stop)) is not None:
            return kept
        data = self._reader.read(offset, min(max(stop, offset + LEAST), self._tail_start))
        self._keep(offset, data)
        return data[:length]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each ``(offset, length)``, as :meth:`read_at`, with few requests.

        Ranges less than 4 KiB apart are fetched as one, and up to 8 requests run at the same time.

        Raises:
            WeightsError: the first error of any range.
        """
        for offset, length in ranges:
            _check_range(self.source, self.size, offset, length)
        merged = _merge([(offset, offset + length) for offset, length in ranges if length])
        if len(merged) > 1:
            pool = ThreadPoolExecutor(min(THREADS, len(merged)), thread_name_prefix="ranges")
            try:
                parts = list(pool.map(lambda span: self.read_at(span[0], span[1] - span[0]), merged))
            finally:
                pool.shutdown(cancel_futures=True)
        else:
            parts = [self.read_at(start, stop - start) for start, stop in merged]
        return [_cut(merged, parts, offset, length) for offset, length in ranges]

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position relative to the start, the current position or the end."""
        self._check_open()
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            raise ValueError(f"whence {whence} is not 0 (start), 1 (position) or 2 (end)")
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if target < 0:
            raise ValueError(f"cannot seek to {target}, before the start of {self.source}")
        self._position = target
        return target

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill a buffer from the current position, and return the number of bytes read, 0 at the end."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        length = min(len(view), max(self.size - self._position, 0))
        view[:length] = self.read_at(self._position, length) if length else b""
        self._position += length
        return length

    def readall(self) -> bytes:
        """Read from the position to the end in one request; ``RawIOBase`` would send one for every 8 KiB."""
        self._check_open()
        data = self.read_at(self._position, self.size - self._position) if self._position < self.size else b""
        self._position += len(data)
        return data

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self.source} is closed")

    def _read_into_tail(self, offset: int, stop: int) -> bytes:
        """Read a range that overlaps the last 64 KiB, which are fetched once and cached."""
        start = self._tail_start
        with self._tail_lock:
            if self._tail is None:
                data = self._reader.read(min(offset, start), self.size)
                self._tail = data[start - min(offset, start) :]
                return data[offset - min(offset, start) :][: stop - offset]
        before = self.read_at(offset, start - offset) if offset < start else b""
        return before + self._tail[max(offset - start, 0) : stop - start]

    def _kept(self, offset: int, stop: int) -> bytes | None:
        with self._blocks_lock:
            for start, block in self._blocks.items():
                if start <= offset and stop <= start + len(block):
                    self._blocks.move_to_end(start)
                    return block[offset - start : stop - start]
        return None

    def _keep(self, offset: int, data: bytes) -> None:
        if len(data) > _LARGEST_BLOCK:
            return
        with self._blocks_lock:
            self._blocks[offset] = data
            while len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)


def _check_range(source: str, size: int, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > size:
        what = f"has {size} bytes, so it lacks {length} bytes at {offset}"
        raise weights_error(source, what, "The file is truncated, or its index is corrupt.")


def _merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans ``(start, stop)``, with overlapping and close ones merged."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start - merged[-1][1] < GAP:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _cut(merged: list[tuple[int, int]], parts: list[bytes], offset: int, length: int) -> bytes:
    if length == 0:
        return b""
    place = bisect_right(merged, offset, key=lambda span: span[0]) - 1
    start = merged[place][0]
    return parts[place][offset - start : offset - start + length]
