"""A chat endpoint on 127.0.0.1 that answers by rule, and breaks when told to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint:
    """What the server was asked, and the faults it still has to make.

    Attributes:
        faults: of the next requests: a status, ``"garbled"``, ``"shapeless"``, ``"slow"``, ``"closed"``.
        headers: of each request.
        most: requests that were in flight at once at most.
        url: of the endpoint.
    """

    def __init__(self) -> None:
        self.faults: list[int | str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.most = self.now = 0
        self.delay = 0.0
        self.lock = threading.Lock()
        self.url = ""


def answer(messages: list[dict[str, str]]) -> str:
    """Explain with the commonest marked word; find and simulate by looking for the described word."""
    text = messages[-1]["content"]
    if not text.startswith("Description:"):
        words = Counter(re.findall(r"<<\s*([^<>]+?)\s*>>", text))
        return f"Here it is.\nEXPLANATION: {words.most_common(1)[0][0] if words else 'nothing'}"
    word = re.match(r"Description: (.*)", text)[1].strip()  # type: ignore[index]
    if "Tokens (" in text:
        tokens = json.loads(text[text.index("): [") + 3 :])
        return json.dumps([10 if token.strip() == word else 0 for token in tokens])
    return json.dumps([int(word in line) for line in text.splitlines()[1:]])


@contextmanager
def serve() -> Iterator[Endpoint]:
    """Run the endpoint."""
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with endpoint.lock:
                endpoint.headers.append({key.lower(): value for key, value in self.headers.items()})
                endpoint.bodies.append(body)
                fault = endpoint.faults.pop(0) if endpoint.faults else None
                endpoint.now += 1
                endpoint.most = max(endpoint.most, endpoint.now)
            time.sleep(endpoint.delay)
            with endpoint.lock:
                endpoint.now -= 1
            self._reply(body, fault)

        def _reply(self, body: dict[str, Any], fault: int | str | None) -> None:
            if fault == "closed":
                self.close_connection = True
                return
            if fault == "slow":
                time.sleep(1.0)
            content = answer(body["messages"]) if self.path == "/v1/chat/completions" else ""
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})
            data = {"garbled": '{"choices": [{"mess', "shapeless": '{"choices": []}'}.get(str(fault), data)
            if isinstance(fault, int):
                data = f'{{"error": "no, {self.headers["authorization"]}"}}'
            try:
                self.send_response(fault if isinstance(fault, int) else 200)
                if fault == 429:
                    self.send_header("retry-after", "0.01")
                self.send_header("content-length", str(len(data.encode())))
                self.end_headers()
                self.wfile.write(data.encode())
            except OSError:
                pass  # the client gave up

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
