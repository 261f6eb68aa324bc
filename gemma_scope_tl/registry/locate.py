"""The locations of registry files and bundled data. Only this module depends on the folder layout of the package.

The package's own folder comes first. Other files come from folders that the environment variable
``GEMMA_SCOPE_TL_REGISTRY`` names, the user's folder, installed packages (the entry-point group
``gemma_scope_tl.releases``), and ``register_release``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from gemma_scope_tl.errors import RegistryError, unknown_name
from gemma_scope_tl.families import bundled_names
from gemma_scope_tl.files import checked_path, expanded


def inside(root: Path, inner: str) -> Path:
    """Return ``root / inner``, which need not exist, if it is inside ``root``.

    Args:
        root: a folder.
        inner: a relative path with ``/`` between its parts.

    Raises:
        RegistryError: when the path leads out of the folder, by its text or through a symbolic link.
    """
    path = root / inner
    try:
        real, real_root = path.resolve(), root.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a cycle of links, or a NUL
        raise RegistryError(f"{str(path)!r} cannot be resolved: {error}") from None
    if not real.is_relative_to(real_root):
        raise RegistryError(f"{path} leads out of {root}, to {real}. Copy the file into the folder.")
    return path


EXTRA_FOLDERS_VARIABLE = "GEMMA_SCOPE_TL_REGISTRY"
ENTRY_POINT_GROUP = "gemma_scope_tl.releases"
FOLDER_NAME, CONFIGS_NAME = "pretrained_yaml", "configs"
_PACKAGE = Path(__file__).resolve().parents[1]
BUNDLED_DATA = _PACKAGE / "bundled"
MODEL_FOLDER = "model"
"""The name of a bundled model's own folder."""
BUNDLED_MODEL = BUNDLED_DATA / MODEL_FOLDER
BUNDLED_SAES = BUNDLED_DATA / "saes"
HELD_OUT_TEXT = BUNDLED_DATA / "text" / "heldout.jsonl"
_registered: dict[Path, str] = {}  # the names of their releases, in the order of register_release


def bundle_folder(name: str) -> Path | None:
    """The folder with ``model/`` and ``saes/`` of a model that comes with this package; None for any other name.

    The name is also the ``repo`` of the model's registry rows. Its parts between hyphens are folders of the package.
    """
    return _PACKAGE.joinpath(*name.split("-")) if name in bundled_names() else None


def is_bundled(name: str) -> bool:
    """Whether a name of a model, or the ``repo`` of a registry row, means files that come with this package."""
    return bundle_folder(name) is not None


def builtin_folder(package: Path = _PACKAGE, name: str = FOLDER_NAME) -> Path:
    """The folder of the registry files, or of other files (``name``), that come with the package.

    A wheel has this folder inside the package. A source tree (and so an editable install and an unpacked sdist) has it
    next to the package.

    Raises:
        RegistryError: when neither exists.
    """
    candidates = (package / name, package.parent / name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = " nor ".join(map(str, candidates))
    what = "registry files" if name == FOLDER_NAME else name
    raise RegistryError(f"No {what}: neither {tried} exists. Install the package again.")


def configurations() -> dict[str, Path]:
    """The configurations of training runs that come with the package: name to file."""
    return {path.stem: path for path in sorted(builtin_folder(name=CONFIGS_NAME).glob("*.yaml"))}


def configuration_file(given: str | Path) -> Path:
    """The file of a configuration: the given one, or else the one with this name that comes with the package.

    Raises:
        RegistryError: the file does not exist.
        UnknownNameError: there is no file, and no configuration of the name.
    """
    path = Path(given)
    if path.exists() and not (path.is_dir() and len(path.parts) == 1):
        return path
    known = configurations()
    if str(given) in known:
        return known[str(given)]
    if path.is_dir():
        raise RegistryError(f"{path} is a folder: name a file.")
    if path.suffix or len(path.parts) > 1:
        if path.stem in known:
            hint = f"One of this name comes with the package: write {path.stem}."
        else:
            hint = f"The package has the configurations {', '.join(known)}."
        raise RegistryError(f"{path} does not exist. {hint}")
    raise unknown_name("configuration", given, known, "A YAML file works too.")


def extra_folders(variable: str | None = None) -> tuple[Path, ...]:
    """The folders that the environment variable ``GEMMA_SCOPE_TL_REGISTRY`` adds, separated as in ``PATH``.

    Args:
        variable: the variable's value; read from the environment when None.

    Raises:
        RegistryError: when one of them does not exist.
    """
    value = os.environ.get(EXTRA_FOLDERS_VARIABLE, "") if variable is None else variable
    folders = tuple(checked_path(part) for part in value.split(os.pathsep) if part)
    for folder in folders:
        if not folder.is_dir():
            raise RegistryError(f"{EXTRA_FOLDERS_VARIABLE} names {folder}, which is not a folder.")
    return folders


def user_folder() -> Path | None:
    """The user's registry folder, which need not exist; None for a user without a home folder.

    It is ``$XDG_CONFIG_HOME/gemma_scope_tl/registry``, or ``~/.config/gemma_scope_tl/registry`` if that variable is
    unset or holds a relative path, which the XDG specification says to ignore.
    """
    given = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    home = given if given.is_absolute() else expanded("~/.config")
    return home and home / "gemma_scope_tl" / "registry"


def release_files() -> tuple[Path, ...]:
    """All registry files without duplicates, in the order of the sources that the module's docstring lists."""
    folders = (builtin_folder(), *extra_folders(), user_folder())
    found = [path for folder in folders if folder is not None for path in _in_folder(folder)]
    return _distinct([*found, *_of_packages(), *_registered])


def add_file(path: Path, release: str) -> None:
    """Add one file, which has this release, for the lifetime of this process."""
    _registered[path] = release


def remove_file(path: Path) -> None:
    """Undo :func:`add_file`."""
    _registered.pop(path, None)


def is_registered(path: Path) -> bool:
    """Whether a file was added by :func:`add_file`."""
    return path in _registered


def registered_files() -> dict[Path, str]:
    """The files that :func:`add_file` added, each with the name of its release."""
    return dict(_registered)


def forget_packages() -> None:
    """Clear the list of installed packages, so that the next use searches for them again."""
    _of_packages.cache_clear()


def _in_folder(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)
    except OSError:  # the user's folder need not exist
        return []
    return [folder / name for name in sorted(names) if name.endswith(".yaml")]


def _distinct(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Remove duplicates among files that were found in several ways; the first one is kept."""
    kept: dict[str, Path] = {}
    real: dict[Path, str] = {}
    for path in paths:
        folder = path.parent
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        place = os.path.realpath(path) if os.path.islink(path) else os.path.join(real[folder], path.name)
        kept.setdefault(place, path)
    return tuple(kept.values())


@lru_cache(maxsize=1)
def _of_packages() -> tuple[Path, ...]:
    return tuple(path for point in entry_points(group=ENTRY_POINT_GROUP) for path in files_of_entry_point(point))


def files_of_entry_point(point: EntryPoint) -> list[Path]:
    """The registry files that an installed package provides.

    The value ``module`` means the YAML files in the folder of the module, which is not imported itself (its parent
    packages are). The value ``module:attribute`` is imported, and must be a path of a file or a folder, or several.

    Raises:
        RegistryError: when the module, the attribute or one of the files does not exist; names the package.
    """
    try:
        places = _places(point)
        return [file for place in places for file in _files_at(place)]
    except Exception as error:  # the code of the package may raise anything
        package = point.dist.name if point.dist else "an installed package"
        what = f"The package {package} provides registry files as {point.value!r}, which cannot be read"
        hint = "Repair or uninstall it."
        raise RegistryError(f"{what} ({type(error).__name__}: {error}). {hint}") from error


def _places(point: EntryPoint) -> list[Path]:
    if point.attr:
        value: object = import_module(point.module)
        for name in point.attr.split("."):
            value = getattr(value, name)
        several = isinstance(value, Iterable) and not isinstance(value, str)
        given = list(cast("Iterable[object]", value)) if several else [value]
        for place in given:
            if not isinstance(place, (str, Path)):
                raise TypeError(f"a path or several paths are needed, not {place!r}")
        return [Path(cast("str | Path", place)) for place in given]
    spec = find_spec(point.module)
    if spec is None:
        raise ModuleNotFoundError(f"there is no module {point.module!r}")
    return [Path(place) for place in spec.submodule_search_locations or [str(Path(spec.origin or "").parent)]]


def _files_at(place: Path) -> list[Path]:
    found = [] if not place.is_absolute() else [place] if place.is_file() else _in_folder(place)
    if not found:
        raise FileNotFoundError(f"{place} is not an absolute path of a file or of a folder with *.yaml files")
    return found
