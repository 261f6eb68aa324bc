"""The positions of arrays in a file, and a single pass that reads, checks and converts them.

In both file formats an array is a run of bytes in the file, stored unchanged or deflated.
:func:`stream` walks such runs in the order of the file, chunk by chunk, through one buffer of a few MiB, and passes
every chunk to all its consumers: the CRC-32, a sha256 of the whole file, the range of values, a destination of another
dtype or device. So a file is read once for any number of consumers, and only the destinations are allocated.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch

from gemma_scope_tl.weights.checks import weights_error

CHUNK = 1 << 22  # bytes; fits into the cache of a core between the checksum and the conversion
_INFLATED = 1 << 20  # bytes inflated at a time: zlib copies them and the input that it has not consumed yet
_THREADS = 2  # arrays read at a time: an SAE has two large ones

Sink = Callable[[int, torch.Tensor], None]
"""Takes the index of the first element and a 1-D chunk of elements, which is overwritten afterwards."""


class Digest(Protocol):
    """The method of hashlib objects that this module uses."""

    def update(self, data: memoryview, /) -> None:
        """Add the next bytes."""
        ...


@dataclass(frozen=True)
class ArrayLayout:
    """The description of one array in a file, from the headers alone.

    Attributes:
        name: the name in the file.
        shape, dtype: the shape and dtype in the header.
        swapped: whether the byte order differs from that of the machine.
        fortran: whether the array is stored in column-major order.
        start: offset in the file of the first byte of the run: of the npy header if there is one, else of the data.
        header_size: bytes of the npy header, inflated; 0 in safetensors.
        stored_size: bytes of the run in the file.
        deflated: whether the run is compressed.
        crc: CRC-32 of header and data; None if the format has no checksum.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stored_size: int
    swapped: bool = False
    fortran: bool = False
    header_size: int = 0
    deflated: bool = False
    crc: int | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the data, inflated and without the header."""
        return self.count * self.dtype.itemsize

    @property
    def mappable(self) -> bool:
        """Whether the data can be memory-mapped."""
        return not (self.deflated or self.swapped or self.fortran)

    def element_offset(self, index: int) -> int:
        """Offset in the file of a stored element, in bytes, by its index in the order of the file."""
        return self.start + self.header_size + index * self.dtype.itemsize


def map_array(path: Path, layout: ArrayLayout) -> torch.Tensor:
    """Memory-map a stored array. Pages are read on access, and copied on a write, which never changes the file."""
    data = np.memmap(path, np.uint8, "c", offset=layout.start + layout.header_size, shape=(layout.nbytes,))
    return torch.from_numpy(data).view(layout.dtype).reshape(layout.shape)


def stream(
    path: Path,
    layouts: Mapping[str, ArrayLayout],
    sinks: Mapping[str, Sequence[Sink]],
    verify: Collection[str] = (),
    digest: Digest | None = None,
) -> None:
    """Read each array once from start to end: one after the other with a ``digest``, and two at a time without.

    Args:
        path: the file.
        layouts: all arrays of the file, which must not overlap, by arbitrary names.
        sinks: the consumers of the chunks of each array. Arrays without sinks are skipped if there is no ``digest``.
        verify: names of the arrays whose CRC-32 is compared.
        digest: receives every byte of the file, including those between the arrays.

    Raises:
        WeightsError: when the file ends early, compressed data is broken or longer than declared, or a CRC is wrong.
    """
    ordered = sorted(layouts.items(), key=lambda item: item[1].start)
    if digest is None:
        wanted = [(layout, sinks[name], name in verify) for name, layout in ordered if sinks.get(name)]
        with ThreadPoolExecutor(_THREADS) as pool:  # reading and checksums release the GIL
            for done in [pool.submit(_stream_one, path, *one) for one in wanted]:
                done.result()
        return
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        for name, layout in ordered:
            _hash_until(file, layout.start, buffer, digest)
            pieces = _pieces(path, file, layout, buffer, digest)
            _deliver(path, layout, pieces, sinks.get(name, ()), name in verify)
        _hash_until(file, None, buffer, digest)


def _stream_one(path: Path, layout: ArrayLayout, sinks: Sequence[Sink], verify: bool) -> None:
    with path.open("rb", buffering=0) as file:
        file.seek(layout.start)
        buffer = bytearray(min(_INFLATED if layout.deflated else CHUNK, CHUNK, layout.stored_size))
        pieces = _pieces(path, file, layout, buffer, None)
        _deliver(path, layout, pieces, sinks, verify)


def _deliver(
    path: Path, layout: ArrayLayout, pieces: Iterator[memoryview], sinks: Sequence[Sink], verify: bool
) -> None:
    """Split the pieces into the header and whole elements, and pass the elements to the sinks."""
    crc, skip, done, rest = 0, layout.header_size, 0, b""
    size = layout.dtype.itemsize
    for piece in pieces:
        if verify and layout.crc is not None:
            crc = zlib.crc32(piece, crc)
        if skip:
            taken = min(skip, len(piece))
            piece, skip = piece[taken:], skip - taken
        if rest:
            piece, rest = memoryview(bytearray(rest) + piece), b""
        if odd := len(piece) % size:
            piece, rest = piece[:-odd], bytes(piece[-odd:])
        if len(piece):
            elements = _elements(piece, layout)
            for sink in sinks:
                sink(done, elements)
            done += len(elements)
    if skip or rest or done != layout.count:
        raise weights_error(path, f"is truncated: {layout.name!r} ends after {done} of {layout.count} values")
    if verify and layout.crc is not None and crc != layout.crc:
        raise weights_error(path, f"is corrupt: the checksum (CRC-32) of {layout.name!r} does not match its data")


def _elements(piece: memoryview, layout: ArrayLayout) -> torch.Tensor:
    if layout.swapped:
        width = np.dtype(f"u{layout.dtype.itemsize}")
        return torch.from_numpy(np.frombuffer(piece, width).byteswap().view(np.uint8)).view(layout.dtype)
    return torch.frombuffer(piece, dtype=layout.dtype)


def _pieces(
    path: Path, file: BinaryIO, layout: ArrayLayout, buffer: bytearray, digest: Digest | None
) -> Iterator[memoryview]:
    """The inflated bytes of a run, never more than the declared size of header and data."""
    raw = _raw(path, file, layout, buffer, digest)
    if not layout.deflated:
        yield from raw
        return
    inflater, left = zlib.decompressobj(-zlib.MAX_WBITS), layout.header_size + layout.nbytes
    for compressed in raw:
        pending: bytes | memoryview = compressed
        while pending and not inflater.eof:
            out = inflater.decompress(pending, min(_INFLATED, left + 1))
            pending = inflater.unconsumed_tail
            left -= len(out)
            if left < 0:
                raise weights_error(path, f"is corrupt: {layout.name!r} inflates to more than it declares")
            if out:
                yield memoryview(bytearray(out))
    if not inflater.eof or left:
        raise weights_error(path, f"is truncated or corrupt: the compressed data of {layout.name!r} ends early")


def _raw(
    path: Path, file: BinaryIO, layout: ArrayLayout, buffer: bytearray, digest: Digest | None
) -> Iterator[memoryview]:
    left = layout.stored_size
    while left:
        view = memoryview(buffer)[: min(_INFLATED, left) if layout.deflated else left]
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise weights_error(path, f"is truncated: it ends inside {layout.name!r}")
        if digest is not None:
            digest.update(view[:count])
        left -= count
        yield view[:count]


def _hash_until(file: BinaryIO, end: int | None, buffer: bytearray, digest: Digest) -> None:
    """Feed the bytes from the current position to ``end`` (None: the end of the file) to ``digest``."""
    left = math.inf if end is None else end - file.tell()
    while left > 0:
        view = memoryview(buffer)[: int(min(CHUNK, left))]
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            return
        digest.update(view[:count])
        left -= count
