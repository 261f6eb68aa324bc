"""Tensors at places, read during an ordinary forward pass of a hooked model.

The pass is the model's own, with the hooks and SAEs that are attached to it, through to the logits. Two other ways to
read serve special purposes: :class:`~gemma_scope_tl.activations.harvest.Harvester` ends the pass at the last place, and
:class:`~gemma_scope_tl.evals.clean_pass.CleanPass` keeps what a restart behind a place needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.sites import Place, flatten_heads

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


def visit_places(
    model: GemmaModel,
    ids: torch.Tensor,
    places: Iterable[Place],
    visit: Callable[[Place, torch.Tensor], None],
    attention_mask: torch.Tensor | None = None,
) -> None:
    """Run ``model`` once, and call ``visit`` with each place and its tensor as the pass reaches it.

    For statistics of many places, none of whose tensors has to outlive the call.

    Args:
        model: from ``load_model``.
        ids: ``[batch, pos]``.
        places: each is visited once, however often it is listed.
        visit: takes the tensor with heads flattened, ``[batch, pos, d]``. The model goes on with the same tensor, so
            ``visit`` must not change it.
        attention_mask: ``[batch, pos]``, 1 at text.
    """
    hooks: list[tuple[str, Callable[..., None]]] = []
    for place in dict.fromkeys(places):

        def read(value: torch.Tensor, hook: Any, place: Place = place) -> None:
            visit(place, flatten_heads(value))

        # HookedTransformer's names hold on both backends.
        hooks.append((model.family.site(place.site).hook_name(place.layer, "hooked_transformer"), read))
    masked: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
    model.run_with_hooks(ids, fwd_hooks=hooks, **masked)


def read_places(
    model: GemmaModel, ids: torch.Tensor, places: Iterable[Place], attention_mask: torch.Tensor | None = None
) -> dict[Place, torch.Tensor]:
    """The tensors at ``places`` from one pass, heads flattened; arguments as for :func:`visit_places`."""
    tensors: dict[Place, torch.Tensor] = {}
    visit_places(model, ids, places, tensors.__setitem__, attention_mask)
    return tensors
