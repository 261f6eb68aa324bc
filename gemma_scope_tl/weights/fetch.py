"""From a registry row to a file on this machine: bundled in the package, in a local folder, or on the Hub."""

from __future__ import annotations

import errno
import os
import re
import traceback
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.files import file_sha256
from gemma_scope_tl.registry.locate import BUNDLED_SAES, inside
from gemma_scope_tl.weights.checks import CFG_NAME, PARAMS_NAME, WEIGHTS_NAME, weights_error

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

BUNDLED = "bundled"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")  # a signed address: whoever has it can read the file
_USER = re.compile(r"(?<=://)[^\s/@]+@")  # a user and password in HF_ENDPOINT


def fetch(row: SAERow, *, force_download: bool = False) -> Path:
    """The weights file of a registry row, downloaded if need be.

    ``row.repo`` is ``"bundled"`` (files inside this package), an existing local folder, or a Hub repository, which is
    looked up in the Hub's cache before anything is downloaded. The client's own settings hold: ``HF_ENDPOINT``,
    ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and its progress bars. A row whose revision is a commit hash is loaded
    from the cache without any request.

    Args:
        row: which file.
        force_download: download again although the file is in the cache; says nothing to bundled and local files.

    Returns:
        Path of ``params.npz``, or of ``sae_weights.safetensors`` (with ``cfg.json`` beside it) for rows in SAELens'
        format.

    Raises:
        WeightsError: when the file is missing or cannot be downloaded. Its content is checked when it is loaded.
        GemmaScopeError: when the row's path leaves its folder.
    """
    root, names = _place(row)
    if root is not None:
        path = [_local(root, PurePosixPath(name)) for name in names][-1]
    else:
        path = [_from_hub(row.repo, name, row.revision, force_download) for name in names][-1]
    return path


def find_local(row: SAERow) -> Path | None:
    """The weights file of a registry row where it is on this machine already; nothing is asked of the Hub.

    For a branch, that is what it was when it was last downloaded. The row's sha256 is not checked.

    Returns:
        As :func:`fetch`; None for a file of the Hub that is not in the cache.

    Raises:
        WeightsError: when a bundled or local file is missing.
        GemmaScopeError: when the row's path leaves its folder.
    """
    root, names = _place(row)
    if root is not None:
        return [_local(root, PurePosixPath(name)) for name in names][-1]
    from huggingface_hub import try_to_load_from_cache

    try:
        found = [try_to_load_from_cache(row.repo, name, revision=row.revision) for name in names]
    except ValueError as error:  # not a repository's name
        raise hub_error(error, row.repo, names[-1], row.revision) from error
    paths = [Path(place) for place in found if isinstance(place, str)]  # another object: known not to exist
    return paths[-1] if len(paths) == len(names) else None


def bundled_root() -> Path:
    """The folder in this package that holds the bundled SAEs."""
    return BUNDLED_SAES


def verify_download(path: Path, wanted: str) -> None:
    """Raise :func:`wrong_hash` unless the file's sha256 is ``wanted`` (hexadecimal)."""
    found = file_sha256(path)
    if found != wanted:
        raise wrong_hash(path, found, wanted)


def wrong_hash(path: Path, found: str, wanted: str) -> WeightsError:
    """The error for a file with another sha256 than the registry or the Hub says.

    A file of the Hub's cache is removed from it, so that the next load downloads it again, where otherwise the cache
    would give the bad file for ever. Files outside the cache are left as they are.
    """
    what = f"has sha256 {found}, it should be {wanted}"
    if remove_from_cache(path):
        return weights_error(path, f"{what}. It was removed from the cache", "Load it again to download it again.")
    return weights_error(path, what)


def remove_from_cache(path: Path) -> bool:
    """Delete a file of the Hub's cache, its blob included, so that the next load downloads it again.

    Returns:
        Whether it was one and is gone; any other file is left as it is.
    """
    entries = _cache_entries(path)
    try:
        for entry in entries:
            entry.unlink(missing_ok=True)
    except OSError:  # a cache that only others may write
        return False
    return bool(entries)


def in_hub_cache(path: Path) -> bool:
    """Whether a file is one of the Hub's cache, which holds whole files and never changes them."""
    return bool(_cache_entries(path))


def known_sha256(path: Path) -> str | None:
    """The sha256 that the Hub gave for a cached file, without reading the file.

    The cache names the blob of an LFS file by that hash. None for files outside the cache, for small files (named by
    their git hash) and where the cache could not use symbolic links.
    """
    blob = _blob(path)
    return blob.name if blob is not None and _SHA256.fullmatch(blob.name) else None


def hub_error(error: Exception, repo: str, filename: str, revision: str | None) -> WeightsError:
    """What the Hub's client raised, as one :class:`WeightsError` that says what to do.

    Args:
        error: from ``hf_hub_download``, ``get_hf_file_metadata`` or the session.
        repo, filename, revision: what was asked for.

    Returns:
        The error, to be raised ``from`` its own ``__cause__``: the client's error, or None where that would show a
        token or a signed address.
    """
    raised = WeightsError(without_secrets(_explain(_root(error), repo, filename, revision)))
    raised.__cause__ = None if shows_secrets(error) else error
    return raised


def download_command(repo: str, filename: str, revision: str | None) -> str:
    """The shell command that puts a file into the Hub's cache."""
    return f"hf download {repo} {filename}" + (f" --revision {revision}" if revision else "")


def _place(row: SAERow) -> tuple[Path | None, list[str]]:
    """The local folder that is the row's repository, or None for the Hub; and its files, the weights last."""
    inner = PurePosixPath(row.path)
    if inner.is_absolute() or ".." in inner.parts:
        raise GemmaScopeError(f"Row {row.release}/{row.id} has the path {row.path!r}, which leaves its repository.")
    names = (PARAMS_NAME,) if row.format == "gemma-scope" else (CFG_NAME, WEIGHTS_NAME)
    local = row.repo == BUNDLED or Path(row.repo).is_absolute()  # a folder called like a repository is not one
    root = (bundled_root() if row.repo == BUNDLED else Path(row.repo)) if local else None
    return root, [str(inner / name) for name in names]


def _blob(path: Path) -> Path | None:
    """The blob that a link in the Hub's cache points to. Only one step: a blob may itself be a link."""
    if not path.is_symlink():
        return None
    target = Path(os.path.normpath(path.parent / os.readlink(path)))
    return target if target.parent.name == "blobs" else None


def _cache_entries(path: Path) -> list[Path]:
    """What to delete so that the Hub's cache no longer has a file: the snapshot's link, and the blob."""
    if (blob := _blob(path)) is not None:
        return [path, blob]
    for parent in path.absolute().parents:
        if parent.name == "snapshots" and parent.parent.name.startswith(("models--", "datasets--")):
            return [path]  # a cache on a disk without symbolic links
    return []


def _local(root: Path, inner: PurePosixPath) -> Path:
    path = inside(root, str(inner))
    if not path.is_file():
        raise weights_error(path, "does not exist", f"Expected {inner} under {root}.")
    return path


def _from_hub(repo: str, filename: str, revision: str | None, force_download: bool) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(repo_id=repo, filename=filename, revision=revision, force_download=force_download)
    except (OSError, ValueError, *hub_exceptions()) as error:
        failure = hub_error(error, repo, filename, revision)
        raise failure from failure.__cause__
    return Path(found)


def hub_exceptions() -> tuple[type[Exception], ...]:
    """What the Hub's client raises: its own errors, and those of the HTTP library under it.

    That library differs between versions of huggingface_hub (httpx, httpx2); the client's own error inherits from the
    base class of the library's.
    """
    from huggingface_hub import errors

    bases = [base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (errors.EntryNotFoundError, errors.HFValidationError, errors.OfflineModeIsEnabled, *bases)


def _root(error: Exception) -> Exception:
    """The client wraps what happened when a file is neither reachable nor cached, or was to be forced."""
    from huggingface_hub import errors

    wrapped = isinstance(error, (errors.LocalEntryNotFoundError, ValueError))
    return error.__cause__ if wrapped and isinstance(error.__cause__, Exception) else error


def _explain(error: Exception, repo: str, filename: str, revision: str | None) -> str:
    from huggingface_hub import errors

    what, page = f"{filename} of {repo}", f"{_endpoint()}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated. Accept its terms at {page}, then run `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "Check the name; a private repository needs `hf auth login`, a local folder a path that exists."
        return f"{repo} is neither a local folder nor a repository on the Hub. {hint}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}. See which commits it has: {page}/commits/main"
    if isinstance(error, errors.HfHubHTTPError) and not isinstance(error, errors.EntryNotFoundError):
        return _explain_status(error, what, page)
    command = download_command(repo, filename, revision)
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        hint = f"On a machine with a connection run `{command}`, then copy its cache (HF_HOME) here."
        why = " (HF_HUB_OFFLINE is set)" if isinstance(error, errors.OfflineModeIsEnabled) else ""
        return f"{what} is not in the local cache and the Hub cannot be reached{why}. {hint}"
    if isinstance(error, errors.EntryNotFoundError):
        hint = f"See what is there: {page}/tree/{revision or 'main'}"
        return f"{what} does not exist (it may have been renamed or deleted). {hint}"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is neither an existing folder nor a repository name: {error}"
    return _explain_local(error, what, command)


def _explain_status(error: Exception, what: str, page: str) -> str:
    """Errors that only their HTTP status tells apart."""
    response = getattr(error, "response", None)
    status = int(getattr(response, "status_code", 0))
    if status == 401:
        return f"{what} was refused: the Hub does not accept your token. Run `hf auth login`, or correct HF_TOKEN."
    if status == 403:
        hint = f"Ask for access at {page}, or use a token that may read it (`hf auth login`)."
        return f"{what} was refused (HTTP 403). {hint}"
    if status == 429:
        after = str(getattr(response, "headers", {}).get("retry-after", ""))
        wait = f"Wait {after} seconds" if after.isdigit() else "Wait some minutes"
        return (
            f"{what} was refused: too many requests (HTTP 429). {wait}, or log in for a higher limit (`hf auth login`)."
        )
    if status >= 500:
        return f"{what} could not be downloaded: the Hub has a problem of its own (HTTP {status}). Try again later."
    return f"{what} could not be downloaded: the Hub answered with HTTP {status}. Try again, or see {page}."


def _explain_local(error: Exception, what: str, command: str) -> str:
    """Errors of the connection and of this machine."""
    from huggingface_hub import constants, errors

    again = f"Try again, or run `{command}`."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f"no space left on the disk of {constants.HF_HUB_CACHE}"
        return f"{what} could not be downloaded: {where}. Free some, or set HF_HOME to another disk."
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return f"{what} could not be downloaded: the answer has another length than the Hub says the file has. {again}"
    if isinstance(error, errors.FileMetadataError):
        hint = "Check HF_ENDPOINT and your proxy."
        return f"{what} could not be downloaded: {_endpoint()} does not answer as a Hub does. {hint}"
    if isinstance(error, hub_exceptions()):
        why = f"the connection to {_endpoint()} failed or was lost ({type(error).__name__})"
        return f"{what} could not be downloaded: {why}. Check the connection. {again}"
    return f"{what} could not be downloaded ({error}). {again}"


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def without_secrets(text: str) -> str:
    """``text`` without the user's token, signatures of addresses and passwords in them."""
    from huggingface_hub import get_token

    token = get_token()
    return _USER.sub("", _QUERY.sub(r"\1", text.replace(token, "[token]") if token else text))


def shows_secrets(error: Exception) -> bool:
    """Whether an error, or one behind it, says something that :func:`without_secrets` takes out."""
    shown = "".join(traceback.format_exception_only(type(error), error))
    for linked in (error.__cause__, error.__context__):
        if isinstance(linked, Exception) and shows_secrets(linked):
            return True
    return without_secrets(shown) != shown
