"""The tables of docs/paper.md that set two recipes side by side are those of the results."""

import re
from pathlib import Path

import pytest

from benchmarks.frontier import load_points

PAGE = Path(__file__).parents[2] / "docs" / "paper.md"
METRICS = ("FVU", "delta loss")


def tables(markdown: str) -> list[list[list[str]]]:
    """The cells of every table of the page that begins with a column ``L0``, without header."""
    found = re.findall(r"\| L0 \|.*\n\|[-:| ]+\|\n((?:\|.*\|\n)+)", markdown)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()] for body in found]


@pytest.mark.parametrize(("number", "name"), [(0, "pareto"), (1, "smollm2_pareto")])
def test_the_page_has_the_numbers_of_the_results(number: int, name: str) -> None:
    rows = {row["what"]: row for row in load_points(name)["rows"]}
    table = tables(PAGE.read_text(encoding="utf-8"))[number]
    assert 2 * len(table) == len(rows)
    for l0, *cells in table:
        for metric, ours, theirs in zip(METRICS, cells[::2], cells[1::2], strict=True):
            (row,) = [row for what, row in rows.items() if what.startswith(f"{metric} at L0 {l0},")]
            assert (row["ours"], row["theirs"]) == (ours, theirs), (metric, l0)
