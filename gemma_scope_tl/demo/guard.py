"""What the demo answers to a network: its own routes, to its own pages, in requests of bounded size.

Gradio registers some eighty routes (uploads, files, proxies, an editor of the app's own source) and answers every host
and origin. The guard is put around the whole of it, Gradio's own middleware included.
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

from gemma_scope_tl.demo.names import Names, host_name, is_address

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gemma_scope_tl.demo.waiting import Places

BODY_BYTES = 1 << 18
"""Of a request. A text of 4,000 characters takes 48,000 where each is written as two escapes."""
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
"""Asked for with GET: the page, what it and Gradio's Python client read first, and the stream of answers."""
READ_BELOW = ("/assets/", "/static/", f"{API}heartbeat/")
WRITE = frozenset({JOIN, f"{API}cancel"})
"""Sent with POST: a question, and that its answer is no longer wanted."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors "
)
"""What a page may load, and who may frame it. Gradio's own page names hosts for fonts and scripts; the browser never
asks them. Its templates need inline scripts and ``eval``: what keeps a text from being code is that it is escaped."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_OWN_PAGE = ("same-origin", "none")
_DEPTH = 3  # of lists in a question: a row's value in what was clicked
_SESSION = 64  # characters of a page's name for itself, which Gradio keeps for a while


def guarded(app: ASGIApp, names: Names, places: Places, framed_by: Iterable[str] = ()) -> ASGIApp:
    """``app`` behind the guard.

    Args:
        app: the whole of Gradio's.
        names: the hosts that it answers to.
        places: told who waits for answers.
        framed_by: origins whose pages may frame the demo.
    """
    frames = " ".join(framed_by) or "'none'"
    headers = {**HEADERS, "Content-Security-Policy": POLICY + frames}
    if frames == "'none'":
        headers["X-Frame-Options"] = "DENY"
    bounded = RequestBodyLimitMiddleware(_Questions(_Listening(app, places)), max_body_size=BODY_BYTES)
    return _Headers(_Hosts(_Origins(_Routes(bounded), names), names), headers)


class _Headers:
    """Every answer carries the same headers, refusals too."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]) -> None:
        self.app, self.headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


class _Hosts(TrustedHostMiddleware):
    """Only requests to a known host pass: a name that an attacker lets resolve to this machine is none."""

    def __init__(self, app: ASGIApp, names: Names) -> None:
        super().__init__(app, allowed_hosts=sorted(names.own | names.given), www_redirect=False)
        self.addresses = names.addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.addresses and scope["type"] == "http" and is_address(host_name(Headers(scope=scope).get("host", ""))):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class _Origins:
    """Pages of other origins cannot send, nor read the API; Gradio sees no origin, so it allows none by its headers."""

    def __init__(self, app: ASGIApp, names: Names) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            guarded = scope["method"] not in ("GET", "HEAD") or scope["path"].startswith(API)
            if guarded and not self._own_page(headers):
                await PlainTextResponse("A page of another origin asked.", 403)(scope, receive, send)
                return
            forwarded = self.names.is_given(headers.get("x-forwarded-host", "").split(",")[0].strip())
            hidden = (b"origin",) if forwarded else (b"origin", b"x-forwarded-host")
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in hidden]}
        await self.app(scope, receive, send)

    def _own_page(self, headers: Headers) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        return site in _OWN_PAGE and (origin is None or self.names.sends(origin, headers.get("host", "")))


class _Routes:
    """Only what the demo's page uses is there; queries reach the stream of answers alone."""

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
    """A body is read whole, in time, and is plain data; what Gradio would take for a file to fetch is refused."""

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
    """A request's whole body; None where the client left before its end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives ``body`` first."""
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
    raise ValueError(constant)  # NaN and infinities are not JSON, and no browser sends them


def _plain(value: Any, depth: int) -> bool:
    """Whether a value is text, a number or lists of such."""
    if isinstance(value, list):
        return depth > 0 and all(_plain(one, depth - 1) for one in value)
    return not isinstance(value, dict)


class _Listening:
    """Tells who waits for answers, and at once when a visitor has left."""

    def __init__(self, app: ASGIApp, places: Places) -> None:
        self.app, self.places = app, places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != ANSWERS:
            await self.app(scope, receive, send)
            return
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        left = self.places.came(session)
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
            if open_ and heard:  # the demo stops: Gradio leaves the stream without its end
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watching.cancel()
            left.cancel()
