"""Text, JSON and JSON lines, written atomically."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gemma_scope_tl.files import replace_files


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, and move the result to `path` atomically."""
    replace_files(path.parent, {path.name: write})


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one per line."""
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)
