"""Writing a store: the activations of a run, cut into sets of shards, each of which is there whole or not at all.

A set holds the same rows of all places, a file for each place. A record beside the files says that the set is whole, so
a writer that was interrupted continues after the last one; the last writer joins all records into the manifest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gemma_scope_tl.activations.folder import Folder, OpenFile, open_folder, unfinished
from gemma_scope_tl.activations.harvest import Harvester
from gemma_scope_tl.activations.manifest import (
    CONTENTS_NAME,
    HEADER_BYTES,
    STORE_NAME,
    UNFINISHED,
    ShardSet,
    StoreContents,
    StoredSet,
    StoreManifest,
    cut,
    read_record,
    tensor_bytes,
    to_json,
)
from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.sites import Place, with_targets
from gemma_scope_tl.text.token_rows import TokenRows
from gemma_scope_tl.weights.fingerprint import sampled_fingerprint
from gemma_scope_tl.weights.modes import ordinary_tensors

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

SHARD_BYTES = 4 << 30
"""Size of a shard unless another is asked for."""

ReadPlaces = Callable[[int], Mapping[Place, torch.Tensor]]
"""Takes the number of a forward pass, and returns its activations ``[kept, d]`` at all places."""

_DTYPES: Mapping[torch.dtype, Literal["float32", "bfloat16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}
_WRITERS = 4  # files that are written and hashed at a time
_MIN_SHARD = 1 << 13
_MAX_PARTS = 99_999

_log = logging.getLogger(__name__)


@ordinary_tensors()
def write_store(
    path: str | os.PathLike[str],
    model: GemmaModel,
    token_rows: TokenRows,
    places: Sequence[Place],
    *,
    dtype: str | torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    batch_rows: int = 8,
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> bool:
    """Store the activations of several places, from one forward pass for each batch of token rows.

    After an interruption, call it again with the same arguments: it continues after the last complete set of shards,
    and the store becomes the same to the bit. Several writers may each write a part, at once or one after the other;
    the last one finishes the store. Memory: the activations of two passes in ``dtype``.

    Args:
        path: a folder, or an fsspec URL.
        model: from ``load_model``.
        token_rows: the data.
        places: whose activations are stored; targets of transcoders are added.
        dtype: float32 or bfloat16.
        shard_bytes: largest size of a file (one pass's activations at least).
        batch_rows: token rows in a forward pass; a stream with the same number serves the same bits.
        part: this writer's number and how many there are. Each has a contiguous share of the passes.
        progress: show a bar.

    Returns:
        Whether the store is finished: with several parts, False until the last of them is there.

    Raises:
        GemmaScopeError: the disk has too little room for what is missing (found before anything runs) or is full; the
            folder holds other activations; another process writes this part; activations are not finite.
    """
    harvester = Harvester(model, with_targets(places))
    kept = token_rows.kept_by_pass(batch_rows).tolist()
    if not sum(kept):
        raise GemmaScopeError("The token rows hold no position to train on: nothing to store.")
    _check_cuts(shard_bytes, part)
    cuts = {"shard_bytes": shard_bytes, "batch_rows": batch_rows, "parts": part[1]}
    contents = _contents(model, token_rows, harvester.widths, sum(kept), _stored_dtype(dtype), cuts)

    def run(number: int) -> dict[Place, torch.Tensor]:
        tokens = token_rows[number * batch_rows : (number + 1) * batch_rows]
        return harvester.run(tokens, token_rows.keep_mask(tokens))

    return write_passes(open_folder(path), contents, kept, run, part=part[0], progress=progress)


def write_passes(
    folder: Folder,
    contents: StoreContents,
    kept: Sequence[int],
    run: ReadPlaces,
    *,
    part: int = 0,
    progress: bool = True,
) -> bool:
    """Write one part of a store with the activations that ``run`` gives: :func:`write_store` without a model.

    Args:
        folder: of the store.
        contents: what it will hold; equal contents must mean equal activations.
        kept: activations of every forward pass, of all parts.
        run: gives the activations of a pass by its number.
        part: this writer's number.
        progress: show a bar.

    Returns:
        Whether the store is finished.

    Raises:
        GemmaScopeError: as :func:`write_store`.
    """
    if _finished(folder, contents):
        return True
    _claim(folder, contents)
    row_bytes = {key: contents.row_bytes(key) for key in contents.places}
    sets = cut(kept, row_bytes, contents.shard_bytes, contents.parts)
    with folder.lock(f"{UNFINISHED}/part_{part:05d}.lock"):
        whole = _stored_sets(folder, contents, sets)
        _check_room(folder, contents, [one for one in sets if one.stem not in whole])
        mine = [one for one in sets if one.part == part]
        with _progress_bar(progress) as bar:
            task = bar.add_task(f"storing part {part}", total=sum(one.rows for one in mine))
            for one in mine:
                if one.stem in whole:
                    bar.advance(task, one.rows)
                else:
                    _write_set(folder, contents, one, kept, run, lambda rows: bar.advance(task, rows))
    return _finish(folder, contents, sets)


def store_bytes(
    token_rows: TokenRows,
    widths: Mapping[Place, int],
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    batch_rows: int = 8,
    parts: int = 1,
) -> dict[Place, int]:
    """Exact size in bytes of every place's files in a store of these activations, without running a model.

    The manifest, about 0.1 kB for every file, is not counted.

    Args:
        token_rows: the data.
        widths: ``d`` of every place (``site.d_in(dims)``).
        dtype, shard_bytes, batch_rows, parts: as in :func:`~gemma_scope_tl.activations.writer.write_store`.
    """
    row_bytes = {place.key: width * dtype.itemsize for place, width in widths.items()}
    sets = cut(token_rows.kept_by_pass(batch_rows).tolist(), row_bytes, shard_bytes, parts)
    rows = sum(one.rows for one in sets)
    return {place: len(sets) * HEADER_BYTES + rows * row_bytes[place.key] for place in widths}


def _contents(
    model: GemmaModel,
    token_rows: TokenRows,
    widths: Mapping[Place, int],
    rows: int,
    dtype: Literal["float32", "bfloat16"],
    cuts: Mapping[str, int],
) -> StoreContents:
    return StoreContents(
        model=str(model.model_id or getattr(model.cfg, "model_name", "")),
        backend=model.backend,
        weights=sampled_fingerprint(model),
        tokens=token_rows.sha256,
        tokenizer=token_rows.tokenizer,
        context=token_rows.context,
        token_rows=len(token_rows),
        rows=rows,
        dtype=dtype,
        places={place.key: width for place, width in widths.items()},
        **cuts,
    )


def _finished(folder: Folder, contents: StoreContents) -> bool:
    manifest = read_record(StoreManifest, folder, STORE_NAME)
    if manifest is not None:
        _refuse_others(folder, manifest.contents, contents)
    return manifest is not None


def _claim(folder: Folder, contents: StoreContents) -> None:
    """Record in the folder what it will hold; raise if it is meant to hold something else."""
    there = read_record(StoreContents, folder, CONTENTS_NAME)
    if there is None:
        folder.put(CONTENTS_NAME, to_json(contents))
    else:
        _refuse_others(folder, there, contents)


def _refuse_others(folder: Folder, there: StoreContents, wanted: StoreContents) -> None:
    old, new = there.model_dump(), wanted.model_dump()
    if differing := [f"{name} is {old[name]!r}, not {new[name]!r}" for name in old if old[name] != new[name]]:
        raise GemmaScopeError(
            f"{folder.url()} holds other activations: {'; '.join(differing)}. Choose another folder, or delete it."
        )


def _finish(folder: Folder, contents: StoreContents, sets: Sequence[ShardSet]) -> bool:
    """Join the records of all sets into the manifest, if all are there. Two writers may do so at the same time."""
    whole = _stored_sets(folder, contents, sets)
    if len(whole) < len(sets):
        return _finished(folder, contents)  # another writer may have finished it just now
    folder.put(STORE_NAME, to_json(StoreManifest(contents=contents, shards=[whole[one.stem] for one in sets])))
    folder.remove(UNFINISHED)
    return True


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} rows"))
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown)


def _stored_dtype(dtype: str | torch.dtype) -> Literal["float32", "bfloat16"]:
    parsed = parse_dtype(dtype)
    if parsed not in _DTYPES:
        raise unknown_name("dtype of a store", dtype, _DTYPES.values())
    return _DTYPES[parsed]


def _check_cuts(shard_bytes: int, part: tuple[int, int]) -> None:
    if shard_bytes < _MIN_SHARD:
        raise GemmaScopeError(f"Shards of {shard_bytes} bytes: the smallest are {_MIN_SHARD}.")
    number, parts = part
    if not 0 <= number < parts <= _MAX_PARTS:
        raise GemmaScopeError(f"Part {number} of {parts}: parts count from 0.")


def _stored_sets(folder: Folder, contents: StoreContents, sets: Sequence[ShardSet]) -> dict[str, StoredSet]:
    """The records of those of ``sets`` that were written completely and whose files have the right sizes, by stem."""
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


def _check_room(folder: Folder, contents: StoreContents, missing: Sequence[ShardSet]) -> None:
    """Raise if the disk has too little room for the sets that are missing, of all writers.

    The part of a missing set that another writer has written already needs no further room.
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


def _write_set(
    folder: Folder,
    contents: StoreContents,
    planned: ShardSet,
    kept: Sequence[int],
    run: ReadPlaces,
    done: Callable[[int], None],
) -> StoredSet:
    """Write one set of shards, a forward pass at a time: while one is written and hashed, the next one runs.

    ``kept`` counts the activations of every pass of all sets; ``done`` is called with the rows of each written pass. On
    any error nothing of the set is left.
    """
    files: dict[Place, OpenFile] = {}
    try:
        with ThreadPoolExecutor(min(_WRITERS, len(contents.places)), "store-write") as pool:
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
        _log.debug("Another file failed too: %s", error)
    if errors:
        raise errors[0]


def _as_stored(
    values: Mapping[Place, torch.Tensor], contents: StoreContents, rows: int, number: int
) -> dict[Place, torch.Tensor]:
    """The values of a pass, checked, in the dtype of the store and in the memory of the CPU."""
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
