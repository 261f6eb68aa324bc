"""Rows of the registry that are known by name only, and the record of those whose files this machine has seen.

A row is marked ``unverified`` when its file's name is from a listing that may be out of date. Loading it warns once.
After ``gemma-scope registry check --remote`` or ``gemma-scope verify`` has found the file with the row's shapes, it is
recorded in the cache folder, and the row is not treated as unverified any more.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.weights.stamp import cache_folder

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

SEEN_NAME = "seen_saes.json"
_warned: set[str] = set()


class UnverifiedSAEWarning(UserWarning):
    """An SAE is loaded whose file is known from a listing only."""


def is_unverified(row: SAERow) -> bool:
    """Whether the row is marked as unverified and this machine has not seen its file."""
    return row.unverified and _key(row) not in _seen()


def unverified_among(rows: Iterable[SAERow]) -> set[tuple[str, str]]:
    """Release and id of the rows that :func:`is_unverified`; the record is read once, and only if it is needed."""
    marked = [row for row in rows if row.unverified]
    seen = _seen() if marked else set()
    return {(row.release, row.id) for row in marked if _key(row) not in seen}


def mark_seen(rows: Iterable[SAERow]) -> int:
    """Record that the files of these rows exist with the rows' shapes; return the number of new entries.

    Rows that are not marked as unverified are ignored. A cache folder that cannot be written is not an error.
    """
    seen = _seen()
    new = {_key(row) for row in rows if row.unverified} - seen
    place = _place()
    if not new or place is None:
        return 0
    with suppress(OSError):
        write_atomically(place, json.dumps(sorted(seen | new), indent=0) + "\n")
        return len(new)
    return 0


def warn_if_unverified(row: SAERow) -> None:
    """Warn, once in a process for each row, that nobody has confirmed the file of the row."""
    if not row.unverified or _key(row) in _warned or not is_unverified(row):
        return
    _warned.add(_key(row))
    warnings.warn(
        f"{row.release}/{row.id} is unverified: the file's name is from an old listing of {row.repo}, and its content "
        "was not compared with anything. `gemma-scope registry check RELEASE --remote` looks for the file, and "
        f"`gemma-scope verify {row.model}` measures samples.",
        UnverifiedSAEWarning,
        stacklevel=3,
    )


def _key(row: SAERow) -> str:
    return f"{row.repo}/{row.path}@{row.revision or 'main'}"


def _place() -> Path | None:
    folder = cache_folder()
    return folder and folder / SEEN_NAME


def _seen() -> set[str]:
    with suppress(OSError, ValueError, TypeError):
        place = _place()
        if place is not None and place.is_file():
            held = json.loads(place.read_text(encoding="utf-8"))
            return {one for one in cast("list[object]", held) if isinstance(one, str)}
    return set()
