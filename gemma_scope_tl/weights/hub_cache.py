"""What the Hub's cache says of a file: whether it is one of the cache's, its sha256, and how it is removed from it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.files import file_sha256
from gemma_scope_tl.weights.checks import weights_error

_SHA256 = re.compile(r"[0-9a-f]{64}")


def verify_download(path: Path, wanted: str) -> None:
    """Raise :func:`wrong_hash` unless the file's sha256 is ``wanted`` (hexadecimal)."""
    found = file_sha256(path)
    if found != wanted:
        raise wrong_hash(path, found, wanted)


def wrong_hash(path: Path, found: str, wanted: str) -> WeightsError:
    """The error for a file with another sha256 than the registry or the Hub says.

    A file of the Hub's cache is removed from it, so that the next load downloads it again, where otherwise the cache
    would give the bad file for ever. Files outside the cache are left as they are.
    """
    what = f"has sha256 {found}, it should be {wanted}"
    if remove_from_cache(path):
        return weights_error(path, f"{what}. It was removed from the cache", "Load it again to download it again.")
    return weights_error(path, what)


def remove_from_cache(path: Path) -> bool:
    """Delete a file of the Hub's cache, its blob included, so that the next load downloads it again.

    Returns:
        Whether it was one and is gone; any other file is left as it is.
    """
    entries = _cache_entries(path)
    try:
        for entry in entries:
            entry.unlink(missing_ok=True)
    except OSError:  # a cache that only others may write
        return False
    return bool(entries)


def in_hub_cache(path: Path) -> bool:
    """Whether a file is one of the Hub's cache, which holds whole files and never changes them."""
    return bool(_cache_entries(path))


def known_sha256(path: Path) -> str | None:
    """The sha256 that the Hub gave for a cached file, without reading the file.

    The cache names the blob of an LFS file by that hash. None for files outside the cache, for small files (named by
    their git hash) and where the cache could not use symbolic links.
    """
    blob = _blob(path)
    return blob.name if blob is not None and _SHA256.fullmatch(blob.name) else None


def _blob(path: Path) -> Path | None:
    """The blob that a link in the Hub's cache points to. Only one step: a blob may itself be a link."""
    if not path.is_symlink():
        return None
    target = Path(os.path.normpath(path.parent / os.readlink(path)))
    return target if target.parent.name == "blobs" else None


def _cache_entries(path: Path) -> list[Path]:
    """What to delete so that the Hub's cache no longer has a file: the snapshot's link, and the blob."""
    if (blob := _blob(path)) is not None:
        return [path, blob]
    for parent in path.absolute().parents:
        if parent.name == "snapshots" and parent.parent.name.startswith(("models--", "datasets--")):
            return [path]  # a cache on a disk without symbolic links
    return []
