"""What the derivations of all releases share: SAELens's catalogue as data, and what a derivation returns."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from gemma_scope_tl.errors import RegistryError
from gemma_scope_tl.registry.schema import ReleaseFile, load_yaml

Row = dict[str, Any]
Differs = Callable[[str, str], None]


class Difference(NamedTuple):
    """A difference of a row or release from SAELens's catalogue, or a remark on it, and the reason."""

    release: str
    what: str
    reason: str


class Derived(NamedTuple):
    """A release file, and the differences found while deriving it.

    ``compared`` is the number of rows whose L0 the catalogue gives beside the formula that the release follows, and
    ``equal`` the number of those for which both agree; both are 0 for a release without a formula.
    """

    file: ReleaseFile
    differences: list[Difference]
    compared: int = 0
    equal: int = 0


def sae_lens_catalogue() -> dict[str, Any]:
    """SAELens's catalogue, read without importing SAELens.

    Raises:
        RegistryError: SAELens is not installed or its catalogue has moved.
    """
    spec = importlib.util.find_spec("sae_lens")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / "pretrained_saes.yaml"
        if path.is_file():
            return cast("dict[str, Any]", load_yaml(path.read_text(encoding="utf-8"), str(path)))
    raise RegistryError("SAELens's pretrained_saes.yaml was not found: pip install sae-lens.")


def add_note(row: Row, note: str) -> None:
    """Add a remark to those of a row."""
    row["note"] = f"{row['note']}; {note}" if row.get("note") else note
