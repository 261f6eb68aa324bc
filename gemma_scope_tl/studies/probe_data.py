"""Labelled text for probes: rows of tokens with their documents, and concepts of rows or of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    """

    tokens: Int[torch.Tensor, "rows pos"]
    documents: Int[torch.Tensor, " rows"]
    kinds: tuple[str, ...]
    concepts: tuple[Concept, ...]

    def chosen(self, names: Sequence[str]) -> LabelledRows:
        """The same rows with only the named concepts.

        Raises:
            UnknownNameError: a concept does not exist.
        """
        known = {concept.name: concept for concept in self.concepts}
        for name in names:
            if name not in known:
                raise unknown_name("concept", name, known)
        return LabelledRows(self.tokens, self.documents, self.kinds, tuple(known[name] for name in names))


def bundled_concepts(tokenizer: Any, context: int = 64, rows: int = 64) -> LabelledRows:
    """The bundled held-out text with concepts of several kinds.

    Concepts of rows are each domain against all others, and Spanish against other prose. Concepts of tokens are, in
    code, whether the token is in a string or in a comment (found by a regular expression, which misreads a piece of a
    file that begins inside a string) and, in prose, whether the token is in the first or the last word of a sentence.

    Args:
        tokenizer: tokenizer of the model.
        context: number of tokens in a row, BOS included.
        rows: maximum number of rows of a document.
    """
    pairs = [(str(record["text"]), str(record["domain"])) for record in read_records()]
    spans = {
        "code: in a string": (("code",), lambda text: _named(text, "string")),
        "code: in a comment": (("code",), lambda text: _named(text, "comment")),
        "sentence: first word": (PROSE, lambda text: [m.span() for m in _FIRST.finditer(text)]),
        "sentence: last word": (PROSE, lambda text: [m.span() for m in _LAST.finditer(text)]),
    }
    labelled = labelled_rows(tokenizer, pairs, context, rows, "domain", spans)
    kinds = [labelled.kinds[number] for number in labelled.documents.tolist()]
    spanish = torch.tensor([int(kind == "spanish") if kind in PROSE else -1 for kind in kinds])
    concepts = (*labelled.concepts, Concept("language: Spanish among prose", spanish))
    return LabelledRows(labelled.tokens, labelled.documents, labelled.kinds, concepts)


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
    found: dict[str, list[tuple[str, str]]] = {}
    for record in read_records(source, split):
        for name in (column, label):
            if name not in record:
                raise unknown_name("column", name, record)
        text, kind = record[column], str(record[label])
        if not isinstance(text, str):
            raise GemmaScopeError(f"Column {column!r} contains {type(text).__name__}, not text.")
        kept = found.setdefault(kind, [])
        if len(kept) < documents:
            kept.append((text, kind))
    return [pair for kept in found.values() for pair in kept]


def labelled_rows(
    tokenizer: Any,
    pairs: Iterable[tuple[str, str]],
    context: int = 64,
    rows: int = 64,
    what: str = "label",
    spans: Mapping[str, tuple[Sequence[str], Callable[[str], list[tuple[int, int]]]]] | None = None,
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

    Raises:
        GemmaScopeError: there is no tokenizer, there are fewer than two labels, or the context is too small.
    """
    if tokenizer is None:
        raise GemmaScopeError("The model has no tokenizer.")
    if context <= SHORTEST:
        raise GemmaScopeError(f"A row needs BOS and {SHORTEST} tokens or more, so context cannot be {context}.")
    asked = spans or {}
    ids: list[list[int]] = []
    documents: list[int] = []
    kinds: list[str] = []
    marks: dict[str, list[list[int]]] = {name: [] for name in asked}
    body = context - 1
    for given, kind in pairs:
        text = given.removeprefix(tokenizer.bos_token or "")  # the row has its own
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(asked))
        for start in range(0, min(len(encoded["input_ids"]), rows * body), body):
            part = encoded["input_ids"][start : start + body]
            if len(part) < SHORTEST:
                continue
            ids.append([tokenizer.bos_token_id, *part, *[tokenizer.pad_token_id] * (body - len(part))])
            documents.append(len(kinds))
            for name, (where, find) in asked.items():
                if kind in where:
                    inside = _inside(text, encoded["offset_mapping"][start : start + body], find(text))
                    marks[name].append([-1, *inside, *[-1] * (body - len(part))])
                else:
                    marks[name].append([-1] * context)
        kinds.append(kind)
    labels = list(dict.fromkeys(kinds))
    if len(labels) < 2:
        raise GemmaScopeError(f"A probe needs two labels or more, and the labels are {labels}.")
    of_row = [kinds[number] for number in documents]
    concepts = [Concept(f"{what}: {name}", torch.tensor([int(kind == name) for kind in of_row])) for name in labels]
    concepts = concepts[:1] if len(labels) == 2 else concepts  # the second is the negation of the first
    concepts += [Concept(name, torch.tensor(lines)) for name, lines in marks.items()]
    return LabelledRows(torch.tensor(ids), torch.tensor(documents), tuple(kinds), tuple(concepts))


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
