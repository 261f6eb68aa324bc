"""The positions of the arrays in an npz, from its headers alone. Pickled data is never loaded.

An npz is a zip of ``.npy`` files. A member that is stored without compression is contained in the file byte by byte,
so it can be memory-mapped, or some of its rows can be read, also from a remote file. The data of a member need not be
aligned to its item size (NumPy does not align it), but x86-64 and ARM64 read unaligned maps directly.
"""

from __future__ import annotations

import ast
import errno
import struct
import zipfile
import zlib
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.weights.checks import (
    MAX_ARRAYS,
    NOT_READ,
    check_name,
    read_head,
    refuse_other_kinds,
    short,
    starts_as_zip,
    weights_error,
)
from gemma_scope_tl.weights.layout import ArrayLayout

_MAX_HEADER = 4096
_MAX_DIMS = 8
_MAX_SIZE = 1 << 48  # values along one dimension
_MAX_INDEX = 1 << 18  # bytes; 64 members need a tenth of it
_MAX_INFLATION = 1040  # DEFLATE cannot expand a byte into more than 1032
_MAX_DESCRIPTOR = 24  # bytes that a streaming writer may add after a member
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _DESCRIPTOR, _PATCHED = 0x1 | 0x40, 0x8, 0x20
_MAX_EXTRA = 256  # bytes of the extra field of a local header: zip64 sizes, alignment
_DTYPES = {
    np.dtype(str(dtype).removeprefix("torch.")): dtype
    for dtype in (
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.bool,
    )
}


class _BoundedReads:
    """A file that refuses large reads, since zipfile would create an object for every entry of a huge index."""

    def __init__(self, file: IO[bytes]) -> None:
        self._read = file.read
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_INDEX:
            raise zipfile.BadZipFile(f"an index of {size} bytes")
        return self._read(size)

    def seekable(self) -> bool:
        return True


class NamedFile(Protocol):
    """A seekable binary file with a name for messages, such as a remote file."""

    source: str

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


def inspect_npz(
    file: str | Path | NamedFile, names: Collection[str] | None = None, vectors: Mapping[str, int] | None = None
) -> dict[str, ArrayLayout]:
    """The arrays of an npz by name, from its headers only.

    Args:
        file: a path, or an open file with a ``source`` for messages.
        names: the arrays whose headers are read, after the index of the archive. If None, all headers are read, and the
            members must fill the file, because a damaged index can hide arrays.
        vectors: lengths of float32 vectors, by name. The header of such a vector is not read if its sizes in the index
            determine it, because each header needs a request over the network.

    Raises:
        WeightsError: when the file is missing, empty, truncated, not an npz, contains pickled objects, lacks a name, or
            its headers contradict each other.
    """
    if not isinstance(file, str | Path):
        with clear_errors(file.source):
            return _inspect(file, file.source, names, vectors or {})  # pyright: ignore[reportArgumentType]
    path = Path(file)
    head = read_head(path)
    refuse_other_kinds(path, head, "an npz archive")
    if not starts_as_zip(head):
        raise weights_error(path, f"is not an npz archive (it starts with {head[:8]!r}, a zip starts with b'PK')")
    with clear_errors(path), path.open("rb") as opened:
        return _inspect(opened, path, names, vectors or {})


def _inspect(
    file: IO[bytes], path: str | Path, names: Collection[str] | None, vectors: Mapping[str, int]
) -> dict[str, ArrayLayout]:
    with zipfile.ZipFile(_BoundedReads(file)) as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
        infos = archive.infolist()
        if not infos or len(infos) > MAX_ARRAYS:
            raise weights_error(path, f"holds {len(infos)} arrays, which no SAE file does")
        layouts: dict[str, ArrayLayout] = {}
        seen: set[str] = set()
        for info in infos:
            check_name(path, info.orig_filename)  # zipfile cuts names at a NUL
            name = info.filename.removesuffix(".npy")
            if name in seen:
                raise weights_error(path, f"holds {name!r} twice")
            seen.add(name)
            if names is None or name in names:
                known = _vector(archive, info, vectors[name]) if name in vectors else None
                layouts[name] = known or _inspect_member(path, archive, file, info)
        if missing := [name for name in names or () if name not in seen]:
            raise weights_error(path, f"has no array {', '.join(missing)}; it has {', '.join(sorted(seen))}")
        if names is None:
            _check_tiling(path, infos, layouts, archive.start_dir)
    return layouts


def _inspect_member(path: str | Path, archive: zipfile.ZipFile, file: IO[bytes], info: zipfile.ZipInfo) -> ArrayLayout:
    name = info.filename
    if not name.endswith(".npy") or "/" in name or "\\" in name:
        raise weights_error(path, f"holds {name!r}, which is not an array (.npy)")
    if info.flag_bits & (_ENCRYPTED | _PATCHED):
        raise weights_error(path, f"is encrypted or patched at {name!r}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise weights_error(path, f"compresses {name!r} with method {info.compress_type}; npz uses 0 or 8")
    stored = info.compress_type == zipfile.ZIP_STORED
    start = _data_start(path, file, info)
    if start + info.compress_size > archive.start_dir:
        raise weights_error(path, f"is truncated or corrupt: {name!r} would reach past the archive's index")
    if stored and info.compress_size != info.file_size:
        raise weights_error(path, f"is corrupt: {name!r} is stored, yet has two sizes")
    if info.file_size > info.compress_size * _MAX_INFLATION:
        raise weights_error(path, f"is corrupt: {name!r} claims {info.file_size} bytes from {info.compress_size}")
    file.seek(start)
    with nullcontext(file) if stored else archive.open(info) as stream:
        shape, dtype, fortran, header_size = _npy_header(path, name, stream)
    layout = ArrayLayout(
        name=name.removesuffix(".npy"),
        shape=shape,
        dtype=_DTYPES[dtype.newbyteorder("=")],
        start=start,
        stored_size=info.compress_size,
        swapped=not dtype.isnative,
        fortran=fortran and len(shape) > 1,
        header_size=header_size,
        deflated=not stored,
        crc=info.CRC,
    )
    if layout.nbytes == 0 or header_size + layout.nbytes != info.file_size:
        declared = f"shape {shape} of {dtype} needs {layout.nbytes} bytes"
        raise weights_error(path, f"is corrupt at {name!r}: {declared}, the member has {info.file_size - header_size}")
    return layout


def _vector(archive: zipfile.ZipFile, info: zipfile.ZipInfo, length: int) -> ArrayLayout | None:
    """The layout of a float32 vector from the index alone, or None if the index does not determine it.

    A run ends where the next member or the index begins, unless a data descriptor follows it. The bytes of a run that
    are not data are its npy header, which NumPy pads to a multiple of 64 bytes. A vector of another item size would
    not leave such a remainder.
    """
    header_size = info.file_size - 4 * length
    after = [other.header_offset for other in archive.infolist() if other.header_offset > info.header_offset]
    start = min([*after, archive.start_dir]) - info.compress_size
    settled = (
        info.compress_type == zipfile.ZIP_STORED
        and info.compress_size == info.file_size
        and not info.flag_bits & (_ENCRYPTED | _PATCHED | _DESCRIPTOR)
        and header_size in (64, 128)
        and 0 <= start - info.header_offset - _LOCAL.size - len(info.orig_filename.encode()) <= _MAX_EXTRA
    )
    if not settled:
        return None
    name = info.filename.removesuffix(".npy")
    return ArrayLayout(name, (length,), torch.float32, start, info.file_size, header_size=header_size, crc=info.CRC)


def _check_tiling(path: str | Path, infos: list[zipfile.ZipInfo], layouts: dict[str, ArrayLayout], end: int) -> None:
    """Raise unless members fill the file up to its index: zipfile silently omits entries if the index is damaged."""
    at = 0
    for info in sorted(infos, key=lambda one: one.header_offset):
        if not 0 <= info.header_offset - at <= _MAX_DESCRIPTOR:
            break
        layout = layouts[info.filename.removesuffix(".npy")]
        at = layout.start + layout.stored_size
    else:
        if 0 <= end - at <= _MAX_DESCRIPTOR:
            return
    raise weights_error(path, f"is corrupt: its index and its data disagree near byte {at}")


def _data_start(path: str | Path, file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Offset of the bytes of a member, from its local header, which must agree with the index."""
    file.seek(info.header_offset)
    raw = file.read(_LOCAL.size)
    if len(raw) < _LOCAL.size:
        raise weights_error(path, f"is truncated at the header of {info.filename!r}")
    signature, _, flags, method, _, _, _, _, _, n_name, n_extra = _LOCAL.unpack(raw)
    same = (
        signature == b"PK\x03\x04"
        and method == info.compress_type
        and not flags & (_ENCRYPTED | _PATCHED)
        and file.read(n_name) == info.orig_filename.encode("utf-8")
    )
    if not same:
        raise weights_error(path, f"is corrupt: the header of {info.filename!r} contradicts the archive's index")
    return info.header_offset + _LOCAL.size + n_name + n_extra


def _npy_header(path: str | Path, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool, int]:
    """Parse an npy header, with literals only, into shape, dtype, whether Fortran-ordered, and size in bytes."""
    start = stream.read(8)
    if start[:6] != b"\x93NUMPY" or len(start) < 8 or start[6] not in (1, 2, 3) or start[7]:
        raise weights_error(path, f"is corrupt: {name!r} does not start as a .npy array")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if not 0 < length <= _MAX_HEADER:
        raise weights_error(path, f"is corrupt: {name!r} has a header of {length} bytes")
    try:
        header = ast.literal_eval(stream.read(length).decode("utf-8" if start[6] == 3 else "latin1"))
        if set(header) != {"descr", "fortran_order", "shape"}:
            raise ValueError("keys")
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
        if not isinstance(descr, str) or not isinstance(fortran, bool) or not isinstance(shape, tuple):
            raise TypeError("types")
        dtype = np.dtype(descr)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise weights_error(path, f"is corrupt: the header of {name!r} is not that of a plain array") from error
    if dtype.hasobject:
        raise weights_error(path, f"holds pickled Python objects at {name!r}, which are never opened")
    if dtype.newbyteorder("=") not in _DTYPES:
        raise weights_error(
            path, f"has values of type {short(str(dtype))} at {name!r}, not numbers", "Use float32 arrays."
        )
    if len(shape) > _MAX_DIMS or not all(type(size) is int and 0 <= size < _MAX_SIZE for size in shape):
        raise weights_error(path, f"is corrupt: {name!r} has the shape {short(shape)}")
    return shape, dtype, fortran, 8 + width + length


@contextmanager
def clear_errors(path: str | Path) -> Generator[None]:
    """Convert exceptions of zipfile, zlib and similar modules for broken files into a :class:`WeightsError`.

    Use it only around code that handles bytes and headers: exceptions of tensor operations (such as an unknown device)
    do not mean that the file is broken.
    """
    try:
        with read_errors(path):
            yield
    except GemmaScopeError:
        raise
    except zipfile.BadZipFile as error:
        if "CRC" in str(error):
            raise weights_error(path, f"is corrupt ({error})") from error
        size = f": {path.stat().st_size} bytes" if isinstance(path, Path) else ""
        raise weights_error(path, f"is truncated or corrupt{size} without a valid zip index ({error})") from error
    except (EOFError, struct.error, NotImplementedError, RuntimeError, ValueError, OverflowError, LookupError) as error:
        raise weights_error(path, f"is corrupt or cannot be read ({type(error).__name__}: {error})") from error


@contextmanager
def read_errors(path: str | Path) -> Generator[None]:
    """Convert read errors, a lack of memory, and errors of compressed data into a :class:`WeightsError`."""
    try:
        yield
    except GemmaScopeError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset before the start of the file
            raise weights_error(path, f"is corrupt ({error})") from error
        raise weights_error(path, f"cannot be read ({error.strerror or error})", NOT_READ) from error
    except MemoryError as error:
        raise weights_error(path, "does not fit in memory", "Free memory, or use a narrower SAE.") from error
    except zlib.error as error:
        raise weights_error(path, f"is truncated or corrupt: its compressed data ends or breaks ({error})") from error
