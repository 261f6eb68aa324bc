"""Reading npz archives: stored members as memory maps, deflated ones inflated, and no pickle ever.

An npz is a zip of ``.npy`` files. A member that the zip merely stores lies in the file byte for byte, so it can be
mapped: nothing is read until it is used, and processes share the pages. Maps are copy-on-write, so changing an array in
place never changes the file. A member's data need not be aligned to its item size (numpy does not align it); x86-64 and
ARM64 read such maps directly.

The checksum of every member (CRC-32, which zip keeps anyway) is verified once on reading, by streaming over the map;
``verify=False`` leaves that out, for reading a few rows of a file that was verified before.
"""

from __future__ import annotations

import ast
import math
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.weights.sniff import read_head, refuse_other_kinds, starts_as_zip, weights_error

_CHUNK = 1 << 24
_MAX_HEADER = 4096
_MAX_MEMBERS = 64
_MAX_DIMS = 8
_MAX_INFLATION = 1040  # DEFLATE cannot expand a byte into more than 1032
_MAX_DESCRIPTOR = 24  # bytes that a streaming writer may put after a member
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class NpzMember:
    """Where one array of an npz lies, known from the headers alone.

    Attributes:
        name: the array's name, without ``.npy``.
        shape, dtype, fortran: what the npy header declares.
        stored: whether the bytes lie uncompressed in the file.
        start: where the member (npy header first) begins in the file, compressed or not.
        header_size: bytes of npy header before the data.
        info: the zip's own entry, with sizes and checksum.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    stored: bool
    start: int
    header_size: int
    info: zipfile.ZipInfo

    @property
    def nbytes(self) -> int:
        """Bytes of data, without the header."""
        return math.prod(self.shape) * self.dtype.itemsize


def inspect_npz(path: str | Path) -> dict[str, NpzMember]:
    """The arrays of an npz by name, from its headers only.

    Raises:
        WeightsError: when the file is missing, empty, truncated, not an npz, holds pickled objects, or its headers
            contradict each other.
    """
    path = Path(path)
    head = read_head(path)
    refuse_other_kinds(path, head, "an npz archive")
    if not starts_as_zip(head):
        raise weights_error(path, f"is not an npz archive (it starts with {head[:8]!r}, a zip starts with b'PK')")
    with _clear_errors(path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        infos = archive.infolist()
        if not infos or len(infos) > _MAX_MEMBERS:
            raise weights_error(path, f"holds {len(infos)} arrays, which no SAE file does")
        members: dict[str, NpzMember] = {}
        for info in infos:
            member = _inspect_member(path, archive, file, info)
            if member.name in members:
                raise weights_error(path, f"holds {member.name!r} twice")
            members[member.name] = member
        _check_tiling(path, list(members.values()), archive.start_dir)
    return members


def read_npz(path: str | Path, names: Iterable[str] | None = None, verify: bool = True) -> dict[str, np.ndarray]:
    """The arrays of an npz: copy-on-write memory maps of stored members, fresh arrays of deflated ones.

    Args:
        path: the file.
        names: which arrays; all of them without it.
        verify: check every stored member's CRC-32 by reading through it once (about 2 GB/s); deflated members are
            always checked.

    Returns:
        Arrays in native byte order. A Fortran-ordered array comes back as a Fortran-ordered view.

    Raises:
        WeightsError: as :func:`inspect_npz`, and when a checksum is wrong or a name is missing.
    """
    path = Path(path)
    members = inspect_npz(path)
    wanted = list(members) if names is None else list(names)
    missing = [name for name in wanted if name not in members]
    if missing:
        raise weights_error(path, f"has no array {', '.join(missing)}; it has {', '.join(sorted(members))}")
    return {name: read_member(path, members[name], verify) for name in wanted}


def read_member(path: Path, member: NpzMember, verify: bool = True) -> np.ndarray:
    """One array of an npz; see :func:`read_npz`."""
    with _clear_errors(path):
        flat = _map(path, member, verify) if member.stored else _inflate(path, member)
    if not member.dtype.isnative:
        flat = flat.astype(member.dtype.newbyteorder("="))
    return flat.reshape(member.shape, order="F" if member.fortran else "C")


def _map(path: Path, member: NpzMember, verify: bool) -> np.ndarray:
    if verify:
        whole = np.memmap(path, np.uint8, "r", offset=member.start, shape=(member.info.file_size,))
        crc = 0
        for start in range(0, whole.size, _CHUNK):
            crc = zlib.crc32(whole[start : start + _CHUNK].data, crc)
        if crc != member.info.CRC:
            raise weights_error(path, f"is corrupt: the checksum (CRC-32) of {member.name!r} does not match its data")
    offset = member.start + member.header_size
    return np.memmap(path, member.dtype, "c", offset=offset, shape=(math.prod(member.shape),))


def _inflate(path: Path, member: NpzMember) -> np.ndarray:
    flat = np.empty(math.prod(member.shape), member.dtype)
    target = flat.view(np.uint8).data
    with zipfile.ZipFile(path) as archive, archive.open(member.info) as stream:
        stream.read(member.header_size)
        done = 0
        while done < len(target):
            chunk = stream.read(min(_CHUNK, len(target) - done))
            if not chunk:
                raise weights_error(path, f"is truncated: {member.name!r} ends after {done} of {len(target)} bytes")
            target[done : done + len(chunk)] = chunk
            done += len(chunk)
        stream.read(1)  # reaching the end is what makes zipfile compare the checksum
    return flat


def _inspect_member(path: Path, archive: zipfile.ZipFile, file: IO[bytes], info: zipfile.ZipInfo) -> NpzMember:
    name = info.filename
    if not name.endswith(".npy") or "/" in name or "\\" in name:
        raise weights_error(path, f"holds {name!r}, which is not an array (.npy)")
    if info.flag_bits & _ENCRYPTED:
        raise weights_error(path, f"is encrypted at {name!r}")
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
    member = NpzMember(name.removesuffix(".npy"), shape, dtype, fortran, stored, start, header_size, info)
    if member.nbytes == 0 or header_size + member.nbytes != info.file_size:
        declared = f"shape {shape} of {dtype} needs {member.nbytes} bytes"
        raise weights_error(path, f"is corrupt at {name!r}: {declared}, the member has {info.file_size - header_size}")
    return member


def _check_tiling(path: Path, members: list[NpzMember], end: int) -> None:
    """Members must fill the file up to its index: a damaged index can make zipfile overlook entries silently."""
    at = 0
    for member in sorted(members, key=lambda m: m.start):
        if not 0 <= member.info.header_offset - at <= _MAX_DESCRIPTOR:
            break
        at = member.start + member.info.compress_size
    else:
        if 0 <= end - at <= _MAX_DESCRIPTOR:
            return
    raise weights_error(path, f"is corrupt: its index and its data disagree near byte {at}")


def _data_start(path: Path, file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin, from its local header, which must agree with the index."""
    file.seek(info.header_offset)
    raw = file.read(_LOCAL.size)
    if len(raw) < _LOCAL.size:
        raise weights_error(path, f"is truncated at the header of {info.filename!r}")
    signature, _, flags, method, _, _, _, _, _, n_name, n_extra = _LOCAL.unpack(raw)
    same = (
        signature == b"PK\x03\x04"
        and method == info.compress_type
        and not flags & _ENCRYPTED
        and file.read(n_name) == info.orig_filename.encode("utf-8")
    )
    if not same:
        raise weights_error(path, f"is corrupt: the header of {info.filename!r} contradicts the archive's index")
    return info.header_offset + _LOCAL.size + n_name + n_extra


def _npy_header(path: Path, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool, int]:
    """Parse a npy header with literals only: shape, dtype, whether Fortran-ordered, size in bytes."""
    start = stream.read(8)
    if start[:6] != b"\x93NUMPY" or len(start) < 8 or start[6] not in (1, 2, 3):
        raise weights_error(path, f"is corrupt: {name!r} does not start as a .npy array")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if not 0 < length <= _MAX_HEADER:
        raise weights_error(path, f"is corrupt: {name!r} has a header of {length} bytes")
    try:
        header = ast.literal_eval(stream.read(length).decode("utf-8" if start[6] == 3 else "latin1").strip())
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
    if dtype.kind not in "fiub":
        raise weights_error(path, f"has values of type {dtype} at {name!r}, not numbers", "Use float32 arrays.")
    if len(shape) > _MAX_DIMS or not all(type(size) is int and size >= 0 for size in shape):
        raise weights_error(path, f"is corrupt: {name!r} has the shape {shape}")
    return shape, dtype, fortran, 8 + width + length


@contextmanager
def _clear_errors(path: Path) -> Generator[None]:
    """Turn what zipfile, zlib and the like raise for broken files into one :class:`WeightsError`."""
    try:
        yield
    except WeightsError:
        raise
    except zipfile.BadZipFile as error:
        if "CRC" in str(error):
            raise weights_error(path, f"is corrupt ({error})") from error
        what = f"is truncated or corrupt: {path.stat().st_size} bytes without a valid zip index ({error})"
        raise weights_error(path, what) from error
    except MemoryError as error:
        raise weights_error(path, "does not fit in memory", "Free memory, or use a narrower SAE.") from error
    except (EOFError, zlib.error) as error:
        raise weights_error(path, f"is truncated or corrupt: its compressed data ends or breaks ({error})") from error
    except (OSError, struct.error, NotImplementedError, RuntimeError, ValueError, OverflowError, LookupError) as error:
        raise weights_error(path, f"is corrupt or cannot be read ({type(error).__name__}: {error})") from error
