"""What the files and the name of a folder claim about the coder in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KEYS = ("site", "layer", "l0", "model")
NAME = "the folder's name"


@dataclass
class FolderMetadata:
    """The metadata of a folder with weights.

    Attributes:
        path: path of the folder inside the repository.
        d_in, d_sae, d_out: sizes from the file's headers; 0 until they are read.
        claims: for each of :data:`KEYS`, the claimed value by the source of the claim.
        width_label: the width in the folder's name, in latents.
        families: names of the families in which the tensors that the files name are a place; None if no file names any.
        has_skip: whether the weights have a skip connection.
        layers: the layers of a coder of several layers; None for one of a single layer.
        named: values of a row that only Gemma Scope 2's layout has: ``label`` and ``seed``.
        problems: problems of the folder, in sentences.
    """

    path: str
    d_in: int = 0
    d_sae: int = 0
    d_out: int = 0
    claims: dict[str, dict[str, Any]] = field(default_factory=lambda: {key: {} for key in KEYS})
    width_label: int | None = None
    families: frozenset[str] | None = None
    has_skip: bool = False
    layers: tuple[int, ...] | None = None
    named: dict[str, Any] = field(default_factory=dict[str, Any])
    problems: list[str] = field(default_factory=list[str])

    def value(self, key: str) -> Any:
        """The claimed value of ``key``, or None. Contradictory claims are added to the problems."""
        claims = self.claims[key]
        values = list(claims.values())
        if any(value != values[0] for value in values):
            listed = ", ".join(f"{value} according to {source}" for source, value in claims.items())
            self.problems.append(f"{key} is {listed}. Give --set {self.path}:{key}=VALUE.")
        return values[0] if values else None
