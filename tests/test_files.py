"""Atomic writes, and what the system has against a write in our words."""

from __future__ import annotations

import errno
import os
import pwd
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from gemma_scope_tl.errors import GemmaScopeError, WriteError
from gemma_scope_tl.files import append_line, checked_path, expanded, make_folder, replace_files, write_atomically
from gemma_scope_tl.sae.save import write_npz

BIG = np.zeros((1000, 200), np.float32)
BIG[:] = np.random.default_rng(0).standard_normal(BIG.shape)  # so that it does not deflate
WRITERS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: path.write_bytes(BIG.tobytes()),
    "safetensors": lambda path: save_file({"a": torch.from_numpy(BIG)}, path),
    "npz": lambda path: write_npz(path, {"a": BIG}),
    "deflated": lambda path: write_npz(path, {"a": BIG}, compress=True),
    "parquet": lambda path: pd.DataFrame({"a": BIG.reshape(-1)}).to_parquet(path),
}


@pytest.fixture(scope="module")
def tiny_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 256 KiB, where this user may mount one."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no disk can be mounted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failed_write_leaves_the_old_files_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "old")
    write_atomically(tmp_path / "b", b"old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WriteError, match="b cannot be written: the disk is full. Make room") as caught:
        replace_files(tmp_path, {"a": lambda path: path.write_text("new"), "b": fail})
    assert _contents(tmp_path) == {"a": b"old", "b": b"old"}
    assert isinstance(caught.value, OSError) and isinstance(caught.value, GemmaScopeError)
    assert caught.value.errno == errno.ENOSPC and isinstance(caught.value.__cause__, OSError)


def test_errors_that_are_not_the_systems_are_left_alone(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        replace_files(tmp_path, {"a": fail})
    assert not _contents(tmp_path)


def test_folders_are_made_and_text_is_utf8(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "deep" / "er" / "file.txt", "Ω\n")
    assert path.read_bytes() == "Ω\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk(kind: str, tiny_disk: Path) -> None:
    (tiny_disk / kind).write_bytes(b"old")
    with pytest.raises(WriteError, match=f"{kind} cannot be written: the disk is full") as caught:
        replace_files(tiny_disk, {kind: WRITERS[kind]})
    assert caught.value.errno == errno.ENOSPC
    assert _contents(tiny_disk) == {kind: b"old"}
    (tiny_disk / kind).unlink()


@contextmanager
def small_files() -> Iterator[None]:
    """No file may become larger than 100 kB, for any user. Not a fixture: pytest's own reports are files too."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_larger_than_the_system_allows(kind: str, tmp_path: Path) -> None:
    message = "cannot be written: it would exceed the largest file size that the system allows"
    with pytest.raises(WriteError, match=message), small_files():
        replace_files(tmp_path, {kind: WRITERS[kind]})
    assert not _contents(tmp_path)


ODD = ["a" * 250, "a" * 255, "é" * 127, "日本" * 42, "a b'\"\\*?\n", "-rf", ".hidden", "\udc80"]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_odd_names(name: str, tmp_path: Path) -> None:
    assert write_atomically(tmp_path / name, "x").read_text() == "x"
    assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [os.fsencode(name)]


NAME = "not a file name"
NO_NAMES = [("a" * 256, r"too long .* \(256 bytes\)"), ("é" * 128, "256 bytes"), ("..", NAME), ("a\0b", NAME)]


@pytest.mark.parametrize(("name", "why"), NO_NAMES, ids=range(len(NO_NAMES)))
def test_names_that_no_file_has(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=why) as caught:
        write_atomically(f"{tmp_path}/{name}", "x")
    assert str(caught.value).isprintable() and not _contents(tmp_path)


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    for name in ("a/b", "../a", "", "."):
        with pytest.raises(WriteError, match="not a file name"):
            replace_files(tmp_path / "in", {name: lambda path: path.write_text("x")})
    assert not _contents(tmp_path / "in")


def test_a_file_in_the_place_of_a_folder_and_the_other_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "in").mkdir(parents=True)
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "y" / "x"):
        with pytest.raises(WriteError, match="a file exists where a folder is needed"):
            write_atomically(path, "x")
    with pytest.raises(WriteError, match="a file exists where a folder is needed"):
        make_folder(tmp_path / "file")
    with pytest.raises(WriteError, match="a file exists where a folder is needed"):
        append_line(tmp_path / "file" / "log", "x")
    with pytest.raises(WriteError, match="a folder of this name exists"):
        write_atomically(tmp_path / "folder", "x")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"] and (tmp_path / "file").read_text() == "mine"
    )


@pytest.mark.parametrize(
    ("number", "why"),
    [(errno.EROFS, "the file system is read-only"), (errno.EACCES, "permission denied"), (errno.EDQUOT, "quota")],
)
def test_a_place_that_takes_nothing(number: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root writes nearly everywhere, so the system's answer is put in."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("gemma_scope_tl.files.tempfile.mkstemp", refuse)
    with pytest.raises(WriteError, match=why) as caught:
        write_atomically(tmp_path / "a", "x")
    assert caught.value.errno == number


def test_folders_that_cannot_be_synced_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr("gemma_scope_tl.files.os.fsync", fsync)
    assert write_atomically(tmp_path / "a", "x").read_text() == "x"


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "old")
    code = f"""
import time
from gemma_scope_tl.files import replace_files
def slow(path):
    path.write_text("half")
    print("now", flush=True)
    time.sleep(60)
replace_files({str(tmp_path)!r}, {{"a": slow}})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "now\n"
        child.send_signal(signal.SIGKILL)
    time.sleep(0.01)
    assert {name: data for name, data in _contents(tmp_path).items() if not name.startswith(".")} == {"a": b"old"}
    assert write_atomically(tmp_path / "a", "new").read_text() == "new"


def test_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/some/home")
    assert expanded("~/x") == Path("/some/home/x") and expanded("x/~") == Path("x/~")
    monkeypatch.delenv("HOME")

    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert expanded("~/x") is None and expanded("/y") == Path("/y")
    with pytest.raises(GemmaScopeError, match="set HOME"):
        checked_path("~/x")
