"""An npz of an SAE of any size with almost nothing in it: holes on disk, valid headers, index and checksums."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

_FULL32, _VERSION = 0xFFFFFFFF, 45  # 45: zip64
_DOS_DATE = (1 << 5) | 1  # 1980-01-01


def write_sparse_npz(path: Path, d_in: int, d_sae: int, rows: Mapping[int, np.ndarray]) -> None:
    """Write ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_in]``, ``b_enc``, ``b_dec`` and ``threshold``, stored, float32.

    All values are zero but for the given rows of the decoder. Zeros are holes: 19 GB take some kB of disk. The zip is
    laid out as ``numpy.savez`` does it (zip64 in every local header), checksums included.

    Args:
        path: the file to write.
        d_in, d_sae: sizes.
        rows: latent to its decoder row ``[d_in]``.
    """
    shapes = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    index = b""
    with path.open("wb") as file:
        for name, shape in shapes.items():
            index += _write_member(file, f"{name}.npy".encode(), shape, rows if name == "W_dec" else {})
        _write_end(file, index, len(shapes))


def _write_member(file: BinaryIO, name: bytes, shape: tuple[int, ...], rows: Mapping[int, np.ndarray]) -> bytes:
    """One array; returns its entry in the index."""
    npy = _npy_header(shape)
    row_bytes = 4 * shape[-1]
    size = len(npy) + 4 * int(np.prod(shape, dtype=np.int64))
    offset = file.tell()
    start = offset + 30 + len(name) + 20
    file.seek(start)
    file.write(npy)
    crc, done = zlib.crc32(npy), 0
    for row in sorted(rows):
        data = np.asarray(rows[row], "<f4").tobytes()
        if len(data) != row_bytes or not 0 <= row < shape[0]:
            raise ValueError(f"row {row} of {len(data)} bytes does not fit {shape}")
        crc = zlib.crc32(data, _crc_of_zeros(crc, row * row_bytes - done))
        file.seek(start + len(npy) + row * row_bytes)
        file.write(data)
        done = (row + 1) * row_bytes
    crc = _crc_of_zeros(crc, size - len(npy) - done)
    file.seek(offset)
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    head = struct.pack("<5H3L2H", _VERSION, 0, 0, 0, _DOS_DATE, crc, _FULL32, _FULL32, len(name), len(extra))
    file.write(b"PK\x03\x04" + head + name + extra)
    file.seek(start + size)
    file.truncate()
    return _index_entry(name, size, crc, offset)


def _index_entry(name: bytes, size: int, crc: int, offset: int) -> bytes:
    sizes = [size, size] if size >= _FULL32 else []
    offsets = [offset] if offset >= _FULL32 else []
    large = sizes + offsets
    extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    short_size, short_offset = _FULL32 if sizes else size, _FULL32 if offsets else offset
    made_by = (3 << 8) | _VERSION
    fields = (made_by, _VERSION, 0, 0, 0, _DOS_DATE, crc, short_size, short_size, len(name), len(extra))
    rest = struct.pack("<HHHLL", 0, 0, 0, 0o600 << 16, short_offset)
    return b"PK\x01\x02" + struct.pack("<6H3L2H", *fields) + rest + name + extra


def _write_end(file: BinaryIO, index: bytes, count: int) -> None:
    """The index and the three records after it, the zip64 ones always."""
    start = file.tell()
    file.write(index)
    end = file.tell()
    counts = (44, _VERSION, _VERSION, 0, 0, count, count, len(index), start)
    file.write(b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", *counts))
    file.write(b"PK\x06\x07" + struct.pack("<LQL", 0, end, 1))
    file.write(b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, count, count, len(index), min(start, _FULL32), 0))


def _npy_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _crc_of_zeros(crc: int, n: int) -> int:
    """The checksum after ``n`` more zero bytes, in log2(n) steps.

    A zero byte changes the register by a linear map over GF(2), kept as the images of its 32 bits; squaring the map
    doubles the number of bytes.
    """
    step = [zlib.crc32(b"\0", (1 << bit) ^ _FULL32) ^ _FULL32 for bit in range(32)]
    register = crc ^ _FULL32
    while n:
        if n & 1:
            register = _apply(step, register)
        step = [_apply(step, image) for image in step]
        n >>= 1
    return register ^ _FULL32


def _apply(images: list[int], value: int) -> int:
    result = 0
    for bit, image in enumerate(images):
        if value >> bit & 1:
            result ^= image
    return result
