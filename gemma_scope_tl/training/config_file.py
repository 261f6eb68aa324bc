"""A configuration's file as plain data.

A file may say ``extends: other.yaml`` (counted from its own folder) and give only what differs: mappings are merged,
anything else is replaced. Other relative paths count from where the command runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from gemma_scope_tl.errors import TrainingStateError
from gemma_scope_tl.registry.plain_yaml import load_yaml, read_text

_MAX_EXTENDS = 8


def read_config(path: Path, depth: int = 0) -> dict[str, Any]:
    """The content of a file, with what it extends; nothing is checked but that it is a mapping."""
    data = load_yaml(read_text(path), str(path))
    if not isinstance(data, dict):
        raise TrainingStateError(f"{path} holds no mapping: a configuration has keys such as output, grid and steps.")
    found = cast("dict[str, Any]", data)
    base = found.pop("extends", None)
    if base is None:
        return found
    if not isinstance(base, str) or depth >= _MAX_EXTENDS:
        raise TrainingStateError(f"{path}: extends names one file, and {_MAX_EXTENDS} may extend each other.")
    return _merged(read_config(path.parent / base, depth + 1), found)


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(cast("Mapping[str, Any]", old), cast("Mapping[str, Any]", value)) if both else value
    return result


def override_key(data: dict[str, Any], override: str) -> None:
    """Set ``key=value`` in ``data``, the key with dots into mappings and numbers into lists."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise TrainingStateError(f"{override!r} is no override: write key=value, such as source.bucket_rows=65536.")
    at: Any = data
    *path, last = key.split(".")
    for part in path:
        if isinstance(at, list):
            at = _item(cast("list[Any]", at), part, override)
        else:
            if not isinstance(at.get(part), (dict, list)):
                at[part] = {}
            at = at[part]
    value = load_yaml(text, f"the value of {key}")
    if isinstance(at, list):
        _item(cast("list[Any]", at), last, override)
        at[int(last)] = value
    else:
        at[last] = value


def _item(values: list[Any], part: str, override: str) -> Any:
    if not part.isdecimal() or int(part) >= len(values):
        raise TrainingStateError(f"{override!r}: {part!r} is none of the list's numbers, 0 to {len(values) - 1}.")
    return values[int(part)]
