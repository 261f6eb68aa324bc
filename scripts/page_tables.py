"""Tables of pages that are made from data: how they are written, and where in a page they stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """``page`` with what stands between ``<!-- NAME: start -->`` and ``<!-- NAME: end -->`` replaced by ``tables``.

    Raises:
        KeyError: a marker in the page of which there is no table.
        ValueError: a table that the page does not show, or twice.
    """
    for name in tables:
        if page.count(f"<!-- {name}: start -->") != 1 or page.count(f"<!-- {name}: end -->") != 1:
            raise ValueError(f"the page must have the marker {name!r} once")

    def made(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name}: start -->\n{tables[name]}\n<!-- {name}: end -->"

    return re.sub(r"<!-- (\w+): start -->\n.*?<!-- \1: end -->", made, page, flags=re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
