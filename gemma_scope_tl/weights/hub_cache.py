"""Information from the Hub's cache: whether a file belongs to the cache, and its sha256."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.files import file_sha256
from gemma_scope_tl.weights.checks import weights_error

_SHA256 = re.compile(r"[0-9a-f]{64}")


def in_hub_cache(path: Path) -> bool:
    """Whether a file is in the Hub's cache, which contains complete files and never changes them."""
    return bool(_entries(path))


def known_sha256(path: Path) -> str | None:
    """The sha256 that the Hub reported for a cached file. The file is not read.

    The cache uses this hash as the name of the blob of an LFS file. It is None for files outside the cache, for small
    files (named by their git hash) and for caches without symbolic links.
    """
    blob = _blob(path)
    return blob.name if blob is not None and _SHA256.fullmatch(blob.name) else None


def check_sha256(path: Path, wanted: str) -> None:
    """Raise :func:`wrong_hash` unless the sha256 of the file is ``wanted`` (hexadecimal)."""
    found = file_sha256(path)
    if found != wanted:
        raise wrong_hash(path, found, wanted)


def wrong_hash(path: Path, found: str, wanted: str) -> WeightsError:
    """The error for a file whose sha256 differs from the one in the registry or on the Hub.

    A file in the Hub's cache is deleted together with its blob, since otherwise every later load would use it. Files
    outside the cache are not changed.
    """
    what = f"has sha256 {found}, but it should be {wanted}"
    entries = _entries(path)
    try:
        for entry in entries:
            entry.unlink(missing_ok=True)
    except OSError:  # no permission to write to the cache
        return weights_error(path, what)
    if not entries:
        return weights_error(path, what)
    return weights_error(path, f"{what}. It was removed from the cache", "Load it again to download it again.")


def _blob(path: Path) -> Path | None:
    """The blob that a link in the Hub's cache points to. Only one link is followed: a blob may be a link itself."""
    if not path.is_symlink():
        return None
    target = Path(os.path.normpath(path.parent / os.readlink(path)))
    return target if target.parent.name == "blobs" else None


def _entries(path: Path) -> list[Path]:
    """The entries of a file in the Hub's cache: the link in the snapshot and the blob. Empty outside the cache."""
    if (blob := _blob(path)) is not None:
        return [path, blob]
    for parent in path.absolute().parents:
        if parent.name == "snapshots" and parent.parent.name.startswith(("models--", "datasets--")):
            return [path]  # a cache on a file system without symbolic links
    return []
