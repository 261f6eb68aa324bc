"""What messages about names that do not exist suggest, apart from what needs the registry itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from gemma_scope_tl.errors import nearest
from gemma_scope_tl.registry.choice import CANONICAL
from gemma_scope_tl.sites import SITES


def nearest_ids(given: str, ids: Iterable[str], n: int = 5) -> list[str]:
    """The ``n`` nearest ids, ordered by the number of leading parts that agree, then by similarity."""
    parts = given.split("/")
    by_agreement: dict[int, list[str]] = {}
    for id_ in ids:
        pairs = zip(parts, id_.split("/"), strict=False)
        agreement = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        by_agreement.setdefault(agreement, []).append(id_)
    found: list[str] = []
    for _, group in sorted(by_agreement.items(), reverse=True):
        found += nearest(given, group, n - len(found)) if len(found) < n else []
    return found


def no_canonical_hint(id_: str, ids: Iterable[str]) -> str:
    head, slash, last = id_.rpartition("/")
    exists = any(other.startswith(head + slash) for other in ids)
    return f"No SAE of {head} is canonical: name one by its L0." if slash and last == CANONICAL and exists else ""


def closest_numbers(given: int, numbers: Iterable[int], n: int = 5) -> list[int]:
    return sorted(numbers, key=lambda number: (abs(number - given), number))[:n]


def folder_hint(name: str) -> str:
    """The hint for a folder or file of SAEs given as a model."""
    path = Path(name)
    try:
        file = path / f"{path.absolute().name}.yaml" if path.is_dir() else path
        if file.suffix in (".yaml", ".yml") and file.is_file():
            return f"register_release({str(file)!r}) returns the release's name; list_saes(release=...) lists its SAEs."
        layers = path.is_dir() and next(path.glob("layer_*"), None) is not None
        if not (layers or any((path / part).exists() for part in (*SITES, "params.npz", "cfg.json"))):
            return ""
    except (OSError, ValueError):  # not a valid file name
        return ""
    return (
        f"This is a folder: JumpReLUSAE.from_folder(...) loads an SAE in it, and export_suite({name!r}, ...) makes a "
        "release of all of them, whose registry file is an argument for register_release."
    )
