"""Numbers in the prose of pages, filled in from committed files.

In a page a number stands as ``<span data-n="attribution.res.gradient.pearson">0.94</span>``. GitHub, PyPI and MkDocs
show the number alone. A span is inline wherever it stands, whereas a comment at the beginning of a line would begin a
block of HTML. :data:`scripts.page_numbers.registry.NUMBERS` says which file each number comes from, and how it is
shown; ``make pages`` fills all pages, and a test asserts that they are filled.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from scripts.page_numbers.sources import read

_SPAN = re.compile(r'<span data-n="([^"]*)">([^<]*)</span>')
_OPENING = "<span data-n"


class Number(NamedTuple):
    """Where a number comes from.

    Attributes:
        source: path of a committed file, from the root of the repository.
        value: takes what the file holds and returns the number, a text, or a tuple of them.
        form: format of the value, or of the values of a tuple.
    """

    source: str
    value: Callable[[Any], Any]
    form: str = "{}"

    def text(self) -> str:
        """The number as it stands in a page, with a space before a sign of per cent.

        Raises:
            FileNotFoundError: the source does not exist.
            ValueError: it holds no such number (the value is not finite).
        """
        value = self.value(read(self.source))
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(one, float) and not math.isfinite(one) for one in values):
            raise ValueError(f"{self.source} gives {value} where a page shows a number")
        return re.sub(r"(?<=\d)%", " %", self.form.format(*values))


def filled(page: str, numbers: Mapping[str, Number]) -> str:
    """``page`` with the present value in every placeholder.

    Raises:
        KeyError: a placeholder names no number; the message gives the nearest names.
        ValueError: a placeholder is not of the form that this module states.
    """
    if page.count(_OPENING) != len(_SPAN.findall(page)):
        raise ValueError('a placeholder is not written as <span data-n="name">text</span>, on one line')

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in numbers:
            near = ", ".join(difflib.get_close_matches(name, numbers, cutoff=0.3)) or "none"
            raise KeyError(f"no number is named {name!r}; near it: {near}")
        return f'<span data-n="{name}">{numbers[name].text()}</span>'

    return _SPAN.sub(made, page)


def names_in(page: str) -> list[str]:
    """The names of the placeholders of a page."""
    return [name for name, _ in _SPAN.findall(page)]


def without_marks(page: str) -> str:
    """``page`` with its numbers as plain text."""
    return _SPAN.sub(r"\2", page)
