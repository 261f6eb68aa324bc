"""``upload_suite``: uploads a release in one commit, and writes a registry file that names this commit."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import checked_path, write_atomically
from gemma_scope_tl.registry.render import render_release
from gemma_scope_tl.registry.schema import ReleaseFile, read_release
from gemma_scope_tl.release.contents import Part, ReleaseContents, check_contents, read_contents
from gemma_scope_tl.weights.hub_errors import upload_errors

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

MAIN = "main"
_AT_A_TIME = 32  # the Hub signs upload addresses for a limited time
State = Literal["new", "changed", "there"]


@dataclass(frozen=True)
class UploadFile:
    """A file of an upload: its path in the repository, size in bytes, sha256, and whether the branch has it."""

    path: str
    size: int
    sha256: str
    state: State


@dataclass(frozen=True)
class Upload:
    """An upload that was made, or that a dry run describes.

    Attributes:
        repo, branch: the target.
        private: whether the repository is private, or will be.
        exists: whether the repository existed before.
        files: of the release.
        left_out: files of the folder that are not part of the release and are not sent.
        revision: the commit that holds the release; None for a dry run.
        registry_file: the registry file that names this commit; None for a dry run.
    """

    repo: str
    branch: str
    private: bool
    exists: bool
    files: tuple[UploadFile, ...]
    left_out: tuple[str, ...]
    revision: str | None = None
    registry_file: Path | None = None

    @property
    def bytes_to_send(self) -> int:
        """Bytes of the files that the branch does not have. Those that the Hub holds already are not sent."""
        return sum(file.size for file in self.files if file.state != "there")


def upload_suite(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    branch: str = MAIN,
    commit_message: str | None = None,
    registry_out: str | os.PathLike[str] | None = None,
    logs: bool = False,
    workers: int = 4,
    progress: bool = True,
) -> Upload:
    """Publish the folder of :func:`export_suite`: check everything, send it, and commit it at once.

    Large files are sent first, and only those that the Hub does not hold, so that an interrupted upload is continued.
    Then one commit makes the whole release visible; without changes there is none. The token is that of ``HF_TOKEN`` or
    ``hf auth login``. Files of the repository that the release lacks stay in it.

    A registry file inside the repository cannot name its own commit. So a copy is written to this machine that names
    the repository and, in each row, the commit: it is the file to register and to contribute.

    Args:
        folder: of one release; with several repositories (``repos="site"``) the folder of one of them.
        repo_id: ``owner/name`` on the Hub; created where it does not exist.
        private: make a new repository private, and refuse an existing public one. A private one stays private.
        dry_run: check everything, look at the repository, and send nothing.
        branch: created from main where it does not exist.
        commit_message: by default it names the release.
        registry_out: the registry file, or its folder; by default it is written beside ``folder``.
        logs: also publish ``metrics.jsonl`` and other logs.
        workers: files sent at a time.
        progress: show bars on standard error.

    Returns:
        What was uploaded, with the commit and the registry file.

    Raises:
        GemmaScopeError: when the folder holds no release, a file fails a check, or the Hub refuses.
    """
    from huggingface_hub import HfApi

    contents = read_contents(folder, logs)
    _check_repo_id(repo_id)
    target = _registry_target(contents, repo_id, registry_out)
    sums = check_contents(contents, progress)
    api = HfApi(library_name="gemma-scope-tl")
    with upload_errors(repo_id, branch, "be looked up"):
        there = _look(api, repo_id, branch)
    upload = _plan(contents, sums, repo_id, branch, private, there)
    if dry_run:
        return upload
    message = commit_message or f"Add {contents.release.release}"
    with upload_errors(repo_id, branch), _bars(progress):
        revision = _publish(api, upload, contents.folder, there, message, workers)
    write_registry(target, render_pinned(contents.release, repo_id, revision, sums), revision)
    return replace(upload, revision=revision, registry_file=target)


def _plan(
    contents: ReleaseContents, sums: Mapping[str, str], repo_id: str, branch: str, private: bool, there: _Remote | None
) -> Upload:
    """Describe the upload, and refuse to send to a public repository what was meant to be private."""
    if there is not None and private and not there.private:
        raise GemmaScopeError(f"{repo_id} is public already: give private=False (--public) to publish the suite there.")
    files = tuple(_compare(contents.folder, part, sums[part.path], there) for part in contents.parts)
    hidden = private if there is None else there.private
    return Upload(repo_id, branch, hidden, there is not None, files, contents.left_out)


def _publish(api: HfApi, upload: Upload, folder: Path, there: _Remote | None, message: str, workers: int) -> str:
    """Create the repository and the branch, send, commit, and verify that everything arrived. Returns the commit."""
    from huggingface_hub import CommitOperationAdd

    api.whoami()
    if there is None:
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
    if upload.branch != MAIN and (there is None or not there.has_branch):
        api.create_branch(upload.repo, branch=upload.branch, exist_ok=True)
    additions = [CommitOperationAdd(file.path, str(folder / file.path)) for file in upload.files]
    for addition, file in zip(additions, upload.files, strict=True):
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # so the Hub refuses a file that was changed since
    parent = _look(api, upload.repo, upload.branch)
    _send(api, upload.repo, upload.branch, additions, workers)
    revision = _commit(api, upload, additions, message, parent, folder)
    _verify(api, upload, revision, folder)
    return revision


@contextmanager
def _bars(progress: bool) -> Generator[None]:
    """Disable the progress bars of the Hub's client unless they are wanted."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if progress or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def write_registry(target: Path, text: str, revision: str) -> None:
    """Write the registry file of a finished upload.

    Raises:
        GemmaScopeError: when it cannot be written. The upload itself is complete.
    """
    try:
        write_atomically(target, text)
    except OSError as error:
        why = f"The suite is uploaded as commit {revision}, but {target} could not be written ({error.strerror})"
        raise GemmaScopeError(f"{why}. Free some space or give another registry_out, and run it again.") from error


def render_pinned(release: ReleaseFile, repo_id: str, revision: str, sums: Mapping[str, str]) -> str:
    """The release's registry file for a commit: every row names the repository, the commit and its file's sha256.

    Args:
        release: with ``repo: .``.
        repo_id, revision: repository and commit.
        sums: sha256 of the weights files by path, for rows that have none.
    """
    entries = [
        entry.model_copy(update={"revision": revision, "sha256": entry.sha256 or sums[row.weights_path]})
        for entry, row in zip(release.saes, release.rows, strict=True)
    ]
    return render_release(release.model_copy(update={"repo": repo_id, "saes": entries}))


@dataclass(frozen=True)
class _Remote:
    """The commit of a branch, or of main where it does not exist, and the sha256 (LFS) or git hash of its files."""

    private: bool
    commit: str
    has_branch: bool
    hashes: Mapping[str, str]


def _look(api: HfApi, repo_id: str, revision: str) -> _Remote | None:
    """The state of a branch or commit; None where there is no repository, or none that the token may read."""
    from huggingface_hub import errors

    try:
        found, info = True, api.model_info(repo_id, revision=revision, files_metadata=True)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        return None
    except errors.RevisionNotFoundError:
        found, info = False, api.model_info(repo_id, files_metadata=True)
    hashes = {file.rfilename: str(file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings or ()}
    return _Remote(bool(info.private), str(info.sha), found, hashes)


def _compare(folder: Path, part: Part, sha256: str, there: _Remote | None) -> UploadFile:
    known = there.hashes.get(part.path) if there else None
    state: State = "new" if known is None else "there" if _is(folder / part.path, sha256, known) else "changed"
    return UploadFile(part.path, part.size, sha256, state)


def _is(path: Path, sha256: str, known: str) -> bool:
    """Whether a file has the hash in the Hub's listing: a sha256 for files in LFS, else git's hash."""
    if len(known) == len(sha256):
        return known == sha256
    data = path.read_bytes()
    return known == sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _send(api: HfApi, repo_id: str, branch: str, additions: Sequence[CommitOperationAdd], workers: int) -> None:
    """Send the large files that the Hub does not hold; the commit itself contains the small ones."""
    for start in range(0, len(additions), _AT_A_TIME):
        some = additions[start : start + _AT_A_TIME]
        api.preupload_lfs_files(repo_id, some, revision=branch, num_threads=workers, free_memory=False)


def _commit(
    api: HfApi,
    upload: Upload,
    additions: Sequence[CommitOperationAdd],
    message: str,
    parent: _Remote | None,
    folder: Path,
) -> str:
    """Commit, and return the commit. One that was made although its answer was lost is not made again."""
    before = parent.commit if parent else None
    try:
        return api.create_commit(
            upload.repo, additions, commit_message=message, revision=upload.branch, parent_commit=before
        ).oid
    except Exception:  # the client raises many kinds; raised again unless the commit exists
        after = _after(api, upload)
        if after is None or after.commit == before or _lacking(upload, after, folder):
            raise
        return after.commit


def _after(api: HfApi, upload: Upload) -> _Remote | None:
    try:
        return _look(api, upload.repo, upload.branch)
    except Exception:  # the error of the commit says more
        return None


def _lacking(upload: Upload, there: _Remote, folder: Path) -> list[str]:
    """The files of the release that a commit lacks, or has with other content."""
    hashes = there.hashes
    return [
        file.path
        for file in upload.files
        if file.path not in hashes or not _is(folder / file.path, file.sha256, hashes[file.path])
    ]


def _verify(api: HfApi, upload: Upload, revision: str, folder: Path) -> None:
    there = _look(api, upload.repo, revision)
    lacking = _lacking(upload, there, folder) if there else [file.path for file in upload.files]
    if lacking:
        text = f"Commit {revision} of {upload.repo} lacks {lacking[0]} ({len(lacking)} of {len(upload.files)} files)."
        raise GemmaScopeError(f"{text} A .gitignore in the repository may leave it out: remove it, then run it again.")


def _check_repo_id(repo_id: Any) -> None:
    from huggingface_hub.utils import validate_repo_id

    with upload_errors(str(repo_id), MAIN):
        validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise GemmaScopeError(f"{repo_id!r} is not the name of a repository: give OWNER/NAME.")


def _registry_target(contents: ReleaseContents, repo_id: str, out: str | os.PathLike[str] | None) -> Path:
    """The path of the registry file. An existing file is replaced only if it is of the same release and repository."""
    name = f"{contents.release.release}.yaml"
    place = checked_path(out) if out is not None else contents.folder.resolve().parent
    target = place if place.suffix == ".yaml" else place / name
    if target.name != name:
        raise GemmaScopeError(f"A registry file is named like its release: {name}, not {target.name}.")
    if target.resolve().is_relative_to(contents.folder.resolve()):
        raise GemmaScopeError(f"{target} is inside the folder to be uploaded: give another registry_out.")
    place = next(parent for parent in target.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise GemmaScopeError(f"{target} cannot be written: {place} takes no files. Give another registry_out.")
    if target.exists() and read_release(target).repo != repo_id:
        raise GemmaScopeError(f"{target} is about another repository: give another registry_out.")
    return target
