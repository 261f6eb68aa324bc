"""The sparse npz is what NumPy would have written, only with holes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from gemma_scope_tl.weights.npz import inspect_npz
from tests.hub.big_npz import write_sparse_npz


def test_small_one_is_numpys(tmp_path: Path) -> None:
    rows = {1: np.arange(6, dtype=np.float32), 4: np.full(6, -2, np.float32)}
    write_sparse_npz(tmp_path / "a.npz", 6, 9, rows)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "W_enc": (6, 9),
            "W_dec": (9, 6),
            "b_enc": (9,),
            "b_dec": (6,),
            "threshold": (9,),
        }
        wanted = np.zeros((9, 6), np.float32)
        wanted[1], wanted[4] = rows[1], rows[4]
        np.testing.assert_array_equal(arrays["W_dec"], wanted)
        assert all(arrays[name].dtype == np.float32 for name in arrays)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None  # every checksum, the zeros' included
    assert set(inspect_npz(tmp_path / "a.npz")) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    np.savez(tmp_path / "numpy.npz", W_dec=wanted)
    with zipfile.ZipFile(tmp_path / "numpy.npz") as archive, zipfile.ZipFile(tmp_path / "a.npz") as ours:
        assert archive.getinfo("W_dec.npy").CRC == ours.getinfo("W_dec.npy").CRC


def test_large_one_takes_no_room(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    write_sparse_npz(path, 2304, 1 << 20, {123_456: np.ones(2304, np.float32)})
    stat = path.stat()
    assert stat.st_size > 19_300_000_000 and stat.st_blocks * 512 < 2_000_000
    found = inspect_npz(path)
    assert found["W_dec"].shape == (1 << 20, 2304) and found["W_enc"].shape == (2304, 1 << 20)
