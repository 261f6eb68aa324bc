"""Paths that must stay inside a folder, symbolic links followed."""

from __future__ import annotations

from pathlib import Path

from gemma_scope_tl.errors import RegistryError


def inside(root: Path, inner: str) -> Path:
    """``root / inner``, which need not exist.

    Args:
        root: the folder.
        inner: a relative path with ``/`` between its parts.

    Raises:
        RegistryError: when the path leads out of the folder, by its text or through a symbolic link.
    """
    path = root / inner
    try:
        real, real_root = path.resolve(), root.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a NUL
        raise RegistryError(f"{str(path)!r} cannot be resolved: {error}") from None
    if not real.is_relative_to(real_root):
        raise RegistryError(f"{path} leads out of {root}, to {real}. Copy the file into the folder.")
    return path
