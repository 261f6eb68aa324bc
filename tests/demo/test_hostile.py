"""The demo as a hostile page or client sees it: on 127.0.0.1, with few and small requests."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_scope_tl.demo import logic
from gemma_scope_tl.demo.world import World
from gemma_scope_tl.errors import GemmaScopeError

gradio = pytest.importorskip("gradio", reason="pip install 'gemma-scope-tl[demo]'")
httpx = pytest.importorskip("httpx")

from gemma_scope_tl.demo import guard, queue_rules, serving  # noqa: E402
from gemma_scope_tl.demo.hosts import hosts_of, origins_of  # noqa: E402

FOREIGN = "http://attacker.example"
PROXY = "demo.example.org"
JOIN = guard.JOIN


@pytest.fixture(scope="module")
def app(world: World) -> Any:
    from gemma_scope_tl.demo.app import build_app

    return build_app(world)


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[Any]:
    address = serving.launch(app, wait=False, allowed_hosts=[PROXY])
    with httpx.Client(base_url=address, timeout=30, trust_env=False) as found:
        yield found
    app.close(verbose=False)


def _index(app: Any, name: str) -> int:
    return next(i for i, function in app.fns.items() if function.api_name == name)


def question(app: Any, session: str, name: str = "latent", data: Any = None) -> dict[str, Any]:
    return {"data": data, "fn_index": _index(app, name), "session_hash": session}


def answer(client: Any, session: str) -> dict[str, Any]:
    """What the stream of answers says at the end of one question."""
    with client.stream("GET", guard.ANSWERS, params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line[5:]) if line.startswith("data:") else {}
            if message.get("msg") in ("process_completed", "unexpected_error"):
                return message
    raise AssertionError("the stream ended without an answer")


def routes(found: Any) -> set[tuple[str, str]]:
    """Methods and paths of all that Gradio registers."""
    pairs: set[tuple[str, str]] = set()
    for route in found:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            pairs |= routes(inner.routes)
        else:
            pairs |= {(method, route.path) for method in getattr(route, "methods", None) or ()}
    return pairs


def test_only_the_routes_of_the_page_are_there(app: Any, client: Any) -> None:
    """Every route of the installed Gradio is either one that the page uses, or is not there."""
    registered = routes(app.app.routes)
    assert ("POST", "/gradio_api/upload") in registered and len(registered) > 60
    for method, path in sorted(registered):
        used = path in guard.READ | guard.WRITE or path.startswith(guard.READ_BELOW)
        if not used:
            response = client.request(method, re.sub(r"\{.*?\}", "x", path))
            assert response.status_code == 404, (method, path)
    for path in guard.READ - {guard.ANSWERS}:
        assert client.get(path).status_code in (200, 404), path  # 404: Gradio's own, of a manifest that it has not
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert client.request(method, "/").status_code == 405
    assert client.get("/gradio_api/file=/etc/passwd").status_code == 404
    assert client.get("/assets/../../etc/passwd").status_code == 404
    assert client.get("/", params={"deep_link": "../../x"}).status_code == 200  # no query is seen


def test_nothing_can_be_stored(client: Any, app: Any) -> None:
    from pathlib import Path

    before = set(Path(app.app.uploaded_file_dir).rglob("*"))
    assert client.post("/gradio_api/upload", files={"files": b"x" * 1000}).status_code == 404
    file = {"path": "http://127.0.0.1:1/secret", "meta": {"_type": "gradio.FileData"}}
    for data in ([file, 0], [[file], 0], [[[file]], 0], {"a": file}):
        assert client.post(JOIN, json=question(app, "files", data=data)).status_code == 422
    assert set(Path(app.app.uploaded_file_dir).rglob("*")) == before


@pytest.mark.parametrize("host", ["attacker.example", "127.0.0.1.attacker.example", "localhost@attacker.example", ""])
def test_unknown_hosts_are_refused(client: Any, host: str) -> None:
    for path in ("/", "/config", "/gradio_api/startup-events"):
        assert client.get(path, headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1234", "[::1]:7860", PROXY, PROXY.upper()])
def test_known_hosts_are_served(client: Any, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 200


def test_what_a_demo_may_be_called() -> None:
    everywhere = hosts_of("0.0.0.0")
    assert everywhere.addresses and not hosts_of("192.168.0.1").addresses
    assert {"localhost", "127.0.0.1", "[::1]", "[fe80::1]"} <= hosts_of("fe80::1").own
    below = hosts_of("127.0.0.1", ["*.example.org"])
    assert below.is_given("a.example.org:80") and not below.is_given("example.org.attacker.example")
    for bad in ("http://a.example", "a.example:80", "a/b", "", "*", "a*b", "a b"):
        with pytest.raises(GemmaScopeError, match="An allowed host"):
            hosts_of("127.0.0.1", [bad])


def test_who_may_frame_it() -> None:
    origins = ("https://huggingface.co", "http://localhost:*", "https://*.example.org")
    assert origins_of(origins) == origins and origins_of(origins[0]) == origins[:1]
    for bad in ("example.org", "https://a/b", "https://a; script-src *", "https://a\r\nX: y", "*", "'self'"):
        with pytest.raises(GemmaScopeError, match="framing page"):
            origins_of([bad])


def test_every_address_of_a_machine_that_listens_on_all(world: World) -> None:
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    served = guard.guarded(Starlette(), hosts_of("0.0.0.0"), _rules())
    status = {
        host: TestClient(served).get("/", headers={"Host": host}).status_code
        for host in ("10.1.2.3:7860", "[fe80::1]:7860", "attacker.example", "10.1.2.3.attacker.example")
    }
    assert list(status.values()) == [404, 404, 400, 400]  # 404: this application has no page


def _rules() -> queue_rules.QueueRules:
    return queue_rules.QueueRules(SimpleNamespace(push=None, get_events=None))


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": FOREIGN},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "file://"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_origins_neither_send_nor_read(client: Any, app: Any, headers: dict[str, str]) -> None:
    asked = [
        client.post(JOIN, json=question(app, "x", data=["a", 0]), headers=headers),
        client.post("/gradio_api/cancel", json={}, headers=headers),
        client.get("/gradio_api/info", headers=headers),
        client.get(guard.ANSWERS, params={"session_hash": "x"}, headers=headers),
        client.options(JOIN, headers={**headers, "Access-Control-Request-Method": "POST"}),
    ]
    assert [response.status_code for response in asked] == [403] * 5
    asked.append(client.get("/config", headers=headers))
    asked.append(client.get("/", headers=headers))
    for response in asked:
        assert not [name for name in response.headers if name.lower().startswith("access-control")]


def test_the_demo_s_own_pages_send(client: Any, app: Any, world: World) -> None:
    own = str(client.base_url).rstrip("/")
    for session, origin in (("own", own), ("proxy", f"https://{PROXY}")):
        asked = question(app, session, data=[world.start(), 3])
        response = client.post(JOIN, json=asked, headers={"Origin": origin, "Sec-Fetch-Site": "same-origin"})
        assert response.status_code == 200
        assert "Latent 3" in answer(client, session)["output"]["data"][0]


def test_headers_of_every_answer(client: Any) -> None:
    for response in (client.get("/"), client.get("/nothing"), client.get("/", headers={"Host": "attacker.example"})):
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["X-Frame-Options"] == "DENY"
        policy = response.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in policy and "object-src 'none'" in policy and "http" not in policy
    forwarded = {"X-Forwarded-Host": "attacker.example"}
    assert "attacker.example" not in client.get("/", headers=forwarded).text
    assert PROXY in client.get("/", headers={"X-Forwarded-Host": PROXY}).text


def closing_early() -> contextlib.suppress:
    """A server that refuses may close the connection before all of a request was sent."""
    return contextlib.suppress(httpx.TransportError)


def test_bodies_are_bounded(client: Any, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    large = json.dumps(question(app, "large", data=["x" * (1 << 20), 0])).encode()
    assert client.post(JOIN, content=large).status_code == 413
    announced = http.client.HTTPConnection("127.0.0.1", client.base_url.port, timeout=10)
    announced.putrequest("POST", JOIN)
    announced.putheader("Content-Length", "9" * 12)
    announced.endheaders()
    assert announced.getresponse().status == 413  # nothing of it was sent
    announced.close()

    def pieces() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 14)

    with closing_early():
        assert client.post(JOIN, content=pieces()).status_code == 413  # chunked: it names no length
    for body in (b"", b"[]", b"{", b"[" * 100_000, b"\xff", json.dumps({"session_hash": "s" * 1000}).encode()):
        assert client.post(JOIN, content=body).status_code == 422
    nan = json.dumps(question(app, "nan", data=["x", float("nan")])).encode()
    assert client.post(JOIN, content=nan, headers={"Content-Type": "application/json"}).status_code == 422
    for number in (999, -1, None):
        assert client.post(JOIN, json={"data": [], "fn_index": number, "session_hash": "none"}).status_code == 400
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)

    def slow() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1)
        yield b"}"

    started = time.monotonic()
    with closing_early():
        assert client.post(JOIN, content=slow()).status_code == 408
    assert time.monotonic() - started < 5
    assert client.get("/config").status_code == 200


def test_abandoned_questions_keep_no_place(client: Any, app: Any, world: World) -> None:
    """Seventy questions whose pages never ask for the answer; the visitor after them is served, and they never run."""
    ran: list[object] = []
    run = logic.steer_text

    def noted(*args: Any) -> Any:
        ran.append(args)
        return run(*args)

    logic.steer_text = noted  # the app looks it up at each question
    try:
        data = ["The king", world.start(), 3, 1.0, 100, 0, 0]
        for number in range(70):
            response = client.post(JOIN, json=question(app, f"gone{number}", "steer", data))
            assert response.status_code == 200, response.text
        assert len(app._queue) <= queue_rules.WAITING
        started = time.monotonic()
        assert client.post(JOIN, json=question(app, "honest", data=[world.start(), 5])).status_code == 200
        assert "Latent 5" in answer(client, "honest")["output"]["data"][0]
        assert time.monotonic() - started < 10
        assert not ran
    finally:
        logic.steer_text = run


def test_visitors_who_leave_free_their_places(
    client: Any, app: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_rules, "SECONDS", 0.5)
    with world.lock:  # the model is busy, so questions wait
        for number in range(6):
            asked = question(app, f"left{number}", data=[world.start(), number])
            assert client.post(JOIN, json=asked).status_code == 200
            address = f"{guard.ANSWERS}?session_hash=left{number}"
            with client.stream("GET", address) as stream:
                next(stream.iter_lines())
        deadline = time.monotonic() + 10
        while len(app._queue):
            assert time.monotonic() < deadline, len(app._queue)
            time.sleep(0.05)
    for number in range(2, 6):
        assert f"left{number}" not in app._queue.pending_event_ids_session


def test_a_visitor_has_few_places(client: Any, app: Any, world: World) -> None:
    with ThreadPoolExecutor(1) as pool:
        with world.lock:
            statuses = [
                client.post(JOIN, json=question(app, "greedy", data=[world.start(), number])).status_code
                for number in range(queue_rules.WAITING_OF_A_PAGE + 3)
            ]
        assert statuses == [200] * queue_rules.WAITING_OF_A_PAGE + [503] * 3
        found = pool.submit(answer, client, "greedy").result(30)
        assert found["success"]


def test_a_stream_that_opens_after_the_stop_ends() -> None:
    """A page may ask for its answers when the demo has just been closed: the stream must not keep the server alive."""

    async def opened() -> bool:
        rules = queue_rules.QueueRules(SimpleNamespace(push=None, get_events=None))
        before = rules.came("before")
        rules.end()
        after = rules.came("after")
        await asyncio.wait([before, after], timeout=5)
        return before.done() and after.done() and not rules.listening

    assert asyncio.run(opened())


def test_a_stop_ends_what_runs(world: World) -> None:
    """Closing with questions pending: the pass in hand ends, nobody hangs, and the model can be used again."""
    from gemma_scope_tl.demo.app import build_app

    app = build_app(world)
    address = serving.launch(app, wait=False)
    held = threading.Event()
    tokens = world.tokens
    world.tokens = lambda text: (held.set(), tokens(text))[1]  # type: ignore[method-assign]
    data = ["The king said", world.start(), 3, 1.0, 100, 0, 0]
    try:
        with httpx.Client(base_url=address, timeout=30, trust_env=False) as client, ThreadPoolExecutor(4) as pool:
            for number in range(4):
                asked = question(app, f"stop{number}", "steer", data)
                assert client.post(JOIN, json=asked).status_code == 200
            waiting_for = [pool.submit(_stream, client, f"stop{number}") for number in range(4)]
            try:
                assert held.wait(20)
                started = time.monotonic()
                app.close(verbose=False)
                assert time.monotonic() - started < 10
                for one in waiting_for:
                    one.result(10)
            finally:
                client.close()  # a stream that does not end would keep the pool, and this test, waiting
    finally:
        del world.tokens
    assert not world._users and world.lock.acquire(timeout=1)
    world.lock.release()
    assert logic.steer_text(world, "The king said", world.start(), 3, 1.0, 3).plain


def _stream(client: Any, session: str) -> None:
    address = f"{guard.ANSWERS}?session_hash={session}"
    with closing_early(), client.stream("GET", address) as stream:
        for _ in stream.iter_lines():
            pass


def test_work_that_nobody_waits_for_ends(world: World) -> None:
    from gemma_scope_tl.demo.world import wanted

    left = iter([True] * 4)
    token = wanted.set(lambda: next(left, False))
    try:
        with pytest.raises(GemmaScopeError, match="No page waits"):
            logic.steer_text(world, "The king said", world.start(), 3, 1.0, 100)
    finally:
        wanted.reset(token)
    assert not world._users and logic.steer_text(world, "The king", world.start(), 3, 1.0, 3).plain


@pytest.mark.slow
def test_what_gradio_refuses_is_shown_as_text(client: Any, app: Any) -> None:
    """Its own messages quote what was sent, into a page that shows messages as HTML."""
    mark, quoted = "<h1 onclick=alert(1)>x</h1>", 0
    for index, function in app.fns.items():
        for place, block in enumerate(function.inputs):
            if block.stateful:
                continue
            for sent in (mark, [mark], [[mark]]):
                data: list[Any] = [None if b.stateful else b.value for b in function.inputs]
                data[place] = sent
                session = f"marks{index}-{place}-{json.dumps(sent).count('[')}"
                asked = {"data": data, "fn_index": index, "session_hash": session}
                response = client.post(JOIN, json=asked)
                assert "<h1" not in response.text
                if response.status_code != 200:
                    continue
                said = answer(client, session)
                if not said.get("success"):
                    assert "<h1" not in json.dumps(said), (function.api_name, block, said)
                    quoted += "&lt;h1" in json.dumps(said)
    assert quoted >= 4
