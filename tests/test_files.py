"""Atomic writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_scope_tl.files import replace_files, write_atomically


def test_a_failed_write_leaves_the_old_files_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "old")
    write_atomically(tmp_path / "b", b"old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_files(tmp_path, {"a": lambda path: path.write_text("new"), "b": fail})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_folders_are_made_and_text_is_utf8(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "deep" / "er" / "file.txt", "Ω\n")
    assert path.read_bytes() == "Ω\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
