"""Writing the shards of a store: the same rows of all places at a time, each set whole or not there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from gemma_scope_tl.activations.direct_file import WRITERS, unfinished
from gemma_scope_tl.activations.folder import Folder, OpenFile
from gemma_scope_tl.activations.manifest import (
    HEADER_BYTES,
    UNFINISHED,
    Contents,
    ShardSet,
    StoredSet,
    cut,
    read_record,
    to_json,
)
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.token_rows import TokenRows

SHARD_BYTES = 4 << 30
"""Size of a shard unless another is asked for."""


def store_bytes(
    token_rows: TokenRows,
    widths: Mapping[Place, int],
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    batch_rows: int = 8,
    parts: int = 1,
) -> dict[Place, int]:
    """Exact bytes of every place's files in a store of these activations, without running anything.

    The manifest comes on top: about 0.1 kB for every file.

    Args:
        token_rows: the data.
        widths: ``d`` of every place (``site.d_in(dims)``).
        dtype, shard_bytes, batch_rows, parts: as in :func:`~gemma_scope_tl.activations.store.write_store`.
    """
    row_bytes = {place.key: width * dtype.itemsize for place, width in widths.items()}
    sets = cut(token_rows.kept_by_pass(batch_rows).tolist(), row_bytes, shard_bytes, parts)
    rows = sum(one.rows for one in sets)
    return {place: len(sets) * HEADER_BYTES + rows * row_bytes[place.key] for place in widths}


def check_room(folder: Folder, contents: Contents, missing: Sequence[ShardSet]) -> None:
    """Refuse what the disk cannot hold; where nobody knows how much it can (object stores), accept.

    Args:
        folder: of the store.
        contents: its contents.
        missing: the sets that are still to be written, of all writers; what they have written of them counts as free.

    Raises:
        GemmaScopeError: with the bytes that are needed and those that are free.
    """
    free = folder.free()
    if free is None:
        return
    needed = 0
    for key in contents.places:
        begun = folder.sizes(key)
        for one in missing:
            size = one.bytes(contents, key)
            needed += max(0, size - begun.get(unfinished(one.file_name), 0))
    if needed > free:
        raise GemmaScopeError(
            f"The store at {folder.url()} needs {needed} bytes ({needed / 2**30:.1f} GiB) more, and {free} bytes "
            f"({free / 2**30:.1f} GiB) are free there. Choose another disk, fewer places, fewer tokens or bfloat16."
        )


Run = Callable[[int], Mapping[Place, torch.Tensor]]
"""Takes the number of a forward pass, and returns its activations ``[kept, d]`` at all places."""

_log = logging.getLogger(__name__)


def stored_sets(folder: Folder, contents: Contents, sets: Sequence[ShardSet]) -> dict[str, StoredSet]:
    """Which of ``sets`` are whole: their records, by stem. A set whose files are gone or have other sizes is not."""
    sizes = {key: folder.sizes(key) for key in contents.places}
    recorded = folder.sizes(UNFINISHED)
    found: dict[str, StoredSet] = {}
    for one in sets:
        there = all(size.get(one.file_name) == one.bytes(contents, key) for key, size in sizes.items())
        if not there or f"{one.stem}.json" not in recorded:
            continue
        record = read_record(StoredSet, folder, one.record_name)
        if record is not None and record.store == contents.digest and record.planned() == one:
            found[one.stem] = record
    return found


def write_set(
    folder: Folder, contents: Contents, planned: ShardSet, kept: Sequence[int], run: Run, done: Callable[[int], None]
) -> StoredSet:
    """Write one set of shards, a forward pass at a time: while one is written and hashed, the next one runs.

    Args:
        folder: of the store.
        contents: its contents.
        planned: the set.
        kept: activations of every pass of the whole run.
        run: makes them.
        done: is told the rows of every pass that was written.

    Raises:
        GemmaScopeError: a file cannot be written (nothing of the set is left then), or activations are of another
            shape than planned, or not finite.
    """
    files: dict[Place, OpenFile] = {}
    try:
        with ThreadPoolExecutor(min(WRITERS, len(contents.places)), "store-write") as pool:
            for place in contents.widths:
                files[place] = folder.create(f"{place.key}/{planned.file_name}")
                files[place].write(memoryview(planned.header(contents, place.key)))
            waiting: list[Future[None]] = []
            rows = 0
            for number in range(planned.first_batch, planned.first_batch + planned.batches):
                values = _as_stored(run(number), contents, kept[number], number)
                _wait(waiting)
                done(rows)
                waiting = [pool.submit(files[place].write, tensor_bytes(value)) for place, value in values.items()]
                rows = kept[number]
            _wait(waiting)
            hashes = [pool.submit(file.commit) for file in files.values()]
            sums = {place.key: future.result() for place, future in zip(files, hashes, strict=True)}
            done(rows)
    except BaseException:
        for file in files.values():
            file.abort()
        raise
    record = StoredSet(**planned.model_dump(), store=contents.digest, sha256=sums)
    folder.put(planned.record_name, to_json(record))
    return record


def _wait(waiting: Sequence[Future[None]]) -> None:
    errors = [error for future in waiting if (error := future.exception()) is not None]
    for error in errors[1:]:
        _log.debug("and: %s", error)
    if errors:
        raise errors[0]


def _as_stored(
    values: Mapping[Place, torch.Tensor], contents: Contents, rows: int, number: int
) -> dict[Place, torch.Tensor]:
    """The values in the dtype of the store, in this machine's memory."""
    stored: dict[Place, torch.Tensor] = {}
    for place, width in contents.widths.items():
        value = values[place]
        if value.shape != (rows, width):
            raise GemmaScopeError(
                f"{place.key}: forward pass {number} gave activations {list(value.shape)}; planned: {[rows, width]}."
            )
        value = value.detach().to(contents.torch_dtype)
        if rows and not all(bool(bound.isfinite()) for bound in value.aminmax()):
            raise GemmaScopeError(
                f"{place.key}: activations of forward pass {number} are not finite in {contents.dtype}. Load the model "
                "in another dtype, or store another."
            )
        stored[place] = value.to("cpu").contiguous()
    return stored


def tensor_bytes(value: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return value.view(-1).view(torch.uint8).numpy().data
