"""Examples of two pages that are run in one folder do not write over each other."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, pages

WRITES = (
    r'save_sae\([^,]+, f?"([\w-]+)',
    r'export_suite\([^,]+, f?"([\w-]+)',
    r'export_suite\(\s+CONFIG\["output"\],\s+"([\w-]+)',
    r'^\s+"output": "([\w-]+)"',
    r"gemma-scope export \S+ ([\w-]+)",
    r"gemma-scope registry new (?:[\w-]+/)?([\w-]+)",
)
TUTORIALS = sorted((ROOT / "tutorials" / "source").glob("*.py"))


def written(text: str) -> set[str]:
    """The folders, and releases, that the examples of a text write."""
    return {name for pattern in WRITES for name in re.findall(pattern, text, flags=re.MULTILINE)}


def examples() -> dict[str, set[str]]:
    """Page to what it writes. Tutorials, which go on with one run, count as one; the README has no whole example."""
    found = {str(p.relative_to(ROOT)): written(p.read_text("utf-8")) for p in pages() if p.name != "README.md"}
    found["CONTRIBUTING.md"] = written((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    found["tutorials"] = set().union(*(written(path.read_text(encoding="utf-8")) for path in TUTORIALS))
    return {page: names for page, names in found.items() if names}


EXAMPLES = examples()


@pytest.mark.parametrize(("one", "other"), combinations(EXAMPLES, 2), ids=lambda page: Path(page).stem)
def test_two_pages_write_different_folders(one: str, other: str) -> None:
    assert EXAMPLES[one] & EXAMPLES[other] == set()


def test_what_the_pages_write_is_found() -> None:
    assert EXAMPLES["tutorials"] == {"tutorial-suite", "tutorial-saes"}
    assert {"my-saes"} <= EXAMPLES["docs/publish.md"] and {"trained-suite"} <= EXAMPLES["docs/how-to/train.md"]
    assert {"shared-saes", "shared-suite"} <= EXAMPLES["docs/how-to/contribute.md"]
    assert "contributed-saes" in EXAMPLES["CONTRIBUTING.md"] and "tuned-suite" in EXAMPLES["docs/coming-from.md"]
