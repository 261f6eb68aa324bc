"""Texts to evaluate on: files, data sets of the ``datasets`` library, or the held-out text in the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.registry.locate import HELD_OUT_TEXT


def read_texts(source: str | PathLike[str] | None = None, column: str = "text", split: str = "train") -> Iterator[str]:
    """Texts one by one, read when asked for.

    Args:
        source: a ``.txt`` file (one text), a ``.jsonl`` file (an object with ``column`` per line), a ``.json`` file
            (the same, or a list of objects), or a data set's name, with its configuration after a colon
            (``"monology/pile-uncopyrighted"``, ``"wikitext:wikitext-2-v1"``) and streamed; None for the bundled
            held-out text.
        column: where the text is.
        split: of a data set.

    Raises:
        UnknownNameError: for a column that does not exist.
        GemmaScopeError: for a file that cannot be read, or a data set that cannot be had.
    """
    return (_text_of(record, column) for record in read_records(source, split, column))


def read_records(
    source: str | PathLike[str] | None = None, split: str = "train", column: str = "text"
) -> Iterator[dict[str, Any]]:
    """All columns of what :func:`read_texts` reads, record by record; a ``.txt`` file is one, with its ``column``.

    Raises:
        GemmaScopeError: for a file that cannot be read, or a data set that cannot be had.
    """
    path = HELD_OUT_TEXT if source is None else Path(source)
    kind = path.suffix.lower()
    if kind == ".txt":
        yield {column: _content(path)}
    elif kind in (".jsonl", ".json"):
        yield from _records(path)
    else:
        yield from _dataset(str(source), split)


def _content(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")  # editors on Windows write a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise GemmaScopeError(f"Cannot read {path} as UTF-8 text: {error}") from error
    if not content.strip():
        raise GemmaScopeError(f"{path} is empty: it holds no text.")
    return content


def _records(path: Path) -> Iterator[dict[str, Any]]:
    content = _content(path)
    if content.lstrip().startswith("["):
        try:
            listed: Any = json.loads(content)
        except json.JSONDecodeError as error:
            raise GemmaScopeError(f"{path} is not JSON: {error}") from error
        yield from (record if isinstance(record, dict) else {} for record in listed)
        return
    for number, line in enumerate(content.split("\n"), 1):  # other separators may stand inside a JSON string
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise GemmaScopeError(f"{path}, line {number}, is not JSON: {error}") from error
        yield record if isinstance(record, dict) else {}


def _dataset(name: str, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    path, _, config = name.partition(":")
    try:
        found: Any = load_dataset(path, config or None, split=split, streaming=True)
        yield from found
    except GemmaScopeError:
        raise
    except Exception as error:  # the library raises whatever its readers and the network raise
        raise GemmaScopeError(
            f"Cannot read the data set {name!r}, split {split!r}: {error} (A file's name ends in .txt or .jsonl.)"
        ) from error


def _text_of(record: Any, column: str) -> str:
    if not isinstance(record, dict) or column not in record:
        names = list(record) if isinstance(record, dict) else []
        raise unknown_name("column of texts", column, names)
    text = record[column]
    if not isinstance(text, str):
        raise GemmaScopeError(f"Column {column!r} holds {type(text).__name__}, not text.")
    return text
