"""One file's bytes as an HTTP answer: ranges, faults, and a log of what was sent."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tests.hub.faults import Fault, Host
from tests.hub.repos import HubFile

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_CHUNK = 1 << 16


@dataclass
class Logged:
    """One request as the server saw it.

    Attributes:
        method, path, host: what was asked, and of which of the two hosts.
        range: the Range header, or None.
        authorized: whether an Authorization header came with it.
        status: of the answer.
        sent: bytes of body handed to the connection.
        taken: bytes of LFS content that came with it.
    """

    method: str
    path: str
    host: Host
    range: str | None
    authorized: bool
    status: int = 0
    sent: int = 0
    taken: int = 0


def error(status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error as the Hub words it: in headers, and in JSON."""
    named = {"X-Error-Code": code} if code else {}
    return JSONResponse({"error": message}, status, {"X-Error-Message": message, **named, **(headers or {})})


class FileAnswer(Response):
    """GET or HEAD of a file, whole or by range, with the request's fault applied."""

    def __init__(self, file: HubFile, entry: Logged, fault: Fault, headers: dict[str, str]) -> None:
        super().__init__()
        self.file, self.entry, self.fault = file, entry, fault
        etag = fault.etag or file.etag
        self.fields = {"Accept-Ranges": "bytes", "ETag": f'"{etag}"', **headers, **fault.headers}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, fault = self.file.size, self.fault
        wanted = None if fault.ignore_range else _parse(self.entry.range, size)
        if wanted is not None and wanted[0] >= size:
            answer = error(416, None, "Range not satisfiable", {"Content-Range": f"bytes */{size}"})
            self.entry.status = 416
            await answer(scope, receive, send)
            return
        start, stop = wanted or (0, size)
        stop -= min(fault.drop, stop - start)
        if wanted is not None:
            shifted = start + fault.shift_range
            self.fields["Content-Range"] = f"bytes {shifted}-{stop - 1 + fault.shift_range}/{size}"
        self.entry.status = 206 if wanted else 200
        self.fields["Content-Length"] = str(stop - start)
        raw = [(name.lower().encode(), value.encode()) for name, value in self.fields.items()]
        await send({"type": "http.response.start", "status": self.entry.status, "headers": raw})
        if self.entry.method == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await self._send_body(start, stop, send, gone)
        finally:
            gone.cancel()

    async def _send_body(self, start: int, stop: int, send: Send, gone: asyncio.Task[None]) -> None:
        cut = self.fault.cut_after
        end = stop if cut is None else min(stop, start + cut)
        for at in range(start, end, _CHUNK):
            await asyncio.sleep(0)
            if gone.done():
                return
            body = self.file.content.read(at, min(_CHUNK, end - at))
            if self.fault.corrupt and at == start:
                body = bytes([body[0] ^ 0xFF]) + body[1:]
            self.entry.sent += len(body)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if cut is None:
            await send({"type": "http.response.body", "body": b""})
        # else: an answer that stays incomplete makes the server close the connection


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _parse(header: str | None, size: int) -> tuple[int, int] | None:
    match = _RANGE.fullmatch(header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size
