"""Conversion of the errors of the Hub's client to errors of this package.

The messages say what to do, and contain neither tokens nor signed URLs.
"""

from __future__ import annotations

import errno
import logging
import re
import traceback
from collections.abc import Generator
from contextlib import contextmanager

from gemma_scope_tl.errors import GemmaScopeError, WeightsError

PASSING = (408, 429, 500, 502, 503, 504)
"""HTTP statuses of temporary failures, after which a request is repeated."""
_QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")  # a signed URL, with which anyone can read the file
_USER = re.compile(r"(?<=://)[^\s/@]+@")  # a user and password in HF_ENDPOINT
_RUN_AGAIN = "Then run it again: files that the Hub has already are not sent twice."


@contextmanager
def download_errors(repo: str, filename: str, revision: str | None) -> Generator[None]:
    """Convert exceptions of the Hub's client to the :class:`WeightsError` of :func:`hub_error`."""
    try:
        yield
    except GemmaScopeError:
        raise
    except (OSError, ValueError, *hub_exceptions()) as error:
        failure = hub_error(error, repo, filename, revision)
        raise failure from failure.__cause__


@contextmanager
def upload_errors(repo: str, branch: str, doing: str = "be uploaded") -> Generator[None]:
    """Convert exceptions of the Hub's client to a :class:`GemmaScopeError`, and remove secrets from its log messages.

    Args:
        repo, branch: the repository and branch that the requests concern.
        doing: the verb of the message, after "could not": ``be uploaded`` or ``be looked up``.
    """
    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(_log_without_secrets)
    try:
        yield
    except GemmaScopeError:
        raise
    except (OSError, ValueError, RuntimeError, *hub_exceptions()) as error:
        text = _explain_upload(_upload_cause(error), repo, branch, doing)
        raise GemmaScopeError(without_secrets(text)) from None if shows_secrets(error) else error
    finally:
        logger.removeFilter(_log_without_secrets)


def hub_error(error: Exception, repo: str, filename: str, revision: str | None) -> WeightsError:
    """Convert an exception of the Hub's client about a file to a :class:`WeightsError` that says what to do.

    Args:
        error: an exception from ``hf_hub_download``, ``get_hf_file_metadata`` or the HTTP session.
        repo, filename, revision: the file that was requested.

    Returns:
        The error, to be raised ``from`` its own ``__cause__``, which is the client's error, or None if that error
        would show a token or a signed URL.
    """
    raised = WeightsError(without_secrets(_explain_download(_download_cause(error), repo, filename, revision)))
    raised.__cause__ = None if shows_secrets(error) else error
    return raised


def hub_exceptions() -> tuple[type[Exception], ...]:
    """The classes that the Hub's client raises: its own errors, and those of its HTTP library.

    That library depends on the version of huggingface_hub (httpx, httpx2). The client's own error inherits from the
    base class of the library's errors.
    """
    from huggingface_hub import errors

    bases = [base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (errors.EntryNotFoundError, errors.HFValidationError, errors.OfflineModeIsEnabled, *bases)


def download_command(repo: str, filename: str, revision: str | None) -> str:
    """The shell command that downloads a file into the Hub's cache."""
    return f"hf download {repo} {filename}" + (f" --revision {revision}" if revision else "")


def without_secrets(text: str) -> str:
    """``text`` without the user's token, signatures of URLs, and passwords in URLs."""
    from huggingface_hub import get_token

    token = get_token()
    return _USER.sub("", _QUERY.sub(r"\1", text.replace(token, "[token]") if token else text))


def shows_secrets(error: Exception) -> bool:
    """Whether the message of an error, or of one of its causes, contains something that must not be shown."""
    shown = "".join(traceback.format_exception_only(type(error), error))
    linked = [one for one in (error.__cause__, error.__context__) if isinstance(one, Exception)]
    return without_secrets(shown) != shown or any(shows_secrets(one) for one in linked)


def _log_without_secrets(record: logging.LogRecord) -> bool:
    """A log filter: the client logs the URL of a request that it repeats, which is signed for uploads."""
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


def _download_cause(error: Exception) -> Exception:
    """The cause of the client's general error for a file that is neither reachable nor cached."""
    from huggingface_hub import errors

    general = isinstance(error, (errors.LocalEntryNotFoundError, ValueError))
    return error.__cause__ if general and isinstance(error.__cause__, Exception) else error


def _upload_cause(error: BaseException) -> BaseException:
    """The cause of the client's general errors for one of several files and for a model card that the Hub refuses."""
    from huggingface_hub import errors

    while isinstance(error.__cause__, Exception) and type(error) in (RuntimeError, errors.LocalEntryNotFoundError):
        error = error.__cause__
    return error


def _explain_download(error: Exception, repo: str, filename: str, revision: str | None) -> str:
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
        return _explain_download_status(error, what, page)
    command = download_command(repo, filename, revision)
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        hint = f"On a machine with a connection run `{command}`, then copy its cache (HF_HOME) here."
        why = " (HF_HUB_OFFLINE is set)" if isinstance(error, errors.OfflineModeIsEnabled) else ""
        return f"{what} is not in the local cache and the Hub cannot be reached{why}. {hint}"
    if isinstance(error, errors.EntryNotFoundError):
        hint = f"See the list of files: {page}/tree/{revision or 'main'}"
        return f"{what} does not exist (it may have been renamed or deleted). {hint}"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is neither an existing folder nor a repository name: {error}"
    return f"{what} could not be downloaded: {_explain_local(error, command)}"


def _explain_download_status(error: Exception, what: str, page: str) -> str:
    """Explain the HTTP status of a download for which the client has no class of its own."""
    status, wait = _status(error)
    if status == 401:
        return f"{what} was refused: the Hub does not accept your token. Run `hf auth login`, or correct HF_TOKEN."
    if status == 403:
        hint = f"Ask for access at {page}, or use a token that may read it (`hf auth login`)."
        return f"{what} was refused (HTTP 403). {hint}"
    if status == 429:
        hint = f"{wait}, or log in for a higher limit (`hf auth login`)."
        return f"{what} was refused: too many requests (HTTP 429). {hint}"
    if status >= 500:
        return f"{what} could not be downloaded: the Hub has an internal error (HTTP {status}). Try again later."
    return f"{what} could not be downloaded: the Hub answered with HTTP {status}. Try again, or see {page}."


def _explain_local(error: Exception, command: str) -> str:
    """Explain errors of the connection and of this machine."""
    from huggingface_hub import constants, errors

    again = f"Try again, or run `{command}`."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f"no space left on the disk of {constants.HF_HUB_CACHE}"
        return f"{where}. Free some, or set HF_HOME to another disk."
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return f"the length of the response differs from the file size on the Hub. {again}"
    if isinstance(error, errors.FileMetadataError):
        return f"{_endpoint()} does not respond like a Hub server. Check HF_ENDPOINT and your proxy."
    if isinstance(error, hub_exceptions()):
        why = f"the connection to {_endpoint()} failed or was lost ({type(error).__name__})"
        return f"{why}. Check the connection. {again}"
    return f"{error}. {again}"


def _explain_upload(error: BaseException, repo: str, branch: str, doing: str) -> str:
    """One sentence on the problem and one on the remedy."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"{repo} could not {doing}: there is no token. Run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not the name of a repository: {error}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} could not {doing}: HF_HUB_OFFLINE is set. Unset it on a machine with a connection."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no branch {branch!r}, and it could not be created. Check its name. {_RUN_AGAIN}"
    if isinstance(error, errors.HfHubHTTPError):
        status, text = _explain_upload_status(error, repo, branch)
        return f"{repo} could not {doing} (HTTP {status}): {text}. {_RUN_AGAIN}"
    if isinstance(error, OSError) and type(error).__name__ == "XetAuthenticationError":
        why = "the Hub's storage does not accept your token. Run `hf auth login`"
    elif isinstance(error, (*hub_exceptions(), ConnectionError, TimeoutError)):
        hint = "Check it (where only Xet is blocked, set HF_HUB_DISABLE_XET=1)"
        why = f"the connection failed or was lost ({type(error).__name__}). {hint}"
    elif isinstance(error, OSError):
        what = f"{error.filename or 'a file'} ({error.strerror or error})"
        why = f"this machine could not read or write {what}. Check its disk"
    else:
        return f"{repo} could not {doing}: {error}"
    return f"{repo} could not {doing}: {why}. {_RUN_AGAIN}"


def _explain_upload_status(error: BaseException, repo: str, branch: str) -> tuple[int, str]:
    status, wait = _status(error)
    said = str(getattr(error, "server_message", None) or "no reason given").rstrip(".")
    texts = {
        401: "the Hub does not accept your token. Run `hf auth login`, or correct HF_TOKEN",
        403: f"your token may not write there ({said}). Use one with write access to {repo.partition('/')[0]}",
        404: "it does not exist, or your token may not see it. Check its name, and `hf auth whoami`",
        409: f"it conflicts with another change of the repository ({said}). Wait a minute",
        412: f"{branch} has changed since this upload began. See the last commits there",
        413: f"a file or the upload exceeds the size limits of the Hub ({said}). Split the release",
        429: f"too many requests. {wait}",
    }
    if status >= 500:
        return status, "the Hub has an internal error. Wait some minutes"
    return status, texts.get(status, f"the Hub refused it ({said}). Check the repository and the files")


def _status(error: BaseException) -> tuple[int, str]:
    """The HTTP status of an error (0 if it has none), and the wait that the Hub requests as a sentence."""
    response = getattr(error, "response", None)
    after = str(getattr(response, "headers", {}).get("retry-after", ""))
    return int(getattr(response, "status_code", 0)), f"Wait {after} seconds" if after.isdigit() else "Wait some minutes"


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
