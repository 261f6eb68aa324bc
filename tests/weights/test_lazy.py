"""What is read when: mapped files, one streaming check, stamps, bounded conversion."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.weights import load, stamp
from gemma_scope_tl.weights.layout import CHUNK
from gemma_scope_tl.weights.load import load_arrays

D_IN, D_SAE = 48, 700


def arrays(d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": d_sae, "b_dec": d_in, "threshold": d_sae}
    made = {name: rng.standard_normal(size=shape, dtype=np.float32) for name, shape in shapes.items()}
    return {**made, "threshold": np.abs(made["threshold"])}


def age(path: Path) -> None:
    """Wait until a write within the same tick of the clock can be told apart."""
    time.sleep(max(0.0, 0.11 - (time.time() - path.stat().st_ctime)))


@pytest.fixture(params=["stored", "deflated", "safetensors", "fortran", "swapped"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    values = arrays()
    path = tmp_path / ("w.safetensors" if request.param == "safetensors" else "params.npz")
    if request.param == "safetensors":
        save_file({name: torch.from_numpy(a) for name, a in values.items()}, path)
    elif request.param == "fortran":
        np.savez(path, **{name: np.asfortranarray(a) for name, a in values.items()})
    elif request.param == "swapped":
        np.savez(path, **{name: a.astype(">f4") for name, a in values.items()})
    else:
        (np.savez if request.param == "stored" else np.savez_compressed)(path, **values)
    age(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [64, 1000, CHUNK])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_slices_give_what_one_conversion_gives(
    file: Path, dtype: torch.dtype | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the slice size, that of an odd number of bytes too: equal to torch's own conversion, to the bit."""
    monkeypatch.setattr("gemma_scope_tl.weights.layout.CHUNK", chunk)
    for _ in range(2):  # checked, then known
        for name, tensor in load_arrays(file, dtype=dtype).items():
            wide = torch.promote_types(torch.float32, dtype or torch.float32)
            to = wide if name == "threshold" else dtype or torch.float32
            assert tensor.dtype == to
            assert tensor.is_contiguous()
            assert torch.equal(tensor, torch.from_numpy(arrays()[name]).to(to)), name


def test_elementwise_functions_run_before_rounding(file: Path) -> None:
    got = load_arrays(file, dtype=torch.bfloat16, elementwise={"W_dec": lambda t: t * 3.0})["W_dec"]
    assert torch.equal(got, (torch.from_numpy(arrays()["W_dec"]) * 3.0).to(torch.bfloat16))


def test_float16_that_would_overflow(file: Path) -> None:
    with pytest.raises(WeightsError, match="W_enc too large for float16"):
        load_arrays(file, dtype=torch.float16, elementwise={"W_enc": lambda t: t * 1e6})


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Names of the arrays that each load reads through."""
    seen: list[set[str]] = []
    real = load.stream

    def spy(path: Path, layouts: Any, sinks: Any, *rest: Any) -> None:
        seen.append({name for name, one in sinks.items() if one})
        real(path, layouts, sinks, *rest)

    monkeypatch.setattr(load, "stream", spy)
    return seen


def test_a_checked_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, **arrays())
    path.chmod(0o444)  # so that it may be mapped
    age(path)
    seen = count_reads(monkeypatch)
    load_arrays(path)
    load_arrays(path)
    vectors = {"b_enc", "b_dec", "threshold"}
    assert seen == [{"W_enc", "W_dec"} | vectors, vectors]


@pytest.mark.parametrize("restore_times", [False, True])
def test_a_changed_file_is_checked_again(tmp_path: Path, restore_times: bool) -> None:
    """A flipped byte in a matrix of a file that was checked, even when its modification time is set back."""
    path = tmp_path / "params.npz"
    np.savez(path, **arrays())
    age(path)
    load_arrays(path)
    before = path.stat()
    raw = bytearray(path.read_bytes())
    raw[raw.index(arrays()["W_enc"].tobytes()) + 1001] ^= 4
    with path.open("r+b") as opened:
        opened.write(raw)
    if restore_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(WeightsError, match=r"checksum \(CRC-32\) of 'W_enc'"):
        load_arrays(path)


def test_a_file_written_just_now_gets_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, **arrays())
    monkeypatch.setattr(stamp.time, "time_ns", lambda: path.stat().st_mtime_ns + 1000)
    load_arrays(path)
    assert stamp.read_stamp(path) is None


def test_vectors_are_checked_although_the_file_is_known(tmp_path: Path) -> None:
    """A stamp that is wrong (forged, or a bit that rotted) does not hide a bad threshold."""
    path = tmp_path / "params.npz"
    np.savez(path, **{**arrays(), "threshold": -arrays()["threshold"]})
    age(path)
    ranges = dict.fromkeys(arrays(), (0.0, 1.0))
    stamp.write_stamp(path, stamp.Stamp(ranges), stamp.file_key(path))
    assert stamp.read_stamp(path) is not None
    with pytest.raises(WeightsError, match="negative thresholds"):
        load_arrays(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"key": 1}', b"\xff\xfe"])
def test_a_broken_stamp_is_no_stamp(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "params.npz"
    np.savez(path, **arrays())
    age(path)
    load_arrays(path)
    (held,) = (tmp_path / "cache" / "checked").iterdir()
    held.write_bytes(content)
    assert stamp.read_stamp(path) is None
    load_arrays(path)
    assert stamp.read_stamp(path) is not None


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path / "file" / "cache"))
    path = tmp_path / "params.npz"
    np.savez(path, **arrays())
    age(path)
    assert torch.equal(load_arrays(path)["b_enc"], torch.from_numpy(arrays()["b_enc"]))


def test_sha256_of_the_whole_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=f"has sha256 {right}, but it should be {'0' * 64}"):
        load_arrays(file, sha256="0" * 64)
    load_arrays(file)  # remembered without a hash, so the hash is taken when it is asked for
    load_arrays(file, sha256=right)
    seen = count_reads(monkeypatch)
    load_arrays(file, sha256=right)
    load_arrays(file)
    with pytest.raises(WeightsError, match="has sha256"):
        load_arrays(file, sha256="1" * 64)
    known = stamp.read_stamp(file)
    assert known is not None
    assert known.sha256 == right
    assert len(seen) == 3


PEAK = """
import sys, torch
from pathlib import Path
from gemma_scope_tl.weights.load import load_arrays
def peak():  # of this process alone; ru_maxrss would start from its parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
(torch.ones(4096, 4096) * 2).to(torch.bfloat16)  # the library's own buffers
Path("/proc/self/clear_refs").write_text("5")
before, path = peak(), Path(sys.argv[1])
held = load_arrays(path, dtype=getattr(torch, sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc")
@pytest.mark.parametrize("kind", ["stored", "deflated"])
def test_the_peak_is_the_result_and_a_slice(tmp_path: Path, kind: str) -> None:
    """64 MiB of float32 to bfloat16: 32 MiB of result; and a few slices of 4 MiB beside it; mapped: neither."""
    path = tmp_path / "params.npz"
    values = arrays(512, 16384)
    (np.savez if kind == "stored" else np.savez_compressed)(path, **values)
    path.chmod(0o444)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # checked, then known
        command = [sys.executable, "-c", PEAK, str(path), "bfloat16"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert 30 < int(done.stdout) / 1024 < 32 + 16
    if kind == "stored":
        command[-1] = "float32"
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert int(done.stdout) / 1024 < 8
