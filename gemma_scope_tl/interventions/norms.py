"""The mean norm of the activations of a site, a unit in which steering strengths can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.counted import CountedBatch, counted_tokens
from gemma_scope_tl.model.finite import visit_finite_places
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.arguments import as_indices
from gemma_scope_tl.sites import Place, target_of
from gemma_scope_tl.text.batch import Text, as_batch
from gemma_scope_tl.text.tokens import special_token_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


@torch.no_grad()
def mean_norms(
    model: GemmaModel,
    text: Text,
    sites: str | Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
    batch_size: int = 8,
    attention_mask: Any = None,
    positions: Positions = None,
) -> pd.DataFrame:
    """Measure the mean norm ``E||x||`` of activations at sites, over the ordinary tokens of a text.

    BOS, EOS and padding are left out: the norm of the residual stream at BOS can be many times larger than elsewhere,
    so a single token would determine the mean.

    Args:
        model: from ``load_model``.
        text: text in any form that :func:`~gemma_scope_tl.features` accepts.
        sites: names of sites; None for all sites of the family except transcoders. ``"transcoder"`` means its output,
            which steering edits (the tensor of the mlp site).
        layers: the layers; None for all.
        batch_size: number of texts in a forward pass, which texts of similar length share.
        attention_mask: ``[batch, pos]``, 1 at text; by default it follows from the text, or the padding of token ids.
        positions: the only positions that count, as for :func:`steer`; None for all.

    Returns:
        A table with a row per site and layer: ``site, layer, hook, mean_norm, tokens``. ``hook`` is the name in
        HookedTransformer, by which :func:`steer` finds the row.

    Raises:
        UnknownNameError: for a site that does not exist.
        SpliceError: for a layer or a position that does not exist.
        GemmaScopeError: no ordinary token is at these positions, an activation is not finite, or a number is invalid.
    """
    import pandas as pd

    places, batch_size = _places(model, sites, layers), checked_count(batch_size, "batch_size")
    given = as_batch(model, text, attention_mask)
    written = [target_of(place) for place in places]
    whole = CountedBatch(given.ids, given.mask, counted_tokens(given, special_token_ids(model.tokenizer), positions))
    sums, count = dict.fromkeys(written, 0.0), 0
    for rows, columns in whole.parts(batch_size):
        part = whole.part(rows, columns)
        count += int(part.counted.sum())

        def add(place: Place, x: torch.Tensor, counted: torch.Tensor = part.counted) -> None:
            norms = x[counted.to(x.device)].float().norm(dim=-1)
            sums[place] += norms.double().sum().item()

        visit_finite_places(model, part.ids, written, add, part.counted, part.attention_mask, rows)
    if count == 0:
        raise GemmaScopeError("The text has no tokens except BOS, EOS and padding: give more text, or more positions=")
    return pd.DataFrame(
        {
            "site": [place.site for place in places],
            "layer": pd.array([place.layer for place in places], dtype="Int64"),
            "hook": [model.family.site(site).hook_name(layer, "hooked_transformer") for site, layer in written],
            "mean_norm": [sums[place] / count for place in written],
            "tokens": count,
        }
    )


def _places(model: GemmaModel, sites: str | Iterable[str] | None, layers: int | Iterable[int] | None) -> list[Place]:
    if sites is None:
        sites = [name for name, site in model.family.sites.items() if not site.is_transcoder]
    sites = [sites] if isinstance(sites, str) else sites
    chosen = list(range(model.dims.n_layers)) if layers is None else as_indices(layers)
    places: list[Place] = []
    for site in map(model.family.site, sites):
        for layer in chosen if site.per_layer else [None]:
            site.check_layer(layer, model.dims)
            places.append(Place(site.name, layer))
    return places
