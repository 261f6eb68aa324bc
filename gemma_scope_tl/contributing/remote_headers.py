"""A repository on the Hub, asked for listings and headers: no weights are downloaded."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_scope_tl.contributing.places import KEPT_NAMES, FoundFile, Shapes, shapes_in
from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.registry.schema import CFG_FILE
from gemma_scope_tl.weights.fetch import hub_error, hub_exceptions


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
        """See :class:`~gemma_scope_tl.contributing.places.Place`. Files in LFS come with their sha256."""
        return self._files

    @cached_property
    def _files(self) -> Mapping[str, FoundFile]:
        from huggingface_hub.hf_api import RepoFile

        with _hub_errors(self.name, self.revision):
            entries = list(self._api.list_repo_tree(self.name, recursive=True, revision=self.revision))
        kept = [e for e in entries if isinstance(e, RepoFile) and e.path.rpartition("/")[2] in KEPT_NAMES]
        return {e.path: FoundFile(e.path, e.size, e.lfs.sha256 if e.lfs else None) for e in kept}

    def shapes(self, path: str) -> Shapes:
        """See :class:`~gemma_scope_tl.contributing.places.Place`. Reads the headers by range."""
        from gemma_scope_tl.weights.remote import RemoteFile

        with _hub_errors(self.name, self.revision, path):
            file = RemoteFile(self.name, path, self.revision)
            return shapes_in(file, path, file.source)

    def cfg(self, folder: str) -> dict[str, Any]:
        """See :class:`~gemma_scope_tl.contributing.places.Place`. The file goes through the Hub's cache."""
        from huggingface_hub import hf_hub_download

        from gemma_scope_tl.weights.safetensors_file import read_cfg

        with _hub_errors(self.name, self.revision, f"{folder}/{CFG_FILE}"):
            file = hf_hub_download(self.name, f"{folder}/{CFG_FILE}", revision=self.revision)
        return read_cfg(Path(file).parent)

    def sha256(self, path: str) -> str | None:
        """See :class:`~gemma_scope_tl.contributing.places.Place`: the LFS hash in the listing."""
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
