"""Reading stores: the batches of a stream to the bit, and of an order written down here from scratch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from gemma_scope_tl.activations import folder as folder_module
from gemma_scope_tl.activations import reader
from gemma_scope_tl.activations.folder import open_folder
from gemma_scope_tl.activations.manifest import StoreContents
from gemma_scope_tl.activations.reader import StoreSource
from gemma_scope_tl.activations.streaming import StreamSource
from gemma_scope_tl.activations.writer import write_passes, write_store
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.token_rows import TokenRows
from tests.helpers import random_tokens, shared_model

RES, MLP = Place("res", 3), Place("mlp", 0)
WIDTHS = {RES: 24, MLP: 40}


def write_random(path: Any, kept: list[int], dtype: str = "float32", shard_bytes: int = 9000, parts: int = 1) -> Any:
    """A store of random rows, and the rows, by place."""
    generator = torch.Generator().manual_seed(0)
    data = {place: torch.randn(sum(kept), width, generator=generator) for place, width in WIDTHS.items()}
    names = {"model": "m", "backend": "bridge", "weights": "w", "tokens": "t", "tokenizer": "k"}
    counts = {"context": 4, "token_rows": len(kept), "batch_rows": 1, "rows": sum(kept)}
    places = {place.key: width for place, width in WIDTHS.items()}
    contents = StoreContents(
        **names,
        **counts,
        dtype=dtype,
        shard_bytes=shard_bytes,
        parts=parts,
        places=places,  # pyright: ignore
    )
    starts = np.cumsum([0, *kept])

    def run(number: int) -> dict[Place, torch.Tensor]:
        return {place: rows[starts[number] : starts[number + 1]] for place, rows in data.items()}

    for part in range(parts):
        write_passes(open_folder(path), contents, kept, run, part=part, progress=False)
    return data


def served(data: torch.Tensor, bucket_rows: int, seed: int, batch_size: int, number: int) -> torch.Tensor:
    """Batch ``number``, from the definition: bucket b is rows b * bucket_rows and on, modulo all, in the order of a
    permutation seeded by (seed, b)."""
    bucket, index = divmod(number, bucket_rows // batch_size)
    rows = (bucket * bucket_rows + np.arange(bucket_rows)) % len(data)
    mixed = int(np.random.SeedSequence([seed, bucket]).generate_state(1, np.uint64)[0])
    order = torch.randperm(bucket_rows, generator=torch.Generator().manual_seed(mixed)).numpy()
    return data[rows[order[index * batch_size : (index + 1) * batch_size]]]


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("bucket", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [32, 96, 400])  # within the data, not a divisor, more than there is
def test_batches_follow_the_definition(tmp_path: Path, stored: str, bucket: str, rows: int) -> None:
    data = write_random(tmp_path, [13, 0, 40, 7, 60, 1, 29, 33, 5], stored)
    source = StoreSource(tmp_path, bucket_rows=rows, seed=5, dtype=bucket)
    assert source.rows == 188 and source.widths == WIDTHS and len(source.store.shards) > 2
    for start in (0, 7, 23):
        for number, batch in enumerate(islice(source.batches(16, start), 20), start):
            for place, values in batch.items():
                rounded = data[place].to(getattr(torch, stored)).to(getattr(torch, bucket)).float()
                assert torch.equal(values, served(rounded, rows, 5, 16, number))


@pytest.mark.parametrize("chunk", [1, 200, 1 << 22])
def test_chunks_of_any_size(tmp_path: Path, chunk: int) -> None:
    data = write_random(tmp_path, [50, 70, 9])
    with patch.object(reader, "CHUNK", chunk), patch.object(folder_module, "CHUNK", chunk):
        source = StoreSource(tmp_path, bucket_rows=60, dtype="bfloat16")
        batch = next(source.batches(60, 1))
        means = source.mean_squares(100)
    for place, values in batch.items():
        assert torch.equal(values, served(data[place].bfloat16().float(), 60, 0, 60, 1))
        exact = data[place][:100].bfloat16().double().square().sum().item() / 100
        assert means[place] == pytest.approx(exact, rel=1e-14)  # float64 sums in another order


def test_a_store_serves_what_a_stream_serves(tmp_path: Path) -> None:
    model = shared_model("grouped", "bridge")
    tokens = random_tokens(model, batch=11, length=16)
    tokens[:, 9] = 1
    rows = TokenRows.from_ids(tokens, special=(2, 1, 0))
    places = [Place("res", 1), Place("transcoder", 2)]
    write_store(tmp_path, model, rows, places, shard_bytes=12_000, batch_rows=3, part=(1, 2), progress=False)
    write_store(tmp_path, model, rows, places, shard_bytes=12_000, batch_rows=3, part=(0, 2), progress=False)
    settings: dict[str, Any] = {"bucket_rows": 64, "seed": 3}
    stream = StreamSource(model, rows, places, batch_rows=3, **settings)
    store = StoreSource(tmp_path, places, **settings)
    assert (store.rows, dict(store.widths)) == (stream.rows, dict(stream.widths))
    for start in (0, 5):
        for ours, theirs in zip(islice(store.batches(16, start), 12), stream.batches(16, start), strict=False):
            assert list(ours) == list(theirs)
            for place, values in ours.items():
                assert torch.equal(values, theirs[place])
    for count in (1, 100, 10_000):
        assert store.mean_squares(count) == stream.mean_squares(count)


def test_only_the_wanted_places_are_read(tmp_path: Path) -> None:
    data = write_random(tmp_path, [50, 70, 9])
    for file in (tmp_path / MLP.key).iterdir():
        file.unlink()
    batch = next(StoreSource(tmp_path, [RES], bucket_rows=32).batches(8))
    assert list(batch) == [RES]
    assert torch.equal(batch[RES], served(data[RES], 32, 0, 8, 0))
    with pytest.raises(GemmaScopeError, match="mlp/layer_0/00000_00000.safetensors is missing"):
        StoreSource(tmp_path, bucket_rows=32)
    with pytest.raises(UnknownNameError, match="mlp/layer_0"):
        StoreSource(tmp_path, [Place("mlp", 9)], bucket_rows=32)


def test_remote_stores_serve_the_same(tmp_path: Path) -> None:
    data = write_random(f"memory://reader/{tmp_path.name}", [50, 70, 9], parts=2)
    source = StoreSource(f"memory://reader/{tmp_path.name}", bucket_rows=96, verify=True)
    for number, batch in enumerate(islice(source.batches(32), 8)):
        assert torch.equal(batch[MLP], served(data[MLP], 96, 0, 32, number))


def test_rows_go_straight_into_the_bucket(tmp_path: Path) -> None:
    """In one dtype the system writes into the bucket's own memory, and what is allocated besides is small."""
    import tracemalloc

    write_random(tmp_path, [4000] * 10, shard_bytes=1 << 20)
    source = StoreSource(tmp_path, bucket_rows=20_000)
    source._filled(0)
    bucket = source._bucket
    assert bucket is not None
    before = {place: tensor.data_ptr() for place, tensor in bucket.tensors.items()}
    seen: list[tuple[int, int]] = []
    original = type(source.store.folder).read_into

    def watched(self: Any, name: str, start: int, view: memoryview) -> None:
        seen.append((np.frombuffer(view, np.uint8).ctypes.data, len(view)))
        original(self, name, start, view)

    with patch.object(type(source.store.folder), "read_into", watched):
        tracemalloc.start()
        source._filled(1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    spans = [(before[place], before[place] + tensor.nbytes) for place, tensor in bucket.tensors.items()]
    assert sum(size for _, size in seen) == bucket.nbytes
    assert all(any(low <= at and at + size <= high for low, high in spans) for at, size in seen)
    assert peak < 1 << 20  # of 5 MiB
