"""The facts on which all measurements of a model on some token rows depend, as a part of each cache key."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.model.counted import CountedBatch
from gemma_scope_tl.model.identity import model_facts, refuse_hooks

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


def facts_of(model: GemmaModel, rows: CountedBatch, special: tuple[int, ...]) -> dict[str, Any]:
    """The facts about a model, token rows, and the ids that do not count. Those of an SAE are ``Subject.facts``.

    Raises:
        GemmaScopeError: there are hooks on the model, or SAEs attached to it, which no key can describe.
    """
    refuse_hooks(model)
    return {
        "model": model_facts(model),
        "tokens": hashlib.sha256(rows.ids.contiguous().numpy().tobytes()).hexdigest(),
        "shape": list(rows.ids.shape),
        "special": list(special),
        **({} if bool(rows.mask.all()) else {"lengths": rows.length.tolist()}),
        **rows.chosen(special),
    }
