"""The index of the registry files that come with the package, so that they need not be parsed as YAML.

``pretrained_yaml/index.jsonl`` holds the content of each file beside it as JSON, with the SHA-256 of the file. It is
derived: an entry counts only while its file has that hash, and any other file is parsed and checked as before. Reading
all rows from the index takes a tenth of the time of parsing the files. ``scripts/build_registry.py`` writes it.

The first line names the columns of rows. Each further line describes one release: its header, a tab, and its rows as
lists of values in the order of the columns, without those at the end that have their default value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from gemma_scope_tl.registry.schema import ReleaseFile, SAEEntry, SAERow

INDEX_NAME = "index.jsonl"
COLUMNS = (
    *("id", "site", "layer", "width", "d_sae", "d_in", "l0", "path", "label", "affine", "seed", "neuronpedia"),
    *("canonical", "unverified", "sha256", "revision", "note", "neuronpedia_warning", "d_out", "layers", "sha256s"),
)
"""The columns of rows, with those that few rows have at the end."""
_DEFAULTS = [SAEEntry.model_fields[name].get_default() for name in COLUMNS]
_TEMPLATE = {name: field.get_default() for name, field in SAERow.model_fields.items()}
_SHARED = ("release", "model", "repo", "format", "family", "series")
_TUPLES = ("layers", "sha256s")
_set = object.__setattr__
_ALL_FIELDS = set(SAERow.model_fields)  # shared by all rows, which are frozen


class Indexed(NamedTuple):
    """The entry of one registry file."""

    sha256: str
    header: Mapping[str, Any]
    rows_text: str

    def rows(self) -> tuple[SAERow, ...]:
        """The rows, which were checked when the index was made."""
        shared = {name: self.header[name] for name in _SHARED}
        return tuple(_row(values, shared) for values in json.loads(self.rows_text))


def index_text(releases: Iterable[tuple[str, ReleaseFile]]) -> str:
    """The text of the index of registry files.

    Args:
        releases: the text of each file, and the release that it describes. A file whose ``repo`` is a relative folder
            is left out, because its rows depend on the place of the file.
    """
    lines = [json.dumps({"columns": COLUMNS})]
    for text, release in sorted(releases, key=lambda pair: pair[1].release):
        if release.repo.startswith("."):
            continue
        header = {name: getattr(release, name) for name in (*_SHARED, "canonical_release")}
        header["sha256"] = hashlib.sha256(text.encode("utf-8")).hexdigest()
        rows = [_trimmed([getattr(entry, name) for name in COLUMNS]) for entry in release.saes]
        lines.append(f"{_dumped(header)}\t{_dumped(rows)}")
    return "\n".join(lines) + "\n"


def indexed(path: Path) -> Indexed | None:
    """The entry of a registry file, or None if there is none or the file has changed since."""
    found = _entries(path.parent).get(path.stem)
    if found is None:
        return None
    try:
        same = hashlib.sha256(path.read_bytes()).hexdigest() == found.sha256
    except OSError:
        return None
    return found if same else None


def forget_indexes() -> None:
    """Clear the cache of indexes, so that they are read again."""
    _entries.cache_clear()


@lru_cache(maxsize=4)
def _entries(folder: Path) -> dict[str, Indexed]:
    """The entries of a folder's index by release; none if it has no index, or one of another version."""
    try:
        first, *lines = (folder / INDEX_NAME).read_text(encoding="utf-8").splitlines()
        if json.loads(first) != {"columns": list(COLUMNS)}:
            return {}
        split = [line.partition("\t") for line in lines]
        headers = cast("list[dict[str, Any]]", json.loads(f"[{','.join(head for head, _, _ in split)}]"))
        return {h["release"]: Indexed(h["sha256"], h, rows) for h, (_, _, rows) in zip(headers, split, strict=True)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _row(values: list[Any], shared: Mapping[str, Any]) -> SAERow:
    """A row of checked values, made as ``SAERow.model_construct`` makes it but in a third of the time."""
    fields = _TEMPLATE.copy()
    fields.update(zip(COLUMNS, values, strict=False))
    fields.update(shared)
    for name in _TUPLES:
        if fields[name] is not None:
            fields[name] = tuple(fields[name])
    row = SAERow.__new__(SAERow)
    _set(row, "__dict__", fields)
    _set(row, "__pydantic_fields_set__", _ALL_FIELDS)
    _set(row, "__pydantic_extra__", None)
    _set(row, "__pydantic_private__", None)
    return row


def _trimmed(values: list[Any]) -> list[Any]:
    kept = list(values)
    while kept[-1] == _DEFAULTS[len(kept) - 1]:
        kept.pop()
    return kept


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
