"""The table of presets in docs/how-to/train.md, made from the recipes in the code."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gemma_scope_tl.training.recipe import FAST, GEMMA_SCOPE_2, PAPER, Recipe, fast
from scripts.page_tables import table

EXAMPLES: dict[str, Recipe] = {
    "paper": PAPER,
    "gemma_scope_2": GEMMA_SCOPE_2,
    "fast: 128 dimensions, 1,024 latents, L0 16, 2,000 steps": FAST,
    "fast: 128 dimensions, 1,024 latents, L0 64, 400 steps": fast(128, d_sae=1_024, target_l0=64.0, steps=400),
    "fast: 2,304 dimensions, 16,384 latents, L0 64, 2,000 steps": fast(2_304, d_sae=16_384, target_l0=64.0),
}


def tables() -> dict[str, str]:
    """The table by its marker: the values in which presets differ."""
    names = [field.name for field in fields(Recipe)]
    rows = [[f"`{name}`", *(_shown(getattr(one, name)) for one in EXAMPLES.values())] for name in names]
    return {"presets": table(["", *EXAMPLES], [row for row in rows if len(set(row[1:])) > 1])}


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, str)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
