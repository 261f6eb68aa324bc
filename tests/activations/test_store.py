"""Writing stores: what is in the files, by whom and in what order it was written, and what they take."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gemma_scope_tl.activations.folder import open_folder
from gemma_scope_tl.activations.manifest import cut
from gemma_scope_tl.activations.reader import describe_store, open_store, verify_store
from gemma_scope_tl.activations.writer import store_bytes, write_store
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place, parse_place
from gemma_scope_tl.text.token_rows import TokenRows
from tests.helpers import hooked, random_gemma, random_tokens, shared_model

PLACES = [Place("res", 0), Place("att", 2), Place("transcoder", 1), Place("embedding", None)]
KEYS = ["res/layer_0", "att/layer_2", "transcoder/layer_1", "embedding", "mlp/layer_1"]
SMALL = {"shard_bytes": 20_000, "batch_rows": 2, "progress": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return shared_model("grouped", "bridge")


@pytest.fixture(scope="module")
def rows(model: Any) -> TokenRows:
    tokens = random_tokens(model, batch=9, length=12)
    tokens[:, 7] = 1  # EOS
    tokens[2, 8:] = 0
    tokens[3, 1:] = 0  # nothing to keep in this row
    return TokenRows.from_ids(tokens, special=(2, 1, 0))


def expected(model: Any, rows: TokenRows, batch_rows: int = 2) -> dict[str, torch.Tensor]:
    """Activations by TransformerLens's own cache, special tokens left out, by key."""
    hooks = {
        "res/layer_0": "blocks.0.hook_out",
        "att/layer_2": "blocks.2.attn.o.hook_in",
        "transcoder/layer_1": "blocks.1.ln2.hook_normalized",
        "embedding": "embed.hook_out",
        "mlp/layer_1": "blocks.1.ln2_post.hook_out",
    }
    found: dict[str, list[torch.Tensor]] = {key: [] for key in hooks}
    for at in range(0, len(rows), batch_rows):
        tokens = rows[at : at + batch_rows]
        mask = torch.ones_like(tokens)
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=list(hooks.values()), attention_mask=mask)
        keep = ~torch.isin(tokens, torch.tensor([0, 1, 2]))
        for key, hook in hooks.items():
            found[key].append(cache[hook].reshape(*tokens.shape, -1)[keep])
    return {key: torch.cat(parts) for key, parts in found.items()}


def contents_of(folder: Path, key: str) -> torch.Tensor:
    """A place's rows by the safetensors library, in the order of the manifest."""
    manifest = json.loads((folder / "store.json").read_text())
    names = [f"{one['part']:05d}_{one['number']:05d}.safetensors" for one in manifest["shards"]]
    return torch.cat([load_file(folder / key / name)["activations"] for name in names])


def files_of(folder: Path) -> dict[str, str]:
    """The sha256 of every file, by its name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_place_has_the_models_activations(tmp_path: Path, model: Any, rows: TokenRows) -> None:
    assert write_store(tmp_path, model, rows, PLACES, **SMALL)
    for key, value in expected(model, rows).items():
        # one forward pass by another route through the same modules: rounding may differ, by a few float32 ulps
        torch.testing.assert_close(contents_of(tmp_path, key), value, rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "unfinished").exists()


def test_hashes_and_headers_hold_for_other_programs(tmp_path: Path, model: Any, rows: TokenRows) -> None:
    write_store(tmp_path, model, rows, PLACES, **SMALL)
    manifest = json.loads((tmp_path / "store.json").read_text())
    assert len(manifest["shards"]) > 2
    first = 0
    for one in manifest["shards"]:
        assert one["first_row"] == first
        first += one["rows"]
        for key, digest in one["sha256"].items():
            path = tmp_path / key / f"{one['part']:05d}_{one['number']:05d}.safetensors"
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
            assert path.stat().st_size <= 20_000
            with safe_open(path, "pt") as opened:
                assert opened.metadata()["place"] == key
                assert opened.get_slice("activations").get_shape()[0] == one["rows"]
    assert first == manifest["contents"]["rows"] == int(rows.kept.sum())
    verify_store(tmp_path, progress=False)


def test_bfloat16_is_rounded_to_nearest(tmp_path: Path, model: Any, rows: TokenRows) -> None:
    write_store(tmp_path / "a", model, rows, PLACES, **SMALL)
    write_store(tmp_path / "b", model, rows, PLACES, dtype="bf16", **SMALL)
    for key in KEYS:
        full, half = contents_of(tmp_path / "a", key), contents_of(tmp_path / "b", key)
        assert half.dtype == torch.bfloat16
        bits = full.numpy().view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        assert np.array_equal(half.view(torch.uint16).numpy(), nearest)


@pytest.mark.parametrize("parts", [2, 3, 5, 7])
def test_parts_hold_the_rows_of_one_writer(tmp_path: Path, model: Any, rows: TokenRows, parts: int) -> None:
    write_store(tmp_path / "one", model, rows, PLACES, **SMALL)
    order = [*range(1, parts), 0]
    done = [write_store(tmp_path / "many", model, rows, PLACES, part=(part, parts), **SMALL) for part in order]
    # of 7 parts of 5 passes, the first has none: the store is whole before it
    assert done == [False] * (parts - 1 - (parts > 5)) + [True] * (1 + (parts > 5))
    for key in KEYS:
        assert torch.equal(contents_of(tmp_path / "one", key), contents_of(tmp_path / "many", key))
    verify_store(tmp_path / "many", progress=False)


def test_writers_at_the_same_time(tmp_path: Path, rows: TokenRows) -> None:
    models = [hooked(random_gemma(), "bridge") for _ in range(3)]
    done: list[bool] = []

    def write(part: int) -> None:
        done.append(write_store(tmp_path, models[part], rows, PLACES, part=(part, 3), **SMALL))

    threads = [threading.Thread(target=write, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3 and any(done)
    verify_store(tmp_path, progress=False)
    torch.testing.assert_close(contents_of(tmp_path, "embedding"), expected(models[0], rows)["embedding"])


def test_the_second_writer_of_a_part_is_refused(tmp_path: Path, model: Any, rows: TokenRows) -> None:
    with open_folder(tmp_path).lock("unfinished/part_00000.lock"), pytest.raises(GemmaScopeError, match="Another"):
        write_store(tmp_path, model, rows, PLACES, **SMALL)
    assert write_store(tmp_path, model, rows, PLACES, **SMALL)


@pytest.mark.parametrize("url", ["memory://stores/{}", "file://{}/store"])
def test_any_fsspec_path(tmp_path: Path, model: Any, rows: TokenRows, url: str) -> None:
    write_store(tmp_path / "local", model, rows, PLACES, **SMALL)
    other = url.format(str(tmp_path) if "file" in url else tmp_path.name)
    assert write_store(other, model, rows, PLACES, **SMALL)
    verify_store(other, progress=False)
    local, remote = open_store(tmp_path / "local"), open_store(other)
    assert [one.sha256 for one in local.shards] == [one.sha256 for one in remote.shards]
    assert describe_store(other).equals(describe_store(tmp_path / "local"))


def test_files_are_the_bytes_written(tmp_path: Path) -> None:
    """Pieces of odd sizes, across pages and chunks."""
    generator = np.random.default_rng(0)
    sizes = [0, 1, 4095, 4096, 4097, 12_345, 1 << 20, (1 << 22) + 5, 3 * (1 << 22) - 1, 7]
    pieces = [generator.bytes(size) for size in sizes]
    file = open_folder(tmp_path).create("a/b.bin")
    for piece in pieces:
        file.write(memoryview(piece))
    assert not (tmp_path / "a/b.bin").exists()
    digest = file.commit()
    written = (tmp_path / "a/b.bin").read_bytes()
    assert written == b"".join(pieces)
    assert digest == hashlib.sha256(written).hexdigest()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_bytes_are_known_before(tmp_path: Path, model: Any, rows: TokenRows) -> None:
    widths = {parse_place(key): (128 if key.startswith("att") else 64) for key in KEYS}
    for number, (parts, dtype) in enumerate([(1, torch.float32), (1, torch.bfloat16), (3, torch.float32)]):
        folder = tmp_path / str(number)
        for part in range(parts):
            write_store(folder, model, rows, PLACES, dtype=dtype, part=(part, parts), **SMALL)
        planned = store_bytes(rows, widths, dtype=dtype, shard_bytes=20_000, batch_rows=2, parts=parts)
        table = describe_store(folder).set_index("place")
        for place, size in planned.items():
            assert size == sum(path.stat().st_size for path in (folder / place.key).iterdir())
            assert table.loc[place.key, "bytes"] == size
            assert table.loc[place.key, "width"] == widths[place]
        assert (table["rows"] == int(rows.kept.sum())).all()


def test_cuts_cover_all_rows_once() -> None:
    generator = np.random.default_rng(1)
    for _ in range(300):
        kept = generator.integers(0, 9, generator.integers(1, 40)).tolist()
        parts, limit = int(generator.integers(1, 6)), int(generator.integers(1, 30))
        sets = cut(kept, {"res/layer_0": 8, "att/layer_0": 16}, 4096 + limit * 16, parts)
        row = 0
        for one in sets:
            passes = kept[one.first_batch : one.first_batch + one.batches]
            assert one.first_row == row == sum(kept[: one.first_batch])
            assert one.rows == sum(passes) and one.rows > 0
            assert one.rows <= limit or sum(count > 0 for count in passes) == 1
            row += one.rows
        assert row == sum(kept)
        assert len({one.stem for one in sets}) == len(sets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"shard_bytes": 100}, "must be 8192 or more"),
        ({"part": (2, 2)}, "no part 2 of 2"),
        ({"batch_rows": 0}, "one token row"),
    ],
)
def test_bad_arguments(tmp_path: Path, model: Any, rows: TokenRows, change: dict[str, Any], message: str) -> None:
    with pytest.raises(GemmaScopeError, match=message):
        write_store(tmp_path, model, rows, PLACES, **{**SMALL, **change})
    assert not list(tmp_path.iterdir())


def test_tokens_that_keep_nothing(tmp_path: Path, model: Any) -> None:
    rows = TokenRows.from_ids(torch.tensor([[2, 1, 0, 0]]), special=(2, 1, 0))
    with pytest.raises(GemmaScopeError, match="no position"):
        write_store(tmp_path, model, rows, PLACES, **SMALL)


def test_a_path_fsspec_cannot_open(tmp_path: Path) -> None:
    with pytest.raises(GemmaScopeError, match="nonsense"):
        open_store("nonsense://somewhere/x")
