"""Registry files as text: the YAML of a release, and the JSON schema that editors use to check it."""

from __future__ import annotations

import json
import re
from typing import Any

from gemma_scope_tl.registry.schema import ReleaseFile, SAEEntry

SCHEMA_LINE = "# yaml-language-server: $schema=schema.json"
_PLAIN = re.compile(r"(?:[A-Za-z][\w./-]*|[1-9]\d*[km])")
_RESERVED = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def render_release(release: ReleaseFile) -> str:
    """The YAML text of a release: one line per row, without keys that have their default value. It is deterministic."""
    lines = [SCHEMA_LINE]
    for key in (
        "release",
        "canonical_release",
        "repo",
        "model",
        "family",
        "license",
        "description",
        "format",
        "series",
    ):
        value = getattr(release, key)
        if key not in ("family", "series") or value is not None:
            lines.append(f"{key}: {_scalar(value)}")
    lines += ["notes:", *(f"  - {_scalar(note)}" for note in release.notes)] if release.notes else ["notes: []"]
    return "\n".join([*lines, "saes:", *(f"  - {_row(entry)}" for entry in release.saes), ""])


def json_schema() -> str:
    """The JSON schema of a registry file, as text."""
    schema = ReleaseFile.model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _row(entry: SAEEntry) -> str:
    fields = SAEEntry.model_fields
    values = {key: getattr(entry, key) for key in fields}
    kept = {key: value for key, value in values.items() if fields[key].is_required() or value != fields[key].default}
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in kept.items()) + "}"


def _scalar(value: str | float | bool | tuple[Any, ...] | None) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _RESERVED
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)
