"""``feature_page``: a latent's page as one HTML file, or inline in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.inputs import Text
from gemma_scope_tl.viz.latent_facts import LatentFacts, PageText, latent_facts
from gemma_scope_tl.viz.latent_html import document, latent_html


@dataclass(frozen=True)
class FeaturePage:
    """A latent's page.

    Attributes:
        facts: the numbers on it.
        html: a whole HTML document that loads nothing from anywhere.
    """

    facts: LatentFacts

    @property
    def html(self) -> str:
        return document(f"Latent {self.facts.latent} of {self.facts.name}", latent_html(self.facts))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the document whole or not at all; folders are made."""
        return write_atomically(path, self.html)

    def _repr_html_(self) -> str:
        return latent_html(self.facts)


def feature_page(
    model: Any,
    sae: Any,
    latent: int,
    text: PageText | Text | None = None,
    *,
    rows: int = 64,
    context: int = 128,
    **counts: int,
) -> FeaturePage:
    """A latent's top activating examples, firing histogram, promoted and suppressed tokens, and similar latents.

    Args:
        model: from ``load_model``.
        sae: a whole SAE or transcoder.
        latent: index.
        text: texts or token ids to look at, by default the held-out text in the package; a :class:`PageText` keeps its
            activations for the next latent.
        rows, context: rows of tokens at most, and tokens in a row; a ``PageText`` has its own.
        counts: ``examples``, ``around``, ``k``, ``neighbours`` of :func:`latent_facts`.

    Returns:
        A page that notebooks show, with ``.html`` and ``.save(path)``.

    Raises:
        SpliceError: no such latent, or an SAE of another model.
        GemmaScopeError: too little text, or an SAE of which only some latents are loaded.
    """
    page_text = text if isinstance(text, PageText) else PageText(model, text, rows, context)
    return FeaturePage(latent_facts(page_text, sae, latent, **counts))
