"""Sources of activations for training: what a model that runs during training and a store on disk have in common.

Both serve the same batches to the bit (in one dtype). The activations of a run form one sequence of rows, in the order
of the tokens, which begins again after the last. It is cut into buckets of ``bucket_rows`` rows: bucket ``b`` begins at
row ``b * bucket_rows``, modulo the number of rows. Each bucket is shuffled by a generator seeded with the run's seed
and ``b``, and served from beginning to end. So batch ``n`` is a function of the seed and of ``n`` alone: a trainer that
resumes asks for the next batch by its number, and no state of a shuffle is ever saved.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float

from gemma_scope_tl.activations.buckets import Bucket
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place


class Source(Protocol):
    """Activations for training; equal seeds give equal batches.

    Attributes:
        widths: ``d`` of every place that is served.
        rows: number of rows before they repeat.
        bucket_rows: rows that are shuffled together.
    """

    @property
    def widths(self) -> Mapping[Place, int]: ...

    @property
    def rows(self) -> int: ...

    @property
    def bucket_rows(self) -> int: ...

    def mean_squares(self, rows: int) -> dict[Place, float]:
        """``E ||x||^2`` of each place over the first ``rows`` rows, in float64. It consumes no batches."""
        ...

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Mapping[Place, torch.Tensor]]:
        """Raw activations ``[batch_size, d]`` of all places, row by row from the same tokens, from batch ``start`` on.

        ``batch_size`` must divide ``bucket_rows``. The iterator does not end: after the last row, the data begins again
        in another order. The caller may change the tensors.
        """
        ...


class MeanSquares:
    """``E ||x||^2`` of rows that arrive in pieces. The result is the same to the bit however the rows are cut.

    The square of each row is summed in float64 by itself; rows are then summed exactly (``math.fsum``) in blocks that
    are counted from the first row.
    """

    BLOCK = 4096

    def __init__(self, dtype: torch.dtype) -> None:
        """
        Args:
            dtype: dtype of the bucket. Rows are rounded to it first, so that the mean is that of the rows that are
                served, and a stream and a store agree.
        """
        self.dtype = dtype
        self.rows = 0
        self._open: dict[Place, list[float]] = {}
        self._blocks: dict[Place, list[float]] = {}

    def update(self, values: Mapping[Place, Float[torch.Tensor, "n d"]]) -> None:
        """Add the next rows of all places.

        Raises:
            GemmaScopeError: an infinite value or NaN.
        """
        for place, value in values.items():
            x = value.to(self.dtype).to(device="cpu", dtype=torch.float64).numpy()
            squares = np.einsum("nd,nd->n", x, x)
            if not np.isfinite(squares).all():
                raise GemmaScopeError(f"{place.key}: activations in {self.dtype} are not finite.")
            waiting = self._open.setdefault(place, [])
            waiting += squares.tolist()
            blocks = self._blocks.setdefault(place, [])
            while len(waiting) >= self.BLOCK:
                blocks.append(math.fsum(waiting[: self.BLOCK]))
                del waiting[: self.BLOCK]
        self.rows += len(next(iter(values.values())))

    def means(self) -> dict[Place, float]:
        """The mean of every place.

        Raises:
            GemmaScopeError: no rows were added.
        """
        if not self.rows:
            raise GemmaScopeError("A mean needs at least one row: call update() before means().")
        return {
            place: math.fsum([*self._blocks[place], math.fsum(waiting)]) / self.rows
            for place, waiting in self._open.items()
        }


class BucketedSource(ABC):
    """A :class:`Source` whose subclass can read the data from any row on.

    Attributes:
        widths: ``d`` of every place that is served.
        rows: number of rows before they repeat.
        bucket_rows: rows that are shuffled together; if there are more than ``rows``, rows repeat within a bucket.
        seed: seed of the shuffles.
        dtype: dtype of the bucket; batches are float32.
        device: device of the bucket and of the batches.
    """

    def __init__(
        self,
        widths: Mapping[Place, int],
        rows: int,
        *,
        bucket_rows: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        pinned: bool = False,
    ) -> None:
        """
        Raises:
            GemmaScopeError: there are no rows, ``bucket_rows`` is below 1, or the seed is negative.
        """
        if rows < 1 or bucket_rows < 1 or seed < 0:
            raise GemmaScopeError(
                f"A source needs one row of activations and bucket_rows of 1 or more, and a seed of 0 or more, not "
                f"{rows} rows, bucket_rows={bucket_rows} and seed={seed}."
            )
        self.widths: Mapping[Place, int] = widths
        self.rows, self.bucket_rows, self.seed = rows, bucket_rows, seed
        self.dtype, self.device, self._pinned = dtype, torch.device(device), pinned
        self._bucket: Bucket | None = None
        self._serving: object = None

    @abstractmethod
    def pieces(self, start: int, count: int) -> Iterator[dict[Place, Float[torch.Tensor, "n d"]]]:
        """Rows ``start`` to ``start + count`` of the data, in pieces of any size; the data has all of these rows."""

    def fill(self, bucket: Bucket, at: int, start: int, count: int) -> None:
        """Write rows ``start`` to ``start + count`` of the data at row ``at`` of the bucket.

        Subclasses that can read into the buffer directly override this.
        """
        for values in self.pieces(start, count):
            bucket.fill(at, values)
            at += len(next(iter(values.values())))

    def mean_squares(self, rows: int) -> dict[Place, float]:
        """``E ||x||^2`` of each place over the first ``rows`` rows (all, if there are fewer), as the bucket holds them.

        Raises:
            GemmaScopeError: ``rows`` is below 1, or activations are not finite.
        """
        squares = MeanSquares(self.dtype)
        for values in self.pieces(0, min(rows, self.rows)):
            squares.update(values)
        return squares.means()

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Mapping[Place, Float[torch.Tensor, "batch_size d"]]]:
        """Raw activations in float32, row by row from the same tokens, from batch ``start`` on, without end.

        A source has one bucket, so it serves one iteration at a time: after another has begun, the older one raises.

        Raises:
            GemmaScopeError: ``batch_size`` does not divide ``bucket_rows``, or ``start`` is negative.
        """
        if batch_size < 1 or self.bucket_rows % batch_size or start < 0:
            raise GemmaScopeError(
                f"A batch size must divide bucket_rows, {self.bucket_rows}, and start cannot be negative: got "
                f"size {batch_size} and start {start}."
            )
        self._serving = own = object()
        return self._batches(batch_size, start, own)

    def _batches(self, batch_size: int, start: int, own: object) -> Iterator[dict[Place, torch.Tensor]]:
        number, first = divmod(start, self.bucket_rows // batch_size)
        while True:
            self._check_current(own)
            bucket = self._filled(number)
            for index in range(first, self.bucket_rows // batch_size):
                self._check_current(own)
                yield bucket.take(index, batch_size)
            number, first = number + 1, 0

    def _check_current(self, own: object) -> None:
        if self._serving is not own:
            raise GemmaScopeError("Another iteration over this source has begun; its bucket serves one at a time.")

    def _filled(self, number: int) -> Bucket:
        """Bucket ``number``, shuffled, in the memory of the previous one."""
        if self._bucket is None:
            self._bucket = Bucket(self.bucket_rows, self.widths, self.dtype, self.device, self._pinned)
        at = 0
        while at < self.bucket_rows:
            start = (number * self.bucket_rows + at) % self.rows
            count = min(self.bucket_rows - at, self.rows - start)
            self.fill(self._bucket, at, start, count)
            at += count
        self._bucket.shuffle(self.seed, number)
        return self._bucket
