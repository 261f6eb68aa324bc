"""Every number in the pages is generated from a committed file, or is no measurement and says why."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from scripts import pages
from scripts.page_numbers import Number, filled, names_in, without_marks
from scripts.page_numbers.registry import NUMBERS
from scripts.page_numbers.sources import ROOT
from tests.docs.prose import Found, numbers

ALLOWED: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "allowed_numbers.yaml").read_text(encoding="utf-8")
)
CHECKED = [*pages.all_pages(), ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
HELP = "write it as <span data-n=...> (scripts/page_numbers), or say in allowed_numbers.yaml why it is no measurement"


def allowed_on(page: str) -> list[str]:
    return [text for entry in ALLOWED for text in entry["texts"].get(page, ())]


def covers(text: str, found: Found) -> bool:
    """Whether an allowed text stands around a number."""
    places = [match.start() for match in re.finditer(re.escape(text), found.text)]
    return any(place <= found.start < place + len(text) for place in places)


def unbacked(page: str, text: str) -> Iterator[str]:
    for found in numbers(text):
        if not any(covers(one, found) for one in allowed_on(page)):
            yield f"{page}:{found.line}: {found.number} in “{found.around.strip()}”: {HELP}"


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_number_of_the_prose_is_without_a_source(page: Path) -> None:
    name = page.relative_to(ROOT).as_posix()
    assert list(unbacked(name, page.read_text(encoding="utf-8"))) == []


def test_every_allowed_number_is_still_there_and_says_why() -> None:
    for entry in ALLOWED:
        assert entry["why"]
        for page, texts in entry["texts"].items():
            found = numbers((ROOT / page).read_text(encoding="utf-8"))
            assert [text for text in texts if not any(covers(text, one) for one in found)] == [], page


@pytest.mark.parametrize("page", pages.all_pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_are_as_they_would_be_written(page: Path) -> None:
    assert pages.written(page) == page.read_text(encoding="utf-8"), "run: make pages"


def test_every_source_is_committed_and_every_number_is_shown() -> None:
    tracked = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines())
    if not tracked:
        pytest.skip("this is no clone: a source distribution has no list of committed files")
    folders = {Path(name).parent.as_posix() for name in tracked}
    assert {n.source for n in NUMBERS.values()} - tracked - folders == set()
    shown = {name for page in pages.all_pages() for name in names_in(page.read_text(encoding="utf-8"))}
    assert sorted(set(NUMBERS) - shown) == [], "numbers of the registry that no page shows"


PLANTED = [
    "The splice is 3.4 times as fast.",
    "It takes 12 ms.",
    "The correlation is 0.96 for single latents.",
    "About 70 % of the latents are dense.",
    "- at L0 33, it is\n- lower by a third of the loss\n",
    "| a | b |\n|---|---|\n| speed | 1.8 |\n",
    "It needs **250 MB** for a text.",
    "[It takes 5 minutes](other.md)",
    "A step takes twice as long.",
    "Loading takes a minute.",
    "    an indented line of 17 requests",
    "<p>about 41 x</p>",
    "![a figure with 3,000 points](figure.png)",
    'It is <span data-n="a">0.94</span>, or 0.87.',
]


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("page", ["README.md", "docs/how-to/attribution.md", "docs/results.md"])
def test_a_planted_number_is_found(planted: str, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert list(unbacked(page, text)) == []
    assert list(unbacked(page, f"{text}\n\n{planted}\n")) != []


@pytest.mark.parametrize(
    "harmless",
    [
        "Gemma 2 2B with 16k latents (section 4.1, Table 1, arXiv 2408.05147) in bfloat16 at layer 12.",
        "`--rows 128` and [the table](https://example.org/3.5), TransformerLens 3.9 and Python 3.11 to 3.13.",
        "```text\n12.5 s\n```",
        "<!-- results: start -->\n| 0.5 | 1.8 |\n<!-- results: end -->",
        'It is <span data-n="a">0.94</span> there.',
    ],
)
def test_names_code_and_generated_numbers_are_none(harmless: str) -> None:
    assert numbers(harmless) == []


def test_a_placeholder_is_filled_from_its_file_and_looks_like_plain_text() -> None:
    given = {"a.b": Number("docs/attribution.json", lambda facts: facts["settings"]["steps"], "{:,} steps")}
    page = '<span data-n="a.b">7</span> at the start of a line,\nor <span data-n="a.b"></span>.'
    made = filled(page, given)
    steps = given["a.b"].value(yaml.safe_load((ROOT / "docs/attribution.json").read_text(encoding="utf-8")))
    plain = f"{steps} steps at the start of a line,\nor {steps} steps."
    assert without_marks(made) == plain and filled(made, given) == made
    python_markdown = pytest.importorskip("markdown", reason="the extra docs is not installed")
    for render in (MarkdownIt("commonmark").render, python_markdown.markdown):  # GitHub's dialect and MkDocs's
        assert re.sub(r"</?span[^>]*>", "", render(made)) == render(plain)


def test_wrong_placeholders_and_values_are_errors() -> None:
    with pytest.raises(KeyError, match=r"attribution\.res\.gradient"):
        filled('<span data-n="attribution.res.gradiant">1</span>', NUMBERS)
    for broken in ('<span data-n="a">1', "<span data-n='a'>1</span>", '<span data-n="a">1<b>2</b></span>'):
        with pytest.raises(ValueError, match="placeholder"):
            filled(broken, NUMBERS)
    with pytest.raises(ValueError, match="nan"):
        Number("docs/attribution.json", lambda _: float("nan")).text()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Number("docs/nowhere.json", lambda _: 1).text()
