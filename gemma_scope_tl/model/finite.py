"""Whether activations are finite, and where a pass first has an infinity or NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.read import visit_places
from gemma_scope_tl.sites import Place, flatten_heads

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


def all_finite(values: torch.Tensor, counted: Bool[torch.Tensor, "batch pos"]) -> bool:
    """Whether the activations of all counted tokens are finite.

    Args:
        values: ``[batch, pos, d]`` or ``[batch, pos, heads, d_head]``.
        counted: True at the tokens that matter.

    The sum over a token is finite only if its entries are, and takes a twentieth of the time of looking at each. A sum
    may overflow, so that the entries are looked at where one is not finite.
    """
    flat, counted = flatten_heads(values.detach()), counted.to(values.device)
    wide = torch.promote_types(flat.dtype, torch.float32)
    if bool((flat.sum(-1, dtype=wide).isfinite() | ~counted).all()):
        return True
    return bool(flat[counted].isfinite().all())


def check_finite(
    model: GemmaModel,
    ids: Int[torch.Tensor, "batch pos"],
    values: Mapping[Place, torch.Tensor],
    counted: Bool[torch.Tensor, "batch pos"],
    numbers: Int[torch.Tensor, " batch"] | None = None,
) -> None:
    """Raise unless the activations at some places, already computed, are finite at all counted tokens.

    Args:
        model: from ``load_model``.
        ids: the rows of the pass, which is made again for the message if something is not finite.
        values: ``[batch, pos, d]`` of each place, heads flattened or not.
        counted: True at the tokens that matter.
        numbers: the number of each row in the data, for the message; by default they count from 0.

    Raises:
        GemmaScopeError: the message says where in the model the first infinity or NaN is.
    """
    for place, value in values.items():
        if not all_finite(value, counted):
            raise not_finite(model, ids, counted, numbers=numbers, seen_at=place.key)


def visit_finite_places(
    model: GemmaModel,
    ids: Int[torch.Tensor, "batch pos"],
    places: Iterable[Place],
    visit: Callable[[Place, torch.Tensor], None],
    counted: Bool[torch.Tensor, "batch pos"],
    attention_mask: torch.Tensor | None = None,
    numbers: Int[torch.Tensor, " batch"] | None = None,
) -> None:
    """Visit places as :func:`~gemma_scope_tl.model.read.visit_places` does, unless what is read there is not finite.

    Args:
        model, ids, places, visit, attention_mask: as ``visit_places`` takes them.
        counted: True at the tokens that matter.
        numbers: the number of each row in the data, for the message; by default they count from 0.

    Raises:
        GemmaScopeError: the message says where in the model the first infinity or NaN is; or the pass does not reach a
            place.
    """

    def checked(place: Place, value: torch.Tensor) -> None:
        if not all_finite(value, counted):
            raise _NotFinite(place.key)
        visit(place, value)

    try:
        visit_places(model, ids, places, checked, attention_mask)
    except _NotFinite as error:  # the search is a pass of its own, and this one has ended now
        seen_at = str(error)
    else:
        return
    raise not_finite(model, ids, counted, attention_mask, numbers, seen_at)


class _NotFinite(Exception):
    """Ends a pass at a place whose tensor is not finite."""


def not_finite(
    model: GemmaModel,
    ids: Int[torch.Tensor, "batch pos"],
    counted: Bool[torch.Tensor, "batch pos"],
    attention_mask: torch.Tensor | None = None,
    numbers: Int[torch.Tensor, " batch"] | None = None,
    seen_at: str = "",
) -> GemmaScopeError:
    """The error of a pass with activations that are not finite, after a search for the first of them."""
    found = _first(model, ids, counted, attention_mask)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    where = f"at {seen_at}" if seen_at else "before its final norm"
    if found is not None:
        place, row, position = found
        number = row if numbers is None else int(numbers[row])
        where = f"first at {place.key}, in row {number} at token {position}"
    remedy = "Its weights are damaged, or a hook or SAE on it gives such values."
    if dtype == "float16":
        remedy = "Values above 65504 overflow there: load it in bfloat16 or float32."
    return GemmaScopeError(f"The model's activations are not finite in {dtype}, {where}. {remedy}")


@torch.no_grad()
def _first(
    model: GemmaModel, ids: torch.Tensor, counted: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[Place, int, int] | None:
    """The first place of a pass, in the order of the pass, with such a value at a counted token; its row and token."""
    places = [
        Place(name, layer)
        for name, site in model.family.sites.items()
        for layer in (range(model.dims.n_layers) if site.per_layer else (None,))
    ]
    found: list[tuple[Place, int, int]] = []

    def look(place: Place, value: torch.Tensor) -> None:
        bad = ~value.isfinite().all(-1) & counted.to(value.device)
        if not found and bool(bad.any()):
            row, position = bad.nonzero()[0].tolist()
            found.append((place, row, position))

    visit_places(model, ids, places, look, attention_mask)
    return found[0] if found else None
