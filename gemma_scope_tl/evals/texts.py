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
        source: a ``.txt`` file (one text), a ``.jsonl`` file (an object with ``column`` per line), or a data set's
            name, with its configuration after a colon (``"monology/pile-uncopyrighted"``, ``"wikitext:wikitext-2-v1"``)
            and streamed; None for the bundled held-out text.
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
    if path.suffix == ".txt":
        yield {column: _content(path)}
    elif path.suffix in (".jsonl", ".json"):
        yield from _lines(path)
    else:
        yield from _dataset(str(source), split)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GemmaScopeError(f"Cannot read {path} as UTF-8 text: {error}") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_content(path).splitlines(), 1):
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
