"""A griffe extension for the documentation site, which converts doctests and headings of docstrings to Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_LITERAL = re.compile(r"::[ ]*$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring after it has been read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Doctests in fences, simple reStructuredText tables as code, and ``::`` before a block as a colon."""
    out: list[str] = []
    fence: str | None = None
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        if fence is None and line.lstrip().startswith(">>> "):
            fence = indent
            out.append(f"{indent}```pycon")
        elif fence is not None and not line.strip():
            out.append(f"{fence}```")
            fence = None
        out.append(line)
    if fence is not None:
        out.append(f"{fence}```")
    return _LITERAL.sub(":", _returns_as_text(_tables_as_code("\n".join(out))))


def _returns_as_text(text: str) -> str:
    """Make the description of return values plain text, because griffe takes the words before a colon for a type."""
    head, found, rest = text.partition("\nReturns:\n")
    if not found:
        return text
    body = re.match(r"(?:[ ]+.*\n|\n)*(?:[ ]+.*)?", rest)
    assert body is not None  # an empty match at least
    return f"{head}\n**Returns:**\n\n{textwrap.dedent(body[0]).rstrip()}\n\n{rest[body.end() :]}"


def _tables_as_code(text: str) -> str:
    """A simple table, from its first rule of ``=`` to its last, in a fence."""
    lines = text.split("\n")
    rules = [number for number, line in enumerate(lines) if re.fullmatch(r"=+( +=+)+", line)]
    if len(rules) < 2:
        return text
    first, last = rules[0], rules[-1]
    return "\n".join([*lines[:first], "```text", *lines[first : last + 1], "```", *lines[last + 1 :]])
