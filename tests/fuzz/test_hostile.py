"""Files made to hurt: each is refused by name, quickly, and before anything is inflated, built or waited for."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError, RegistryError, WeightsError
from gemma_scope_tl.registry.plain_yaml import MAX_BYTES
from gemma_scope_tl.registry.schema import read_release
from gemma_scope_tl.weights import load
from gemma_scope_tl.weights.load import load_arrays
from gemma_scope_tl.weights.npz import inspect_npz
from gemma_scope_tl.weights.safetensors_file import inspect_safetensors, read_cfg
from gemma_scope_tl.weights.stamp import read_stamp
from tests.fuzz import seeds
from tests.fuzz.guard import Guard
from tests.fuzz.targets import Target, make_target
from tests.fuzz.zip_files import DEFLATED, Member, npy, npy_of, write_zip

PLAIN = seeds.arrays()
MEMBERS = [Member(f"{name}.npy".encode(), npy(array)) for name, array in PLAIN.items()]
FIRST, *REST = MEMBERS


def with_first(**changes: Any) -> bytes:
    """The archive of a sound SAE, but for its first member."""
    return write_zip([replace(FIRST, **changes), *REST])


def zip64(*numbers: int) -> bytes:
    """A zip64 extra field."""
    return struct.pack("<HH", 1, 8 * len(numbers)) + b"".join(struct.pack("<Q", number) for number in numbers)


def header_of(descr: str = "'<f4'", shape: str = "(3, 6)", after: str = "") -> bytes:
    """``W_enc`` under another npy header."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}{after}"
    return npy_of(header, PLAIN["W_enc"].tobytes())


FULL = {"compressed": 0xFFFFFFFF, "size": 0xFFFFFFFF}
LENGTH, CRC = len(FIRST.content), zlib.crc32(FIRST.content)
NPZ: dict[str, tuple[bytes, str]] = {
    "members that overlap": (
        write_zip([FIRST, replace(FIRST, name=b"b_enc.npy", offset=0)]),
        "contradicts the archive's index",
    ),
    "two names for the same bytes": (
        write_zip([FIRST, *REST, replace(REST[0], content=b"", raw=b"", offset=LENGTH)]),
        "holds 'W_dec' twice",
    ),
    "a hole between members": (
        write_zip([replace(FIRST, descriptor=bytes(99)), *REST]),
        "its index and its data disagree",
    ),
    "bytes before the index": (write_zip(MEMBERS, between=bytes(99)), "its index and its data disagree"),
    "local method differs": (with_first(local={"method": 8}), "contradicts the archive's index"),
    "index size too small": (with_first(central={"size": LENGTH - 4}), "is stored, yet has two sizes"),
    "both sizes too small": (with_first(central={"size": LENGTH - 4, "compressed": LENGTH - 4}), "shape (3, 6)"),
    "both sizes too large": (with_first(central={"size": LENGTH + 4, "compressed": LENGTH + 4}), "shape (3, 6)"),
    "deflated to more than declared": (
        with_first(method=DEFLATED, content=FIRST.content + bytes(64), central={"size": LENGTH, "crc": CRC}),
        "inflates to more than it declares",
    ),
    "deflated to less than declared": (
        write_zip([replace(FIRST, method=DEFLATED, content=FIRST.content[:-4], central={"size": LENGTH}), *REST]),
        "ends early",
    ),
    "wrong checksum": (with_first(central={"crc": 1}), "checksum (CRC-32) of 'W_enc'"),
    "zip64 sizes beyond the file": (
        with_first(central=FULL, central_extra=zip64(1 << 62, 1 << 62)),
        "past the archive's index",
    ),
    "zip64 sizes of 2^64 - 1": (with_first(central=FULL, central_extra=zip64(*[2**64 - 1] * 2)), "past the archive's"),
    "zip64 field too short": (with_first(central=FULL, central_extra=b"\x01\x00\x04\x00abcd"), "zip64"),
    "zip64 field past its end": (with_first(central=FULL, central_extra=b"\x01\x00\xff\xffabcd"), "xtra"),
    "offset past the end": (with_first(offset=0xFFFFFF00), "is truncated at the header"),
    "offset into data": (with_first(offset=40), "contradicts the archive's index"),
    "a name with NUL": (with_first(name=b"W_enc.npy\x00.npy"), "which is not an array name"),
    "a name with escapes": (with_first(name=b"\x1b[2J.npy"), r"'\x1b[2J.npy', which is not an array name"),
    "an absolute name": (with_first(name=b"/etc/W_enc.npy"), "which is not an array"),
    "a name that climbs": (with_first(name=b"../W_enc.npy"), "which is not an array"),
    "an endless name": (with_first(name=b"W" * 60_000), "which is not an array name"),
    "a program before the archive": (write_zip(MEMBERS, prefix=b"#!/bin/sh\nexit\n"), "is not an npz archive"),
    "a zip before the archive": (write_zip(MEMBERS, prefix=b"PK\x03\x04" + bytes(99)), "disagree near byte 0"),
    "65,000 members": (write_zip([FIRST] * 65_000), "an index of"),
    "65 members": (write_zip([replace(FIRST, name=b"%d.npy" % i) for i in range(65)]), "holds 65 arrays"),
    "encrypted": (with_first(central={"flags": 1}), "is encrypted"),
    "patched data": (with_first(central={"flags": 0x20}, local={"flags": 0x20}), "is encrypted or patched"),
    "a structured dtype": (with_first(content=header_of("[('a', '<f4')]")), "not that of a plain array"),
    "a structured dtype in words": (with_first(content=header_of("'f4,f4'")), "values of type"),
    "void": (with_first(content=header_of("'V4'")), "values of type"),
    "dates": (with_first(content=header_of("'<M8[s]'")), "values of type"),
    "objects": (with_first(content=header_of("'|O'")), "pickled Python objects"),
    "a sub-array dtype": (with_first(content=header_of("'(2,3)f4'")), "values of type"),
    "numpy's new strings": (with_first(content=header_of("'T'")), ""),
    "a product past 2^64": (with_first(content=header_of(shape="(4294967296, 4294967296, 2)")), "the member has"),
    "a product of 2^64": (with_first(content=header_of(shape="(4294967296, 4294967296)")), "the member has"),
    "a negative size": (with_first(content=header_of(shape="(-3, -6)")), "has the shape"),
    "a size of thousands of digits": (with_first(content=header_of(shape="(0x" + "f" * 3900 + ",)")), "has the shape"),
    "a format of tomorrow": (with_first(content=FIRST.content[:7] + b"\x01" + FIRST.content[8:]), "does not start as"),
    "a header of brackets": (with_first(content=npy_of("[" * 4000)), "not that of a plain array"),
    "a header of operators": (with_first(content=npy_of("-" * 4000 + "1")), "not that of a plain array"),
    "a header with a call": (with_first(content=npy_of("__import__('os').abort()")), "not that of a plain array"),
    "a header that is blank": (with_first(content=npy_of(" " * 100)), "not that of a plain array"),
    "a header with spaces that numpy refuses": (
        with_first(content=header_of(after="\xa0")),
        "not that of a plain array",
    ),
}  # fmt: skip


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guard:
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path / "cache"))
    return Guard(tmp_path)


def refused(guard: Guard, path: Path, read: Callable[[Path], object], error: type[GemmaScopeError], text: str) -> None:
    with pytest.raises(error) as caught, guard.watch(path.stat().st_size):
        read(path)
    assert text in str(caught.value)
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", NPZ)
def test_npz(case: str, tmp_path: Path, guard: Guard) -> None:
    path, (data, text) = tmp_path / "params.npz", NPZ[case]
    path.write_bytes(data)
    refused(guard, path, load_arrays, WeightsError, text)


def test_what_is_odd_but_sound_is_read(tmp_path: Path) -> None:
    """A comment of 64 KiB, zip64 fields, descriptors, false numbers that only the local header has (the index and the
    checksums count): the arrays are the right ones, as numpy reads them."""
    odd = [
        write_zip(MEMBERS, comment=b"c" * 0xFFFF),
        write_zip([replace(m, central=FULL, central_extra=zip64(len(m.content), len(m.content))) for m in MEMBERS]),
        write_zip([replace(m, descriptor=b"PK\x07\x08" + bytes(12)) for m in MEMBERS]),
        write_zip([replace(m, local={"crc": 1, "size": 2, "compressed": 3}) for m in MEMBERS]),
        write_zip([replace(m, local={"crc": 1, "size": 2, "compressed": 3}, method=DEFLATED) for m in MEMBERS]),
    ]
    for data in odd:
        (tmp_path / "params.npz").write_bytes(data)
        found = load_arrays(tmp_path / "params.npz")
        with np.load(tmp_path / "params.npz") as archive:
            assert all(np.array_equal(archive[name], array) for name, array in PLAIN.items())
        assert all(np.array_equal(found[name].numpy(), array) for name, array in PLAIN.items())


def test_a_bomb_with_true_sizes_is_refused_before_it_is_inflated(
    tmp_path: Path, monkeypatch: Any, guard: Guard
) -> None:
    """Zeros deflate 1000:1, and nothing in the index is false; but no SAE has such shapes."""
    bomb = Member(b"W_enc.npy", npy(np.zeros((3, 6 << 18), np.float32)), DEFLATED, level=9)
    path = tmp_path / "params.npz"
    path.write_bytes(write_zip([bomb, *REST]))
    assert len(bomb.content) > 900 * len(bomb.run())
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("memory was asked for"))
    monkeypatch.setattr(load, "stream", lambda *_: pytest.fail("it was inflated"))
    refused(guard, path, load_arrays, WeightsError, "shapes that do not fit together")


def test_the_header_of_a_bomb_is_read_without_inflating_the_rest(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "params.npz"
    path.write_bytes(write_zip([Member(b"x.npy", npy_of(" " * 10, bytes(1 << 25)), DEFLATED)]))
    refused(guard, path, inspect_npz, WeightsError, "not that of a plain array")


TENSOR = {"dtype": "F32", "shape": [3, 6], "data_offsets": [0, 72]}


def tensors(header: object, size: int = 72, length: int | None = None) -> bytes:
    """A safetensors file with any header, text or JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return ((len(text) if length is None else length) & (2**64 - 1)).to_bytes(8, "little") + text + bytes(size)


def spelled(name: str, index: int) -> str:
    """One of the ways to write a name in upper and lower case."""
    return "".join(c.upper() if index >> n & 1 else c for n, c in enumerate(name))


def one(**changes: Any) -> bytes:
    return tensors({"W_enc": {**TENSOR, **changes}})


SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "overlap": (tensors({"a": TENSOR, "b": TENSOR}), "does not begin where"),
    "a hole": (tensors({"a": TENSOR, "b": {**TENSOR, "data_offsets": [76, 148]}}, 148), "does not begin where"),
    "bytes at the end": (tensors({"a": TENSOR}, 73), "its tensors need"),
    "offsets past the end": (tensors({"a": TENSOR}, 71), "its tensors need"),
    "offsets backwards": (one(data_offsets=[72, 0]), "needs 72 bytes"),
    "negative offsets": (one(data_offsets=[-72, 0]), "does not describe"),
    "a key twice": (tensors(b'{"a": %b, "a": %b}' % ((json.dumps(TENSOR).encode(),) * 2)), "a key occurs twice"),
    "a length of 2^63": (tensors({"a": TENSOR}, length=2**63), "is truncated, corrupt"),
    "a length of 2^64 - 1": (tensors({"a": TENSOR}, length=2**64 - 1), "is truncated, corrupt"),
    "a length of 0": (tensors({"a": TENSOR}, length=0), "is truncated, corrupt"),
    "a NUL in a name": (tensors({"W_enc\x00": TENSOR}), "which is not an array name"),
    "half a surrogate in a name": (tensors({"\ud800": TENSOR}), "surrogates not allowed"),
    "an escape in a name": (tensors({"\x1b[2J": TENSOR}), "which is not an array name"),
    "a name that turns the text around": (tensors({"\u202eW_enc": TENSOR}), "which is not an array name"),
    "a megabyte of brackets": (tensors(b"[" * (1 << 20)), "is truncated, corrupt"),
    "a megabyte of objects": (tensors(b'{"a":' * 200_000), "is truncated, corrupt"),
    "more than a megabyte": (tensors(b"{" + b" " * (1 << 20) + b"}"), "a header of"),
    "a megabyte of names for one array": (
        tensors({spelled("finetuning_scaling_factor", i): 0 for i in range(9000)}),
        "tensors, which no SAE file does",
    ),
    "a number of a million digits": (tensors(b'{"a": ' + b"9" * 900_000 + b"}"), "is truncated, corrupt"),
    "a product of thousands of digits": (one(shape=[10**4299] * 8), "does not describe"),
    "a product of 2^64 and a bit": (one(shape=[2**32, 2**32]), "needs 73786976294838206464 bytes"),
    "no size": (one(shape=[0, 6], data_offsets=[0, 0]), "needs 0 bytes"),
    "a true size": (one(shape=[True, 18]), "does not describe"),
    "a size of 3.0": (one(shape=[3.0, 6]), "does not describe"),
    "a shape that is a mapping": (one(shape={}), "does not describe"),
    "a shape that is text": (one(shape="36"), "does not describe"),
    "nine dimensions": (one(shape=[3, 6, 1, 1, 1, 1, 1, 1, 1]), "does not describe"),
    "more than a tensor needs": (one(more=1), "does not describe"),
    "eight-bit floats": (one(dtype="F8_E4M3"), "of type 'F8_E4M3'"),
    "a dtype that is none": (one(dtype=["F32"] * 999), "of type ['F32'"),
    "NaN": (tensors(b'{"a": NaN}'), "NaN is not JSON"),
    "metadata that is a list": (tensors({"__metadata__": [1], "a": TENSOR}), "__metadata__"),
    "metadata that is an empty list": (tensors({"__metadata__": [], "a": TENSOR}), "__metadata__"),
    "metadata of numbers": (tensors({"__metadata__": {"a": 1}, "a": TENSOR}), "__metadata__"),
    "a list": (tensors([1, 2]), "not a JSON object"),
    "no tensors": (tensors({}, 0), "lacks W_enc"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case: str, tmp_path: Path, guard: Guard) -> None:
    path, (data, text) = tmp_path / "sae_weights.safetensors", SAFETENSORS[case]
    path.write_bytes(data)
    refused(guard, path, load_arrays, WeightsError, text)


HEAD = "release: fuzz\nmodel: m\nrepo: {repo}\nlicense: x\ndescription: d\nsaes:\n"
ROW = HEAD + "- {{id: a, site: res, layer: 0, width: 1k, d_sae: 1024, d_in: 64, l0: 1.0, path: {path}}}\n"
YAML: dict[str, tuple[str, str]] = {
    "aliases": ("a: &a [x]\nb: [*a, *a]\n", "has the alias *a"),
    "deep": ("[" * 900, "nested more than 16 deep"),
    "very deep": ("[" * 60_000, "nest"),
    "deep mappings": ("{a: " * 20_000, "nested more than 16 deep"),
    "an object": ("!!python/object/apply:os.system ['true']", "has the tag"),
    "a module": ("!!python/module:antigravity ''", "has the tag"),
    "bytes": ("a: !!binary aGk=", "has the tag"),
    "a key twice": ("a: 1\na: 2", "has the key 'a' again"),
    "an empty number": ("a: !!int ''", "is not a int"),
    "a number of signs": ("a: !!float '+'", "is not a float"),
    "a long number": ("a: " + "9" * 60_000, "is not a int"),
    "a sexagesimal number": ("a: 1" + ":59" * 20_000, "is not a int"),
    "many documents": ("---\na\n" * 10_000, "a second document"),
    "an absolute path": (ROW.format(repo=".", path="/etc"), "is not a relative path"),
    "a path that climbs": (ROW.format(repo=".", path="a/../../b"), "is not a relative path"),
    "a repository that climbs": (ROW.format(repo="./..", path="a"), "is not a repository"),
    "a path through a link": (ROW.format(repo=".", path="escape"), "leads out of"),
    "rows that are all wrong": (HEAD + "- {}\n" * 100_000, "more than 10,000 entries"),
    "mappings of mappings": ("\n".join(f"k{i}: {[1] * 999}" for i in range(400)), "more than 300,000 values"),
    "NUL": ("a: \x00", "is not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", YAML)
def test_yaml(case: str, tmp_path: Path, guard: Guard) -> None:
    path, (text, wanted) = tmp_path / "fuzz.yaml", YAML[case]
    path.write_text(text)
    (tmp_path / "escape").symlink_to("/", target_is_directory=True)
    refused_long(guard, path, wanted)


def refused_long(guard: Guard, path: Path, text: str) -> None:
    with pytest.raises(RegistryError) as caught, guard.watch(path.stat().st_size):
        read_release(path)
    assert text in str(caught.value)
    assert path.name in str(caught.value)


def test_yaml_of_one_byte_too_many(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "fuzz.yaml"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    refused_long(guard, path, "is larger than")


READERS = {
    "params.npz": inspect_npz,
    "sae_weights.safetensors": inspect_safetensors,
    "cfg.json": lambda path: read_cfg(path.parent),
    "fuzz.yaml": read_release,
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file(name: str, tmp_path: Path, guard: Guard) -> None:
    """A pipe that nobody writes to would be waited for for ever; the guard's alarm would end the wait."""
    path, read = tmp_path / name, READERS[name]
    makers: list[Callable[[], None]] = [
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: path.symlink_to(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(tmp_path / "nothing"),
    ]
    for make in makers:
        make()
        with pytest.raises((WeightsError, RegistryError), match=name), guard.watch(0):
            read(path)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", READERS)
def test_a_link_to_a_sound_file_is_read(name: str, tmp_path: Path) -> None:
    """The Hub's cache is made of links."""
    sound = {"params.npz": seeds.npz(PLAIN), "sae_weights.safetensors": seeds.safetensors(PLAIN)}
    sound |= {"cfg.json": b"{}", "fuzz.yaml": seeds.yaml_seeds()[0]}
    (tmp_path / "blob").write_bytes(sound[name])
    (tmp_path / name).symlink_to("blob")
    READERS[name](tmp_path / name)


def test_a_stamp_that_is_no_stamp_is_none(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path))
    target: Target = make_target("stamp", tmp_path)
    key = '{"key": "@KEY@", "sha256": null, "ranges": '
    for text in ("[" * 100_000, key + '{"W_enc": [1e400, 1' + "0" * 400 + "]}}", "", "\x00", key + '{"W_enc": [1]}}'):
        target.place(text.encode())
        target.run(text.encode())
    place = next((tmp_path / "cache").rglob("*.json"))
    with place.open("wb") as file:
        file.truncate(1 << 40)
    target.run(b"")
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    with Guard(tmp_path).watch(0):
        assert read_stamp(tmp_path / "params.npz") is None
    assert torch.equal(load_arrays(tmp_path / "params.npz")["b_dec"], torch.from_numpy(PLAIN["b_dec"]))
