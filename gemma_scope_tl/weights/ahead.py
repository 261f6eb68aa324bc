"""Telling the system which rows of a mapped array are needed next.

A row of a mapped file that is not in memory is read when it is touched, with as much around it as the system reads
ahead at once: often 128 KiB, on some disks 8 MiB. For rows that lie far apart, as those of active latents in a decoder
of several layers, that is many times what is needed, and pushes out of memory what is needed again. When all rows are
announced before, exactly they are read, many at a time.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor

WORTH_BYTES = 64 << 20
"""Size of an array from which announcing rows is worth the calls."""


def read_ahead(array: Tensor, rows: Tensor) -> None:
    """Announce rows of an array. It changes nothing but the time of reading them, and nothing at all on other systems
    than Linux, for arrays that are small or not in the processor's memory, and for rows that are in memory already.

    Args:
        array: ``[n, ...]``, the values of each row next to each other.
        rows: int64 ``[k]``, in any order.
    """
    step = array.stride(0) * array.element_size()
    if array.device.type != "cpu" or step * array.shape[0] < WORTH_BYTES:
        return
    advise = _madvise()
    if advise is None:
        return
    size, start = math.prod(array.shape[1:]) * array.element_size(), array.data_ptr()
    for row in rows.unique().tolist():
        first = start + row * step
        page = first - first % mmap.PAGESIZE
        advise(page, first + size - page, mmap.MADV_WILLNEED)


@cache
def _madvise() -> Any:
    """The system's function of that name; None where there is none."""
    if sys.platform != "linux":
        return None
    found = getattr(ctypes.CDLL(None), "madvise", None)
    if found is not None:
        found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
