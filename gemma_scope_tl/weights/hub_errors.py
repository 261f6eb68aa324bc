"""What can go wrong while publishing, in our words; tokens and signed addresses are in none of them."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.weights.fetch import hub_exceptions, shows_secrets, without_secrets

_AGAIN = "Then run it again: what the Hub holds already is not sent twice."


@contextmanager
def in_our_words(repo: str, branch: str, doing: str = "be uploaded") -> Generator[None]:
    """Raise what the Hub's client raises as a :class:`GemmaScopeError`, and keep secrets out of what it logs.

    Args:
        repo, branch: what the requests are about.
        doing: what ``repo`` could not do: ``be uploaded``, ``be looked up``.
    """
    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(_without_secrets)
    try:
        yield
    except GemmaScopeError:
        raise
    except (OSError, ValueError, RuntimeError, *hub_exceptions()) as error:
        raised = GemmaScopeError(without_secrets(explain(_root(error), repo, branch, doing)))
        raise raised from None if shows_secrets(error) else error
    finally:
        logger.removeFilter(_without_secrets)


def _without_secrets(record: logging.LogRecord) -> bool:
    """The client logs the address of a request that it tries again, which for an upload is a signed one."""
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


def _root(error: BaseException) -> BaseException:
    """The client wraps what happened to one of several files, and refusals of the card."""
    from huggingface_hub import errors

    while isinstance(error.__cause__, Exception) and type(error) in (RuntimeError, errors.LocalEntryNotFoundError):
        error = error.__cause__
    return error


def explain(error: BaseException, repo: str, branch: str, doing: str) -> str:
    """One sentence on what happened and one on what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"{repo} could not {doing}: there is no token. Run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not the name of a repository: {error}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} could not {doing}: HF_HUB_OFFLINE is set. Unset it on a machine with a connection."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no branch {branch!r}, and it could not be made. Check its name. {_AGAIN}"
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error, repo, branch, doing)
    if isinstance(error, OSError) and type(error).__name__ == "XetAuthenticationError":
        return f"{repo} could not {doing}: the Hub's storage does not accept your token. Run `hf auth login`. {_AGAIN}"
    if isinstance(error, (*hub_exceptions(), ConnectionError, TimeoutError)):
        why = f"the connection failed or was lost ({type(error).__name__})"
        return (
            f"{repo} could not {doing}: {why}. Check it (where only Xet is blocked, set HF_HUB_DISABLE_XET=1). {_AGAIN}"
        )
    if isinstance(error, OSError):
        what = f"{error.filename or 'a file'} ({error.strerror or error})"
        return f"{repo} could not {doing}: this machine could not read or write {what}. Check its disk. {_AGAIN}"
    return f"{repo} could not {doing}: {error}"


def _explain_status(error: BaseException, repo: str, branch: str, doing: str) -> str:
    response = getattr(error, "response", None)
    status = int(getattr(response, "status_code", 0))
    said = str(getattr(error, "server_message", None) or "no reason given").rstrip(".")
    after = str(getattr(response, "headers", {}).get("retry-after", ""))
    wait = f"Wait {after} seconds" if after.isdigit() else "Wait some minutes"
    texts = {
        401: "the Hub does not accept your token. Run `hf auth login`, or correct HF_TOKEN",
        403: f"your token may not write there ({said}). Use one with write access to {repo.partition('/')[0]}",
        404: "it does not exist, or your token may not see it. Check its name, and `hf auth whoami`",
        409: f"it conflicts with what the Hub has or does just now ({said}). Wait a minute",
        412: f"{branch} has changed since this upload began. See what was committed there",
        413: f"a file or the whole is more than the Hub takes ({said}). See the Hub's limits, and split the release",
        429: f"too many requests. {wait}",
    }
    text = texts.get(status, f"the Hub refused it ({said}). See what it says")
    if status >= 500:
        text = "the Hub has a problem of its own. Wait some minutes"
    return f"{repo} could not {doing} (HTTP {status}): {text}. {_AGAIN}"
