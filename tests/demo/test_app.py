"""The app over its own API: concurrent clients, errors as messages, what it answers to the network."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from urllib.request import urlopen

import pytest
from typer.testing import CliRunner

from gemma_scope_tl import cli
from gemma_scope_tl.demo import logic, serving, views
from gemma_scope_tl.demo.world import World
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry.listing import select_rows

gradio = pytest.importorskip("gradio", reason="pip install 'gemma-scope-tl[demo]'")
gradio_client = pytest.importorskip("gradio_client", reason="pip install 'gemma-scope-tl[demo]'")

TEXTS = [f"The king said unto his {number} servants." for number in range(4)]


@pytest.fixture(scope="module")
def address(world: World) -> Iterator[str]:
    from gemma_scope_tl.demo.app import build_app
    from gemma_scope_tl.demo.serving import launch

    app = build_app(world)
    yield launch(app, wait=False)
    app.close()


def _client(address: str) -> gradio_client.Client:
    return gradio_client.Client(address, verbose=False, analytics_enabled=False)


@pytest.mark.slow
def test_it_listens_on_this_machine_alone_and_names_a_policy(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    with urlopen(address, timeout=10) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "http" not in policy


@pytest.mark.slow
def test_clients_at_once_keep_their_own_state(address: str, world: World) -> None:
    def visit(text: str) -> tuple[str, str]:
        """Read a text, then look at another token of what was read."""
        client = _client(address)
        latent, position, *_ = client.predict(text, world.start(), api_name="/read")
        _, words, _ = client.predict(latent, position, api_name="/show")
        expected = views.reading_words(logic.read_text(world, text, world.start()), latent, position)
        return str(words), escape(expected)

    with ThreadPoolExecutor(4) as pool:
        for words, expected in pool.map(visit, TEXTS):
            assert words == expected


def test_errors_are_messages(address: str, world: World) -> None:
    client = _client(address)
    with pytest.raises(gradio_client.exceptions.AppError, match="Type some text first"):
        client.predict("", world.start(), api_name="/read")
    with pytest.raises(gradio_client.exceptions.AppError, match="The latent is a number from 0"):
        client.predict(world.start(), 10**7, api_name="/latent")


def test_a_failure_is_logged_and_says_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    from gemma_scope_tl.demo.serving import as_messages

    def fail() -> None:
        raise RuntimeError("secret words")

    with pytest.raises(gradio.Error) as caught:
        as_messages(fail)()
    assert "secret" not in str(caught.value) and "secret words" in caplog.text


def test_a_latent_s_page(address: str, world: World) -> None:
    page = _client(address).predict(world.start(), 3, api_name="/latent")
    assert re.search(r"Latent 3\b", page) and "Promoted tokens" in page


def test_an_app_on_another_suite(world: World) -> None:
    """Nothing is loaded before it is asked for, so the real SAEs' names do without their weights."""
    from gemma_scope_tl.demo.app import build_app

    several = World(world.model, select_rows(model="gemma-2-2b", width="16k"))
    only = World(world.model, select_rows(model="gemma-2-2b", site="embedding"))
    for other in (several, only):
        radio = next(b for b in build_app(other).blocks.values() if getattr(b, "label", None) == "Site")
        assert [value for _, value in radio.choices] == other.sites()


def test_a_taken_port_is_an_error(address: str, world: World) -> None:
    from gemma_scope_tl.demo.app import build_app
    from gemma_scope_tl.demo.serving import launch

    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(GemmaScopeError, match=f"port {port}"):
        launch(build_app(world), port=port, wait=False)


def test_without_gradio_the_error_names_the_extra(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_scope_tl.demo.app import build_app

    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GemmaScopeError, match=re.escape("pip install 'gemma-scope-tl[demo]'")):
        build_app(world)
    found = CliRunner().invoke(cli.app, ["demo"])
    assert isinstance(found.exception, GemmaScopeError) and "gemma-scope-tl[demo]" in str(found.exception)


def test_gradio_is_imported_when_an_app_is_built_and_not_before() -> None:
    for path in Path(serving.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "gradio" for name in imported), path


def test_the_command_s_help() -> None:
    words = CliRunner().invoke(cli.app, ["demo", "--help"]).output
    assert "gemma-scope demo --open" in words and "gemma-scope-tl[demo]" in words
