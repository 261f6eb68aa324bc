"""Repositories that hold the files of a release: a folder on this machine, or a repository on the Hub.

Both have the methods of :class:`Repository`. No weights are downloaded: shapes come from the headers of the files, and
hashes of files on the Hub from its listing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import Progress

from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.files import checked_path, file_sha256, is_folder
from gemma_scope_tl.registry.locate import inside, is_bundled
from gemma_scope_tl.registry.schema import CFG_FILE, WEIGHTS_FILES
from gemma_scope_tl.weights.checks import (
    CONFIG_NAME,
    Expected,
    canonical_names,
    check_shapes,
    check_skip,
    weights_error,
)
from gemma_scope_tl.weights.hub_errors import hub_error, hub_exceptions
from gemma_scope_tl.weights.layer_files import is_layer_file

LISTED_NAMES = frozenset((*WEIGHTS_FILES.values(), CFG_FILE, CONFIG_NAME))
T = TypeVar("T")
R = TypeVar("R")

Shapes = dict[str, tuple[int, ...]]
"""Shapes by canonical array name, as ``weights/checks.py`` lists them."""


def is_listed(name: str) -> bool:
    """Whether files of this name belong to releases."""
    return name in LISTED_NAMES or is_layer_file(name)


@dataclass(frozen=True)
class RepositoryFile:
    """A file of a release.

    Attributes:
        path: path relative to the repository, with ``/`` between the parts.
        size: size in bytes.
        sha256: sha256 of the file; None if the repository does not know it.
    """

    path: str
    size: int
    sha256: str | None = None


class Repository(Protocol):
    """The files of a release.

    Attributes:
        name: name of the repository in messages.
        revision: the commit that is read; None for a folder.
        workers: number of files that may be read at a time.
        files: the weights files and their ``cfg.json`` or ``config.json`` by path.
    """

    name: str
    revision: str | None
    workers: int
    files: Mapping[str, RepositoryFile]

    def shapes(self, path: str) -> Shapes:
        """Shapes of the arrays in a weights file, from the file's headers. Only the names of the arrays are checked."""
        ...

    def cfg(self, folder: str) -> dict[str, Any]:
        """The ``cfg.json`` in a folder."""
        ...

    def config(self, path: str) -> dict[str, Any]:
        """The content of a JSON file."""
        ...

    def sha256(self, path: str) -> str | None:
        """The sha256 of a file; None if only a download could determine it."""
        ...


class LocalRepository:
    """A folder on this machine, without hidden folders. Links that point outside the folder are not followed.

    Raises:
        WeightsError: the path is not a folder.
    """

    revision: str | None = None
    workers = 1

    def __init__(self, root: Path) -> None:
        if not is_folder(root):
            raise WeightsError(f"{root} is not a folder. Check the path; a repository on the Hub is OWNER/NAME.")
        self.root, self.name = root, str(root)
        self.files: Mapping[str, RepositoryFile] = self._list()

    def _list(self) -> dict[str, RepositoryFile]:
        found: dict[str, RepositoryFile] = {}
        for folder, inner, names in os.walk(self.root):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(filter(is_listed, names)):
                path = (Path(folder) / name).relative_to(self.root).as_posix()
                found[path] = RepositoryFile(path, self._at(path).stat().st_size)
        return found

    def shapes(self, path: str) -> Shapes:
        """See :class:`Repository`."""
        return shapes_in(self._at(path), path, str(self._at(path)))

    def cfg(self, folder: str) -> dict[str, Any]:
        """See :class:`Repository`."""
        return self.config(f"{folder}/{CFG_FILE}")

    def config(self, path: str) -> dict[str, Any]:
        """See :class:`Repository`."""
        from gemma_scope_tl.weights.safetensors_file import read_json

        return read_json(self._at(path))

    def sha256(self, path: str) -> str | None:
        """See :class:`Repository`. Reads the whole file."""
        try:
            return file_sha256(self._at(path))
        except OSError as error:
            raise weights_error(self._at(path), f"cannot be read ({error.strerror or error})", "") from error

    def _at(self, path: str) -> Path:
        return inside(self.root, path)


class HubRepository:
    """A model repository on the Hub at one commit. The listing has the sha256 of files in LFS.

    Args:
        repo: ``owner/name``.
        revision: a branch, tag or commit; by default the main branch.

    Raises:
        WeightsError: the repository or revision does not exist, or the Hub cannot be reached.
    """

    workers = 8

    def __init__(self, repo: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api, self.name = HfApi(), repo
        with _hub_errors(repo, revision):
            self.revision = api.repo_info(repo, revision=revision).sha
        with _hub_errors(repo, self.revision):
            entries = list(api.list_repo_tree(repo, recursive=True, revision=self.revision))
        kept = [e for e in entries if isinstance(e, RepoFile) and is_listed(e.path.rpartition("/")[2])]
        self.files: Mapping[str, RepositoryFile] = {
            e.path: RepositoryFile(e.path, e.size, e.lfs.sha256 if e.lfs else None) for e in kept
        }

    def shapes(self, path: str) -> Shapes:
        """See :class:`Repository`. Reads the headers with range requests."""
        from gemma_scope_tl.weights.remote import RemoteFile

        with _hub_errors(self.name, self.revision, path):
            file = RemoteFile(self.name, path, self.revision)
            return shapes_in(file, path, file.source)

    def cfg(self, folder: str) -> dict[str, Any]:
        """See :class:`Repository`."""
        return self.config(f"{folder}/{CFG_FILE}")

    def config(self, path: str) -> dict[str, Any]:
        """See :class:`Repository`. The file goes through the Hub's cache."""
        from huggingface_hub import hf_hub_download

        from gemma_scope_tl.weights.safetensors_file import read_json

        with _hub_errors(self.name, self.revision, path):
            file = hf_hub_download(self.name, path, revision=self.revision)
        return read_json(Path(file))

    def sha256(self, path: str) -> str | None:
        """See :class:`Repository`: the LFS hash in the listing."""
        found = self.files.get(path)
        return found.sha256 if found else None


@contextmanager
def _hub_errors(repo: str, revision: str | None, what: str = "The listing") -> Generator[None]:
    """Raise the errors of the Hub's client as :class:`WeightsError`, in the words of a failed download."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except GemmaScopeError:
        raise
    except (OSError, ValueError, *hub_exceptions()) as error:
        failure = hub_error(error, repo, what, revision)
        if not isinstance(error, HfHubHTTPError):
            text = f"{what} of {repo} cannot be fetched from the Hub ({type(error).__name__})"
            hint = "Check the name, the connection and HF_HUB_OFFLINE, and try again."
            raise WeightsError(f"{text}. {hint}") from failure.__cause__
        raise failure from failure.__cause__


def is_remote(repo: str) -> bool:
    """Whether a registry row's ``repo`` is on the Hub."""
    return not is_bundled(repo) and not repo.startswith("/")


def open_repository(repo: str, revision: str | None = None) -> Repository:
    """Open the repository of a registry row: a bundled model's name, a folder's absolute path, or a name on the Hub.

    Raises:
        GemmaScopeError: the repository does not exist, or the Hub cannot be reached.
    """
    if is_bundled(repo):
        from gemma_scope_tl.weights.fetch import bundled_root

        return LocalRepository(bundled_root(repo))
    return HubRepository(repo, revision) if is_remote(repo) else LocalRepository(Path(repo))


def open_source(source: str, revision: str | None = None) -> Repository:
    """Open the repository that a user names: a folder if it exists, otherwise a repository on the Hub.

    Raises:
        GemmaScopeError: neither exists, or the Hub cannot be reached.
    """
    path = checked_path(source)
    if is_folder(path) or source.startswith(("/", ".", "~")) or source.count("/") != 1:
        return LocalRepository(path)
    return open_repository(source, revision)


def shapes_in(file: Any, path: str, source: str) -> Shapes:
    """Shapes of a weights file by canonical name.

    Args:
        file: path of the file, or an open file with a ``source`` and a ``size``.
        path: a path whose suffix names the format.
        source: name of the file in messages.

    Raises:
        WeightsError: the file is not a weights file, or its arrays are not those of an SAE.
    """
    if path.endswith(".npz"):
        from gemma_scope_tl.weights.npz import inspect_npz

        layouts = inspect_npz(file)
    else:
        from gemma_scope_tl.weights.safetensors_file import inspect_safetensors

        layouts = inspect_safetensors(file)
    names = canonical_names(layouts, source)
    return {names[name]: tuple(layout.shape) for name, layout in layouts.items()}


def sizes_of(shapes: Shapes, source: str, expected: Expected | None = None) -> tuple[int, int, int]:
    """Check that the shapes of arrays fit each other and ``expected``, and return ``d_in, d_sae, d_out``.

    Raises:
        WeightsError: shapes are wrong; the message lists all of them.
    """
    check_skip(shapes, source, expected)
    check_shapes(shapes, source, expected)
    (d_in, d_sae), d_out = shapes["W_enc"], shapes["W_dec"][1]
    return d_in, d_sae, d_out


def ask_each(
    items: Iterable[T], ask: Callable[[T], R], what: str, workers: int, progress: bool
) -> list[R | GemmaScopeError]:
    """Call ``ask`` with every item, in threads, with a progress bar on standard error.

    Returns:
        The results in the order of the items; if ``ask`` raised a :class:`GemmaScopeError`, the error is the result.
    """

    def answer(item: T) -> R | GemmaScopeError:
        try:
            return ask(item)
        except GemmaScopeError as error:
            return error

    several = list(items)
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not (progress and console.is_terminal))
    with bar, ThreadPoolExecutor(workers) as pool:
        return list(bar.track(pool.map(answer, several), total=len(several), description=what))
