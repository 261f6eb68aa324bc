"""Writing files so that a crash leaves the old file or the new one, never half of one; telling files apart."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_BLOCK = 4 << 20


def replace_files(folder: str | os.PathLike[str], writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write every file completely under a temporary name in ``folder``, then rename them into place.

    Args:
        folder: made if need be.
        writers: a function per file name, which writes to the path that it is given.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    done: dict[str, Path] = {}
    try:
        for name, write in writers.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=place)
            os.close(handle)
            done[name] = Path(temporary)
            write(done[name])
            done[name].chmod(0o644)
            _sync(done[name])
        for name, temporary in done.items():
            temporary.replace(place / name)
        _sync(place)
    finally:
        for temporary in done.values():
            temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write ``data`` (text as UTF-8) to ``path`` whole or not at all, and return the path."""
    target = Path(path)
    encoded = data.encode() if isinstance(data, str) else data
    replace_files(target.parent, {target.name: lambda temporary: temporary.write_bytes(encoded)})
    return target


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file, read a few MiB at a time."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
