"""Where the registry files are: the one place that knows how the package is laid out on disk."""

from __future__ import annotations

import os
from pathlib import Path

from gemma_scope_tl.errors import RegistryError

EXTRA_FOLDERS_VARIABLE = "GEMMA_SCOPE_TL_REGISTRY"
FOLDER_NAME = "pretrained_yaml"
_PACKAGE = Path(__file__).resolve().parents[1]


def builtin_folder(package: Path = _PACKAGE) -> Path:
    """The folder of the release files that come with the package.

    A wheel has it inside the package; a source tree, and so an editable install and an unpacked sdist, beside it.

    Raises:
        RegistryError: when neither exists.
    """
    candidates = (package / FOLDER_NAME, package.parent / FOLDER_NAME)
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = " nor ".join(map(str, candidates))
    raise RegistryError(f"No registry files: neither {tried} exists. Install the package again.")


def extra_folders(variable: str | None = None) -> tuple[Path, ...]:
    """The folders that the environment variable ``GEMMA_SCOPE_TL_REGISTRY`` adds, separated as in ``PATH``.

    Args:
        variable: the variable's value; read from the environment when None.

    Raises:
        RegistryError: when one of them does not exist.
    """
    value = os.environ.get(EXTRA_FOLDERS_VARIABLE, "") if variable is None else variable
    folders = tuple(Path(part).expanduser() for part in value.split(os.pathsep) if part)
    for folder in folders:
        if not folder.is_dir():
            raise RegistryError(f"{EXTRA_FOLDERS_VARIABLE} names {folder}, which is not a folder.")
    return folders


def release_files() -> tuple[Path, ...]:
    """Every registry file: the package's own, then those of the extra folders."""
    return tuple(path for folder in (builtin_folder(), *extra_folders()) for path in sorted(folder.glob("*.yaml")))
