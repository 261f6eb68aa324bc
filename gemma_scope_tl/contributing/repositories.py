"""A repository on the Hub, asked for listings and headers: no weights are downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import Progress

from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.files import checked_path, file_sha256, is_folder
from gemma_scope_tl.registry.locate import inside
from gemma_scope_tl.registry.schema import CFG_FILE, WEIGHTS_FILES
from gemma_scope_tl.weights.checks import Expected, canonical_names, check_shapes, weights_error
from gemma_scope_tl.weights.hub_errors import hub_error, hub_exceptions


class HubRepo:
    """A model repository at one commit.

    Args:
        repo: ``owner/name``.
        revision: a branch, tag or commit; the main branch without it.

    Raises:
        WeightsError: when the repository or revision does not exist, or the Hub cannot be asked.
    """

    workers = 8

    def __init__(self, repo: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi

        self.name, self._api = repo, HfApi()
        with _hub_errors(repo, revision):
            self.revision = self._api.repo_info(repo, revision=revision).sha

    def files(self) -> Mapping[str, FoundFile]:
        """See :class:`~gemma_scope_tl.contributing.repositories.Place`. Files in LFS come with their sha256."""
        return self._files

    @cached_property
    def _files(self) -> Mapping[str, FoundFile]:
        from huggingface_hub.hf_api import RepoFile

        with _hub_errors(self.name, self.revision):
            entries = list(self._api.list_repo_tree(self.name, recursive=True, revision=self.revision))
        kept = [e for e in entries if isinstance(e, RepoFile) and e.path.rpartition("/")[2] in KEPT_NAMES]
        return {e.path: FoundFile(e.path, e.size, e.lfs.sha256 if e.lfs else None) for e in kept}

    def shapes(self, path: str) -> Shapes:
        """See :class:`~gemma_scope_tl.contributing.repositories.Place`. Reads the headers by range."""
        from gemma_scope_tl.weights.remote import RemoteFile

        with _hub_errors(self.name, self.revision, path):
            file = RemoteFile(self.name, path, self.revision)
            return shapes_in(file, path, file.source)

    def cfg(self, folder: str) -> dict[str, Any]:
        """See :class:`~gemma_scope_tl.contributing.repositories.Place`. The file goes through the Hub's cache."""
        from huggingface_hub import hf_hub_download

        from gemma_scope_tl.weights.safetensors_file import read_cfg

        with _hub_errors(self.name, self.revision, f"{folder}/{CFG_FILE}"):
            file = hf_hub_download(self.name, f"{folder}/{CFG_FILE}", revision=self.revision)
        return read_cfg(Path(file).parent)

    def sha256(self, path: str) -> str | None:
        """See :class:`~gemma_scope_tl.contributing.repositories.Place`: the LFS hash in the listing."""
        found = self.files().get(path)
        return found.sha256 if found else None


@contextmanager
def _hub_errors(repo: str, revision: str | None, what: str = "The listing") -> Generator[None]:
    """What the Hub's client raises as one :class:`WeightsError`, where the Hub answered worded as for downloads."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except GemmaScopeError:
        raise
    except (OSError, ValueError, *hub_exceptions()) as error:
        failure = hub_error(error, repo, what, revision)
        if not isinstance(error, HfHubHTTPError):
            text = f"{what} of {repo} cannot be had from the Hub ({type(error).__name__})"
            hint = "Check the name, the connection and HF_HUB_OFFLINE, and try again."
            raise WeightsError(f"{text}. {hint}") from failure.__cause__
        raise failure from failure.__cause__


KEPT_NAMES = frozenset((*WEIGHTS_FILES.values(), CFG_FILE))
BUNDLED = "bundled"
T = TypeVar("T")
R = TypeVar("R")

Shapes = dict[str, tuple[int, ...]]
"""Shapes by canonical array name, as ``weights/checks.py`` lists them."""


@dataclass(frozen=True)
class FoundFile:
    """A file of a release: its path with ``/`` between the parts, its bytes, its sha256 where the place knows it."""

    path: str
    size: int
    sha256: str | None = None


class Place(Protocol):
    """What the files of a release can be asked.

    Attributes:
        name: what messages call it.
        revision: the commit that the answers are about; None where there are no commits.
        workers: how many files may be asked about at a time.
    """

    name: str
    revision: str | None
    workers: int

    def files(self) -> Mapping[str, FoundFile]:
        """The weights files and ``cfg.json`` files by path."""
        ...

    def shapes(self, path: str) -> Shapes:
        """Shapes of the arrays in a weights file, from its headers only, unchecked but for their names."""
        ...

    def cfg(self, folder: str) -> dict[str, Any]:
        """The ``cfg.json`` in a folder."""
        ...

    def sha256(self, path: str) -> str | None:
        """The hash of a file, None where the place cannot tell it without a download."""
        ...


class LocalFolder:
    """A folder on this machine; nothing outside it is read, through symbolic links neither."""

    revision: str | None = None
    workers = 1

    def __init__(self, root: Path) -> None:
        if not is_folder(root):
            raise WeightsError(f"{root} is not a folder. Check the path; a repository on the Hub is OWNER/NAME.")
        self.root, self.name = root, str(root)

    def files(self) -> Mapping[str, FoundFile]:
        """See :class:`Place`. Hidden folders are left out."""
        return self._files

    @cached_property
    def _files(self) -> Mapping[str, FoundFile]:
        found: dict[str, FoundFile] = {}
        for folder, inner, names in os.walk(self.root):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(KEPT_NAMES.intersection(names)):
                path = (Path(folder) / name).relative_to(self.root).as_posix()
                found[path] = FoundFile(path, self._at(path).stat().st_size)
        return found

    def shapes(self, path: str) -> Shapes:
        """See :class:`Place`."""
        return shapes_in(self._at(path), path, str(self._at(path)))

    def cfg(self, folder: str) -> dict[str, Any]:
        """See :class:`Place`."""
        from gemma_scope_tl.weights.safetensors_file import read_cfg

        return read_cfg(self._at(f"{folder}/{CFG_FILE}").parent)

    def sha256(self, path: str) -> str | None:
        """See :class:`Place`. Reads the whole file."""
        try:
            return file_sha256(self._at(path))
        except OSError as error:
            raise weights_error(self._at(path), f"cannot be read ({error.strerror or error})", "") from error

    def _at(self, path: str) -> Path:
        return inside(self.root, path)


def open_place(source: str, revision: str | None = None) -> Place:
    """The place that a user names: a folder that exists, or a repository on the Hub.

    Raises:
        GemmaScopeError: when it is neither, or the Hub cannot be asked.
    """
    path = checked_path(source)
    if is_folder(path) or source.startswith(("/", ".", "~")) or source.count("/") != 1:
        return LocalFolder(path)
    return place_of(source, revision)


def is_remote(repo: str) -> bool:
    """Whether a registry row's ``repo`` is on the Hub."""
    return repo != BUNDLED and not repo.startswith("/")


def place_of(repo: str, revision: str | None = None) -> Place:
    """The place that a registry row's ``repo`` names: ``bundled``, a folder's absolute path, or a Hub repository.

    Raises:
        GemmaScopeError: when it does not exist, or the Hub cannot be asked.
    """
    if repo == BUNDLED:
        from gemma_scope_tl.weights.fetch import bundled_root

        return LocalFolder(bundled_root())
    if repo.startswith("/"):
        return LocalFolder(Path(repo))
    from gemma_scope_tl.contributing.repositories import HubRepo

    return HubRepo(repo, revision)


def shapes_in(file: Any, path: str, source: str) -> Shapes:
    """Shapes of a weights file by canonical name.

    Args:
        file: its path, or an open file with a ``source`` and a ``size``.
        path: by whose suffix the format is known.
        source: the file's name, for messages.

    Raises:
        WeightsError: when it is not a weights file, or its arrays are not those of an SAE.
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
    """``d_in, d_sae, d_out`` of arrays whose shapes fit together, and fit ``expected``.

    Raises:
        WeightsError: naming every array whose shape is wrong.
    """
    check_shapes(shapes, source, expected)
    (d_in, d_sae), d_out = shapes["W_enc"], shapes["W_dec"][1]
    return d_in, d_sae, d_out


def each(
    items: Iterable[T], ask: Callable[[T], R], what: str, workers: int, progress: bool
) -> list[R | GemmaScopeError]:
    """``ask`` of every item, in their order, with a bar on standard error; an error stands in place of its answer."""

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
