"""Writing the shards of a store: the same rows of all places at a time, each set whole or not there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from gemma_scope_tl.activations.direct_file import WRITERS
from gemma_scope_tl.activations.folder import Folder, OpenFile
from gemma_scope_tl.activations.manifest import UNFINISHED, Contents, ShardSet, StoredSet, read_record, to_json
from gemma_scope_tl.activations.source import Place
from gemma_scope_tl.errors import GemmaScopeError

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
