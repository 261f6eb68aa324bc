"""What users really give: standard input, files from Windows, old names of options; and what is on which stream."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gemma_scope_tl.cli import app
from gemma_scope_tl.cli.failures import run
from gemma_scope_tl.cli.output import results_apart, say, say_json
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model import loading
from gemma_scope_tl.text.documents import read_texts
from tests.cli.test_help import _once

SMALL = ("--layer", "2", "--site", "res", "--width", "1k", "--canonical", "--rows", "1", "--context", "12")


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "load_model", _once)
    monkeypatch.chdir(tmp_path)


def _read(*words: str, given: bytes = b"") -> Any:
    result = CliRunner().invoke(app, [*words, "--json"], input=given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_text_from_standard_input() -> None:
    wanted = _read("features", "And God said\nunto them")
    for given in (
        b"And God said\nunto them\n",
        b"And God said\r\nunto them\r\n",
        b"\xef\xbb\xbfAnd God said\nunto them",
    ):
        assert _read("features", "-", given=given) == wanted
    for given, words in ((b"", "Standard input is empty"), (b"\n", "Standard input is empty"), (b"\xff", "not valid")):
        with pytest.raises(GemmaScopeError, match=words):
            CliRunner().invoke(app, ["features", "-"], input=given, catch_exceptions=False)


def test_a_file_of_texts_is_not_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("And God said")
    assert run(app, ["features", "a.txt"]) == 0
    assert "note: 'a.txt' is read as the text itself; `- < a.txt` reads the file." in capsys.readouterr().err


def test_files_from_windows_and_other_programs(tmp_path: Path) -> None:
    """A byte-order mark, Windows line ends, a separator that JSON allows in a string, a list, other capitals."""
    texts = ["one\u2028two", "three"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    for name, content in (
        ("a.jsonl", lines.encode("utf-8-sig")),
        ("b.JSONL", lines.encode()),
        ("c.json", json.dumps([{"text": text} for text in texts]).encode()),
    ):
        (tmp_path / name).write_bytes(content)
        assert list(read_texts(tmp_path / name)) == texts, name
    (tmp_path / "d.TXT").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert list(read_texts(tmp_path / "d.TXT")) == ["one\ntwo"]
    (tmp_path / "e.txt").write_text(" \n")
    (tmp_path / "f.json").write_text("[{")
    for name, words in (("e.txt", "is empty: it has no text"), ("f.json", "is not JSON")):
        with pytest.raises(GemmaScopeError, match=words):
            list(read_texts(tmp_path / name))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("neuronpedia", "--folder", "np", "--latent", "3", *SMALL), ("--folder", "--out")),
        (("top-tokens", "--latent", "3", "--k=2"), ("--k", "--top")),
        (("registry", "check", "REGISTRY", "--model-path", "bundled"), ("--model-path", "--model")),
    ],
)
def test_old_names_are_taken_with_a_word(
    old: tuple[str, ...], new: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Path(loading.__file__).parents[2] / "pretrained_yaml" / "bundled-res.yaml"
    words = [str(registry) if word == "REGISTRY" else word for word in old]
    assert run(app, [*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"DeprecationWarning: {new[0]} is called {new[1]} now" in err
    assert run(app, [*(word.replace(*new) for word in words), "--json"]) == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == json.loads(out) and "Deprecation" not in again.err
    assert Path("np").is_dir() == (old[0] == "neuronpedia")


def test_the_table_that_neuronpedia_once_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["neuronpedia", "--out", "t.csv", "--latent", "3", *SMALL]) == 0
    assert "DeprecationWarning: --out names the folder now" in capsys.readouterr().err
    assert Path("t.csv").is_file() and list(Path("neuronpedia").rglob("batch-0.json"))


@pytest.mark.slow
def test_standard_output_holds_results_alone(tmp_path: Path) -> None:
    """In a process of its own, where libraries write to the real streams: valid JSON alone, both backends."""
    command = [sys.executable, "-m", "gemma_scope_tl.cli", "features", "And God said", "--top", "1", "--json"]
    done = subprocess.run([*command, "--backend", "hooked_transformer"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {row["layer"] for row in json.loads(done.stdout)} == {2}


def test_what_a_library_prints_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with results_apart():
        print("loading ...")  # noqa: T201
        say("result")
        say_json({"a": float("nan"), "b": Path("x"), "c": [float("inf"), True, SimpleNamespace(item=lambda: 3)]})
    out, err = capsys.readouterr()
    assert err == "loading ...\n" and out.startswith("result\n")
    assert json.loads(out.removeprefix("result")) == {"a": None, "b": "x", "c": [None, True, 3]}


def test_a_stream_that_knows_few_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run(app, ["list", "--model", "bundled", "--site", "res", "--layer", "2"]) == 0
    assert rb"\u2713" in raw.getvalue()


@pytest.mark.slow
def test_a_port_that_is_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is loaded only then, and the server gets the very port."""
    pytest.importorskip("gradio")
    seen: list[Any] = []

    def launch(shown: Any, host: str, port: int | None, *_: Any, **__: Any) -> str:
        seen.extend((host, port))
        raise typer.Exit(5)

    monkeypatch.setattr("gemma_scope_tl.demo.serving.launch", launch)
    monkeypatch.setattr("gemma_scope_tl.demo.app.build_app", lambda *_, **__: None)
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run(app, ["demo", "--port", str(port)]) == 5
    assert seen == ["127.0.0.1", port]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions stop")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(GemmaScopeError, match="you have no write permission in"):
        CliRunner().invoke(app, ["eval", "--out", "closed/t.csv"], catch_exceptions=False)
