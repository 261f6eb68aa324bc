"""Activations against a server that speaks Neuronpedia's JSON, whose values are made with plain torch."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place
from gemma_scope_tl.verification.neuronpedia import ADDRESS_VARIABLE, Comparison, compare, get_feature
from gemma_scope_tl.verification.probe import Probe
from tests.verify.world import World, row_of, sae_of

SOURCE = "small/2-right-res-40"


class Dashboards:
    """Features by path; the status to answer with; the paths asked for."""

    def __init__(self) -> None:
        self.features: dict[str, Any] = {}
        self.status = 200
        self.body: bytes | None = None
        self.asked: list[str] = []


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboards]:
    book = Dashboards()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            book.asked.append(self.path)
            found = book.features.get(self.path)
            status = book.status if found is not None or book.status != 200 else 404
            self.send_response(status)
            self.end_headers()
            self.wfile.write(book.body if book.body is not None else json.dumps(found).encode())

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv(ADDRESS_VARIABLE, f"http://127.0.0.1:{running.server_address[1]}/")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    yield book
    running.shutdown()
    running.server_close()


def publish(book: Dashboards, small: World, arrays: dict[str, Any], factor: float = 1.0, bos: bool = True) -> list[int]:
    """Dashboards of the latents that fire: two rows of tokens with the activation of each token, in plain torch."""
    texts = small.model.tokenizer.convert_ids_to_tokens
    rows = small.tokens()[:2]
    probe = Probe(small.model, rows, (), limit=rows.numel())
    x = probe.at(Place("res", 2)).reshape(2, rows.shape[1], -1)
    pre = x @ arrays["W_enc"] + arrays["b_enc"]
    acts = pre * (pre > arrays["threshold"])
    start = 0 if bos else 1
    for latent in range(acts.shape[-1]):
        records = []
        for row in range(2):
            values = (acts[row, start:, latent] * factor).tolist()
            tokens = texts(rows[row, start:].tolist())
            records.append({"tokens": tokens, "values": values, "maxValue": max(values), "maxValueTokenIndex": 0})
        book.features[f"/api/feature/{SOURCE}/{latent}"] = {"modelId": "small", "activations": records}
    return (acts[:, 1:] > 0).any(0).any(0).nonzero().flatten().tolist()


def compared(small: World, fired: list[int], arrays: dict[str, Any] | None = None, **row: Any) -> Comparison:
    arrays = small.arrays("res", 2) if arrays is None else arrays
    made = row_of("res", 2, arrays, 9, **{"neuronpedia": SOURCE, **row})
    return compare(small.model, sae_of("res", 2, arrays), made, fired, seed=0, wanted=True)


@pytest.mark.parametrize("bos", [True, False])
def test_the_same_sae_agrees(small: World, server: Dashboards, bos: bool) -> None:
    """A pass of one row alone and of two differ by rounding only: 1e-4 in float32."""
    found = compared(small, publish(server, small, small.arrays("res", 2), bos=bos))
    assert found.skipped == "" and found.faults == () and 3 <= len(found.latents) <= 6
    for one in found.latents:
        assert one["ours"] == pytest.approx(one["stored"], rel=1e-4) and one["correlation"] > 0.999
    assert len(server.asked) == 3 and all(path.startswith(f"/api/feature/{SOURCE}/") for path in server.asked)


@pytest.mark.parametrize("fault", ["another SAE", "another scale"])
def test_another_sae_does_not(small: World, server: Dashboards, fault: str) -> None:
    arrays = small.arrays("res", 2)
    fired = publish(server, small, arrays, factor=2.0 if fault == "another scale" else 1.0)
    if fault == "another SAE":
        turned = torch.randperm(arrays["W_enc"].shape[1], generator=torch.Generator().manual_seed(0))
        arrays |= {"W_enc": arrays["W_enc"][:, turned], "b_enc": arrays["b_enc"][turned]}
    found = compared(small, fired, arrays)
    assert {one.kind for one in found.faults} == {"neuronpedia"} and SOURCE in found.faults[0].text


def test_reasons_to_skip(small: World, server: Dashboards) -> None:
    fired = publish(server, small, small.arrays("res", 2))
    assert "no dashboard" in compared(small, fired, neuronpedia=None).skipped
    assert "wrong tensor" in compared(small, fired, neuronpedia_warning="made on the wrong tensor").skipped
    assert compared(small, []).skipped == "no latent fired"
    arrays = small.arrays("res", 2)
    row = row_of("res", 2, arrays, 9, neuronpedia=SOURCE)
    unasked = compare(small.model, sae_of("res", 2, arrays), row, fired, seed=0, wanted=False)
    assert "--neuronpedia" in unasked.skipped and server.asked == []
    for feature in server.features.values():
        feature["activations"] = [{"tokens": ["no such token", "x"], "values": [1.0, 0.0]}, {"tokens": None}, 3]
    assert "converted to token ids" in compared(small, fired).skipped


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (429, b"", "limit of requests"),
        (500, b"", "status 500"),
        (200, b"<html>", "with JSON"),
        (200, b"[]", "stored activations"),
        (200, b'{"activations": null}', "stored activations"),
    ],
)
def test_answers_of_no_use(small: World, server: Dashboards, status: int, body: bytes, says: str) -> None:
    fired = publish(server, small, small.arrays("res", 2))
    server.status, server.body = status, body
    found = compared(small, fired)
    assert says in found.skipped and found.faults == ()


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(GemmaScopeError, match="cannot be reached"):
        get_feature(SOURCE, 0)
