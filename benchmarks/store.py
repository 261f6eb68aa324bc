"""An activation store against a plain file of the same size on the same disk, and against SAELens's cached activations.

Writing includes fsync; before a cold read the files are dropped from the page cache. SAELens's CacheActivationsRunner
builds a ``datasets`` shard from a buffer and saves it, and its ActivationsStore slices the loaded dataset. These calls
are timed, without the model. The environment variable ``TMPDIR`` chooses the disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Array2D, Dataset, Features, load_from_disk
from datasets.utils.logging import disable_progress_bar

from benchmarks.timing import main, paired
from gemma_scope_tl.activations.buckets import Bucket
from gemma_scope_tl.activations.folder import open_folder
from gemma_scope_tl.activations.manifest import StoreContents, tensor_bytes
from gemma_scope_tl.activations.reader import StoreSource
from gemma_scope_tl.activations.writer import SHARD_BYTES, write_passes
from gemma_scope_tl.sites import Place

D_IN, CONTEXT, PASS_ROWS, CACHED_BYTES = 2304, 1024, 8192, 1 << 28
PLACES = [Place("res", 12), Place("mlp", 12)]
CHUNK = 1 << 23
RUNS, QUICK_RUNS = 5, 1
GIB, QUICK_GIB = 0.75, 0.15
"""Size of the store; the quick one has one pass of rows at each of two places."""
FILE, CACHED = "plain file", "SAELens cached activations"


def write_ours(folder: Path, rows: torch.Tensor, places: list[Place], dtype: str = "float32") -> None:
    """Write a whole store, in which every place has an equal share of the rows."""
    shutil.rmtree(folder, ignore_errors=True)
    shares = dict(zip(places, rows.chunk(len(places)), strict=True))
    count = len(rows) // len(places)
    kept = [min(PASS_ROWS, count - at) for at in range(0, count, PASS_ROWS)]
    contents = StoreContents(
        model="gemma-2-2b",
        backend="bridge",
        weights="random",
        tokens="none",
        tokenizer="none",
        context=CONTEXT,
        token_rows=count // CONTEXT,
        batch_rows=PASS_ROWS // CONTEXT,
        rows=count,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        shard_bytes=SHARD_BYTES,
        parts=1,
        places=dict.fromkeys((place.key for place in places), D_IN),
    )

    def run(number: int) -> dict[Place, torch.Tensor]:
        return {place: share[number * PASS_ROWS : (number + 1) * PASS_ROWS] for place, share in shares.items()}

    write_passes(open_folder(folder), contents, kept, run, progress=False)


def write_plain(path: Path, rows: torch.Tensor) -> None:
    """Write the same bytes to one file, and flush it to the disk."""
    data = tensor_bytes(rows)
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(data), CHUNK):
            file.write(data[at : at + CHUNK])
        os.fsync(file.fileno())


def write_cached(folder: Path, rows: torch.Tensor) -> None:
    """Write like CacheActivationsRunner, in buffers of 256 MiB."""
    shutil.rmtree(folder, ignore_errors=True)
    features = Features({"acts": Array2D(shape=(CONTEXT, D_IN), dtype="float32")})
    step = CACHED_BYTES // (D_IN * 4) // CONTEXT * CONTEXT
    for number, at in enumerate(range(0, len(rows), step)):
        part = rows[at : at + step].view(-1, CONTEXT, D_IN)
        shard = Dataset.from_dict({"acts": part}, features=features)
        shard.save_to_disk(str(folder / f"shard_{number:05d}"), num_shards=1)
    for file in folder.rglob("*.arrow"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def read_plain(path: Path, into: torch.Tensor) -> None:
    """Read one file into allocated memory."""
    data, at = tensor_bytes(into), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(data[at : at + CHUNK]):
            at += count


def read_cached(folder: Path) -> None:
    """Read like ActivationsStore, 8 contexts at a time in the order of the dataset."""
    for shard in sorted(folder.iterdir()):
        dataset = load_from_disk(str(shard))
        dataset.set_format(type="torch", columns=["acts"], device="cpu", dtype=torch.float32)
        for at in range(0, len(dataset), 8):
            _ = cast(torch.Tensor, dataset[at : at + 8]["acts"]).flatten(0, 1)


def _drop(place: Path) -> None:
    for file in [place] if place.is_file() else place.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _row(
    what: str, peer: str, size: int, ours: Callable[[], Any], theirs: Callable[[], Any], runs: int
) -> dict[str, Any]:
    times = paired(ours, theirs, runs=runs)
    way = "write" if what.startswith("store: write") else "read"
    speeds = {
        f"{who}_value{end}": size / times[f"{who}_s{other}"]
        for who in ("ours", "peer")
        for end, other in (("", ""), ("_min", "_max"), ("_max", "_min"))
    }
    ratios = {name: times[name] for name in ("ratio", "ratio_min", "ratio_max", "runs")}
    return {
        "what": what,
        "peer": peer,
        "unit": "bytes/s",
        f"{way}_bytes_per_s": speeds["ours_value"],
        **speeds,
        **ratios,
    }


def _cold(place: Path, read: Callable[[], Any]) -> Callable[[], None]:
    def run_once() -> None:
        _drop(place)
        read()

    return run_once


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Write and read one place and two places, and read stored bfloat16 as float32."""
    disable_progress_bar()
    runs = QUICK_RUNS if quick else RUNS
    count = int((QUICK_GIB if quick else GIB) * 2**30) // (D_IN * 4) // (2 * PASS_ROWS) * 2 * PASS_ROWS
    rows = torch.randn(count, D_IN, generator=torch.Generator().manual_seed(0))
    label = f"{rows.nbytes / 1e9:.1f} GB"
    with tempfile.TemporaryDirectory() as scratch:
        store, plain, cached = (Path(scratch) / name for name in ("store", "plain", "cached"))
        result = [
            _row(
                f"store: write {number} place{'s' * (number > 1)}, with sha256 ({label})",
                FILE,
                rows.nbytes,
                lambda: write_ours(store, rows, PLACES[:number]),
                lambda: write_plain(plain, rows),
                runs,
            )
            for number in (2, 1)
        ]
        write = lambda: write_ours(store, rows, PLACES[:1])  # noqa: E731
        result.append(_row("store: write", CACHED, rows.nbytes, write, lambda: write_cached(cached, rows), runs))
        source = StoreSource(store, bucket_rows=count)
        bucket = Bucket(count, source.widths)
        ours = lambda: source.fill(bucket, 0, 0, count)  # noqa: E731
        theirs = lambda: read_plain(plain, bucket.tensors[PLACES[0]])  # noqa: E731
        cold = _cold(store, ours), _cold(plain, theirs)
        result.append(_row("store: read a bucket from disk", FILE, rows.nbytes, *cold, runs))
        result.append(_row("store: read a bucket from the page cache", FILE, rows.nbytes, ours, theirs, runs))
        assert torch.equal(bucket.tensors[PLACES[0]], rows)
        peer = _cold(cached, lambda: read_cached(cached))
        result.append(_row("store: read a bucket from disk", CACHED, rows.nbytes, cold[0], peer, runs))
        write_ours(store, rows, PLACES[:1], "bfloat16")
        half = StoreSource(store, bucket_rows=count)
        ours = lambda: half.fill(bucket, 0, 0, count)  # noqa: E731
        half_file = rows.bfloat16()
        write_plain(plain, half_file)
        cold = _cold(store, ours), _cold(plain, lambda: read_plain(plain, half_file))
        what = "store: read bfloat16 as float32 from disk"
        result.append(_row(what, f"{FILE}, as it is", half_file.nbytes, *cold, runs))
    return result


if __name__ == "__main__":
    main("store", run)
