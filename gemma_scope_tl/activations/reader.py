"""Reading a finished store: opened and checked, described, verified, and served for training."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from gemma_scope_tl.activations.buckets import Bucket
from gemma_scope_tl.activations.folder import CHUNK, Folder, LocalFolder, open_folder
from gemma_scope_tl.activations.manifest import (
    CONTENTS_NAME,
    HEADER_BYTES,
    STORE_NAME,
    StoreContents,
    StoredSet,
    StoreManifest,
    read_record,
    tensor_bytes,
)
from gemma_scope_tl.activations.source import BucketedSource
from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.sites import Place, with_targets
from gemma_scope_tl.weights.stamp import Stamp, file_key, read_stamp, write_stamp

if TYPE_CHECKING:
    import pandas as pd

READERS = 4
"""Places that are read at a time. Each place has one thread, because the system reads ahead best for one reader a file;
a thread takes ``2 * CHUNK`` bytes where the bucket has another dtype than the store."""
_CHECKERS = 8
_HASHERS = 2
_LISTED = 5
_REMEDY = "Restore it, or write the store again."


class Span(NamedTuple):
    """Consecutive rows of one shard.

    Attributes:
        shard: the set of shards.
        first, rows: index of the first row within the shard, and how many there are.
    """

    shard: StoredSet
    first: int
    rows: int


class Store:
    """A finished store, whose files have the sizes and headers that its manifest says.

    Attributes:
        folder: where it is.
        contents: what it holds.
        shards: the sets of shards, in the order of the rows.
        widths: ``d`` of the places that were opened.
    """

    def __init__(self, folder: Folder, manifest: StoreManifest, widths: Mapping[Place, int]) -> None:
        """Use :func:`open_store`."""
        self.folder, self.contents, self.shards, self.widths = folder, manifest.contents, manifest.shards, widths
        self._first_rows = [shard.first_row for shard in self.shards]

    @property
    def rows(self) -> int:
        """Activations of every place."""
        return self.contents.rows

    def spans(self, start: int, count: int) -> Iterator[Span]:
        """The spans of rows ``start`` to ``start + count``."""
        if start < 0 or count < 0 or start + count > self.rows:
            raise GemmaScopeError(f"The store has rows 0 to {self.rows}, not {start} to {start + count}.")
        index = bisect_right(self._first_rows, start) - 1
        while count:
            shard = self.shards[index]
            first = start - shard.first_row
            rows = min(count, shard.rows - first)
            yield Span(shard, first, rows)
            start, count, index = start + rows, count - rows, index + 1

    def read_into(self, place: Place, shard: StoredSet, first: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of whole rows of a shard, from row ``first`` of it on."""
        begin = HEADER_BYTES + first * self.contents.row_bytes(place.key)
        self.folder.read_into(f"{place.key}/{shard.file_name}", begin, view)

    def verify_shard(
        self, place: Place, shard: StoredSet, remembered: bool = False, done: Callable[[int], object] | None = None
    ) -> None:
        """Read a shard to its end and compare its sha256.

        Args:
            place, shard: whose file.
            remembered: skip a local file that was verified before and has not changed since.
            done: called with the number of bytes of every chunk that was read.

        Raises:
            GemmaScopeError: the file was changed, or cannot be read.
        """
        name = f"{place.key}/{shard.file_name}"
        path = self.folder.root / name if isinstance(self.folder, LocalFolder) else None
        stamp = read_stamp(path) if remembered and path is not None else None
        if stamp is not None and stamp.sha256 == shard.sha256[place.key]:
            return
        key = None if path is None or not path.is_file() else file_key(path)
        size, digest, buffer = shard.bytes(self.contents, place.key), hashlib.sha256(), memoryview(bytearray(CHUNK))
        for at in range(0, size, CHUNK):
            view = buffer[: min(CHUNK, size - at)]
            self.folder.read_into(name, at, view)
            digest.update(view)
            if done is not None:
                done(len(view))
        if digest.hexdigest() != shard.sha256[place.key]:
            raise GemmaScopeError(
                f"{self.folder.url(name)} was changed since it was written: its sha256 is {digest.hexdigest()}, the "
                f"store's manifest says {shard.sha256[place.key]}. {_REMEDY}"
            )
        if path is not None and key is not None:
            write_stamp(path, Stamp({}, digest.hexdigest()), key)


def open_store(path: str | os.PathLike[str], places: Sequence[Place] | None = None) -> Store:
    """Open a finished store: its manifest, and the size and header of every file of the places that are wanted.

    Args:
        path: a folder, or an fsspec URL.
        places: those that will be read, all unless given. Files of other places are not checked.

    Raises:
        UnknownNameError: the store has no such place.
        GemmaScopeError: there is no finished store; its manifest is damaged; a file is missing, truncated, too long, or
            belongs to another store.
    """
    folder = open_folder(path)
    manifest = read_record(StoreManifest, folder, STORE_NAME)
    if manifest is None:
        raise _no_store(folder)
    widths = manifest.contents.widths
    for place in places or ():
        if place not in widths:
            raise unknown_name("place in this store", place.key, manifest.contents.places)
    wanted = dict.fromkeys(places or widths)
    store = Store(folder, manifest, {place: widths[place] for place in wanted})
    with ThreadPoolExecutor(_CHECKERS) as pool:
        for place in wanted:
            sizes = folder.sizes(place.key)
            for checked in [pool.submit(_check, store, place, shard, sizes) for shard in store.shards]:
                checked.result()
    return store


def verify_store(path: str | os.PathLike[str], places: Sequence[Place] | None = None, *, progress: bool = True) -> None:
    """Read every file to its end and compare its sha256 with the manifest's.

    Args:
        path: a folder, or an fsspec URL.
        places: whose files; all of them unless given.
        progress: show a bar.

    Raises:
        GemmaScopeError: as :func:`open_store`; or files were changed, which the message names.
    """
    store = open_store(path, places)
    total = sum(shard.bytes(store.contents, place.key) for place in store.widths for shard in store.shards)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with (
        Progress(*columns, console=console, transient=True, disable=not progress) as bar,
        ThreadPoolExecutor(_HASHERS) as pool,
    ):
        task = bar.add_task("verifying", total=total)
        checks = [
            pool.submit(store.verify_shard, place, shard, done=lambda count: bar.advance(task, count))
            for place in store.widths
            for shard in store.shards
        ]
        errors = [error for check in checks if (error := check.exception()) is not None]
    for error in errors:
        if not isinstance(error, GemmaScopeError):
            raise error
    if errors:
        more = f" And {len(errors) - _LISTED} more files." if len(errors) > _LISTED else ""
        raise GemmaScopeError(" ".join(str(error) for error in errors[:_LISTED]) + more)


def describe_store(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A row per place of a finished store: ``place``, ``rows``, ``width``, ``dtype``, ``shards``, ``bytes``."""
    import pandas as pd

    store = open_store(path)
    contents = store.contents
    return pd.DataFrame(
        [
            {
                "place": key,
                "rows": contents.rows,
                "width": width,
                "dtype": contents.dtype,
                "shards": len(store.shards),
                "bytes": sum(shard.bytes(contents, key) for shard in store.shards),
            }
            for key, width in contents.places.items()
        ]
    )


class StoreSource(BucketedSource):
    """Activations of a store, read straight into the bucket.

    A bucket holds consecutive rows of every place, so all reading is sequential, and files of other places are not
    touched. Any number of sources, in any processes, may read one store. Memory: the bucket, and 32 MiB when it has
    another dtype than the store or is on a GPU.

    Attributes:
        store: the store that was opened.
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
            verify: compare a shard's sha256 before it is first read, unless it was verified before and is unchanged.

        Raises:
            UnknownNameError: the store has no such place.
            GemmaScopeError: as :func:`~gemma_scope_tl.activations.reader.open_store`.
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
        """As in the base class; files are read straight into a bucket that has the dtype of the store."""
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
            self.store.verify_shard(place, span.shard, remembered=True)  # only this thread reads this place now
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
        """Whether bytes of the store can be read into the tensor as they are."""
        return tensor.dtype == self.store.contents.torch_dtype and tensor.device.type == "cpu"

    def _chunk_rows(self, place: Place) -> int:
        return max(1, CHUNK // self.store.contents.row_bytes(place.key))


def _check(store: Store, place: Place, shard: StoredSet, sizes: Mapping[str, int]) -> None:
    """Raise unless a file has the size and the header that the manifest says."""
    name, size = f"{place.key}/{shard.file_name}", shard.bytes(store.contents, place.key)
    url = store.folder.url(name)
    if (there := sizes.get(shard.file_name)) is None:
        raise GemmaScopeError(f"{url} is missing. {_REMEDY}")
    if there != size:
        what = "is truncated" if there < size else "is too long"
        raise GemmaScopeError(f"{url} {what}: it has {there} bytes, the store's manifest says {size}. {_REMEDY}")
    head = bytearray(HEADER_BYTES)
    store.folder.read_into(name, 0, memoryview(head))
    if bytes(head) != shard.header(store.contents, place.key):
        raise GemmaScopeError(
            f"{url} is not the file that was written here: its header is another store's, place's or shard's, or "
            f"damaged. {_REMEDY}"
        )


def _no_store(folder: Folder) -> GemmaScopeError:
    begun = read_record(StoreContents, folder, CONTENTS_NAME)
    if begun is None:
        return GemmaScopeError(f"{folder.url()} holds no store: there is no {STORE_NAME}. Write one with write_store.")
    return GemmaScopeError(
        f"The store at {folder.url()} is not finished. Call write_store again with the same arguments: it continues "
        "after the last shards that are whole."
    )
