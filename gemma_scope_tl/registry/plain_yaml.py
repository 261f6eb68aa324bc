"""A reader of plain data from untrusted YAML files.

The text is read as a stream of events, without recursion, and the result contains only mappings, sequences and
scalars. Constructs that could grow without bound or hide data are refused: aliases (the "billion laughs" attack needs
nine lines of them), tags, deep nesting, a second document, and duplicate keys, of which other readers silently keep
the last.

PyYAML's own constructors are not used. Its C loader, which is five times as fast as the Python loader, composes nodes
recursively and resolves aliases before a subclass could refuse them, so a separate pass over the events would be
needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from gemma_scope_tl.errors import RegistryError

MAX_BYTES = 16 << 20
"""The largest registry file that is read, in bytes. Gemma Scope's largest has a hundredth of this size."""
MAX_DEPTH = 16
MAX_ENTRIES = 10_000
"""Most entries of one mapping or sequence; messages about a wrong row are a hundred times as long as the row."""
MAX_VALUES = 300_000
"""Most scalars and collections of one file, keys included. Gemma Scope's largest file has ten thousand."""
_MAX_NUMBER = 64  # characters; parsing sexagesimal numbers takes quadratic time
_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float")}
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is five times as fast
_UNSET = object()


class _Open(NamedTuple):
    """A collection whose end has not been read yet."""

    value: dict[object, object] | list[object]
    lines: dict[object, int]  # the line of each key


def load_yaml(text: str, source: str) -> object:
    """Parse YAML into dicts, lists, strings, numbers, booleans and None.

    Args:
        text: one document. Dates stay strings.
        source: the file's name, for messages.

    Raises:
        RegistryError: with the line, when the text is not YAML or contains more than plain data.
    """
    try:
        return _build(_LOADER(text), source)
    except yaml.YAMLError as error:
        raise RegistryError(f"{source} is not YAML: {error}") from None


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a registry file.

    Raises:
        RegistryError: when it cannot be read, is not UTF-8, or is larger than ``limit`` bytes.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block, and a device has no end
            raise RegistryError(f"{path} cannot be read: it is not a file. Give the path of a YAML file.")
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise RegistryError(f"{path} is larger than {limit:,} bytes, which no registry file is. Split the release.")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RegistryError(f"{path} cannot be read: {error}") from None


def _build(loader: Any, source: str) -> object:
    stack: list[_Open] = []
    keys: list[object] = []  # for each open mapping, the key whose value has not been read
    root: object = _UNSET
    count = 0
    while not isinstance(event := loader.get_event(), yaml.StreamEndEvent):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _refused(source, line, f"has the alias *{event.anchor}", "Write the value out.")
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            _check_collection(event, source, line, len(stack))
            value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
        elif isinstance(event, yaml.ScalarEvent):
            value = _scalar(loader, event, source, line)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            if isinstance(stack.pop().value, dict):
                keys.pop()
            continue
        else:  # starts and ends of the stream and its documents
            continue
        count += 1
        if count > MAX_VALUES:
            raise _refused(source, line, f"has more than {MAX_VALUES:,} values", "Split the release.")
        if not stack and root is not _UNSET:
            raise _refused(source, line, "has a second document", "Keep one release in a file.")
        root = value if not stack else root
        if stack:
            _put(stack[-1], keys, value, source, line)
        if isinstance(value, (dict, list)):
            stack.append(_Open(cast("dict[object, object] | list[object]", value), {}))
            if isinstance(value, dict):
                keys.append(_UNSET)
    return None if root is _UNSET else root


def _put(parent: _Open, keys: list[object], value: object, source: str, line: int) -> None:
    """Add a value to the open collection: to a list, or to a mapping as its next key or value."""
    if len(parent.value) >= MAX_ENTRIES:
        raise _refused(source, line, f"is one of more than {MAX_ENTRIES:,} entries", "Split the release.")
    if isinstance(parent.value, list):
        parent.value.append(value)
    elif keys[-1] is not _UNSET:
        parent.value[keys[-1]] = value
        keys[-1] = _UNSET
    elif isinstance(value, (dict, list)):
        raise _refused(source, line, "has a collection as a key", "Keys are words.")
    elif value in parent.lines:
        raise _refused(source, line, f"has the key {value!r} again (first in line {parent.lines[value]})", "Keep one.")
    else:
        parent.lines[value] = line
        keys[-1] = value


def _check_collection(event: Any, source: str, line: int, depth: int) -> None:
    if event.tag not in (None, "!", f"{_TAG}map", f"{_TAG}seq"):
        raise _refused(source, line, f"is not plain YAML data: it has the tag {event.tag!r}", "Remove it.")
    if depth >= MAX_DEPTH:
        raise _refused(source, line, f"is nested more than {MAX_DEPTH} deep", "A registry file has four levels.")


def _scalar(loader: Any, event: Any, source: str, line: int) -> object:
    tag = event.tag
    if tag is None or tag == "!":
        tag = loader.resolve(yaml.ScalarNode, event.value, event.implicit)
    elif tag not in (*_SCALARS, f"{_TAG}str"):
        raise _refused(source, line, f"is not plain YAML data: it has the tag {tag!r}", "Remove it.")
    if tag == f"{_TAG}merge":
        raise _refused(source, line, "merges mappings with <<", "Write the values out.")
    if tag not in _SCALARS:
        return event.value
    try:
        if len(event.value) > _MAX_NUMBER:
            raise ValueError("too long")
        return loader.yaml_constructors[tag](loader, yaml.ScalarNode(tag, event.value))
    except (ValueError, LookupError, OverflowError):  # IndexError: an empty number, "!!int ''"
        raise _refused(source, line, f"has {event.value[:40]!r}, which is not a {tag.removeprefix(_TAG)}", "") from None


def _refused(source: str, line: int, what: str, remedy: str) -> RegistryError:
    return RegistryError(f"{source}, line {line}, {what}. {remedy}".rstrip())
