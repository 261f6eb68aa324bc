"""HTTP range requests for one file on the Hub. Every response is checked, and failed requests are repeated.

The Hub's client provides the URL, headers and session, so its settings apply: ``HF_ENDPOINT``, ``HF_TOKEN``, proxies.
The content of LFS files is on another host, at a signed URL that expires. The token is never sent to that host.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gemma_scope_tl.weights.checks import weights_error
from gemma_scope_tl.weights.hub_errors import PASSING, download_command, hub_error, hub_exceptions

TRIES = 3
LONGEST_WAIT = 10.0  # seconds
_FIRST_WAIT = 0.5
_CHANGED = "Open it again; if that does not help, download the whole file."


@dataclass(frozen=True)
class HubAddress:
    """A file of a repository at a revision (None means the main branch)."""

    repo: str
    filename: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.filename} of {self.repo} at {self.revision or 'main'}"

    @property
    def command(self) -> str:
        """The shell command that downloads the whole file."""
        return download_command(self.repo, self.filename, self.revision)


class _Retry(Exception):
    """A temporary failure, with a message and the wait in seconds that the server requests."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _Expired(Exception):
    """The signed URL is no longer valid."""


class RangeReader:
    """A reader of ranges of one version of one file. It can be used from several threads.

    Attributes:
        size, etag, commit: size in bytes, etag and commit of the file, from the Hub.
        requests: number of requests so far, including failed ones.
        bytes_received: bytes of content received so far.

    Raises:
        WeightsError: from the constructor and :meth:`read`, for any failure.
    """

    def __init__(self, address: HubAddress) -> None:
        self.address = address
        self.requests = 0
        self.bytes_received = 0
        self._lock = threading.Lock()
        self._resolving = threading.Lock()
        self.size, self.etag, self.commit, self._location = self._resolve(address.revision)
        self._answer_etag: str | None = None

    def read(self, start: int, stop: int) -> bytes:
        """Return exactly the bytes ``[start, stop)``. After a broken connection only the missing bytes are fetched."""
        data = bytearray()
        renewed = False
        tried = 0
        while start + len(data) < stop:
            location = self._location
            try:
                self._get(location, start, stop, data)
            except _Expired as error:
                if renewed:
                    what = "was refused twice (HTTP 401 or 403)"
                    raise weights_error(
                        str(self.address), what, "Log in with `hf auth login`, or try later."
                    ) from error
                renewed = True
                self._renew(location)
            except _Retry as failure:
                tried += 1
                self._wait(failure, tried)
        return bytes(data)

    def _get(self, location: str, start: int, stop: int, data: bytearray) -> None:
        """Send one request for the bytes that ``data`` lacks, and append the response to it."""
        from huggingface_hub import constants, get_session

        first = start + len(data)
        headers = {**self._headers(location), "Range": f"bytes={first}-{stop - 1}"}
        self._count(requests=1)
        try:
            with get_session().stream(
                "GET", location, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
            ) as response:
                self._check_answer(response.status_code, response.headers, first, stop)
                for chunk in response.iter_raw():
                    self._count(received=len(chunk))
                    data += chunk
                    if start + len(data) > stop:
                        raise weights_error(str(self.address), "was answered with more bytes than requested", _CHANGED)
        except hub_exceptions() as error:
            self._refuse_offline(error)
            raise _Retry(f"the connection failed or was lost ({type(error).__name__})") from None
        if start + len(data) < stop:
            raise _Retry(f"only {len(data)} of {stop - start} bytes arrived")

    def _check_answer(self, status: int, headers: Mapping[str, str], first: int, stop: int) -> None:
        """Raise unless a response is the requested range of the file that was opened."""
        source = str(self.address)
        if status in (401, 403):
            raise _Expired
        if status in PASSING:
            raise _Retry(_name(status), _retry_after(headers))
        if status == 200:
            what = "cannot be read in parts: the server ignores ranges and would send the whole file"
            raise weights_error(source, what, f"Download it: `{self.address.command}`.")
        if status != 206:
            raise weights_error(source, f"was answered with {_name(status)} to a range", _CHANGED)
        given, wanted = headers.get("content-range", ""), f"bytes {first}-{stop - 1}/{self.size}"
        if given.lower().replace("/*", f"/{self.size}") != wanted:
            raise weights_error(source, f"was answered with the wrong part: {given!r}, not {wanted!r}", _CHANGED)
        length = headers.get("content-length")
        if length is not None and length != str(stop - first):
            what = f"was answered with the wrong length: {length} bytes, not {stop - first}"
            raise weights_error(source, what, _CHANGED)
        encoding = headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise weights_error(source, f"was answered compressed ({encoding})", _CHANGED)
        self._check_etag(headers.get("etag"))

    def _check_etag(self, etag: str | None) -> None:
        """Raise unless all responses have the same etag. (The etag of the storage host differs from the Hub's.)"""
        if etag is None:
            return
        with self._lock:
            self._answer_etag = self._answer_etag or etag
            same = self._answer_etag == etag
        if not same:
            raise weights_error(str(self.address), "changed while it was being read", _CHANGED)

    def _renew(self, expired: str) -> None:
        """Request a new signed URL, only once even if several threads find that the old one has expired."""
        with self._resolving:
            if self._location != expired:
                return
            size, etag, _, location = self._resolve(self.commit)
            if (size, etag) != (self.size, self.etag):
                raise weights_error(str(self.address), "changed while it was being read", _CHANGED)
            with self._lock:
                self._location, self._answer_etag = location, None

    def _resolve(self, revision: str | None) -> tuple[int, str, str, str]:
        """Get the size, etag, commit and location of the file from the Hub."""
        tried = 0
        while True:
            try:
                return self._head(revision)
            except _Retry as failure:
                tried += 1
                self._wait(failure, tried)

    def _head(self, revision: str | None) -> tuple[int, str, str, str]:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        address = self.address
        self._count(requests=1)
        try:
            url = hf_hub_url(address.repo, address.filename, revision=revision)
            metadata = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except (OSError, ValueError, *hub_exceptions()) as error:
            self._refuse_offline(error)
            response = getattr(error, "response", None)
            if response is not None and response.status_code in PASSING:
                raise _Retry(_name(response.status_code), _retry_after(response.headers)) from None
            if response is None and isinstance(error, hub_exceptions()) and not isinstance(error, ValueError):
                raise _Retry(f"the connection failed or was lost ({type(error).__name__})") from None
            failure = hub_error(error, address.repo, address.filename, address.revision)
            raise failure from failure.__cause__
        if metadata.size is None or metadata.etag is None or metadata.commit_hash is None:
            what = "cannot be opened: the server gives no size, etag or commit, so it is not a Hub server"
            raise weights_error(str(address), what, "Check HF_ENDPOINT and your proxy.")
        location = metadata.location
        if location == url:  # not redirected: a branch could move between two requests, a commit cannot
            location = hf_hub_url(address.repo, address.filename, revision=metadata.commit_hash)
        return metadata.size, metadata.etag, metadata.commit_hash, location

    def _refuse_offline(self, error: Exception) -> None:
        from huggingface_hub.errors import OfflineModeIsEnabled

        if isinstance(error, OfflineModeIsEnabled):
            hint = f"Unset it, or download the file while online: `{self.address.command}`."
            raise weights_error(str(self.address), "cannot be read: HF_HUB_OFFLINE is set", hint) from None

    def _headers(self, location: str) -> dict[str, str]:
        """Headers for a location, with the token only for the Hub's own host."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        hub, there = urlsplit(constants.ENDPOINT), urlsplit(location)
        own = (hub.scheme, hub.hostname, hub.port) == (there.scheme, there.hostname, there.port)
        return {**build_hf_headers(token=None if own else False), "Accept-Encoding": "identity"}

    def _wait(self, failure: _Retry, tried: int) -> None:
        """Sleep before the next try, or raise after the last one."""
        if tried >= TRIES:
            what = f"could not be read after {TRIES} tries: {failure}"
            hint = "Wait some minutes, or log in (`hf auth login`) for a higher limit." if "429" in str(failure) else ""
            raise weights_error(str(self.address), what, hint or "Try again later.") from None
        wait = _FIRST_WAIT * 2 ** (tried - 1) if failure.wait is None else failure.wait
        time.sleep(min(wait, LONGEST_WAIT))

    def _count(self, requests: int = 0, received: int = 0) -> None:
        with self._lock:
            self.requests += requests
            self.bytes_received += received


def _name(status: int) -> str:
    """The text for an HTTP status.

    >>> _name(503)
    'HTTP 503 (the Hub has an internal error)'
    """
    words = "too many requests" if status == 429 else "the Hub has an internal error" if status >= 500 else ""
    return f"HTTP {status} ({words})" if words else f"HTTP {status}"


def _retry_after(headers: Mapping[str, Any]) -> float | None:
    value = str(headers.get("retry-after", ""))
    return float(value) if value.isdigit() else None
