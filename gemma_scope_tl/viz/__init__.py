"""Figures of evaluations, studies, training and circuits, and the HTML page of a latent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["feature_page"]

if TYPE_CHECKING:
    from gemma_scope_tl.viz.latent_page import feature_page


def __getattr__(name: str) -> Any:
    if name == "feature_page":
        from gemma_scope_tl.viz import latent_page

        return latent_page.feature_page
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
