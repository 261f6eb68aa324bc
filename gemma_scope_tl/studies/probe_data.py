"""Labelled text for probes: rows of tokens with their documents, and concepts of rows or of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.text.documents import read_records

PROSE = ("commentary", "docs", "factbook", "scripture", "shakespeare", "spanish", "wikipedia")
SHORTEST = 4  # tokens in a row, not counting BOS
_STRINGS = r"'''.*?'''|\"\"\".*?\"\"\"|'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\""
_CODE = re.compile(rf"(?P<string>{_STRINGS})|(?P<comment>#[^\n]*)", re.DOTALL)
_FIRST = re.compile(r"(?:(?<=[.!?]\s)|(?<=\A))\s*[A-ZÁÉÍÓÚÑ¿¡]\w*")
_LAST = re.compile(r"\w+(?=[.!?](?:\s|\Z))")


@dataclass(frozen=True)
class Concept:
    """A property that a row or a token has or lacks.

    Attributes:
        name: name of the property in tables.
        labels: 1, 0, or -1 where the property is undefined; ``[rows]``, or ``[rows, pos]`` for a property of tokens.
    """

    name: str
    labels: Int[torch.Tensor, "rows ..."]

    @property
    def of_tokens(self) -> bool:
        """Whether the concept is a property of tokens rather than rows."""
        return self.labels.ndim == 2


@dataclass(frozen=True)
class LabelledRows:
    """Rows of tokens with their documents and concepts.

    Attributes:
        tokens: BOS, tokens of one document, and padding, ``[rows, pos]``.
        documents: number of each row's document, ``[rows]``.
        kinds: label of each document.
        concepts: the properties to probe.
        groups: source of each document, such as its book or author; empty if each document is a source of its own.
    """

    tokens: Int[torch.Tensor, "rows pos"]
    documents: Int[torch.Tensor, " rows"]
    kinds: tuple[str, ...]
    concepts: tuple[Concept, ...]
    groups: tuple[Hashable, ...] = ()

    def chosen(self, names: Sequence[str]) -> LabelledRows:
        """The same rows with only the named concepts.

        Raises:
            UnknownNameError: a concept does not exist.
        """
        known = {concept.name: concept for concept in self.concepts}
        for name in names:
            if name not in known:
                raise unknown_name("concept", name, known)
        return replace(self, concepts=tuple(known[name] for name in names))


def bundled_concepts(tokenizer: Any, context: int = 64, rows: int = 64) -> LabelledRows:
    """The bundled held-out text with concepts of several kinds, and the source of each document.

    Concepts of rows are each domain against all others, and Spanish against other prose. Concepts of tokens are, in
    code, whether the token is in a string or in a comment (found by a regular expression, which misreads a piece of a
    file that begins inside a string) and, in prose, whether the token is in the first or the last word of a sentence.

    Args:
        tokenizer: tokenizer of the model.
        context: number of tokens in a row, BOS included.
        rows: maximum number of rows of a document.
    """
    records = list(read_records())
    pairs = [(str(record["text"]), str(record["domain"])) for record in records]
    sources = [f"{record['domain']}: {record['source']}" for record in records]
    spans = {
        "code: in a string": (("code",), lambda text: _named(text, "string")),
        "code: in a comment": (("code",), lambda text: _named(text, "comment")),
        "sentence: first word": (PROSE, lambda text: [m.span() for m in _FIRST.finditer(text)]),
        "sentence: last word": (PROSE, lambda text: [m.span() for m in _LAST.finditer(text)]),
    }
    labelled = labelled_rows(tokenizer, pairs, context, rows, "domain", spans, groups=sources)
    kinds = [labelled.kinds[number] for number in labelled.documents.tolist()]
    spanish = torch.tensor([int(kind == "spanish") if kind in PROSE else -1 for kind in kinds])
    concepts = (*labelled.concepts, Concept("language: Spanish among prose", spanish))
    return replace(labelled, concepts=concepts)


def read_labelled(
    source: str | None, column: str = "text", label: str = "label", split: str = "train", documents: int = 200
) -> list[tuple[str, str]]:
    """Texts and labels of a file or data set, the first ``documents`` of each label.

    Args:
        source, split: as :func:`~gemma_scope_tl.text.documents.read_texts` takes them.
        column, label: names of the columns with the text and its label; a label may be a number.
        documents: maximum number of documents for each label. The data are read to the end, because a label may first
            appear late.

    Raises:
        UnknownNameError: a column does not exist.
        GemmaScopeError: a value is not text.
    """
    return [(text, kind) for text, kind, _ in _first_of_each(source, split, (column, label), documents)]


def read_grouped(
    source: str | None,
    group: str,
    column: str = "text",
    label: str = "label",
    split: str = "train",
    documents: int = 200,
) -> tuple[list[tuple[str, str]], list[str]]:
    """As :func:`read_labelled`, and the column ``group`` of each document: its source, for :func:`labelled_rows`."""
    found = _first_of_each(source, split, (column, label, group), documents)
    return [(text, kind) for text, kind, _ in found], [name for *_, name in found]


def _first_of_each(
    source: str | None, split: str, columns: tuple[str, ...], documents: int
) -> list[tuple[str, str, str]]:
    """Text, label and last column of the first documents of each label."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for record in read_records(source, split):
        for name in columns:
            if name not in record:
                raise unknown_name("column", name, record)
        text, kind = record[columns[0]], str(record[columns[1]])
        if not isinstance(text, str):
            raise GemmaScopeError(f"Column {columns[0]!r} contains {type(text).__name__}, not text.")
        kept = found.setdefault(kind, [])
        if len(kept) < documents:
            kept.append((text, kind, str(record[columns[-1]])))
    return [entry for kept in found.values() for entry in kept]


def labelled_rows(
    tokenizer: Any,
    pairs: Iterable[tuple[str, str]],
    context: int = 64,
    rows: int = 64,
    what: str = "label",
    spans: Mapping[str, tuple[Sequence[str], Callable[[str], list[tuple[int, int]]]]] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> LabelledRows:
    """Labelled documents as rows of tokens; each label against all others is a concept.

    Args:
        tokenizer: tokenizer of the model; with ``spans`` it must be a fast one.
        pairs: text and label of each document.
        context: number of tokens in a row, BOS included.
        rows: maximum number of rows of a document. The last row is padded, or left out if it has fewer than 4 tokens.
        what: kind of the labels, such as ``"domain"``, which is a part of the concepts' names.
        spans: concepts of tokens by name: the labels for which each is defined, and a function that finds the spans of
            characters that have the property. A token is in a span if its first non-blank character is.
        groups: source of each document, such as its book, article or author. Documents of one source are all training
            or all test documents, and are resampled together; by default each document is a source of its own.

    Raises:
        GemmaScopeError: there is no tokenizer, there are fewer than two labels, the context is too small, or there are
            not as many groups as documents.
    """
    if tokenizer is None:
        raise GemmaScopeError("The model has no tokenizer.")
    if context <= SHORTEST:
        raise GemmaScopeError(f"A row needs BOS and {SHORTEST} tokens or more, so context cannot be {context}.")
    lines = _Lines(context - 1, rows, {name: [] for name in spans or {}})
    kinds: list[str] = []
    for given, kind in pairs:
        text = given.removeprefix(tokenizer.bos_token or "")  # the row has its own
        lines.add(tokenizer, len(kinds), text, kind, spans or {})
        kinds.append(kind)
    labels = list(dict.fromkeys(kinds))
    if len(labels) < 2:
        raise GemmaScopeError(f"A probe needs two labels or more, and the labels are {labels}.")
    if groups is not None and len(groups) != len(kinds):
        raise GemmaScopeError(
            f"There are {len(kinds)} documents, but {len(groups)} groups: give one for each document."
        )
    of_row = [kinds[number] for number in lines.documents]
    concepts = [Concept(f"{what}: {name}", torch.tensor([int(kind == name) for kind in of_row])) for name in labels]
    concepts = concepts[:1] if len(labels) == 2 else concepts  # the second is the negation of the first
    concepts += [Concept(name, torch.tensor(marks)) for name, marks in lines.marks.items()]
    found = (torch.tensor(lines.ids), torch.tensor(lines.documents), tuple(kinds), tuple(concepts))
    return LabelledRows(*found, groups=() if groups is None else tuple(groups))


@dataclass
class _Lines:
    """Rows of token ids as they are made from documents, with the marks of concepts of tokens."""

    body: int
    rows: int
    marks: dict[str, list[list[int]]]
    ids: list[list[int]] = field(default_factory=list[list[int]])
    documents: list[int] = field(default_factory=list[int])

    def add(self, tokenizer: Any, number: int, text: str, kind: str, spans: Mapping[str, Any]) -> None:
        """Add the rows of one document."""
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(spans))
        for start in range(0, min(len(encoded["input_ids"]), self.rows * self.body), self.body):
            part = encoded["input_ids"][start : start + self.body]
            if len(part) < SHORTEST:
                continue
            padding = self.body - len(part)
            self.ids.append([tokenizer.bos_token_id, *part, *[tokenizer.pad_token_id] * padding])
            self.documents.append(number)
            for name, (where, find) in spans.items():
                inside = [-1] * len(part)
                if kind in where:
                    inside = _inside(text, encoded["offset_mapping"][start : start + self.body], find(text))
                self.marks[name].append([-1, *inside, *[-1] * padding])


def _named(text: str, group: str) -> list[tuple[int, int]]:
    return [match.span() for match in _CODE.finditer(text) if match.lastgroup == group]


def _inside(text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """For each token, whether its first non-blank character lies in a span; -1 for tokens that are only blanks."""
    marked = bytearray(len(text) + 1)
    for start, stop in spans:
        marked[start:stop] = b"\x01" * (stop - start)
    found: list[int] = []
    for start, stop in offsets:
        letters = text[start:stop]
        blank = len(letters) - len(letters.lstrip())
        found.append(int(marked[start + blank]) if letters.strip() else -1)
    return found
