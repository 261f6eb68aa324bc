"""What the files of a release cannot say about it. What is not given is left out of the card, and the card says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_scope_tl.errors import GemmaScopeError, unknown_name


@dataclass(frozen=True)
class About:
    """Facts for a model card.

    Attributes:
        license: SPDX identifier of the weights' licence, in the Hub's spelling (``mit``, ``cc-by-4.0``).
        base_model: the model on the Hub, ``owner/name``.
        description: what these SAEs are, in a sentence or more.
        data: what they were trained on, and its licence.
        evaluated_on: the text behind the metrics.
        recipe: hyper-parameters by name; those of the paper's recipe stand beside the paper's values.
        searched: names of ``recipe`` whose values were searched for; all others were set beforehand.
        notes: what users should know.
    """

    license: str
    base_model: str | None = None
    description: str | None = None
    data: str | None = None
    evaluated_on: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    searched: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.license, str) or not self.license.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GemmaScopeError("The licence of the weights is not known: give license, such as cc-by-4.0.")
        for name in self.searched:
            if name not in self.recipe:
                raise unknown_name("searched hyper-parameter", name, self.recipe)
        if self.base_model is not None and self.base_model.count("/") != 1:
            raise GemmaScopeError(f"base_model is OWNER/NAME on the Hub, not {self.base_model!r}.")
