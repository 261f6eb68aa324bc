"""The demo in a real browser: what a visitor clicks, types and reads. No request leaves this machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from gemma_scope_tl.demo.app import build_app
from gemma_scope_tl.demo.serving import launch
from gemma_scope_tl.demo.world import World
from gemma_scope_tl.errors import GemmaScopeError

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
TEXT = "The king said unto his servants, Behold, the city is fallen."

pytest.importorskip("gradio", reason="pip install 'gemma-scope-tl[demo]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
sync_api.expect.set_options(timeout=20_000)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium at /usr/bin/chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A demo in another process, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gemma_scope_tl.cli", "demo", "--port", str(port), "--rows", "16"]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        found = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None, process.stdout and process.stdout.read()
            try:
                urlopen(found, timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "the demo did not start"
                time.sleep(0.3)
        yield found
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A fresh visitor on the page. Afterwards: nothing was asked of another host, and no script failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    outside: list[str] = []
    failures: list[str] = []
    opened.on("request", lambda request: outside.append(request.url) if _leaves(request.url, address) else None)
    opened.on("pageerror", lambda error: failures.append(str(error)))
    opened.on("console", lambda said: failures.append(said.text) if said.type == "error" else None)
    opened.on("response", lambda r: failures.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    opened.goto(address)
    yield opened
    context.close()
    assert not outside
    assert not failures


def _leaves(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def _words(page: Any, selector: str, pattern: str) -> str:
    """The text of an element once it matches."""
    sync_api.expect(page.locator(selector)).to_contain_text(re.compile(pattern))
    return str(page.locator(selector).inner_text())


def _tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def test_reading_a_text_and_following_a_latent(page: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    page.reload()
    _words(page, "#gs-words", r"Latent \d+ is active on")
    print(f"\nfrom page load to the first result: {time.monotonic() - started:.2f} s")  # noqa: T201
    page.screenshot(path=tmp_path / "1-start.png")
    page.locator("#gs-text textarea").fill(TEXT)
    page.locator("#gs-read").click()
    sync_api.expect(page.locator("#gs-tokens")).to_contain_text("city")
    page.locator("#gs-tokens").get_by_text("king", exact=True).click()
    where = re.search(r"on token (\d+) \(' king'\)", _words(page, "#gs-words", r"on token \d+ \(' king'\)"))
    assert where and page.locator("#gs-position input").input_value() == where[1]
    cells = [page.locator(f'#gs-latents [data-testid="cell-1-{column}"]') for column in (0, 1)]
    latent, activation = (cell.inner_text().strip() for cell in cells)
    cells[0].click()
    words = _words(page, "#gs-words", rf"Latent {latent} is active on")
    assert f"{float(activation):.2f}" in words
    assert page.locator("#gs-latent-number input").input_value() == latent
    page.screenshot(path=tmp_path / "2-read.png")
    _tab(page, "Latent")
    shown = _words(page, "#gs-latent-page", rf"Latent {latent}(?!\d)")
    for heading in ("Promoted tokens", "Suppressed tokens", "Similar latents", "one of"):
        assert heading in shown
    page.screenshot(path=tmp_path / "3-latent.png", full_page=True)


def test_another_place(page: Any) -> None:
    _words(page, "#gs-words", r"Latent \d+ is active on")
    page.get_by_label("mlp", exact=True).first.check()
    shown = page.get_by_label("SAE", exact=True).first
    sync_api.expect(shown).to_have_value(re.compile("latents"))
    _tab(page, "Latent")
    _words(page, "#gs-latent-page", r"mlp, layer \d+")


def test_pages_are_legible_in_the_dark(browser: Any, address: str, tmp_path: Path) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(address)
    _words(page, "#gs-words", r"Latent \d+ is active on")
    for tab, card, inner in (("Latent", ".gs-latent", "h1, td, li span"), ("Suite", ".gs-heat", "p, td")):
        _tab(page, tab)
        page.locator(card).wait_for()
        style = "(elements, name) => [...new Set(elements.map(e => getComputedStyle(e)[name]))]"
        assert page.locator(card).evaluate_all(style, "backgroundColor") == ["rgb(255, 255, 255)"]
        assert page.locator(card).locator(inner).evaluate_all(style, "color") == ["rgb(28, 25, 23)"]
        page.screenshot(path=tmp_path / f"dark-{tab}.png")
    context.close()


def test_steering(page: Any, tmp_path: Path) -> None:
    _words(page, "#gs-words", r"Latent \d+ is active on")
    _tab(page, "Steer")
    page.locator("#gs-continue").click()
    plain, steered = page.locator("#gs-plain textarea"), page.locator("#gs-steered textarea")
    sync_api.expect(steered).to_have_value(re.compile("In the beginning God created.+"))
    assert plain.input_value().startswith("In the beginning God created")
    assert plain.input_value() != steered.input_value()
    page.screenshot(path=tmp_path / "4-steer.png")


def test_splicing_and_the_suite(page: Any, tmp_path: Path) -> None:
    _words(page, "#gs-words", r"Latent \d+ is active on")
    _tab(page, "Splice")
    page.locator("#gs-splice").click()
    words = _words(page, "#gs-splice-words", r"delta loss [+-]\d+\.\d{3} nats over \d+ tokens")
    clean, spliced, delta = (float(x) for x in re.findall(r"[+-]?\d+\.\d{3}", words))
    assert abs(spliced - clean - delta) <= 0.0016
    page.screenshot(path=tmp_path / "5-splice.png")
    page.get_by_label("Add the error term").check()
    page.locator("#gs-splice").click()
    _words(page, "#gs-splice-words", r"delta loss [+-]0\.000 nats")
    _tab(page, "Suite")
    before = _words(page, "#gs-suite", "FVU|No measurement")
    page.get_by_label("delta loss, nats").check()
    assert _words(page, "#gs-suite", "delta loss|No measurement") != before or "No measurement" in before
    page.wait_for_timeout(300)
    page.screenshot(path=tmp_path / "6-suite.png")


def test_bad_input_is_a_message(page: Any, tmp_path: Path) -> None:
    _words(page, "#gs-words", r"Latent \d+ is active on")
    page.locator("#gs-text textarea").fill("  ")
    page.locator("#gs-read").click()
    message = page.locator(".toast-body, .toast-wrap").first
    sync_api.expect(message).to_contain_text("Type some text first.")
    sync_api.expect(page.locator("#gs-tokens")).to_contain_text("heaven")  # what was there stays
    page.wait_for_timeout(500)  # for the picture: the message fades in
    page.screenshot(path=tmp_path / "7-message.png")
    assert "Traceback" not in page.content()


def test_markup_in_a_text_stays_text(page: Any) -> None:
    _words(page, "#gs-words", r"Latent \d+ is active on")
    page.locator("#gs-text textarea").fill('<img src=x onerror="window.broken=1"> & <script>window.broken=1</script>')
    page.locator("#gs-read").click()
    sync_api.expect(page.locator("#gs-tokens")).to_contain_text("&")
    shown = re.sub(r"\s", "", page.locator("#gs-tokens").inner_text())
    assert "<imgsrc=xonerror=" in shown and "<script>window.broken=1</script>" in shown
    assert page.evaluate("window.broken") is None


HOSTILE = (
    *("<h1>big</h1>", "<img src=x onerror='window.broken=1'>", "<script>window.broken=1</script>", "</script><b>"),
    *("${window.broken=1}", "{{#each value}}{{this}}{{/each}}", "{{value}}", "# title", "\n# title\n", "`code`"),
    *("[a](javascript:window.broken=1)", "|a|b|", "$$x^2$$", "</p><style>*{display:none}</style>", "&lt;h1&gt;"),
)


class HostileWorld(World):
    """A world whose tokenizer has tokens that are markup, and whose errors quote markup."""

    def token_texts(self, tokens: Any) -> list[str]:
        return [HOSTILE[i % len(HOSTILE)] for i in range(tokens.shape[1])]

    def tokens(self, text: object) -> Any:
        if text == "fail":
            raise GemmaScopeError(f"No such {' '.join(HOSTILE[:5])} as this.")
        return super().tokens(text)


@pytest.fixture(scope="module")
def hostile_address(world: World) -> Iterator[str]:
    hostile = HostileWorld(world.model, list(world.rows.values()), text=world.text)
    app = build_app(hostile)
    yield launch(app, wait=False)
    app.close(verbose=False)


def test_tokens_that_are_markup_stay_text(browser: Any, hostile_address: str) -> None:
    page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
    page.set_default_timeout(20_000)
    page.goto(hostile_address)
    _words(page, "#gs-words", r"Latent \d+ is active on")
    made = "document.querySelectorAll('#gs-words *, #gs-splice-words *').length"
    before = page.evaluate(made)
    for position in range(1, len(HOSTILE) + 1):
        page.locator("#gs-position input").fill(str(position))
        page.locator("#gs-position input").press("Tab")
        quoted = re.escape(repr(HOSTILE[position % len(HOSTILE)]))
        _words(page, "#gs-words", rf"on token {position} \({quoted}\)")
        assert page.evaluate(made) == before
    shown = page.locator("#gs-tokens").inner_text()
    assert all(token.strip() in shown for token in HOSTILE if "\n" not in token)
    page.locator("#gs-text textarea").fill("fail")
    page.locator("#gs-read").click()
    message = page.locator(".toast-body").first
    sync_api.expect(message).to_contain_text("<h1>big</h1> <img src=x")
    assert message.locator("h1, img, script, b").count() == 0
    _tab(page, "Splice")
    page.locator("#gs-splice").click()
    sync_api.expect(page.locator("#gs-splice-tokens")).to_contain_text("<script>window.broken=1</script>")
    assert page.evaluate("document.querySelectorAll('h1').length") == 1  # the page's own title
    assert page.evaluate("window.broken") is None
    page.context.close()
