"""Activations from a store, as training asks for them: what a stream would serve, to the bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Float

from gemma_scope_tl.activations.buckets import Bucket
from gemma_scope_tl.activations.direct_file import CHUNK
from gemma_scope_tl.activations.shards import tensor_bytes
from gemma_scope_tl.activations.source import BucketedSource
from gemma_scope_tl.activations.stored import Span, open_store
from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.sites import Place, with_targets

READERS = 4
"""Places read at a time, each by one thread, for which the system reads ahead best; each takes twice ``CHUNK`` bytes
where the bucket has another dtype than the store."""


class StoreSource(BucketedSource):
    """Activations of a store, read straight into the bucket.

    A bucket is contiguous rows of every place's shards, so all reading is sequential, and places that are not wanted
    are not touched. Any number of sources, in any processes, read one store. Memory: the bucket; and 32 MiB when it has
    another dtype than the store, or is on a GPU.

    Attributes:
        store: what was opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        places: Sequence[Place] | None = None,
        *,
        bucket_rows: int,
        seed: int = 0,
        dtype: str | torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        verify: bool = False,
    ) -> None:
        """
        Args:
            path: a folder, or an fsspec URL.
            places: whose activations are wanted, and targets of the transcoders among them; all unless given.
            bucket_rows: rows that are shuffled together; the paper has about a million.
            seed: of the shuffles.
            dtype: in which the bucket stores activations; batches are float32.
            device: where the bucket is, and the batches.
            verify: compare a shard's sha256 before it is first read from. What was verified is remembered.

        Raises:
            UnknownNameError: the store has no such place.
            GemmaScopeError: as :func:`~gemma_scope_tl.activations.stored.open_store`.
        """
        self.store = open_store(path, None if places is None else with_targets(places))
        self.verify = verify
        self._verified: set[tuple[Place, str]] = set()
        super().__init__(
            self.store.widths,
            self.store.rows,
            bucket_rows=bucket_rows,
            seed=seed,
            dtype=parse_dtype(dtype),
            device=device,
        )

    def pieces(self, start: int, count: int) -> Iterator[dict[Place, Float[torch.Tensor, "n d"]]]:
        """Rows ``start`` to ``start + count`` in the dtype of the store, ``CHUNK`` bytes of each place at a time."""
        dtype = self.store.contents.torch_dtype
        most = max(1, CHUNK // (max(self.widths.values()) * dtype.itemsize))
        for span in self.store.spans(start, count):
            for first in range(0, span.rows, most):
                rows = min(most, span.rows - first)
                values = {place: torch.empty(rows, width, dtype=dtype) for place, width in self.widths.items()}
                for place, value in values.items():
                    self._read(place, Span(span.shard, span.first + first, rows), value)
                yield values

    def fill(self, bucket: Bucket, at: int, start: int, count: int) -> None:
        """As in the base class, without a tensor between the files and the bucket where both have the same dtype."""
        with ThreadPoolExecutor(READERS, "store-read") as pool:
            reads: list[Future[None]] = []
            for span in self.store.spans(start, count):
                for place in self.widths:
                    reads.append(pool.submit(self._read, place, span, bucket.tensors[place][at : at + span.rows]))
                at += span.rows
            for read in reads:
                read.result()

    def _read(self, place: Place, span: Span, into: torch.Tensor) -> None:
        """Read rows of a shard into ``[rows, d]`` of any dtype and device."""
        if self.verify and (place, span.shard.stem) not in self._verified:
            self.store.verify_shard(place, span.shard, remembered=True)  # one thread has a shard at a time
            self._verified.add((place, span.shard.stem))
        if self._as_stored(into):
            self.store.read_into(place, span.shard, span.first, tensor_bytes(into))
            return
        parts = into.split(self._chunk_rows(place))
        staging = [torch.empty(parts[0].shape, dtype=self.store.contents.torch_dtype) for _ in parts[:2]]

        def read(number: int) -> torch.Tensor:
            part = staging[number % 2][: len(parts[number])]
            self.store.read_into(place, span.shard, span.first + number * len(parts[0]), tensor_bytes(part))
            return part

        with ThreadPoolExecutor(1, "store-ahead") as ahead:  # the next part is read while one is converted
            waiting = ahead.submit(read, 0)
            for number, part in enumerate(parts):
                values = waiting.result()
                if number + 1 < len(parts):
                    waiting = ahead.submit(read, number + 1)
                part.copy_(values)

    def _as_stored(self, tensor: torch.Tensor) -> bool:
        """Whether bytes of the store can be read into it."""
        return tensor.dtype == self.store.contents.torch_dtype and tensor.device.type == "cpu"

    def _chunk_rows(self, place: Place) -> int:
        return max(1, CHUNK // self.store.contents.row_bytes(place.key))
