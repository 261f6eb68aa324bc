"""The site is complete: pages in its navigation, public names in its reference, numbers from their file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import gemma_scope_tl as gs
from scripts import hardware_table
from scripts.site_docstrings import as_markdown
from scripts.site_hooks import on_page_content, on_page_markdown

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


class _Loader(yaml.SafeLoader):
    """MkDocs's configuration may name Python objects, which do not matter here."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
CONFIG: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [leaf for value in values for leaf in _leaves(value)]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = _leaves(CONFIG["nav"])
    there = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(listed) == there


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))
    documented = set(re.findall(r"^::: gemma_scope_tl\.(\w+)$", text, flags=re.MULTILINE))
    missing = [name for name in gs.__all__ if name not in documented and name != "__version__"]
    assert missing == [], "add `::: gemma_scope_tl.NAME` to a page of docs/api"
    listed = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    assert [name for name in gs.__all__ if f"`{name}`" not in listed and f"gs.{name}" not in listed] == []


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(site.rglob("*.html"))
    assert len(pages) == len(_leaves(CONFIG["nav"])) + 1  # and the one for what is not found
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="?https?://', text), page.name
        assert not re.findall(r'<link[^>]*rel="?stylesheet"?[^>]*https?://', text), page.name
        assert ":func:" not in text and ":class:" not in text, page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?https?://", style.read_text(encoding="utf-8")), style.name
    assert "JumpReLU" in (site / "api" / "saes.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_and_images_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_hardware_page_is_made_from_its_file_and_that_by_the_script() -> None:
    data = json.loads(hardware_table.DATA.read_text(encoding="utf-8"))
    page = hardware_table.PAGE.read_text(encoding="utf-8")
    assert json.loads(json.dumps(hardware_table.numbers())) == data
    assert hardware_table.with_tables(page, data) == page
    data["models"][0]["parameters"] = 77e9
    assert "77.00 billion" in hardware_table.with_tables(page, data)
    with pytest.raises(ValueError, match="models"):
        hardware_table.with_tables(page.replace("<!-- models: start -->", ""), data)


def test_hardware_agrees_with_what_was_released() -> None:
    """Sizes of files on the Hub, which the release states: 302 MB for 16k of 2B, 19.3 and 30.1 GB for 1m."""
    sizes = {(r["model"], r["width"]): r["bytes_float32"] for r in hardware_table.saes() if r["site"] == "res"}
    assert sizes["gemma-2-2b", "16k"] == pytest.approx(302e6, rel=5e-3)
    assert sizes["gemma-2-2b", "1m"] == pytest.approx(19.3e9, rel=5e-3)
    assert sizes["gemma-2-9b", "1m"] == pytest.approx(30.1e9, rel=5e-3)
    parameters = {r["model"]: r["parameters"] for r in hardware_table.models()}
    assert parameters["gemma-2-2b"] == pytest.approx(2.614e9, rel=1e-3)
    assert parameters["gemma-2-9b"] == pytest.approx(9.242e9, rel=1e-3)
    assert parameters["gemma-2-27b"] == pytest.approx(27.227e9, rel=1e-3)


class _Page:
    class file:
        src_uri = "how-to/load.md"


def test_links_out_of_the_site_become_paths_and_roles_links() -> None:
    text = "[a](../api/saes.md) [b](../../scripts/demo.py) ![c](../demo.png)"
    assert on_page_markdown(text, page=_Page) == "[a](../api/saes.md) `scripts/demo.py` ![c](../demo.png)"
    html = on_page_content(":func:<code>~gemma_scope_tl.circuit</code>")
    assert html == '<autoref optional identifier="gemma_scope_tl.circuit"><code>circuit</code></autoref>'


def test_docstrings_become_markdown() -> None:
    assert as_markdown("Text::\n\n    x = 1") == "Text:\n\n    x = 1"
    assert as_markdown(">>> f([1])\n[1]\n\nMore") == "```pycon\n>>> f([1])\n[1]\n```\n\nMore"
    assert as_markdown("a\n==== ===\nx    y\n==== ===") == "a\n```text\n==== ===\nx    y\n==== ===\n```"
    told = "f\n\nReturns:\n    A row: ``a``.\n\n    More.\n\nRaises:\n    X: y"
    assert as_markdown(told) == "f\n\n**Returns:**\n\nA row: ``a``.\n\nMore.\n\nRaises:\n    X: y"
