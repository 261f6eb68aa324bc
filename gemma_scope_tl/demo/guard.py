"""Middleware in front of Gradio that admits only the demo's routes, for the demo's pages, in requests of bounded size.

Gradio registers about eighty routes (uploads, files, proxies, an editor of the app's source) and answers every host and
origin. This middleware is outermost, in front of Gradio's own middleware.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from gemma_scope_tl.demo.hosts import Hosts, host_name, is_address

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gemma_scope_tl.demo.queue_rules import QueueRules

BODY_BYTES = 1 << 18
"""Largest request in bytes. A text of 4,000 characters takes 48,000 bytes if each is written as two escapes."""
BODY_SECONDS = 10.0
API = "/gradio_api/"
JOIN, ANSWERS = f"{API}queue/join", f"{API}queue/data"
READ = frozenset(
    {
        *("/", "/config", "/config/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
        *(f"{API}{name}" for name in ("info", "app_id", "startup-events", "theme.css")),
        ANSWERS,
    }
)
"""Routes for GET: the page, the resources that it and Gradio's Python client load first, and the stream of answers."""
READ_BELOW = ("/assets/", "/static/", f"{API}heartbeat/")
WRITE = frozenset({JOIN, f"{API}cancel"})
"""Routes for POST: a request, and its cancellation."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors "
)
"""The policy for what a page may load and which pages may frame it. Gradio's page refers to other hosts for fonts and
scripts, which this policy forbids. Gradio's templates need inline scripts and ``eval``, so texts of visitors must be
escaped."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_OWN_PAGE = ("same-origin", "none")
_DEPTH = 3  # nesting of lists in a request, as in the row of a clicked cell
_SESSION = 64  # length limit of the session's name, which Gradio stores for some time


def guarded(app: ASGIApp, hosts: Hosts, rules: QueueRules, framed_by: Iterable[str] = ()) -> ASGIApp:
    """``app`` behind the middleware of this module.

    Args:
        app: Gradio's application with its middleware.
        hosts: the host names that the demo answers to.
        rules: the rules of the queue, which are notified of the pages that wait for answers.
        framed_by: origins whose pages may frame the demo.
    """
    frames = " ".join(framed_by) or "'none'"
    headers = {**HEADERS, "Content-Security-Policy": POLICY + frames}
    if frames == "'none'":
        headers["X-Frame-Options"] = "DENY"
    bounded = RequestBodyLimitMiddleware(_Questions(_Listening(app, rules)), max_body_size=BODY_BYTES)
    return _Headers(_KnownHosts(_Origins(_Routes(bounded), hosts), hosts), headers)


class _Headers:
    """Adds the same headers to every answer, including refusals."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]) -> None:
        self.app, self.headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


class _KnownHosts(TrustedHostMiddleware):
    """Refuses requests to unknown host names, such as a foreign name that resolves to this machine (DNS rebinding)."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        super().__init__(app, allowed_hosts=sorted(hosts.own | hosts.given), www_redirect=False)
        self.addresses = hosts.addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.addresses and scope["type"] == "http" and is_address(host_name(Headers(scope=scope).get("host", ""))):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class _Origins:
    """Refuses requests to the API from pages of other origins. Gradio does not see the origin, so it allows none."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            guarded = scope["method"] not in ("GET", "HEAD") or scope["path"].startswith(API)
            if guarded and not self._own_page(headers):
                await PlainTextResponse("A page of another origin asked.", 403)(scope, receive, send)
                return
            forwarded = self.hosts.is_given(headers.get("x-forwarded-host", "").split(",")[0].strip())
            hidden = (b"origin",) if forwarded else (b"origin", b"x-forwarded-host")
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in hidden]}
        await self.app(scope, receive, send)

    def _own_page(self, headers: Headers) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        return site in _OWN_PAGE and (origin is None or self.hosts.sends(origin, headers.get("host", "")))


class _Routes:
    """Refuses routes that the demo's page does not use, and removes all queries except that of the answers' stream."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, method = scope["path"], scope["method"]
            below = path.startswith(READ_BELOW) and ".." not in path.split("/")
            methods = ("POST",) if path in WRITE else ("GET", "HEAD") if path in READ or below else ()
            if method not in methods:
                status, words = (405, "Method Not Allowed") if methods else (404, "Not Found")
                await PlainTextResponse(words, status)(scope, receive, send)
                return
            if path != ANSWERS:
                scope = {**scope, "query_string": b""}
        elif scope["type"] != "lifespan":
            return
        await self.app(scope, receive, send)


class _Questions:
    """Refuses bodies that arrive slowly or hold more than plain data, such as files that Gradio would fetch."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(_body(receive), BODY_SECONDS)
        except TimeoutError:
            await PlainTextResponse("Request Timeout", 408, {"Connection": "close"})(scope, receive, send)
            return
        if body is None:
            return
        if not _is_question(body):
            await PlainTextResponse("The request is no question of the demo.", 422)(scope, receive, send)
            return
        await self.app(scope, _replayed(body, receive), send)


async def _body(receive: Receive) -> bytes | None:
    """The complete body of a request; None if the client disconnects before the end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that returns ``body`` first."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Message:
        return first.pop() if first else await receive()

    return give


def _is_question(body: bytes) -> bool:
    try:
        given = json.loads(body, parse_constant=_refused)
    except (ValueError, RecursionError):
        return False
    if not isinstance(given, dict) or len(str(given.get("session_hash"))) > _SESSION:
        return False
    event = given.get("event_data")
    rest = [value for key, value in given.items() if key != "event_data"]
    return _plain(rest, _DEPTH) and (not isinstance(event, dict) or _plain(list(event.values()), _DEPTH))


def _refused(constant: str) -> None:
    raise ValueError(constant)  # NaN and infinities are not JSON


def _plain(value: Any, depth: int) -> bool:
    """Whether a value is a text, a number or a list of these, nested at most ``depth`` times."""
    if isinstance(value, list):
        return depth > 0 and all(_plain(one, depth - 1) for one in value)
    return not isinstance(value, dict)


class _Listening:
    """Notifies the rules of the queue when a page begins to wait for answers, and when a page disconnects."""

    def __init__(self, app: ASGIApp, rules: QueueRules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != ANSWERS:
            await self.app(scope, receive, send)
            return
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        left = self.rules.came(session)
        open_, heard = False, True
        first: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

        async def watch() -> None:
            nonlocal heard
            while (await receive())["type"] != "http.disconnect":
                pass
            heard = False
            left.cancel()

        async def give() -> Message:
            if first:
                return first.pop()
            await asyncio.wait([left])
            return {"type": "http.disconnect"}

        async def pass_on(message: Message) -> None:
            nonlocal open_
            open_ = message["type"] == "http.response.start" or message.get("more_body", False)
            await send(message)

        watching = asyncio.create_task(watch())
        try:
            await self.app(scope, give, pass_on)
            if open_ and heard:  # Gradio does not end the stream when the demo stops
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watching.cancel()
            left.cancel()
