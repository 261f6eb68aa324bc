"""Rows of a mapped file that are announced are read from disk, and no others."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_scope_tl.weights import ahead
from gemma_scope_tl.weights.ahead import read_ahead

ROWS, WIDTH = 1_024, 16_384  # 64 KiB a row
FAR = [3, 511, 1_000]


def _resident(array: torch.Tensor, row: int) -> list[bool]:
    """Whether each page of a row is in memory, by the system's ``mincore``."""
    size = array.stride(0) * array.element_size()
    start = array.data_ptr() + row * size
    page = start - start % mmap.PAGESIZE
    count = -(-(start + size - page) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(count * mmap.PAGESIZE), found) == 0
    return [bool(one & 1) for one in found]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is told")
def test_announced_rows_are_read_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    with file.open("wb") as out:
        out.truncate(ROWS * WIDTH * 4)  # a hole, which is read like data
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    array = torch.from_numpy(np.memmap(file, np.float32, "c", shape=(ROWS, WIDTH)))
    if any(_resident(array, 700)):
        pytest.skip("this file system keeps all files in memory")
    read_ahead(array, torch.tensor([*FAR, 511]))
    ended = time.monotonic() + 10
    while not all(all(_resident(array, row)) for row in FAR) and time.monotonic() < ended:
        time.sleep(0.01)
    assert all(all(_resident(array, row)) for row in FAR)
    assert not any(any(_resident(array, row)) for row in (250, 700, 800))


def test_values_do_not_change_and_small_arrays_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "WORTH_BYTES", 0)
    array = torch.randn(8, 3, 4)
    before = array.clone()
    read_ahead(array, torch.tensor([7, 0, 7]))
    read_ahead(array[:, 1:], torch.tensor([7]))
    read_ahead(array, torch.tensor([], dtype=torch.long))
    read_ahead(array[:0], torch.tensor([], dtype=torch.long))
    assert torch.equal(array, before)
    monkeypatch.undo()
    monkeypatch.setattr(ahead, "_madvise", lambda: pytest.fail("a small array was announced"))
    read_ahead(array, torch.tensor([1]))
