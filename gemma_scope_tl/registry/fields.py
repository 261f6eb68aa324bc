"""Types of fields of registry files: relative paths, repositories, names, hashes, and lists that are kept as tuples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, Field

from gemma_scope_tl.errors import RegistryError
from gemma_scope_tl.families import bundled_names
from gemma_scope_tl.registry.locate import inside

_PLAIN_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def _relative(text: str) -> str:
    """A relative POSIX path that stays below its root."""
    if _PLAIN_PATH.fullmatch(text):  # nearly all paths; the checks below take ten times as long
        return text
    if not text or any(c.isspace() or c in "\\:" or ord(c) < 32 for c in text):
        raise ValueError(f"{text!r} is not a relative path with '/' between its parts and no spaces, ':' or '\\'")
    if any(part in ("", ".", "..") for part in text.split("/")):
        raise ValueError(f"{text!r} is not a relative path: no leading or double '/', no '.' and no '..'")
    return text


_HUB = r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*"
REPO = rf"({'|'.join(bundled_names())}|\./?|\./[^/]+(/[^/]+)*|/.*|{_HUB})"


def checked_repo(text: str) -> str:
    """Check a ``repo``: a bundled model, ``owner/name``, an absolute folder, or ``./folder`` beside the file."""
    if not re.fullmatch(REPO, text) or ".." in text.split("/") or any(ord(c) < 32 for c in text):
        hint = "'owner/name' on Hugging Face, './folder' relative to this file, or an absolute path"
        raise ValueError(f"{text!r} is not a repository: write {hint}, without '..'")
    return text


def resolved_repo(repo: str, folder: Path | None) -> str:
    """Make ``repo`` absolute if it is relative to the registry file; any other ``repo`` is returned unchanged.

    Raises:
        RegistryError: for a relative folder when ``folder`` is None.
    """
    if not repo.startswith("."):
        return repo
    if folder is None:
        raise RegistryError(
            f"The folder {repo!r} is relative to its registry file, but this release was not read from a file."
        )
    return str(inside(folder, repo))


RelativePath = Annotated[str, AfterValidator(_relative)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _tuple(value: object) -> object:
    """A list as a tuple, which makes rows hashable."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _ascending(layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if layers is not None and (len(layers) < 2 or list(layers) != sorted(set(layers))):
        raise ValueError(f"{list(layers)} are not at least two layers in ascending order")
    return layers


LayerNumbers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_tuple), AfterValidator(_ascending)
]
Hashes = Annotated[tuple[Sha256, ...] | None, BeforeValidator(_tuple)]
