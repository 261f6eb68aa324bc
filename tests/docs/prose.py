"""Numbers in the prose of a page: what is left without names, code, links, generated tables and placeholders.

A page is parsed by markdown-it, so that what counts as code or as a link is what a reader sees as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

PARSER = MarkdownIt("commonmark").enable("table")
_GENERATED = re.compile(r"<!-- (\w+): start -->.*?<!-- \1: end -->", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])(?:\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|½|¼|¾)(?:\s?%|\w*)")
"""A number with its unit where that follows without a space. Digits after a letter (`float32`, `L0`) are names."""
_COUNT = "two|three|four|five|six|seven|eight|nine|ten|twenty|thirty|hundred|thousand|million"
_WORDS = re.compile(
    r"\b(?:half (?:of|as|that)|(?:a|one|two) (?:thirds?|quarters?|fifths?|tenths?|hundredths?|thousandths?)"
    rf"|twice (?:as|the)|per cent|(?:{_COUNT}) times|(?:{_COUNT}) (?:seconds|minutes|hours|days|requests|packages)"
    r"|an? (?:minute|hour|day))\b",
    re.IGNORECASE,
)
"""Shares, factors and times in words."""
CODE = "`"
"""What stands for a code span in the text of a block."""

NAMES = {
    r"\bGemma(?: Scope)? [1-3](?: (?:and|or) [1-3])?\b(?!,\d)": "a model's or suite's name",
    r"\b(?:270M|(?:1|2|4|9|12|27)B)\b": "a model's name",
    r"\b(?:Qwen 2|GPT-3|SmolLM2-135M)\b": "a model's name",
    r"\b(?:16k|65k|131k|262k|524k|1m)\b": "a width's label, as in the folder names",
    r"\b(?:TransformerLens|SAELens|SAEBench|transformers|Python|PyTorch|NumPy|numpy|version|versions)"
    r"(?: below)? \d+(?:\.\d+)*(?: (?:to|and) \d+(?:\.\d+)*)?": "a version",
    r"\b[Ss]ections? \d+(?:\.\d+)*(?: and \d+(?:\.\d+)*)?": "a part of a text",
    r"\b(?:Table|Figure|Tutorial|figure|equation) \d+": "a part of a text, by its number",
    r"\bet al\. \d{4}\b": "a citation",
    r"\b95 % intervals?\b": "a level of confidence, which the code sets",
    r"\bexit status is \d(?:,| |\b)": "an exit status",
    r"\b[A-Z]\.\d\b|^4\.[1-7](?= [A-Za-z]{4}|,|$)": "an appendix or a section of the paper, in a cell",
    r"^\d\.? (?=[A-Z])": "the number of a step or of a tutorial",
    r"\b[Ll]ayers? \d+(?:(?:, \d+)* and \d+)?": "a layer, by its number",
    r"(?<=\()[45]\d\d(?=\))": "a status of HTTP",
    r"\b\d{4}\.\d{5}\b": "an arXiv id",
    r"\b\d{4}-\d\d-\d\d\b": "a date",
    r"\b\d+\.\d+\.\d+\.\d+\b": "an address",
    r"\bCC-BY-\d\.\d": "a licence",
}
"""Digits that belong to names, and why they are none of the numbers that this looks for."""


@dataclass(frozen=True)
class Found:
    """A number in prose: where, and the words around it."""

    line: int
    number: str
    around: str
    start: int
    text: str


def blocks(markdown: str) -> Iterator[tuple[int, str]]:
    """``(line, text)`` of each paragraph, cell and heading, without code, addresses, placeholders and made tables."""
    shown = _GENERATED.sub(lambda match: "\n" * match[0].count("\n"), markdown)
    line = 0
    for token in PARSER.parse(shown):
        line = token.map[0] + 1 if token.map else line
        if token.type == "inline":
            yield line, _text(token.children or [])
        elif token.type in ("html_block", "code_block"):  # pages fence their code, so an indented block is a loophole
            yield line, re.sub(r"<[^>]*>|<!--.*?-->", "", token.content, flags=re.DOTALL)


def _text(children: list[Token]) -> str:
    parts: list[str] = []
    placed = False
    for child in children:
        if child.type == "html_inline":
            placed = child.content.startswith("<span data-n=") or (placed and child.content != "</span>")
        elif placed:
            continue
        elif child.type in ("text", "image", "text_special"):
            parts.append(child.content)
        elif child.type == "code_inline":
            parts.append(CODE)
        elif child.type in ("softbreak", "hardbreak"):
            parts.append(" ")
    return "".join(parts)


def numbers(markdown: str) -> list[Found]:
    """Every number of a page's prose that belongs to no name, in digits, or a share, factor or time in words."""
    found: list[Found] = []
    for line, text in blocks(markdown):
        taken = [match.span() for name in NAMES for match in re.finditer(name, text)]
        for match in sorted([*_NUMBER.finditer(text), *_WORDS.finditer(text)], key=re.Match.start):
            if not any(start <= match.start() < end for start, end in taken):
                around = text[max(0, match.start() - 40) : match.end() + 40]
                found.append(Found(line, match[0], around, match.start(), text))
    return found
