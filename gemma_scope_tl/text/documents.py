"""Reading of documents for training and evaluation from the Hub, files, folders, or objects in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, cast

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.files import is_file, is_folder
from gemma_scope_tl.registry.locate import HELD_OUT_TEXT

DocumentBatch = list[Any]
"""Texts, or lists of token ids."""

_BATCH = 128
_BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = {".gz", ".xz", ".bz2", ".zst"}
_TOKEN_COLUMNS = ("tokens", "input_ids")
_ENDS = 1 << 20  # bytes at each end of a file that are hashed to identify it


@dataclass(frozen=True)
class Documents:
    """A sequence of documents that can be read from any position.

    Attributes:
        source: a text that identifies the documents, equal for equal documents. None if unknown before reading.
        tokenised: whether the documents are token ids already.
        total: number of documents, if known.
        read: function that yields batches of documents from a given document number. If ``source`` is None, it works
            once, from 0.
    """

    source: str | None
    tokenised: bool
    total: int | None
    read: Callable[[int], Iterator[DocumentBatch]]


def open_documents(
    data: Any,
    *,
    column: str | None = None,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
) -> Documents:
    """Open documents for reading.

    Args:
        data: the name of a dataset on the Hub; a ``.jsonl``, ``.json``, ``.txt`` (one document per line, empty lines
            are skipped), ``.parquet`` or ``.csv`` file, also compressed, or a folder of such files; a folder from
            ``save_to_disk``; a ``datasets`` object; or a list or an iterator of texts.
        column: name of the column; by default ``text``, else ``tokens`` or ``input_ids`` (token ids).
        split: split of a dataset that has splits.
        config, revision: configuration and revision of a dataset on the Hub.
        streaming: whether to read a dataset of the Hub during its download; False downloads it first.

    Raises:
        GemmaScopeError: when ``data`` is empty, cannot be read, or is of another kind.
        UnknownNameError: for a column or split that does not exist.
    """
    if isinstance(data, (str, os.PathLike)):
        name = os.fspath(cast("str | os.PathLike[str]", data))
        if is_folder(name) or is_file(name):
            dataset, source = _local(Path(name), split)
        else:
            dataset = _hub(name, config=config, split=split, revision=revision, streaming=streaming)
            source = f"hub {name} config={config} split={split} revision={revision}"
        return _from_dataset(dataset, source, column)
    if hasattr(data, "column_names"):  # a Dataset, IterableDataset, or a dictionary of them
        dataset = _pick(data, split)
        return _from_dataset(dataset, _fingerprint(dataset), column)
    if isinstance(data, Sequence):
        return _from_list(cast("Sequence[Any]", data))
    if isinstance(data, Iterable):
        return _from_iterator(cast("Iterable[Any]", data))
    raise GemmaScopeError(
        f"Documents must be a name on the Hub, a file, a folder, a dataset or texts, not {type(data).__name__}."
    )


def _from_list(texts: Sequence[Any]) -> Documents:
    if not texts:
        raise GemmaScopeError("No texts were given.")
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        encoded = _checked([text], number)[0].encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)

    def read(start: int) -> Iterator[DocumentBatch]:
        for at in range(start, len(texts), _BATCH):
            yield list(texts[at : at + _BATCH])

    return Documents(f"texts sha256={digest.hexdigest()}", False, len(texts), read)


def _from_iterator(texts: Iterable[Any]) -> Documents:
    iterator = iter(texts)

    def read(start: int) -> Iterator[DocumentBatch]:
        while batch := list(islice(iterator, _BATCH)):
            yield _checked(batch, start)
            start += len(batch)

    return Documents(None, False, None, read)


def _from_dataset(dataset: Any, source: str | None, column: str | None) -> Documents:
    try:
        first: dict[str, Any] | None = next(iter(dataset), None)
    except Exception as error:  # datasets, pyarrow and file systems raise errors of many types
        raise GemmaScopeError(f"The documents cannot be read: {error}") from error
    if first is None:
        raise GemmaScopeError("The dataset has no rows.")
    chosen = column or next((name for name in ("text", *_TOKEN_COLUMNS) if name in first), None)
    if chosen is None or chosen not in first:
        raise unknown_name("column", column or "text", first, "Give the column of the documents as column=.")
    tokenised = not isinstance(first[chosen], str)
    narrow = dataset.select_columns([chosen])

    def read(start: int) -> Iterator[DocumentBatch]:
        try:
            for number, batch in enumerate((narrow.skip(start) if start else narrow).iter(batch_size=_BATCH)):
                found = list(batch[chosen])
                yield found if tokenised else _checked(found, start + number * _BATCH)
        except GemmaScopeError:
            raise
        except Exception as error:  # as above, and interrupted downloads
            raise GemmaScopeError(f"Reading the documents failed: {error}") from error

    total = len(dataset) if hasattr(dataset, "__len__") else None
    return Documents(source and f"{source} column={chosen}", tokenised, total, read)


def _pick(dataset: Any, split: str) -> Any:
    if not isinstance(dataset, Mapping):
        return dataset
    splits = cast("Mapping[str, Any]", dataset)
    if split not in splits:
        raise unknown_name("split", split, splits)
    return splits[split]


def _fingerprint(dataset: Any) -> str | None:
    """The fingerprint from ``datasets``; None for an IterableDataset."""
    found = getattr(dataset, "_fingerprint", None)
    return found and f"dataset {found}"


def _local(path: Path, split: str) -> tuple[Any, str | None]:
    """The dataset in a file or folder, and a text that identifies it independently of the path."""
    import datasets

    try:
        if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            saved = _pick(datasets.load_from_disk(str(path)), split)
            return saved, _fingerprint(saved)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if _suffix(file) in _BUILDERS]
        kinds = {_BUILDERS[_suffix(file)] for file in files}
        if len(kinds) != 1:
            raise GemmaScopeError(f"{path} has no files of one of these kinds: {', '.join(_BUILDERS)}.")
        kind = kinds.pop()
        names = [str(file) for file in files]
        dataset: Any = datasets.load_dataset(kind, data_files=names, split="train", streaming=True)
        if kind == "text":
            dataset = dataset.filter(_has_text)
        return dataset, "files " + " ".join(_file_id(file) for file in files)
    except GemmaScopeError:
        raise
    except Exception as error:  # datasets and pyarrow raise errors of many types
        raise GemmaScopeError(f"Cannot read documents from {path}: {error}") from error


def _hub(name: str, **options: Any) -> Any:
    import datasets

    config = options.pop("config")
    try:
        return datasets.load_dataset(name, config, **options)
    except Exception as error:  # errors of the Hub, the network or a builder
        raise GemmaScopeError(
            f"{name[:200]!r} is not an existing file or folder, and cannot be opened as a dataset of the Hub: {error}\n"
            "Put a single text into a list."
        ) from error


def _has_text(row: Mapping[str, str]) -> bool:
    return bool(row["text"].strip())


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _file_id(path: Path) -> str:
    """Name, size, and a hash of both ends, because reading all of a large corpus at every start would take minutes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_ENDS)
        file.seek(max(size - _ENDS, 0))
        digest = hashlib.sha256(head + file.read(_ENDS)).hexdigest()
    return f"{path.name}:{size}:{digest[:32]}"


def _checked(texts: DocumentBatch, first: int) -> DocumentBatch:
    """Return the texts, the first of which has the number ``first`` among all documents."""
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            given = f"{type(text).__name__}: {str(text)[:80]!r}"
            raise GemmaScopeError(f"Documents must be texts, not {given} (document {number}).")
    return texts


def read_texts(source: str | PathLike[str] | None = None, column: str = "text", split: str = "train") -> Iterator[str]:
    """Iterate over texts, which are read lazily.

    Args:
        source: a ``.txt`` file (one text), a ``.jsonl`` file (an object with ``column`` per line), a ``.json`` file
            (the same, or a list of objects), or the name of a data set, with its configuration after a colon
            (``"monology/pile-uncopyrighted"``, ``"wikitext:wikitext-2-v1"``), which is streamed; None for the bundled
            held-out text.
        column: name of the column with the text.
        split: split of a data set.

    Raises:
        UnknownNameError: for a column that does not exist.
        GemmaScopeError: for a file that cannot be read, or a data set that cannot be loaded.
    """
    return (_text_of(record, column) for record in read_records(source, split, column))


def read_records(
    source: str | PathLike[str] | None = None, split: str = "train", column: str = "text"
) -> Iterator[dict[str, Any]]:
    """Iterate over records with all columns, from the sources of :func:`read_texts`. A ``.txt`` file is one record.

    Raises:
        GemmaScopeError: for a file that cannot be read, or a data set that cannot be loaded.
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
        content = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise GemmaScopeError(f"Cannot read {path} as UTF-8 text: {error}") from error
    if not content.strip():
        raise GemmaScopeError(f"{path} is empty: it has no text.")
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
    for number, line in enumerate(
        content.split("\n"), 1
    ):  # splitlines() would also split at separators inside JSON strings
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
    except Exception as error:  # errors of the Hub, the network or a reader
        raise GemmaScopeError(
            f"Cannot read the data set {name!r}, split {split!r}: {error} (A file's name ends in .txt or .jsonl.)"
        ) from error


def _text_of(record: Any, column: str) -> str:
    if not isinstance(record, dict) or column not in record:
        names = list(record) if isinstance(record, dict) else []
        raise unknown_name("column of texts", column, names)
    text = record[column]
    if not isinstance(text, str):
        raise GemmaScopeError(f"Column {column!r} contains {type(text).__name__}, not text.")
    return text
