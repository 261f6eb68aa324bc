"""Memory of batches that nobody holds any more, for the batches to come.

A C library gives tensors above 32 MiB back to the system when they are freed. A batch of 4,096 rows of 2,304 floats is
such a tensor; touching its pages anew costs twice what gathering the rows does.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch

_KEPT = 2  # blocks of a size: one may still be in use while the next batch is made

Block = np.ndarray[Any, np.dtype[np.uint8]]


class SpareMemory:
    """Makes uninitialised CPU tensors out of blocks that come back when the last tensor on them is gone."""

    def __init__(self) -> None:
        self._blocks: dict[int, deque[Block]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor like ``torch.empty``; views of it keep it from being used again, as any tensor."""
        size = math.prod(shape) * dtype.itemsize
        spare = self._blocks.setdefault(size, deque(maxlen=_KEPT))
        try:
            block = spare.pop()
        except IndexError:
            block = np.empty(size, np.uint8)
        lent = block.view()  # the tensor's storage holds this view, and nothing else does
        weakref.finalize(lent, spare.append, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)
