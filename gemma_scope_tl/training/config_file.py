"""Configuration files: reading and merging them, overriding keys, checking plain values, and wording errors.

A file may say ``extends: other.yaml``, relative to its own folder, and give only what differs: mappings are merged,
anything else is replaced. Other relative paths count from the working directory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from gemma_scope_tl.errors import TrainingStateError
from gemma_scope_tl.registry.plain_yaml import load_yaml, read_text
from gemma_scope_tl.registry.problems import error_text

LARGEST = 1 << 53
"""The largest number in a configuration: up to it floats, as which YAML reads ``4e9``, hold every whole number."""
_MAX_EXTENDS = 8
_A_SECTION, _A_WORD = "should be a section of keys", "should be a word"
_WHOLE, _NUMBER, _SWITCH = "should be a whole number", "should be a number", "should be true or false"
_WORDS = {
    "list_type": "should be a list",
    "model_type": _A_SECTION,
    "dict_type": _A_SECTION,
    "string_type": _A_WORD,
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "bool_type": _SWITCH,
    "bool_parsing": _SWITCH,
    "invalid_key": _A_WORD,
}


class ValueAt(ValueError):
    """A wrong value inside a value that is checked as a whole.

    Attributes:
        at: the path of the wrong value from there.
    """

    def __init__(self, at: str, message: str) -> None:
        super().__init__(message)
        self.at = at


def read_config(path: Path, depth: int = 0) -> dict[str, Any]:
    """Read a file and the files that it extends. The only check is that each file holds a mapping.

    Raises:
        TrainingStateError: a file holds no mapping, ``extends`` is not one file name, or too many files are nested.
        RegistryError: the file cannot be read or is not plain YAML.
    """
    data = load_yaml(read_text(path), str(path))
    if not isinstance(data, dict):
        raise TrainingStateError(f"{path} holds no mapping: a configuration has keys such as output, grid and steps.")
    found = cast("dict[str, Any]", data)
    base = found.pop("extends", None)
    if base is None:
        return found
    if not isinstance(base, str) or depth >= _MAX_EXTENDS:
        raise TrainingStateError(f"{path}: extends names one file, and at most {_MAX_EXTENDS} may extend each other.")
    return _merged(read_config(path.parent / base, depth + 1), found)


def plain_copy(value: Any) -> Any:
    """Mappings as dicts, lists and tuples as lists, at every depth: changes do not reach the caller's values."""
    if isinstance(value, Mapping):
        return {key: plain_copy(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [plain_copy(item) for item in cast("Sequence[Any]", value)]
    return value


def override_key(data: dict[str, Any], override: str) -> None:
    """Set ``key=value`` in ``data``; dots in the key lead into mappings, numbers into lists. The value is plain YAML.

    Raises:
        TrainingStateError: the override is not ``key=value``, or a list has no item of the given number.
        RegistryError: the value is not plain YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise TrainingStateError(f"{override!r} is not an override: write key=value, such as source.bucket_rows=65536.")
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


def number(value: object) -> object:
    """Convert text that means a number, such as ``4e9``, and whole floats; return other values unchanged."""
    if isinstance(value, bool):
        raise ValueError(f"not a number: {value}")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"not a finite number: {value}")
    if isinstance(value, (int, float)) and abs(value) > LARGEST:
        shown = f"{value:.3g}" if isinstance(value, float) else f"a number of {value.bit_length()} bits"
        raise ValueError(f"should be at most {LARGEST:,}, not {shown}")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def device_name(value: object) -> object:
    """Check the name of a device. Whether this machine has it is checked when the run starts."""
    try:
        torch.device(str(value))
    except RuntimeError:
        raise ValueError(f"{value!r} is no device: write cpu, cuda or cuda:1") from None
    return value


def each_once(**lists: Sequence[object] | None) -> None:
    """Raise ValueError where a list has a value twice."""
    for name, values in lists.items():
        given = list(values or ())
        for value in given:
            if given.count(value) > 1:
                shown = f"{value:g}" if isinstance(value, float) else value
                raise ValueError(f"{name} has {shown} twice")


def problem(detail: ErrorDetails, root: type[BaseModel]) -> str:
    """Word one of pydantic's errors as a line: the path of the key, and what is wrong with its value.

    Args:
        detail: the error.
        root: the class of the whole configuration.
    """
    loc, words = detail["loc"], _WORDS
    if detail["type"] == "extra_forbidden":
        section, keys = _known(loc[:-1], root)
        keys = [*keys, loc[-1]]
    else:
        section, keys = _known(loc, root)
    if detail["type"] == "list_type" and isinstance(detail["input"], (str, int, float)):
        words = {"list_type": f"should be a list, such as [{detail['input']}]"}
    error = detail.get("ctx", {}).get("error")
    if isinstance(error, ValueAt):
        keys = [*keys, error.at]
    path = ".".join(map(str, keys)) + ": " if keys else ""
    return path + error_text(detail, section.model_fields, words)


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(cast("Mapping[str, Any]", old), cast("Mapping[str, Any]", value)) if both else value
    return result


def _item(values: list[Any], part: str, override: str) -> Any:
    if not part.isdecimal() or int(part) >= len(values):
        raise TrainingStateError(f"{override!r}: {part!r} is not an index of the list, 0 to {len(values) - 1}.")
    return values[int(part)]


def _known(loc: Sequence[int | str], root: type[BaseModel]) -> tuple[type[BaseModel], list[int | str]]:
    """The section that a location points to, and the location without the names that pydantic adds for types."""
    section, keys = root, list[int | str]()
    for part in loc:
        if isinstance(part, int):
            keys.append(part)
        elif part in section.model_fields:
            keys.append(part)
            section = _section(section.model_fields[part].annotation) or section
    return section, keys or list(loc[:1])


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)
