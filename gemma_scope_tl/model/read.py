"""Tensors at places, read during a forward pass that ends where the last of them was read.

The pass is the model's own, with the hooks and SAEs that are attached to it, up to and including those at the last
place that is read. What lies behind it does not run: no later layer, no hook or SAE there, no unembedding.

:class:`EndOfPass` is the one way in which the package ends a pass early, on both backends:
:class:`~gemma_scope_tl.activations.harvest.Harvester` ends the passes over a corpus by it, and
:class:`~gemma_scope_tl.evals.clean_pass.CleanPass` those that need everything but the logits. ``stop_at_layer`` of
TransformerLens would run to the end of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place, flatten_heads

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


class EndOfPass(Exception):
    """Raised by a hook to end a forward pass whose rest is not needed. Whoever runs the pass suppresses it."""


def visit_places(
    model: GemmaModel,
    ids: torch.Tensor,
    places: Iterable[Place],
    visit: Callable[[Place, torch.Tensor], None],
    attention_mask: torch.Tensor | None = None,
) -> None:
    """Run ``model`` up to the last of ``places``, and call ``visit`` with each place and its tensor on the way.

    For statistics of many places, none of whose tensors has to outlive the call.

    Args:
        model: from ``load_model``.
        ids: ``[batch, pos]``.
        places: each is visited once, however often it is listed; without any, nothing runs.
        visit: takes the tensor with heads flattened, ``[batch, pos, d]``. The model goes on with the same tensor, so
            ``visit`` must not change it.
        attention_mask: ``[batch, pos]``, 1 at text.

    Raises:
        GemmaScopeError: the pass does not reach a place.
    """
    missing = dict.fromkeys(places)
    hooks: list[tuple[str, Callable[..., None]]] = []
    for place in missing:

        def read(value: torch.Tensor, hook: Any, place: Place = place) -> None:
            visit(place, flatten_heads(value))
            missing.pop(place, None)
            if not missing:
                raise EndOfPass

        # HookedTransformer's names hold on both backends.
        hooks.append((model.family.site(place.site).hook_name(place.layer, "hooked_transformer"), read))
    if not hooks:
        return
    options: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
    if model.backend == "bridge":
        options["use_cache"] = False  # Hugging Face would keep the keys and values of every layer
    with suppress(EndOfPass):
        model.run_with_hooks(ids, fwd_hooks=hooks, **options)
    if missing:
        raise GemmaScopeError(f"The forward pass does not reach {', '.join(place.key for place in missing)}.")


def read_places(
    model: GemmaModel, ids: torch.Tensor, places: Iterable[Place], attention_mask: torch.Tensor | None = None
) -> dict[Place, torch.Tensor]:
    """The tensors at ``places`` from one pass, heads flattened; arguments and errors as for :func:`visit_places`."""
    tensors: dict[Place, torch.Tensor] = {}
    visit_places(model, ids, places, tensors.__setitem__, attention_mask)
    return tensors
