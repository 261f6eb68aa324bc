"""What pydantic finds wrong in a configuration, in our words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from gemma_scope_tl.errors import unknown_name

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


def problem(detail: ErrorDetails, root: type[BaseModel]) -> str:
    """One of pydantic's errors as a line: the key's path, and what should stand there.

    Args:
        detail: the error.
        root: the class of the whole configuration.
    """
    loc = detail["loc"]
    if detail["type"] == "extra_forbidden":
        section, keys = _known(loc[:-1], root)
        return f"{_path([*keys, loc[-1]])}{unknown_name('key', loc[-1], section.model_fields)}"
    lead = _path(_known(loc, root)[1])
    if detail["type"] == "missing":
        return f"{lead}is missing"
    if detail["type"] == "value_error":
        return f"{lead}{detail.get('ctx', {}).get('error', detail['msg'])}"
    given = detail["input"]
    shown = repr(given) if len(repr(given)) < 80 else repr(given)[:77] + "..."
    words = _WORDS.get(detail["type"], detail["msg"])
    if detail["type"] == "list_type" and isinstance(given, (str, int, float)):
        words += f", such as [{given}]"
    return f"{lead}{words}, not {shown}"


def _path(keys: Sequence[int | str]) -> str:
    return ".".join(map(str, keys)) + ": " if keys else ""


def _known(loc: Sequence[int | str], root: type[BaseModel]) -> tuple[type[BaseModel], list[int | str]]:
    """The section that a location leads into, and the location without the names that pydantic gives to its types."""
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
