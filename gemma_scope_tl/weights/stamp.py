"""Records of checked files, so that a later load need not read a file completely.

A stamp records that a file with a certain size, inode and times had correct checksums, and the smallest and largest
value of each array. Every change of a file changes its ``ctime``, which a program cannot set back, so a stamp becomes
invalid when the content changes. (A disk error changes no time, so it is found only if it precedes the check.)

Stamps are in ``$HF_HOME/gemma_scope_tl/checked``, or in the folder that ``GEMMA_SCOPE_TL_CACHE`` names. They are as
trustworthy as the cached weights, because whoever can write one can write the other. If a stamp cannot be written
(a read-only home folder, or none), files are checked at every load.
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
_VERSION = 1  # increase it when the checks change


@dataclass(frozen=True)
class Stamp:
    """The result of a check.

    Attributes:
        ranges: smallest and largest value of every array, by its canonical name.
        sha256: hash of the whole file; None if it was not needed.
    """

    ranges: dict[str, tuple[float, float]]
    sha256: str | None = None


def cache_folder() -> Path | None:
    """The folder for files that can be made again; None for a user without a home folder, as in some containers."""
    if own := os.environ.get(CACHE_VARIABLE):
        return expanded(own)
    general = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = expanded(os.environ.get("HF_HOME", os.path.join(general, "huggingface")))
    return home and home / "gemma_scope_tl"


def file_key(path: Path) -> dict[str, int | str]:
    """Numbers that identify a version of a file: at least one differs after any change."""
    path = path.resolve()
    stat = path.stat()
    numbers = {name: getattr(stat, f"st_{name}") for name in ("size", "ino", "dev", "mtime_ns", "ctime_ns")}
    return {"path": str(path), "version": _VERSION, **numbers}


def read_stamp(path: Path) -> Stamp | None:
    """The stamp of the current version of a file, or None."""
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
    """Write ``stamp`` for the file, unless the file has changed since ``key`` or the cache is not writable."""
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
