"""Changing inputs: bytes at large, and what the formats are made of, so that checks behind checksums are reached."""

from __future__ import annotations

import json
import math
import random
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import yaml

from tests.fuzz.zip_files import Member, fix_checksums, header_fields, npy_of, read_members, split_npy, write_zip

Mutate = Callable[[bytes, random.Random, bytes], bytes]
"""Takes an input, a source of chance, and a second input to cross it with."""

MAX_SIZE = 1 << 16
INTERESTING = [0, 1, 2, 7, 8, 63, 64, 65, 127, 128, 255, 256, 1023, 4096, 32767, 65535, 2**24, 2**31 - 1, 2**31, 2**32]
INTERESTING += [2**32 - 1, 2**32 - 16, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64]
NAMES = ["W_enc", "W_dec", "b_enc", "b_dec", "threshold", "log_threshold", "W_skip", "scaling_factor", "w_ENC", "nope"]
_DTYPES = (
    "<f4 <f2 <f8 >f4 >f2 |i1 <i4 <u8 |b1 ? |O |S8 <U3 <c8 |V4 V <M8[s] <m8 f4,f4 (2,3)f4 2f4 float float32 e f16 T"
)
_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    1e308,
    2**31,
    2**63,
    2**64,
]
_VALUES += [
    10**400,
    10**4299,
    "",
    "x",
    "\ud800",
    "\x00",
    "\x1b[31m",
    "..",
    "9" * 5000,
    [],
    {},
    [[]],
    [1],
    {"a": 1},
    {"get": 1},
]


def mutate_bytes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """One change that knows nothing of the format."""
    out = bytearray(data)
    at = rng.randrange(len(out) + 1)
    end = min(len(out), at + rng.choice([1, 1, 2, 4, 8, 16, 64, 512]))
    kind = rng.randrange(8)
    if kind == 0 and out:
        out[at % len(out)] ^= 1 << rng.randrange(8)
    elif kind == 1 and out:
        out[at % len(out)] = rng.randrange(256)
    elif kind == 2:
        form = rng.choice(["<B", "<H", "<I", "<Q", ">H", ">I"])
        out[at : at + struct.calcsize(form)] = pack(form, rng.choice(INTERESTING))
    elif kind == 3:
        del out[at:end]
    elif kind == 4:
        out[at:at] = out[at:end] * rng.choice([1, 1, 2, 16])
    elif kind == 5:
        out[at:at] = rng.randbytes(rng.choice([1, 2, 4, 30]))
    elif kind == 6 and other:
        begin = rng.randrange(len(other))
        out[at:end] = other[begin : begin + rng.choice([1, 4, 16, 64, 1024])]
    else:
        del out[at:]
    return bytes(out[:MAX_SIZE])


def mutate_npz(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A change to an archive's fields, its members, their npy headers or their data."""
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(data, rng, other)
    if kind < 0.4:
        fields = header_fields(data)
        if fields:
            at, form = rng.choice(fields)
            out = bytearray(data)
            old = struct.unpack_from(form, out, at)[0]
            new = rng.choice([*INTERESTING, len(data), old + 1, old - 1, old + rng.randrange(-64, 64), old * 2])
            out[at : at + struct.calcsize(form)] = pack(form, new)
            return bytes(out[:MAX_SIZE])
    if kind < 0.5:
        return fix_checksums(mutate_bytes(data, rng, other))[:MAX_SIZE]
    try:
        members = read_members(data)
        more = read_members(other) if rng.random() < 0.2 else []
    except Exception:  # whatever zipfile raises: there are no members to change
        return mutate_bytes(data, rng, other)
    members = _change_members(members + more[:1], rng)
    parts: dict[str, bytes] = {}
    if rng.random() < 0.1:
        parts[rng.choice(["prefix", "comment", "between"])] = rng.randbytes(rng.choice([1, 16, 300]))
    return write_zip(members, **parts)[:MAX_SIZE]


def _change_members(members: list[Member], rng: random.Random) -> list[Member]:
    if not members:
        return [Member(b"W_enc.npy", npy_of("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", bytes(4)))]
    at = rng.randrange(len(members))
    one = members[at]
    kind = rng.randrange(11)
    if kind < 4:
        members[at] = replace(one, content=_change_npy(one.content, rng))
    elif kind == 4:
        members[at] = replace(one, method=rng.choice([0, 8, 8, 12, 14, 99]), level=rng.choice([0, 1, 9]))
    elif kind == 5:
        name = rng.choice(NAMES) + rng.choice([".npy", ".npy", ".npy", "", "/x.npy", "\x00.npy", "\u00e9.npy"])
        members[at] = replace(one, name=rng.choice(["", "", "", "/", "../"]).encode() + name.encode())
    elif kind == 6:
        del members[at]
    elif kind == 7:
        members.insert(rng.randrange(len(members)), replace(one, name=rng.choice(NAMES).encode() + b".npy"))
    elif kind == 8:
        where = rng.choice(["local", "central"])
        lie = {rng.choice(["flags", "method", "crc", "compressed", "size"]): rng.choice(INTERESTING) & 0xFFFF}
        members[at] = replace(one, **{where: lie})
    elif kind == 9:
        sizes = b"".join(pack("<Q", rng.choice(INTERESTING)) for _ in range(rng.randrange(4)))
        extra = pack("<H", rng.choice([1, 1, 7])) + pack("<H", rng.choice([len(sizes), 28, 4])) + sizes
        full = {"size": 0xFFFFFFFF, "compressed": 0xFFFFFFFF}
        members[at] = replace(
            one, central=rng.choice([full, {}]), **{rng.choice(["local_extra", "central_extra"]): extra}
        )
    else:
        members[at] = replace(one, raw=mutate_bytes(one.run(), rng, b""), central=rng.choice([{}, {"crc": 0}]))
    return members


def _change_npy(content: bytes, rng: random.Random) -> bytes:
    parts = split_npy(content)
    if parts is None or rng.random() < 0.1:
        return mutate_bytes(content, rng, b"")
    header, data = parts[0].decode("latin1"), parts[1]
    kind = rng.randrange(7)
    if kind == 0:
        header = re.sub(r"'descr': '[^']*'", lambda _: f"'descr': '{rng.choice(_DTYPES.split(' '))}'", header)
    elif kind == 1:
        numbers = [m.span() for m in re.finditer(r"\d+", header[header.find("shape") :])]
        sizes = [*INTERESTING, -1, 3, 6, 18, 10**19, "0x" + "f" * 900, "True", "2.0", "'x'", "None"]
        text = ", ".join(str(rng.choice(sizes)) for _ in range(rng.choice([1, 1, 2, 2, 3, 9])))
        header = re.sub(r"\([^)]*\)", lambda _: f"({text},)", header) if numbers or rng.random() < 0.5 else header
    elif kind == 2:
        header = header.replace(
            *rng.choice([("False", "True"), ("True", "1"), ("'shape'", "'Shape'"), ("}", ", 'x': 1}")])
        )
    elif kind == 3:
        header = mutate_bytes(header.encode("latin1"), rng, b"(" * 900).decode("latin1")
    elif kind == 4:
        special = [0.0, -1.0, float("nan"), float("inf"), 1e-40, 3e38, 1e5]
        width = rng.choice([("<e", 2), ("<f", 4), ("<d", 8)])
        at = rng.randrange(len(data) + 1) // width[1] * width[1]
        value = rng.choice(special)
        packed = struct.pack(width[0], value if width[0] != "<e" or value < 6e4 or value != value else float("inf"))
        data = data[:at] + packed + data[at + width[1] :]
    elif kind == 5:
        data = data[: -rng.choice([1, 4, 8])] if rng.random() < 0.5 else data + bytes(rng.choice([1, 4, 4096]))
    else:
        return npy_of(header, data, rng.choice([1, 2, 3, 3, 4, 0]))
    return npy_of(header, data, content[6])


def mutate_safetensors(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A change to the header's JSON, to the offsets so that they fit again, or to the bytes."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2 or not 0 < length <= len(data) - 8:
        return mutate_bytes(data, rng, other)
    text, rest = data[8 : 8 + length], data[8 + length :]
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return _safetensors(mutate_bytes(text, rng, other), rest)
    kind = rng.random()
    if kind < 0.15:
        return _safetensors(mutate_bytes(text, rng, other), rest)
    if kind < 0.25:
        return _safetensors(text, mutate_bytes(rest, rng, other))
    if kind < 0.55 and isinstance(header, dict) and header:
        name = rng.choice(list(header))
        if rng.random() < 0.5:
            header[rng.choice([*NAMES, "__metadata__", "\x00"])] = header.pop(name)
        elif isinstance(header[name], dict):
            dtypes = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "f32", 4, None]
            sizes = [*INTERESTING[:8], 3, 6, 18, 2**40, -1, True, 10**4299]
            shape = [rng.choice(sizes) for _ in range(rng.choice([0, 1, 2, 2, 3, 9]))]
            header[name][rng.choice(["dtype", "shape"])] = rng.choice([rng.choice(dtypes), shape])
    else:
        header = change_tree(header, rng)
    if rng.random() < 0.4:
        header, rest = _fit(header, rest)
    return _safetensors(_dumped(header) or mutate_bytes(text, rng, other), rest)


def _fit(header: Any, rest: bytes) -> tuple[Any, bytes]:
    """Offsets one after the other, as long as shapes and dtypes say, and as many bytes."""
    at = 0
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}
    for entry in header.values() if isinstance(header, dict) else ():
        try:
            need = sizes[entry["dtype"]] * math.prod(int(size) for size in entry["shape"]) % 2**64
            entry["data_offsets"] = [at, at + need]
            at += need
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            continue
    return header, (rest + bytes(max(0, min(at, MAX_SIZE) - len(rest))))[: min(at, MAX_SIZE)]


def _safetensors(text: bytes, rest: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + rest


def mutate_json(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A change to a JSON document."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng, other)
    if rng.random() < 0.1:
        return mutate_bytes(data, rng, other)
    return (_dumped(change_tree(tree, rng)) or mutate_bytes(data, rng, other))[:MAX_SIZE]


def _dumped(tree: Any) -> bytes | None:
    try:
        return json.dumps(tree).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):  # ValueError: an integer of too many digits
        return None


def change_tree(tree: Any, rng: random.Random) -> Any:
    """Replace, drop, double or nest one node of a tree of plain data."""
    nodes: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            nodes.append((node, key))
            waiting.append(node[key])
    if not nodes or rng.random() < 0.03:
        return rng.choice(_VALUES)
    parent, key = rng.choice(nodes)
    kind = rng.randrange(6)
    if kind < 3:
        parent[key] = rng.choice(_VALUES)
    elif kind == 3:
        del parent[key]
    elif kind == 4:
        source, name = rng.choice(nodes)
        if isinstance(source, list) and name >= len(source):
            return tree
        value = json.loads(json.dumps(source[name]))
        if isinstance(parent, dict):
            parent[rng.choice(["a", "get", "self", "id", name if isinstance(name, str) else "b"])] = value
        else:
            parent.insert(rng.randrange(len(parent) + 1), value)
    else:
        for _ in range(rng.choice([1, 2, 900])):
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}
    return tree


_TOKENS = [
    "- ",
    "? ",
    ": ",
    "[",
    "]",
    "{",
    "}",
    "&a ",
    "*a",
    "!!int ",
    "!!float ",
    "!!bool ",
    "!!null ",
    "!!str ",
    "!!map ",
]
_TOKENS += [
    "!!python/object:os.system ",
    "!!binary ",
    "! ",
    "!<x> ",
    "<<: ",
    "---\n",
    "...\n",
    "%YAML 1.1\n",
    "%TAG ! x\n",
]
_TOKENS += [
    "|\n",
    ">-\n",
    "'",
    '"',
    "#",
    "\t",
    "\n",
    "\u0085",
    "\ufeff",
    "0x",
    "0b",
    "_",
    "1:2:3",
    ".inf",
    ".nan",
    "~",
    "yes",
]
_TOKENS += ["2024-01-01", "1e999", "=", "\\x00", "\\ud800", "9" * 65, "+", "-", "''", '""', "true", "null", "\x00"]


def mutate_yaml(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A change to the tokens, the lines, or the tree of a YAML document."""
    kind = rng.random()
    if kind < 0.1:
        return mutate_bytes(data, rng, other)
    if kind < 0.45:
        try:
            tree = change_tree(json.loads(json.dumps(yaml.load(data, yaml.CSafeLoader), default=str)), rng)
            return yaml.dump(tree, Dumper=yaml.CSafeDumper, allow_unicode=True).encode("utf-8", "replace")[:MAX_SIZE]
        except Exception:  # whatever pyyaml raises: there is no tree to change
            pass
    text = data.decode("utf-8", "replace")
    if kind < 0.75:
        places = [m.start() for m in re.finditer(r"\b|\n|$", text)]
        at = rng.choice(places)
        end = at + rng.choice([0, 0, 1, 3, 10])
        text = text[:at] + rng.choice(_TOKENS) * rng.choice([1, 1, 1, 2, 20]) + text[end:]
    else:
        lines = text.split("\n")
        at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
        new = rng.choice([[], [lines[to]], [lines[at], lines[at]], ["  " + lines[at]], [lines[at].strip()]])
        lines[at : at + 1] = new
        text = "\n".join(lines)
    return text.encode("utf-8", "replace")[:MAX_SIZE]


def pack(form: str, number: int) -> bytes:
    """``struct.pack`` of a number cut to what fits."""
    return struct.pack(form, number & (256 ** struct.calcsize(form) - 1))
