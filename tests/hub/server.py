"""A small Hugging Face Hub on this machine, for the stock client: what it asks to list, to download and to upload.

Two hosts, as in life: 127.0.0.1 answers as the Hub, 127.0.0.2 serves and takes LFS content at signed addresses. It
models the API as ``huggingface_hub`` calls it; passing it does not prove that the real Hub agrees. Not covered: pull
requests, pagination, Xet (the client uses it unless ``HF_HUB_DISABLE_XET`` is set: no answer can ask for LFS instead).
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import uuid

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.hub.faults import Fault, FaultBook
from tests.hub.repos import HubFile, Repo
from tests.hub.routes import Routes
from tests.hub.serving import Logged
from tests.hub.writing import Writing

_HUB, _CDN = "127.0.0.1", "127.0.0.2"
_START_S = 20.0


class LocalHub:
    """The server, in a thread of its own; a context manager.

    Attributes:
        url: the endpoint, for ``HF_ENDPOINT``.
        repos: by kind and id.
        tokens: those that the Hub knows at all; any other is refused with 401.
        readers: tokens that may not write.
        part_size: LFS files larger than this are uploaded in parts of so many bytes; None for never.
        store: LFS contents that were uploaded, by repository and sha256, committed or not.
        faults: what goes wrong; see :meth:`fail`.
        log: every request so far.
        signed: valid signatures of LFS addresses, with what they give.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: set[str] = set()
        self.readers: set[str] = set()
        self.part_size: int | None = None
        self.store: dict[str, dict[str, bytes]] = {}
        self.faults = FaultBook()
        self.log: list[Logged] = []
        self.signed: dict[str, tuple[str, HubFile]] = {}
        self._sockets = [_listen(_HUB), _listen(_CDN)]
        self.url, self.cdn_url = (f"http://{s.getsockname()[0]}:{s.getsockname()[1]}" for s in self._sockets)
        app = _Front(self, Routes(self), Writing(self))
        config = uvicorn.Config(app, lifespan="off", log_config=None, log_level="critical", loop="asyncio", http="h11")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        end = time.monotonic() + _START_S
        while not self._server.started:
            if time.monotonic() > end or not self._thread.is_alive():
                raise RuntimeError("the local Hub did not start")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(_START_S)
        for sock in self._sockets:
            sock.close()

    def repo(self, id: str, kind: str = "models", gated: bool = False, private: bool = False) -> Repo:
        """A new, empty repository."""
        return self.repos.setdefault((kind, id), Repo(id, kind, gated, private))

    def fail(self, pattern: str, fault: Fault) -> None:
        """Make requests for ``owner/name/file`` (a pattern) go wrong."""
        self.faults.add(pattern, fault)

    def sign(self, path: str, file: HubFile) -> str:
        """An address on the second host that gives a file's content until :meth:`expire`."""
        signature = uuid.uuid4().hex
        self.signed[signature] = (path, file)
        return f"{self.cdn_url}/{file.sha256}?Signature={signature}"

    def expire(self) -> None:
        """Make every address signed so far invalid."""
        self.signed.clear()

    def requests(self, method: str | None = None, host: str | None = None) -> list[Logged]:
        """The log's entries of a method and a host."""
        return [e for e in list(self.log) if method in (None, e.method) and host in (None, e.host)]

    def bytes_sent(self) -> int:
        """Bytes of bodies so far, of both hosts."""
        return sum(entry.sent for entry in list(self.log))

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=self._sockets))


class _Front:
    """Logs each request and hands it to the routes of the host it came in on."""

    def __init__(self, hub: LocalHub, routes: Routes, writing: Writing) -> None:
        self.log = hub.log
        self.apps: dict[str, ASGIApp] = {
            _HUB: Starlette(routes=[*writing.table(), *routes.table()]),
            _CDN: Starlette(routes=[*writing.cdn_table(), *routes.cdn_table()]),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        address = scope["server"][0]
        authorized = "authorization" in request.headers
        host = "cdn" if address == _CDN else "hub"
        entry = Logged(request.method, scope["path"], host, request.headers.get("range"), authorized)
        self.log.append(entry)
        request.state.entry = entry

        async def noting(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                entry.status = int(str(message["status"]))
            await send(message)

        await self.apps[address](scope, receive, noting)


def _listen(address: str) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, 0))
    sock.listen(64)
    return sock
