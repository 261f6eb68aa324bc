"""Write every table and number that pages take from committed files: README.md and docs/.

    python -m scripts.pages            # write
    python -m scripts.pages --check    # only say which pages are not as they would be written

Nothing is measured or trained. ``python -m scripts.artefacts`` makes what the pages are made from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.pages import with_page_tables, with_readme_table
from gemma_scope_tl.files import write_atomically
from scripts import (
    hardware_table,
    interventions_table,
    paper_tables,
    plan_cluster,
    plan_tables,
    preset_table,
    release_table,
    results_page,
    study_page,
)
from scripts.page_numbers import filled
from scripts.page_numbers.registry import NUMBERS
from scripts.page_numbers.sources import ROOT
from scripts.page_tables import with_tables


def _hardware(page: str) -> str:
    return hardware_table.with_tables(page, json.loads(hardware_table.DATA.read_text(encoding="utf-8")))


def _clusters(page: str) -> str:
    return plan_tables.with_tables(page, json.loads(plan_cluster.PLAN.read_text(encoding="utf-8")))


TABLES: dict[str, Callable[[str], str]] = {
    "README.md": with_readme_table,
    "docs/benchmarks.md": with_page_tables,
    "docs/results.md": results_page.with_table,
    "docs/studies.md": study_page.with_all_tables,
    "docs/attribution-checks.md": lambda page: with_tables(page, interventions_table.tables()),
    "docs/hardware.md": _hardware,
    "docs/clusters.md": _clusters,
    "docs/how-to/load.md": lambda page: with_tables(page, release_table.tables()),
    "docs/how-to/train.md": lambda page: with_tables(page, preset_table.tables()),
    "docs/paper.md": lambda page: with_tables(page, paper_tables.tables()),
}
"""Page to the function that puts its tables in."""


def all_pages() -> list[Path]:
    """The pages in which numbers are filled in."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written(page: Path) -> str:
    """The text of a page with its present tables and numbers.

    Raises:
        KeyError, ValueError: a placeholder or marker of the page is wrong; the message names the page.
    """
    name = page.relative_to(ROOT).as_posix()
    text = page.read_text(encoding="utf-8")
    try:
        return filled(TABLES.get(name, str)(text), NUMBERS)
    except (KeyError, ValueError) as error:
        raise type(error)(f"{name}: {error.args[0]}") from error


def main(arguments: list[str]) -> int:
    """Write all pages, or say which would change."""
    changed = [page for page in all_pages() if written(page) != page.read_text(encoding="utf-8")]
    if "--check" in arguments:
        for page in changed:
            print(f"{page.relative_to(ROOT)} is not as `make pages` writes it")
        return 1 if changed else 0
    for page in changed:
        write_atomically(page, written(page))
        print(f"wrote {page.relative_to(ROOT)}")
    print(f"{len(all_pages())} pages, {len(changed)} of them changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
