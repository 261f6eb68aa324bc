"""A bucket: rows of activations that are shuffled together, in one buffer that is never copied.

The paper shuffles in buckets of about a million activations (section 3.1). Here the order is a permutation, eight bytes
a row, and a batch is gathered through it, while the rows stay where they were written. The next bucket overwrites the
last one, so shuffling needs no second buffer, and no state of a shuffle is saved: the order follows from the seed and
the bucket's number.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place
from gemma_scope_tl.weights.modes import is_out_of_memory

Block = np.ndarray[Any, np.dtype[np.uint8]]

_CHUNK = 512  # rows gathered at a time when their dtype changes; this many fit into a core's cache


class BufferPool:
    """Makes uninitialised CPU tensors out of memory blocks that return to the pool when no tensor uses them any more.

    Allocating a batch anew each step costs page faults; reusing the block of an earlier one does not.
    """

    def __init__(self, keep: int = 2) -> None:
        """
        Args:
            keep: blocks of each size that may wait unused.
        """
        self.keep = keep
        self._blocks: dict[int, deque[Block]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor like ``torch.empty``. Its block is reused only after the last view of the tensor is gone."""
        size = math.prod(shape) * dtype.itemsize
        unused = self._blocks.setdefault(size, deque(maxlen=self.keep))
        try:
            block = unused.pop()
        except IndexError:
            block = np.empty(size, np.uint8)
        lent = block.view()  # only the tensor's storage refers to this view, so the view dies with the storage
        weakref.finalize(lent, unused.append, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)


def bucket_order(seed: int, number: int, rows: int) -> Int[torch.Tensor, " rows"]:
    """The order in which the rows of bucket ``number`` are served: a permutation, the same for every source.

    Args:
        seed: seed of the run, 0 or more.
        number: number of the bucket, counted from 0 through all epochs.
        rows: number of rows in the bucket.

    Raises:
        GemmaScopeError: ``seed`` or ``number`` is negative.
    """
    if seed < 0 or number < 0:
        raise GemmaScopeError(f"Seeds and bucket numbers cannot be negative, got {seed} and {number}.")
    mixed = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mixed))


class Bucket:
    """Rows of all places, written in order and read shuffled.

    Attributes:
        rows: number of rows that the bucket holds.
        tensors: the buffer ``[rows, d]`` of every place; a reader may write into slices of it directly.
    """

    def __init__(
        self,
        rows: int,
        widths: Mapping[Place, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pinned: bool = False,
    ) -> None:
        """
        Args:
            rows: how many rows fit.
            widths: ``d`` of every place.
            dtype: dtype of the buffer: float32, bfloat16 or float16.
            device: device of the buffer.
            pinned: allocate page-locked host memory, into which a GPU copies while Python continues.

        Raises:
            GemmaScopeError: there are no rows or places, the dtype is not floating-point, or memory does not suffice.
        """
        if rows < 1 or not widths or not dtype.is_floating_point:
            raise GemmaScopeError(
                f"A bucket needs one row, one place and a floating-point dtype at least, not {rows} rows, "
                f"{len(widths)} places and {dtype}."
            )
        self.rows = rows
        try:
            self.tensors = {
                place: torch.empty(rows, width, dtype=dtype, device=device, pin_memory=pinned)
                for place, width in widths.items()
            }
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = rows * sum(widths.values()) * dtype.itemsize / 2**30
            raise GemmaScopeError(
                f"A bucket of {rows} rows at {len(widths)} places takes {size:.1f} GiB, which {device} does not have "
                f"({error}). Lower bucket_rows, store bfloat16, or train fewer places at a time."
            ) from error
        self._order: torch.Tensor | None = None
        self._pool = BufferPool()

    @property
    def nbytes(self) -> int:
        """Size of all buffers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def fill(self, at: int, values: Mapping[Place, Float[torch.Tensor, "n d"]]) -> None:
        """Write rows of every place, from row ``at`` on, and discard the order.

        A copy from a GPU to pinned memory may continue in the background until :meth:`shuffle`.

        Raises:
            GemmaScopeError: a place is missing or unknown, a width differs from the bucket's, the places have unequal
                numbers of rows, or the rows do not fit.
        """
        self._order = None
        if set(values) != set(self.tensors):
            raise GemmaScopeError(
                f"The bucket holds {_keys(self.tensors)}, and values were given for {_keys(values)}: give all of them."
            )
        count = len(next(iter(values.values())))
        for place, value in values.items():
            wanted = (count, self.tensors[place].shape[1])
            if value.shape != wanted or not 0 <= at <= self.rows - count:
                raise GemmaScopeError(
                    f"{place.key}: {list(value.shape)} does not fit at row {at} of {list(self.tensors[place].shape)}; "
                    f"expected {list(wanted)}."
                )
        for place, value in values.items():
            self.tensors[place][at : at + count].copy_(value, non_blocking=True)

    def shuffle(self, seed: int, number: int) -> None:
        """Order the rows as bucket ``number`` of a run with this seed; nothing is moved."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies into pinned memory may still be under way
        device = next(iter(self.tensors.values())).device
        self._order = bucket_order(seed, number, self.rows).to(device)

    def take(
        self, index: int, batch_size: int, dtype: torch.dtype = torch.float32
    ) -> dict[Place, Float[torch.Tensor, "batch_size d"]]:
        """Batch ``index`` in the order of the shuffle: new tensors, the same rows at all places.

        Raises:
            GemmaScopeError: the bucket was not shuffled since it was filled, or has no such batch.
        """
        if self._order is None:
            raise GemmaScopeError("Shuffle the bucket after filling it, then take batches.")
        if index < 0 or batch_size < 1 or (index + 1) * batch_size > self.rows:
            raise GemmaScopeError(f"A bucket of {self.rows} rows has no batch {index} of {batch_size}.")
        rows = self._order[index * batch_size : (index + 1) * batch_size]
        return {place: self._gather(tensor, rows, dtype) for place, tensor in self.tensors.items()}

    def _gather(self, tensor: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if tensor.device.type != "cpu":
            return tensor.index_select(0, rows).to(dtype)
        out = self._pool.empty((len(rows), tensor.shape[1]), dtype)
        if tensor.dtype == dtype:
            return torch.index_select(tensor, 0, rows, out=out)
        for at in range(0, len(rows), _CHUNK):
            out[at : at + _CHUNK].copy_(tensor.index_select(0, rows[at : at + _CHUNK]))
        return out


def _keys(places: Mapping[Place, object]) -> str:
    return ", ".join(place.key for place in places) or "nothing"
