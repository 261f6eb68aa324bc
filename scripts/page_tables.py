"""Tables that are made from data: formatting them, and inserting them into a page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """Replace the text between ``<!-- NAME: start -->`` and ``<!-- NAME: end -->`` in ``page`` by ``tables``.

    Raises:
        KeyError: a marker of the page has no table.
        ValueError: the page does not have exactly one marker for a table.
    """
    for name in tables:
        if page.count(f"<!-- {name}: start -->") != 1 or page.count(f"<!-- {name}: end -->") != 1:
            raise ValueError(f"the page must have the marker {name!r} once")

    def made(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name}: start -->\n{tables[name]}\n<!-- {name}: end -->"

    return re.sub(r"<!-- (\w+): start -->\n.*?<!-- \1: end -->", made, page, flags=re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns except the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
