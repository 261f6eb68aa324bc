"""A finished store: opened and checked, described, verified."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from gemma_scope_tl.activations.direct_file import CHUNK
from gemma_scope_tl.activations.folder import Folder, LocalFolder, open_folder
from gemma_scope_tl.activations.manifest import (
    CONTENTS_NAME,
    HEADER_BYTES,
    STORE_NAME,
    Contents,
    Manifest,
    StoredSet,
    read_record,
)
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.sites import Place
from gemma_scope_tl.weights.stamp import Stamp, file_key, read_stamp, write_stamp

if TYPE_CHECKING:
    import pandas as pd

_CHECKERS = 8
_HASHERS = 2
_LISTED = 5


class Span(NamedTuple):
    """Rows that lie together in one shard.

    Attributes:
        shard: the set.
        first, rows: where in the shard they begin, and how many they are.
    """

    shard: StoredSet
    first: int
    rows: int


class Store:
    """A store whose files were found whole in size and header.

    Attributes:
        folder: where it is.
        contents: what it holds.
        shards: the sets, in the order of the rows.
        widths: ``d`` of the places that were opened.
    """

    def __init__(self, folder: Folder, manifest: Manifest, widths: Mapping[Place, int]) -> None:
        """Use :func:`open_store`."""
        self.folder, self.contents, self.shards, self.widths = folder, manifest.contents, manifest.shards, widths
        self._first_rows = [shard.first_row for shard in self.shards]

    @property
    def rows(self) -> int:
        """Activations of every place."""
        return self.contents.rows

    def spans(self, start: int, count: int) -> Iterator[Span]:
        """Where rows ``start`` to ``start + count`` lie."""
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
            place, shard: which.
            remembered: do not read a local file that was found right before and has not changed since.
            done: is told the bytes that were read.

        Raises:
            GemmaScopeError: naming the file.
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
                f"store's manifest says {shard.sha256[place.key]}. Restore it, or write the store again."
            )
        if path is not None and key is not None:
            write_stamp(path, Stamp({}, digest.hexdigest()), key)


def open_store(path: str | os.PathLike[str], places: Sequence[Place] | None = None) -> Store:
    """Open a finished store: its manifest, and the size and header of every file of the places that are wanted.

    Args:
        path: a folder, or an fsspec URL.
        places: those that will be read; all of them unless given. Other places' files are not looked at.

    Raises:
        UnknownNameError: the store has no such place.
        GemmaScopeError: there is no finished store; its manifest is damaged; a file is missing, truncated, too long, or
            another one.
    """
    folder = open_folder(path)
    manifest = read_record(Manifest, folder, STORE_NAME)
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
        GemmaScopeError: as :func:`open_store`, or naming the files that were changed.
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


def _check(store: Store, place: Place, shard: StoredSet, sizes: Mapping[str, int]) -> None:
    """Raise unless a shard has the size and the first block that the manifest says."""
    name, size = f"{place.key}/{shard.file_name}", shard.bytes(store.contents, place.key)
    url, remedy = store.folder.url(name), "Restore it, or write the store again."
    if (there := sizes.get(shard.file_name)) is None:
        raise GemmaScopeError(f"{url} is missing. {remedy}")
    if there != size:
        what = "is truncated" if there < size else "is too long"
        raise GemmaScopeError(f"{url} {what}: it has {there} bytes, the store's manifest says {size}. {remedy}")
    head = bytearray(HEADER_BYTES)
    store.folder.read_into(name, 0, memoryview(head))
    if bytes(head) != shard.header(store.contents, place.key):
        raise GemmaScopeError(
            f"{url} is not the file that was written here: its header is another store's, place's or shard's, or "
            f"damaged. {remedy}"
        )


def _no_store(folder: Folder) -> GemmaScopeError:
    begun = read_record(Contents, folder, CONTENTS_NAME)
    if begun is None:
        return GemmaScopeError(f"{folder.url()} holds no store: there is no {STORE_NAME}. Write one with write_store.")
    return GemmaScopeError(
        f"The store at {folder.url()} is not finished. Call write_store again with the same arguments: it goes on "
        "after the last shards that are whole."
    )
