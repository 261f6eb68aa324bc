"""Harvesting the activations of a run into a store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gemma_scope_tl.activations.folder import Folder, open_folder
from gemma_scope_tl.activations.harvest import Harvester
from gemma_scope_tl.activations.manifest import (
    CONTENTS_NAME,
    STORE_NAME,
    UNFINISHED,
    Contents,
    Manifest,
    ShardSet,
    cut,
    read_record,
    to_json,
)
from gemma_scope_tl.activations.shards import SHARD_BYTES, Run, check_room, stored_sets, write_set
from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.sites import Place, with_targets
from gemma_scope_tl.text.token_rows import TokenRows
from gemma_scope_tl.weights.modes import ordinary_tensors

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

_SAMPLES = 64
_MIN_SHARD = 1 << 13


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
    """Store the activations of all places, from one forward pass for each batch of token rows.

    A call that was cut off is called again: it goes on after the last set of shards that is whole, and the store
    becomes the same to the bit. Several writers may each write a part, at once or one after the other; whoever is last
    finishes the store. Memory: two passes' activations in ``dtype``, and 32 MiB.

    Args:
        path: a folder, or an fsspec URL.
        model: from ``load_model``.
        token_rows: the data.
        places: whose activations are stored; targets of transcoders are added.
        dtype: float32 or bfloat16.
        shard_bytes: largest size of a file (one pass's activations at least).
        batch_rows: token rows to a forward pass; a stream with the same number serves the same bits.
        part: this writer's number and how many there are. Each has a contiguous share of the passes.
        progress: show a bar.

    Returns:
        Whether the store is finished: with several parts, False until the last of them is there.

    Raises:
        GemmaScopeError: the disk has no room for what is missing (before anything runs) or is full; the folder holds
            other activations; another process writes this part; activations are not finite.
    """
    harvester = Harvester(model, with_targets(places))
    kept = token_rows.kept_by_pass(batch_rows).tolist()
    if not sum(kept):
        raise GemmaScopeError("The token rows hold no position to train on: nothing to store.")
    cuts = {"shard_bytes": _checked_size(shard_bytes), "batch_rows": batch_rows, "parts": _checked_part(part)}
    contents = _contents(model, token_rows, harvester.widths, sum(kept), _stored_dtype(dtype), cuts)

    def run(number: int) -> dict[Place, torch.Tensor]:
        tokens = token_rows[number * batch_rows : (number + 1) * batch_rows]
        return harvester.run(tokens, token_rows.keep_mask(tokens))

    return write_passes(open_folder(path), contents, kept, run, part=part[0], progress=progress)


def write_passes(
    folder: Folder, contents: Contents, kept: Sequence[int], run: Run, *, part: int = 0, progress: bool = True
) -> bool:
    """Write one part of a store from whatever makes the activations: :func:`write_store` without a model.

    Args:
        folder: of the store.
        contents: what it will hold; equal contents must mean equal activations.
        kept: activations of every forward pass, of all parts.
        run: makes them.
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
        whole = stored_sets(folder, contents, sets)
        check_room(folder, contents, [one for one in sets if one.stem not in whole])
        mine = [one for one in sets if one.part == part]
        with _progress_bar(progress) as bar:
            task = bar.add_task(f"storing part {part}", total=sum(one.rows for one in mine))
            for one in mine:
                if one.stem in whole:
                    bar.advance(task, one.rows)
                else:
                    write_set(folder, contents, one, kept, run, lambda rows: bar.advance(task, rows))
    return _finish(folder, contents, sets)


def fingerprint(model: Any) -> str:
    """A hash of every parameter's name, shape, dtype and some of its values: tells checkpoints apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to("cpu", torch.float64)
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:32]


def _contents(
    model: GemmaModel,
    token_rows: TokenRows,
    widths: Mapping[Place, int],
    rows: int,
    dtype: Literal["float32", "bfloat16"],
    cuts: Mapping[str, int],
) -> Contents:
    return Contents(
        model=str(model.model_id or getattr(model.cfg, "model_name", "")),
        backend=model.backend,
        weights=fingerprint(model),
        tokens=token_rows.sha256,
        tokenizer=token_rows.tokenizer,
        context=token_rows.context,
        token_rows=len(token_rows),
        rows=rows,
        dtype=dtype,
        places={place.key: width for place, width in widths.items()},
        **cuts,
    )


def _finished(folder: Folder, contents: Contents) -> bool:
    manifest = read_record(Manifest, folder, STORE_NAME)
    if manifest is not None:
        _refuse_others(folder, manifest.contents, contents)
    return manifest is not None


def _claim(folder: Folder, contents: Contents) -> None:
    """Say in the folder what it will hold, or find that it is to hold something else."""
    there = read_record(Contents, folder, CONTENTS_NAME)
    if there is None:
        folder.put(CONTENTS_NAME, to_json(contents))
    else:
        _refuse_others(folder, there, contents)


def _refuse_others(folder: Folder, there: Contents, wanted: Contents) -> None:
    old, new = there.model_dump(), wanted.model_dump()
    if differing := [f"{name} is {old[name]!r}, not {new[name]!r}" for name in old if old[name] != new[name]]:
        raise GemmaScopeError(
            f"{folder.url()} holds other activations: {'; '.join(differing)}. Choose another folder, or delete it."
        )


def _finish(folder: Folder, contents: Contents, sets: Sequence[ShardSet]) -> bool:
    """Join the records of all sets into the store's manifest, if all are there. Doing it twice at once is harmless."""
    whole = stored_sets(folder, contents, sets)
    if len(whole) < len(sets):
        return _finished(folder, contents)  # another writer may have finished it just now
    folder.put(STORE_NAME, to_json(Manifest(contents=contents, shards=[whole[one.stem] for one in sets])))
    folder.remove(UNFINISHED)
    return True


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} rows"))
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown)


def _stored_dtype(dtype: str | torch.dtype) -> Literal["float32", "bfloat16"]:
    parsed = parse_dtype(dtype)
    if parsed == torch.float32:
        return "float32"
    if parsed == torch.bfloat16:
        return "bfloat16"
    raise unknown_name("dtype of a store", dtype, ["float32", "bfloat16"])


def _checked_size(shard_bytes: int) -> int:
    if shard_bytes < _MIN_SHARD:
        raise GemmaScopeError(f"Shards of {shard_bytes} bytes: the smallest are {_MIN_SHARD}.")
    return shard_bytes


def _checked_part(part: tuple[int, int]) -> int:
    number, parts = part
    if not 0 <= number < parts <= 99_999:
        raise GemmaScopeError(f"Part {number} of {parts}: parts count from 0.")
    return parts
