"""What the page of an attribution graph says of latents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

LatentKey = tuple[str, int | None, int]
"""The coder as the graph names it, the layer, and the latent's index within the layer."""


@dataclass(frozen=True)
class Plane:
    """The tokens that a latent promotes and suppresses most by what it writes at one layer.

    Attributes:
        layer: the layer that is written, or None.
        promoted, suppressed: tokens with the change of their logits per unit of activation, strongest first.
    """

    layer: int | None
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


@dataclass(frozen=True)
class LatentNote:
    """What is known of a latent.

    Attributes:
        label: a short explanation, or an empty text.
        planes: a :class:`Plane` for each written layer.
        fired, tokens, maximum: on how many of how many tokens it fires, and at most how strongly; None if unknown.
        examples: ``tokens, activations, peak`` of each excerpt, strongest first.
        neuronpedia, neuronpedia_warning: as in :class:`~gemma_scope_tl.viz.latent_facts.LatentFacts`.
    """

    label: str = ""
    planes: list[Plane] = field(default_factory=list[Plane])
    fired: int | None = None
    tokens: int | None = None
    maximum: float | None = None
    examples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    neuronpedia: str | None = None
    neuronpedia_warning: str | None = None

    def as_data(self) -> dict[str, Any]:
        """The note as plain values."""
        return asdict(self)
