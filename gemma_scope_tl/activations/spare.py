"""Memory of tensors that nobody holds any more, for tensors of the same size to come.

A C library gives large tensors back to the system when they are freed. Touching the pages of a new one costs twice what
gathering a batch of rows into it does, and ten times what a comparison into it does.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch

Block = np.ndarray[Any, np.dtype[np.uint8]]


class SpareMemory:
    """Makes uninitialised CPU tensors out of blocks that come back when the last tensor on them is gone."""

    def __init__(self, keep: int = 2) -> None:
        """
        Args:
            keep: blocks of each size that may wait unused.
        """
        self.keep = keep
        self._blocks: dict[int, deque[Block]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor like ``torch.empty``; views of it keep it from being used again, as any tensor."""
        size = math.prod(shape) * dtype.itemsize
        spare = self._blocks.setdefault(size, deque(maxlen=self.keep))
        try:
            block = spare.pop()
        except IndexError:
            block = np.empty(size, np.uint8)
        lent = block.view()  # the tensor's storage holds this view, and nothing else does
        weakref.finalize(lent, spare.append, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)
