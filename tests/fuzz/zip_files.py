"""Zip archives that lie: every field of every header can be set, the rest is right."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_FIELDS = ("flags", "method", "crc", "compressed", "size")
_LOCAL_AT = dict(zip(_FIELDS, ((6, "<H"), (8, "<H"), (14, "<I"), (18, "<I"), (22, "<I")), strict=True))
_CENTRAL_AT = dict(zip(_FIELDS, ((8, "<H"), (10, "<H"), (16, "<I"), (20, "<I"), (24, "<I")), strict=True))


@dataclass(frozen=True)
class Member:
    """One file of an archive.

    Attributes:
        name, content: what is stored, before compression.
        method: 0 or 8 compress; any other number is only declared.
        local, central: fields (``flags``, ``method``, ``crc``, ``compressed``, ``size``) to declare falsely there.
        local_extra, central_extra: extra fields.
        descriptor: bytes after the data.
        offset: of the local header as the index says it; None for the true one.
        raw: the bytes of the run, in place of the compressed content.
        level: of zlib.
    """

    name: bytes
    content: bytes
    method: int = STORED
    local: dict[str, int] = field(default_factory=dict[str, int])
    central: dict[str, int] = field(default_factory=dict[str, int])
    local_extra: bytes = b""
    central_extra: bytes = b""
    descriptor: bytes = b""
    offset: int | None = None
    raw: bytes | None = None
    level: int = 6

    def run(self) -> bytes:
        """The bytes that lie in the file."""
        if self.raw is not None:
            return self.raw
        if self.method != DEFLATED:
            return self.content
        deflater = zlib.compressobj(self.level, zlib.DEFLATED, -zlib.MAX_WBITS)
        return deflater.compress(self.content) + deflater.flush()


def write_zip(members: Sequence[Member], prefix: bytes = b"", comment: bytes = b"", between: bytes = b"") -> bytes:
    """The archive of the members; ``prefix`` stands before it, ``between`` before the index."""
    out, index = bytearray(prefix), bytearray()
    for member in members:
        at, run = len(out) if member.offset is None else member.offset, member.run()
        true = {
            "flags": 0x8 if member.descriptor else 0,
            "method": member.method,
            "crc": zlib.crc32(member.content),
            "compressed": len(run),
            "size": len(member.content),
        }
        there = {**true, **member.local}
        out += struct.pack("<4sHHHHHIII", LOCAL, 20, there["flags"], there["method"], 0, 33, *_numbers(there))
        out += struct.pack("<HH", len(member.name), len(member.local_extra)) + member.name + member.local_extra
        out += run + member.descriptor
        here = {**true, **member.central}
        index += struct.pack("<4sHHHHHHIII", CENTRAL, 20, 20, here["flags"], here["method"], 0, 33, *_numbers(here))
        index += struct.pack("<HHHHHII", len(member.name), len(member.central_extra), 0, 0, 0, 0, at & 0xFFFFFFFF)
        index += member.name + member.central_extra
    out += between
    count = min(len(members), 0xFFFF)
    end = struct.pack("<4sHHHHIIH", END, 0, 0, count, count, len(index), len(out), min(len(comment), 0xFFFF))
    return bytes(out + index + end + comment)


def read_members(data: bytes) -> list[Member]:
    """The members of an archive that zipfile can open, each with at most 1 MiB of content.

    Raises:
        Exception: whatever zipfile raises for one that it cannot.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found: list[Member] = []
        for info in archive.infolist()[:64]:
            with archive.open(info) as stream:
                content = stream.read(1 << 20)
            found.append(Member(info.orig_filename.encode("utf-8", "replace"), content, info.compress_type))
        return found


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    """An array as numpy writes it."""
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version, allow_pickle=False)
    return out.getvalue()


def npy_of(header: str | bytes, data: bytes = b"", version: int = 1) -> bytes:
    """A .npy with any header at all."""
    text = header.encode("latin1", "replace") if isinstance(header, str) else header
    width = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(width, len(text) & 0xFFFF) + text + data


def split_npy(content: bytes) -> tuple[bytes, bytes] | None:
    """Header text and data of a .npy, or None where it is none."""
    if len(content) < 12 or content[:6] != b"\x93NUMPY":
        return None
    width = 2 if content[6] == 1 else 4
    end = 8 + width + int.from_bytes(content[8 : 8 + width], "little")
    return content[8 + width : end], content[end:]


def fix_checksums(data: bytes) -> bytes:
    """The archive with every CRC-32 set to that of the data that lies there, where that can be told."""
    out = bytearray(data)
    at = data.find(CENTRAL)
    while at >= 0 and at + 46 <= len(data):
        method, compressed, size = (_get(data, at, _CENTRAL_AT[name]) for name in ("method", "compressed", "size"))
        local = int.from_bytes(data[at + 42 : at + 46], "little")
        if local + 30 <= len(data):
            start = local + 30 + sum(struct.unpack_from("<HH", data, local + 26))
            run = data[start : start + compressed]
            try:
                inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(run, min(size, 1 << 20) or 1)
            except zlib.error:
                inflated = run
            struct.pack_into("<I", out, at + 16, zlib.crc32(inflated if method == DEFLATED else run))
            struct.pack_into("<I", out, local + 14, zlib.crc32(inflated if method == DEFLATED else run))
        at = data.find(CENTRAL, at + 4)
    return bytes(out)


def header_fields(data: bytes) -> list[tuple[int, str]]:
    """Where the numbers of all zip headers stand in ``data``, and their struct formats."""
    found: list[tuple[int, str]] = []
    for mark, places in (
        (LOCAL, [*_LOCAL_AT.values(), (26, "<H"), (28, "<H")]),
        (CENTRAL, [*_CENTRAL_AT.values(), (28, "<H"), (30, "<H"), (32, "<H"), (34, "<H"), (42, "<I")]),
        (END, [(4, "<H"), (8, "<H"), (10, "<H"), (12, "<I"), (16, "<I"), (20, "<H")]),
    ):
        at = data.find(mark)
        while at >= 0:
            found += [(at + offset, form) for offset, form in places if at + offset + 4 <= len(data)]
            at = data.find(mark, at + 4)
    return found


def renamed(member: Member, name: bytes) -> Member:
    """The member under another name."""
    return replace(member, name=name)


def _numbers(fields: dict[str, int]) -> tuple[int, int, int]:
    return fields["crc"] & 0xFFFFFFFF, fields["compressed"] & 0xFFFFFFFF, fields["size"] & 0xFFFFFFFF


def _get(data: bytes, at: int, place: tuple[int, str]) -> int:
    return struct.unpack_from(place[1], data, at + place[0])[0]
