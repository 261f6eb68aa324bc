"""Stores that were cut off, filled the disk, or were damaged: they resume to the same bits, or say which file it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_scope_tl.activations import folder as folder_module
from gemma_scope_tl.activations.folder import LocalFolder, RemoteFolder
from gemma_scope_tl.activations.reader import StoreSource, describe_store, open_store, verify_store
from gemma_scope_tl.activations.writer import write_store
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.token_rows import TokenRows
from tests.activations.test_reader import MLP, RES, write_random
from tests.activations.test_store import PLACES, SMALL, files_of
from tests.helpers import hooked, random_gemma, random_tokens, shared_model

SHARD = "00000_00001.safetensors"


@pytest.fixture(scope="module")
def model() -> Any:
    return shared_model("grouped", "bridge")


@pytest.fixture(scope="module")
def rows(model: Any) -> TokenRows:
    return TokenRows.from_ids(random_tokens(model, batch=9, length=12), special=(2, 1, 0))


class _Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("passes", [0, 1, 3, 4])
def test_a_killed_writer_goes_on_after_the_last_whole_set(
    tmp_path: Path, model: Any, rows: TokenRows, passes: int
) -> None:
    from gemma_scope_tl.activations.harvest import Harvester

    write_store(tmp_path / "whole", model, rows, PLACES, **SMALL)
    original, ran = Harvester.run, []

    def dies(self: Harvester, *args: Any) -> Any:
        if len(ran) == passes:
            raise _Killed
        ran.append(1)
        return original(self, *args)

    with patch.object(Harvester, "run", dies), pytest.raises(_Killed):
        write_store(tmp_path / "cut", model, rows, PLACES, **SMALL)
    with pytest.raises(GemmaScopeError, match="is not finished"):
        open_store(tmp_path / "cut")
    whole = len(list((tmp_path / "cut/unfinished").glob("0*.json")))
    again: list[int] = []

    def counted(self: Harvester, *args: Any) -> Any:
        again.append(1)
        return original(self, *args)

    with patch.object(Harvester, "run", counted):
        assert write_store(tmp_path / "cut", model, rows, PLACES, **SMALL)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert len(again) == 5 - sum(one.batches for one in open_store(tmp_path / "whole").shards[:whole])
    assert write_store(tmp_path / "cut", model, rows, PLACES, **SMALL)  # nothing is left to do


@pytest.mark.kill
def test_a_process_that_is_killed_leaves_a_store_that_resumes(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {os.getcwd()!r})
import gemma_scope_tl.activations.folder as d
from tests.activations.test_reader import write_random
real, count = os.pwrite, []
def dies(handle, view, at):
    count.append(1)
    if len(count) > 9:
        os._exit(9)
    return real(handle, view, at)
d.os.pwrite = dies
write_random({str(tmp_path / "cut")!r}, [30] * 12)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    assert list((tmp_path / "cut").rglob("*.unfinished"))
    write_random(tmp_path / "cut", [30] * 12)
    write_random(tmp_path / "whole", [30] * 12)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("writes", [0, 5, 13])
def test_a_full_disk_leaves_a_store_that_resumes(tmp_path: Path, writes: int) -> None:
    write_random(tmp_path / "whole", [30] * 12)
    real, count = os.pwrite, []

    def full(handle: int, view: memoryview, at: int) -> int:
        count.append(1)
        if len(count) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, view, at)

    with patch.object(folder_module.os, "pwrite", full), pytest.raises(GemmaScopeError, match="the disk is full"):
        write_random(tmp_path / "cut", [30] * 12)
    assert not list((tmp_path / "cut").rglob("*.unfinished"))  # what is of no use makes room
    write_random(tmp_path / "cut", [30] * 12)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_a_full_remote_leaves_a_store_that_resumes(tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFile

    url, real, count = f"memory://faults/{tmp_path.name}", MemoryFile.write, []

    def full(self: Any, data: Any) -> int:
        count.append(1)
        if len(count) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    with patch.object(MemoryFile, "write", full, create=True), pytest.raises(GemmaScopeError, match="disk is full"):
        write_random(url, [30] * 12)
    write_random(url, [30] * 12)
    write_random(tmp_path, [30] * 12)
    assert [one.sha256 for one in open_store(url).shards] == [one.sha256 for one in open_store(tmp_path).shards]
    verify_store(url, progress=False)


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path: Path, model: Any, rows: TokenRows) -> None:
    write_store(tmp_path / "fits", model, rows, PLACES, **SMALL)
    needed = int(describe_store(tmp_path / "fits")["bytes"].sum())
    with (
        patch.object(LocalFolder, "free", lambda self: needed - 1),
        patch("gemma_scope_tl.activations.harvest.Harvester.run", side_effect=AssertionError),
        pytest.raises(GemmaScopeError, match=f"needs {needed} bytes .* more, and {needed - 1} bytes"),
    ):
        write_store(tmp_path / "no", model, rows, PLACES, **SMALL)
    with patch.object(LocalFolder, "free", lambda self: needed):
        assert write_store(tmp_path / "no", model, rows, PLACES, **SMALL)


def test_a_resumed_store_needs_only_the_rest(tmp_path: Path) -> None:
    write_random(tmp_path, [30] * 12)
    shards = open_store(tmp_path).shards
    (tmp_path / "unfinished").mkdir()
    contents = json.loads((tmp_path / "store.json").read_text())["contents"]
    (tmp_path / "unfinished/contents.json").write_text(json.dumps(contents))
    for one in shards[1:]:
        (tmp_path / f"unfinished/{one.stem}.json").write_text(one.model_dump_json())
    (tmp_path / "store.json").unlink()
    rest = sum((tmp_path / place.key / shards[0].file_name).stat().st_size for place in (RES, MLP))
    with (
        patch.object(LocalFolder, "free", lambda self: rest - 1),
        pytest.raises(GemmaScopeError, match=f"{rest} bytes"),
    ):
        write_random(tmp_path, [30] * 12)
    with patch.object(LocalFolder, "free", lambda self: rest):
        write_random(tmp_path, [30] * 12)
    verify_store(tmp_path, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["tokens", "weights", "places", "dtype", "batch_rows"])
@pytest.mark.parametrize("finished", [True, False])
def test_another_run_is_refused(tmp_path: Path, model: Any, rows: TokenRows, change: str, finished: bool) -> None:
    part = (0, 1) if finished else (0, 2)
    write_store(tmp_path, model, rows, PLACES, part=part, **SMALL)
    before = files_of(tmp_path)
    arguments: dict[str, Any] = {"model": model, "token_rows": rows, "places": PLACES, "part": part, **SMALL}
    if change == "tokens":
        arguments["token_rows"] = TokenRows.from_ids(rows[0:8], special=(2, 1, 0))
    elif change == "weights":
        arguments["model"] = hooked(random_gemma(seed=1), "bridge")
    else:
        arguments[change] = {"places": PLACES[:2], "dtype": "bf16", "batch_rows": 3}[change]
    with pytest.raises(GemmaScopeError, match=f"other activations.*{change}"):
        write_store(tmp_path, **arguments)
    assert files_of(tmp_path) == before


def test_activations_that_are_not_finite(tmp_path: Path, model: Any, rows: TokenRows) -> None:
    broken = hooked(random_gemma(), "bridge")
    with torch.no_grad():
        next(iter(broken.embedding_module().parameters()))[5, 3] = float("nan")
    tokens = rows[0:2].clone()
    tokens[1, 4] = 5
    with pytest.raises(GemmaScopeError, match="not finite"):
        write_store(tmp_path, broken, TokenRows.from_ids(tokens, (2, 1, 0)), [Place("embedding", None)], **SMALL)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _lengthen(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"x")


def _flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (_truncate, "is truncated"),
        (_lengthen, "is too long"),
        (lambda file: file.write_bytes(b""), "is truncated"),
        (lambda file: _flip(file, 40), "is not the file"),
        (lambda file: shutil.copy(file.with_name("00000_00002.safetensors"), file), "is not the file"),
    ],
    ids=["missing", "truncated", "long", "empty", "header", "another shard"],
)
def test_damage_is_seen_when_opening(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write_random(tmp_path, [30] * 12)
    damage(tmp_path / RES.key / SHARD)
    for opening in (open_store, describe_store, lambda path: StoreSource(path, bucket_rows=8)):
        with pytest.raises(GemmaScopeError, match=f"{RES.key}/{SHARD} {message}"):
            opening(tmp_path)


def test_a_shard_of_another_store_is_seen(tmp_path: Path) -> None:
    write_random(tmp_path / "a", [30] * 12)
    write_random(tmp_path / "b", [30] * 12, shard_bytes=9001)  # the same rows and cuts, other contents
    shutil.copy(tmp_path / "b" / RES.key / SHARD, tmp_path / "a" / RES.key / SHARD)
    with pytest.raises(GemmaScopeError, match="another store"):
        open_store(tmp_path / "a")


@pytest.mark.parametrize("at", [4096, 5000, -1])
def test_a_flipped_bit_is_seen_by_hash(tmp_path: Path, at: int) -> None:
    write_random(tmp_path, [30] * 12)
    _flip(tmp_path / RES.key / SHARD, at)
    open_store(tmp_path)
    with pytest.raises(GemmaScopeError, match=f"{RES.key}/{SHARD} was changed"):
        verify_store(tmp_path, progress=False)
    verify_store(tmp_path, [MLP], progress=False)
    with pytest.raises(GemmaScopeError, match=f"{RES.key}/{SHARD} was changed"):
        list(islice(StoreSource(tmp_path, bucket_rows=60, verify=True).batches(60), 12))
    with pytest.raises(GemmaScopeError, match=f"{RES.key}/{SHARD} was changed"):
        StoreSource(tmp_path, bucket_rows=60, verify=True).mean_squares(10_000)


def test_what_was_verified_is_not_read_again_until_it_changes(tmp_path: Path) -> None:
    write_random(tmp_path, [30] * 12)
    for file in tmp_path.rglob("*.safetensors"):
        os.utime(file)
    with patch("gemma_scope_tl.weights.stamp._SETTLED_NS", 0):
        verify_store(tmp_path, progress=False)
    store = open_store(tmp_path)
    with patch.object(LocalFolder, "read_into", side_effect=AssertionError("read")):
        for shard in store.shards:
            store.verify_shard(RES, shard, remembered=True)
        with pytest.raises(AssertionError, match="read"):
            store.verify_shard(RES, store.shards[1])
    _flip(tmp_path / RES.key / SHARD, -1)
    with pytest.raises(GemmaScopeError, match="was changed"):
        store.verify_shard(RES, store.shards[1], remembered=True)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    for path in (tmp_path, f"memory://shrinks/{tmp_path.name}"):
        write_random(path, [30] * 12)
        source = StoreSource(path, bucket_rows=360)
        name = f"{RES.key}/{SHARD}"
        source.store.folder.put(name, (source.store.folder.read(name) or b"")[:-1])
        with pytest.raises(GemmaScopeError, match=f"{name} is truncated"):
            next(source.batches(8))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_manifest_is_refused_or_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever is done to the manifest's bytes: an error of this package that names a file, or the same store."""
    folder = tmp_path_factory.getbasetemp() / "manifest"
    if not (folder / "store.json").exists():
        write_random(folder, [30] * 4)
        (folder / "good.json").write_bytes((folder / "store.json").read_bytes())
    good = (folder / "good.json").read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    to = data.draw(st.integers(at, min(len(good), at + 40)))
    new = data.draw(st.binary(max_size=6) | st.sampled_from([b"-1", b"9" * 30, b"null", b'"../x"', b"[" * 3000]))
    (folder / "store.json").write_bytes(good[:at] + new + good[to:])
    try:
        store = open_store(folder)
        verify_store(folder, progress=False)
    except GemmaScopeError as error:
        assert str(folder) in str(error)
    else:
        assert store.rows == 120 and {place.key for place in store.widths} == {RES.key, MLP.key}


def test_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(GemmaScopeError, match="holds no store"):
        open_store(tmp_path)
    with pytest.raises(GemmaScopeError, match="holds no store"):
        StoreSource("memory://nowhere", bucket_rows=8)
    assert isinstance(open_store_folder("memory://nowhere"), RemoteFolder)


def open_store_folder(path: str) -> Any:
    from gemma_scope_tl.activations.folder import open_folder

    return open_folder(path)
