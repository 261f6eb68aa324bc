"""Locating the weights file of a registry row: bundled in the package, in a local folder, or on the Hub."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.families import bundled_names
from gemma_scope_tl.registry.locate import BUNDLED_SAES, bundle_folder, inside, is_bundled
from gemma_scope_tl.weights.checks import (
    CFG_NAME,
    CODER_NAME,
    CONFIG_NAME,
    PARAMS_NAME,
    WEIGHTS_NAME,
    weights_error,
)
from gemma_scope_tl.weights.hub_errors import download_errors

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

_NAMES = {
    "gemma-scope": (PARAMS_NAME,),
    "sae-lens": (CFG_NAME, WEIGHTS_NAME),
    "gemma_scope_2": (CODER_NAME,),
}


def fetch(row: SAERow, *, force_download: bool = False) -> Path:
    """Return the weights file of a registry row, downloading it if necessary.

    ``row.repo`` is the name of a bundled model (files inside this package), an existing local folder, or a Hub
    repository, which is looked up in the Hub's cache before anything is downloaded. The settings of the Hub's client
    apply: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and its progress bars. If the revision of the
    row is a commit hash, a cached file is used without any request.

    Args:
        row: the registry row.
        force_download: download again even if the file is in the cache. Bundled and local files ignore it.

    Returns:
        Path of ``params.npz``; or of ``sae_weights.safetensors`` with ``cfg.json`` beside it, for rows in SAELens's
        format; or of ``params.safetensors`` with ``config.json`` beside it if the folder has one, for rows in Gemma
        Scope 2's.

    Raises:
        WeightsError: when the file is missing or cannot be downloaded. Its content is checked when it is loaded.
        GemmaScopeError: when the row's path leaves its folder.
    """
    root, names = _files(row)
    files = [_from_hub(row, name, force_download) if root is None else _local(root, name) for name in names]
    if root is None and row.format == "gemma_scope_2":
        _fetch_config(row, files[-1], force_download)
    return files[-1]


def find_local(row: SAERow) -> Path | None:
    """Return the weights file of a registry row if it is on this machine already. No request is sent to the Hub.

    For a branch, this is the file of the last download. The row's sha256 is not checked.

    Returns:
        The path as from :func:`fetch`; None for a file of the Hub that is not in the cache.

    Raises:
        WeightsError: when a bundled or local file is missing.
        GemmaScopeError: when the row's path leaves its folder.
    """
    root, names = _files(row)
    files = [_cached(row, name) if root is None else _local(root, name) for name in names]
    return None if None in files else files[-1]


def fetch_layers(row: SAERow, *, force_download: bool = False) -> list[Path]:
    """Return the files of the layers of a row of several layers, in their order, as :func:`fetch` does for one file.

    All files of the Hub are of one commit, also where a branch moves while they are downloaded.

    Raises:
        WeightsError: when a file is missing, surplus or cannot be downloaded.
        GemmaScopeError: when the row's path leaves its folder.
    """
    root, names = _root(row), list(row.weights_paths)
    if root is not None:
        folder = inside(root, row.path)
        if not folder.is_dir():
            raise weights_error(folder, "does not exist", f"Expected {names[0]} under {root}.")
        from gemma_scope_tl.weights.layer_files import find_layers  # imports torch, which takes seconds

        return [inside(root, f"{row.path}/{path.name}") for path in find_layers(folder, len(names))]
    first = _from_hub(row, names[0], force_download)
    same = row.model_copy(update={"revision": _commit_of(row, first)})
    files = [first, *(_from_hub(same, name, force_download) for name in names[1:])]
    _fetch_config(row, first, force_download)
    return files


def find_local_layers(row: SAERow, places: Iterable[int]) -> dict[int, Path] | None:
    """As :func:`find_local`, for files of a row of several layers.

    Args:
        row: the registry row.
        places: the numbers of the files among the coder's layers.

    Returns:
        The path of each of these files; None unless all of them are on this machine.

    Raises:
        WeightsError: when a bundled or local file is missing.
        GemmaScopeError: when the row's path leaves its folder.
    """
    if _root(row) is not None:
        files = fetch_layers(row)
        return {place: files[place] for place in places}
    found: dict[int, Path] = {}
    for place in places:
        path = _cached(row, row.weights_paths[place])
        if path is None:
            return None
        found[place] = path
    return found


def bundled_root(repo: str = "bundled") -> Path:
    """The folder in this package with the SAEs of a bundled model, whose name is the ``repo`` of its rows.

    Raises:
        UnknownNameError: no bundled model has this name.
    """
    folder = bundle_folder(repo)
    if folder is None:
        raise unknown_name("bundled model", repo, bundled_names())
    return folder / BUNDLED_SAES.name


def _files(row: SAERow) -> tuple[Path | None, list[str]]:
    """The local folder that is the repository of a row (None for the Hub), and the names of its files, weights last."""
    root, weights = _root(row), PurePosixPath(row.weights_path)
    return root, [str(weights.with_name(name)) for name in _NAMES[row.format]]


def _root(row: SAERow) -> Path | None:
    """The local folder that is the repository of a row; None for the Hub."""
    folder = PurePosixPath(row.path)
    if folder.is_absolute() or ".." in folder.parts:
        raise GemmaScopeError(f"Row {row.release}/{row.id} has the path {row.path!r}, which leaves its repository.")
    if is_bundled(row.repo):
        return bundled_root(row.repo)
    # a relative folder could have the name of a repository on the Hub
    return Path(row.repo) if Path(row.repo).is_absolute() else None


def _commit_of(row: SAERow, weights: Path) -> str:
    """The commit of a file in the Hub's cache."""
    return weights.parents[len(PurePosixPath(row.path).parts)].name


def _fetch_config(row: SAERow, weights: Path, force_download: bool) -> None:
    """Download the ``config.json`` of the same commit as the weights, if that commit has one.

    It only confirms what the row says, so weights in the cache are used without it while the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    name = str(PurePosixPath(row.path) / CONFIG_NAME)
    commit = _commit_of(row, weights)
    with download_errors(row.repo, name, commit):
        if not force_download and try_to_load_from_cache(row.repo, name, revision=commit) is not None:
            return  # it is there, or it is known that there is none
        with suppress(EntryNotFoundError):  # also raised if the Hub cannot be reached
            hf_hub_download(repo_id=row.repo, filename=name, revision=commit, force_download=force_download)


def _local(root: Path, name: str) -> Path:
    path = inside(root, name)
    if not path.is_file():
        raise weights_error(path, "does not exist", f"Expected {name} under {root}.")
    return path


def _from_hub(row: SAERow, name: str, force_download: bool) -> Path:
    from huggingface_hub import hf_hub_download

    with download_errors(row.repo, name, row.revision):
        return Path(
            hf_hub_download(repo_id=row.repo, filename=name, revision=row.revision, force_download=force_download)
        )


def _cached(row: SAERow, name: str) -> Path | None:
    """The path of a file of the Hub in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    with download_errors(row.repo, name, row.revision):
        cached = try_to_load_from_cache(row.repo, name, revision=row.revision)
    return Path(cached) if isinstance(cached, str) else None  # a sentinel object means "known not to exist"
