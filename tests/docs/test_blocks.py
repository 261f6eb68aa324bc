"""Every block of code in the documentation runs, or is looked up where it needs what is not here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from gemma_scope_tl.cli import app
from gemma_scope_tl.registry import clear_cache, locate
from tests.docs.blocks import ROOT, Block, blocks_of, pages, unknown_options, unresolved

RUN_ELSEWHERE = {"docs/publish.md", "docs/demo.md"}  # tests/docs/test_publish.py with a Hub, tests/demo with a server
LANGUAGES = {"python", "console", "text", "yaml", "bash", ""}
NOT_RUN = (
    "pip",
    "make",
    "jupyter",
    "hf",
    "python",
    "torchrun",
    "ray",
)  # of which something else is checked, or nothing


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, as that of a reader; a release that a page registers is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(locate, "_registered", dict(locate._registered))
    yield tmp_path
    clear_cache()


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page(page: Path, elsewhere: Path) -> None:
    variables: dict[str, object] = {"__name__": "__main__"}
    known: set[str] = set()
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block.page}:{block.line}: {block.language}"
        if block.language == "python":
            run_python(block, variables, known)
        elif block.language == "console":
            for words in block.commands:
                run_command(block, words)
        elif block.language == "yaml":
            yaml.safe_load(block.text)


def run_python(block: Block, variables: dict[str, object], known: set[str]) -> None:
    """Run a block after the earlier ones of its page, or look its names up."""
    where = f"{block.page}:{block.line}"
    padded = "\n" * block.line + block.text  # so that a traceback names the page's line
    assert unresolved(block.text, known) == [], where
    if block.runs and block.page not in RUN_ELSEWHERE:
        exec(compile(padded, str(ROOT / block.page), "exec"), variables)
    else:
        compile(padded, where, "exec")


def run_command(block: Block, words: list[str]) -> None:
    """Run a ``gemma-scope`` command; of one that needs something, look its name and options up."""
    where = f"{block.page}:{block.line}: {' '.join(words)}"
    if words[0] != "gemma-scope":
        assert words[0] in NOT_RUN, f"{where}: say how this is checked"
        return
    if block.runs and block.page not in RUN_ELSEWHERE:
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{where}\n{result.output}\n{result.exception!r}"
        return
    verbs = words[1:3] if words[1] in ("registry", "study") else words[1:2]
    help_text = CliRunner().invoke(app, [*verbs, "--help"])
    assert help_text.exit_code == 0, where
    assert unknown_options(words[1 + len(verbs) :], help_text.output) == [], where


def test_make_targets_on_all_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in pages():
        for block in blocks_of(page):
            for target in re.findall(r"^(?:\$ )?make ([\w-]+)", block.text, flags=re.MULTILINE):
                assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{block.page}: make {target}"


def test_what_does_not_exist_is_found() -> None:
    known: set[str] = set()
    assert unresolved("import gemma_scope_tl as gs\nmodel = gs.load_model('x')\ngs.load_modle", known) == [
        "gs.load_modle"
    ]
    assert unresolved("gs.sites.get_site(modell)", known) == ["modell"]
    assert unresolved("from gemma_scope_tl.evals.suite import evalute", known) == ["gemma_scope_tl.evals.suite.evalute"]
    assert unresolved("from nowhere_at_all import x\nx.y", set()) == []
    assert unknown_options(["list", "--sumary", "--site", "res"], "--summary  --site TEXT") == ["--sumary"]


def test_blocks_that_need_something_are_few_and_say_what() -> None:
    for page in pages():
        for block in blocks_of(page):
            if not block.runs:
                assert re.search(r"needs (Gemma 2 2B|the Hub|the package index|Jupyter|nnsight)", block.title), block
