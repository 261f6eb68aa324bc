"""Remembering that a file was checked, so that the next load need not read it.

A stamp says: this file, with this size, inode and times, had these checksums right and these smallest and largest
values. Whatever changes a file changes its ``ctime``, which no program can set back, so a stamp does not outlive its
file's content. (A bit that rots on the disk changes no time: such a file is caught when it is checked, not later.)

Stamps lie beside the Hub's cache, in ``$HF_HOME/gemma_scope_tl/checked``; ``GEMMA_SCOPE_TL_CACHE`` names another
folder. They are as trustworthy as the cached weights themselves: whoever can write one can write the other. Where a
stamp cannot be written (a read-only home, or none), files are checked at every load.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_scope_tl.files import expanded, write_atomically

CACHE_VARIABLE = "GEMMA_SCOPE_TL_CACHE"
_SETTLED_NS = 100_000_000
_MAX_STAMP = 1 << 16  # bytes; a stamp has less than 1 kB
_VERSION = 1  # raise it when what a check checks changes


@dataclass(frozen=True)
class Stamp:
    """The result of a check.

    Attributes:
        ranges: smallest and largest value of every array, by its canonical name.
        sha256: of the whole file, None where it was not needed.
    """

    ranges: dict[str, tuple[float, float]]
    sha256: str | None = None


def cache_folder() -> Path | None:
    """The folder for files that can be made again; None for a user without a home, as containers have them."""
    if own := os.environ.get(CACHE_VARIABLE):
        return expanded(own)
    general = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = expanded(os.environ.get("HF_HOME", os.path.join(general, "huggingface")))
    return home and home / "gemma_scope_tl"


def file_key(path: Path) -> dict[str, int | str]:
    """Numbers of which one changes whenever a file does."""
    path = path.resolve()
    stat = path.stat()
    numbers = {name: getattr(stat, f"st_{name}") for name in ("size", "ino", "dev", "mtime_ns", "ctime_ns")}
    return {"path": str(path), "version": _VERSION, **numbers}


def read_stamp(path: Path) -> Stamp | None:
    """The stamp of a file as it is now, or None."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        place = _place(path)
        if place is None or not place.is_file() or place.stat().st_size > _MAX_STAMP:
            return None
        held = json.loads(place.read_text(encoding="utf-8"))
        if held["key"] == file_key(path):
            ranges = {str(name): (float(low), float(high)) for name, (low, high) in held["ranges"].items()}
            return Stamp(ranges, held["sha256"])
    return None


def write_stamp(path: Path, stamp: Stamp, key: dict[str, int | str]) -> None:
    """Remember ``stamp`` for the file, unless it changed since ``key`` was taken or the cache cannot be written."""
    touched = max(int(key["mtime_ns"]), int(key["ctime_ns"]))
    if time.time_ns() - touched < _SETTLED_NS:
        return  # another write within a tick of the file system's clock would leave the same times
    with suppress(OSError):
        place = _place(path)
        if place is not None and file_key(path) == key:
            write_atomically(place, json.dumps({"key": key, **asdict(stamp)}))


def _place(path: Path) -> Path | None:
    cache = cache_folder()
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache and cache / "checked" / f"{name}.json"
