"""The npz reader: what it maps, what it inflates, and what it refuses."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.weights.layout import map_array, stream
from gemma_scope_tl.weights.npz import clear_errors, inspect_npz

RNG = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "W_enc": RNG.normal(size=(5, 7)).astype(np.float32),
    "b_enc": RNG.normal(size=7).astype(np.float32),
    "scalar": np.float32(3.5),
}


def read_npz(path: Path, verify: bool = True) -> dict[str, np.ndarray]:
    """Every array, as the loader reads them."""
    layouts = inspect_npz(path)
    found = {name: np.empty(layout.count, str(layout.dtype).removeprefix("torch.")) for name, layout in layouts.items()}

    def put(name: str) -> Any:
        return lambda index, chunk: found[name].__setitem__(slice(index, index + len(chunk)), chunk.numpy())

    with clear_errors(path):
        stream(path, layouts, {name: [put(name)] for name in layouts}, set(layouts) if verify else ())
    return {
        name: a.reshape(layouts[name].shape, order="F" if layouts[name].fortran else "C") for name, a in found.items()
    }


def save(path: Path, compress: bool = False, **arrays: Any) -> Path:
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return path


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    """A .npy with any header at all."""
    width = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(width, len(header)) + header.encode() + data


def zip_of(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("compress", [False, True], ids=["stored", "deflated"])
def test_reads_what_numpy_wrote(tmp_path: Path, compress: bool) -> None:
    read = read_npz(save(tmp_path / "a.npz", compress, **ARRAYS))
    assert list(read) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)
        assert inspect_npz(tmp_path / "a.npz")[name].mappable != compress


@pytest.mark.parametrize("compress", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize(
    "array", [np.asfortranarray(ARRAYS["W_enc"]), ARRAYS["W_enc"].astype(">f4"), ARRAYS["W_enc"].T]
)
def test_orders_and_byte_orders(tmp_path: Path, compress: bool, array: np.ndarray) -> None:
    read = read_npz(save(tmp_path / "a.npz", compress, x=array))["x"]
    np.testing.assert_array_equal(read, array)


def test_changing_an_array_leaves_the_file_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", **ARRAYS)
    before = path.read_bytes()
    map_array(path, inspect_npz(path)["W_enc"])[:] = 0
    assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc")
def test_stored_members_are_mapped_and_not_copied(tmp_path: Path) -> None:
    path = save(tmp_path / "big.npz", x=np.zeros((512, 1024), np.float32)).resolve()
    array = map_array(path, inspect_npz(path)["x"])
    address = array.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in maps]
    assert any(low <= address and address + array.nbytes <= high for low, high in spans)


def test_inspect_reads_headers_only(tmp_path: Path) -> None:
    member = inspect_npz(save(tmp_path / "a.npz", **ARRAYS))["W_enc"]
    assert (member.shape, member.dtype, member.fortran, member.deflated) == ((5, 7), torch.float32, False, False)
    assert member.nbytes == 5 * 7 * 4


def test_names_select_and_missing_names_are_listed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", **ARRAYS)
    assert list(inspect_npz(path, ["b_enc"])) == ["b_enc"]
    with pytest.raises(WeightsError, match=r"no array nope; it has W_enc, b_enc, scalar"):
        inspect_npz(path, ["nope"])


@pytest.mark.parametrize("compress", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("tenths", range(1, 10))
def test_truncated_at_every_tenth(tmp_path: Path, compress: bool, tenths: int) -> None:
    path = save(tmp_path / "a.npz", compress, x=RNG.normal(size=(64, 64)).astype(np.float32))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * tenths // 10])
    with pytest.raises(WeightsError, match=r"a\.npz is truncated.*[Dd]ownload it again"):
        read_npz(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"\n  <html></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b'{"error": "gated"}', "is JSON text"),
        (pickle.dumps({"W_enc": [1.0]}), "Python pickle"),
        (b"\x93NUMPY\x01\x00", "a single .npy array"),
        (b"\x00" * 100, "not an npz archive"),
        (b"PK\x03\x04garbage", "truncated or corrupt"),
        (b"PK\x05\x06" + bytes(18), "holds 0 arrays"),
    ],
)
def test_files_that_are_not_npz(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "params.npz"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_npz(path)
    assert str(path) in str(caught.value)
    assert "download it again" in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        read_npz(tmp_path / "nope.npz")
    with pytest.raises(WeightsError, match="is not a file"):
        read_npz(tmp_path)


@pytest.mark.parametrize("compress", [False, True], ids=["stored", "deflated"])
def test_pickled_members_are_never_opened(tmp_path: Path, compress: bool) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    path = save(tmp_path / "a.npz", compress, W_enc=np.array([Bomb()], dtype=object))
    with pytest.raises(WeightsError, match=r"pickled Python objects at 'W_enc\.npy'"):
        read_npz(path)
    assert not (tmp_path / "ran").exists()


def test_wrong_checksum_in_stored_data(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", **ARRAYS)
    raw = bytearray(path.read_bytes())
    raw[raw.index(ARRAYS["W_enc"].tobytes()) + 10] ^= 1
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match=r"checksum \(CRC-32\) of 'W_enc'"):
        read_npz(path)
    assert read_npz(path, verify=False)["W_enc"].shape == (5, 7)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}",  # the member has two values
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2.0,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 2)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': [2]}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1, 1, 1, 1, 1, 1, 1, 1)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4294967296)}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (2,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '|S8', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1}",
        "{'descr': '<f4', 'shape': (2,)}",
        "__import__('os').getcwd()",
        "(" * 3000,
        "[" * 99 + "]" * 99,
        "{" + " " * 5000 + "}",
        "",
    ],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_absurd_headers(tmp_path: Path, header: str, method: int) -> None:
    path = zip_of(tmp_path / "a.npz", {"x.npy": npy(header, np.ones(2, np.float32).tobytes())}, method)
    with pytest.raises(WeightsError, match=r"a\.npz"):
        read_npz(path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_npy_version(tmp_path: Path, version: int) -> None:
    data = np.ones(2, np.float32)
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}"
    path = zip_of(tmp_path / "a.npz", {"x.npy": npy(header, data.tobytes(), version)})
    np.testing.assert_array_equal(read_npz(path)["x"], data)


@pytest.mark.parametrize("name", ["x.txt", "../x.npy", "a/x.npy"])
def test_members_that_are_not_arrays(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="is not an array"):
        read_npz(zip_of(tmp_path / "a.npz", {name: b"hello"}))


def test_a_name_held_twice(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2, np.float32))
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", buffer.getvalue())
    with pytest.raises(WeightsError, match="twice"):
        read_npz(path)


def test_other_compression_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="method 12"):
        read_npz(zip_of(tmp_path / "a.npz", {"x.npy": b"hello"}, zipfile.ZIP_BZIP2))


def test_streamed_archives_are_read(tmp_path: Path) -> None:
    """Writers that cannot seek put a descriptor after every member."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    np.savez(pipe, **ARRAYS)  # type: ignore[arg-type]
    (tmp_path / "a.npz").write_bytes(pipe.data)
    read = read_npz(tmp_path / "a.npz")
    assert all(np.array_equal(read[name], array) for name, array in ARRAYS.items())


def test_a_bomb_is_refused_before_it_inflates(tmp_path: Path) -> None:
    """The index claims a terabyte that its compressed bytes cannot hold."""
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}"
    path = zip_of(tmp_path / "a.npz", {"x.npy": npy(header, bytes(8))}, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02") + 24
    raw[at : at + 4] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match="claims 4294967280 bytes"):
        read_npz(path)


@pytest.mark.slow
@pytest.mark.parametrize("compress", [False, True], ids=["stored", "deflated"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_is_caught_or_harmless(tmp_path: Path, compress: bool, data: st.DataObject) -> None:
    """Whatever one byte changes to: an error of ours, or (timestamps, padding) exactly the arrays that were saved."""
    path = save(tmp_path / "a.npz", compress, **ARRAYS)
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        read = read_npz(path)
    except WeightsError:
        return
    assert set(read) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=300), start=st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"<html>", b"\x80\x04"])
)
def test_arbitrary_bytes_never_raise_anything_else(tmp_path: Path, content: bytes, start: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(start + content)
    with pytest.raises(WeightsError):
        read_npz(path)
