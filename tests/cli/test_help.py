"""The help that users see: every example of it runs, or parses where it needs what is not here."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from gemma_scope_tl.attributions.graph_json import write_graph
from gemma_scope_tl.cli import app
from gemma_scope_tl.model import loading
from tests.attribution.example_graph import small_graph
from tests.cli.test_refusals import verbs

LOAD_NOTHING = {"list", "show"}
NOT_RUN = {"train", "demo", "export", "upload", "explain", "explanations", "registry"}
"""They train for minutes, serve, send, or ask a language model: tests of their own run them."""
SMALL = {
    "eval": ["--rows", "2", "--context", "16"],
    "study": ["--rows", "1", "--context", "16"],
    "neuronpedia": ["--rows", "2", "--context", "32", "--latent", "3"],
    "steer": ["--tokens", "3"],
    "verify": ["--sample", "2", "--tokens", "128", "--context", "32"],
    "probes": ["--documents", "8", "--k", "1", "--l0-band", "2"],
}


def rendered(words: list[str], width: int) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": str(width)}, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def examples(text: str) -> list[list[str]]:
    """The words of each example of a rendered help, as a shell would read them."""
    _, _, tail = text.partition("\n Example")
    lines = tail.replace("\\\n", " ").splitlines()[1:]
    return [shlex.split(line)[1:] for line in lines if line.strip().startswith("gemma-scope ")]


EXAMPLES = [(words, example) for words, _ in verbs() for example in examples(rendered(words, 80))]


@functools.cache
def _held(name: str, **options: Any) -> Any:
    return _load(name, **options)


def _once(name: str | None = None, **options: Any) -> Any:
    """Load a model, or take the one that was loaded so before."""
    return _load(name, **options) if "hf_model" in options else _held(name, **options)


_load = loading.load_model


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that examples name; models are loaded once."""
    for folder in ("my-saes", "my-run"):
        (tmp_path / folder).mkdir()
    for file in ("my-saes.yaml", "texts.jsonl", "prompts.jsonl"):
        (tmp_path / file).write_text('{"text": "a"}\n')
    review = '{{"text": "It was a story of {} years that {} told me.", "stars": {}, "author": {}}}\n'
    lines = [review.format(n, "he" if n % 2 else "she", n % 2, n // 4) for n in range(16)]
    (tmp_path / "reviews.jsonl").write_text("".join(lines))
    write_graph(small_graph(), tmp_path / "graph.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_model", _once)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("words", "example"), EXAMPLES, ids=[shlex.join(example) for _, example in EXAMPLES])
def test_every_example(words: list[str], example: list[str], elsewhere: Path) -> None:
    assert example[: len(words)] == words
    needs_hub = any(part.startswith("gemma-2") for part in example) and words[0] not in LOAD_NOTHING
    if needs_hub or NOT_RUN & set(words):
        command = get_command(app)
        for word in words:
            command = command.commands[word]  # pyright: ignore[reportAttributeAccessIssue]
        command.make_context(shlex.join(words), example[len(words) :])
        return
    result = CliRunner().invoke(
        app, [*example, *SMALL.get(words[0], []), *SMALL.get(words[-1], [])], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) > 1, "it finds something"


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 80, 120])
def test_examples_and_options_are_whole_at_every_width(width: int) -> None:
    """Nothing is swallowed by the renderer: asterisks, brackets, quotes."""
    for words, command in verbs():
        text = rendered(words, width)
        assert [shlex.split(example)[1:] for example in command.examples] == examples(text), words
        assert command.examples
        inside = _squeezed(text)
        for param in command.params:
            for part in (*param.opts, *(param.help or "").split()):
                assert _squeezed(part) in inside, (words, part)
        for part in command.help.split():
            assert _squeezed(part.replace("\\", "")) in inside, (words, part)


def _squeezed(text: str) -> str:
    """Without frames, spaces and the marks of code."""
    return re.sub(r"[\s│`]", "", text)


def test_version_is_a_line() -> None:
    import gemma_scope_tl as gs

    assert CliRunner().invoke(app, ["--version"]).stdout == f"gemma-scope-tl {gs.__version__}\n"
