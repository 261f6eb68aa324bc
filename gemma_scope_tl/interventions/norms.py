"""The mean norm of the activations of a site, a unit in which steering strengths can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sae.arguments import as_indices
from gemma_scope_tl.sites import Site, flatten_heads
from gemma_scope_tl.text.batch import Text, as_batch
from gemma_scope_tl.text.tokens import special_token_ids

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def mean_norms(
    model: Any,
    text: Text,
    sites: str | Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
    batch_size: int = 8,
    attention_mask: Any = None,
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
        batch_size: rows in a forward pass.
        attention_mask: ``[batch, pos]``, 1 at text; by default it follows from the text, or the padding of token ids.

    Returns:
        A table with a row per site and layer: ``site, layer, hook, mean_norm, tokens``. ``hook`` is the name in
        HookedTransformer, by which :func:`steer` finds the row.

    Raises:
        UnknownNameError: for a site that does not exist.
        SpliceError: for a layer that does not exist.
        GemmaScopeError: when the text has no ordinary token.
    """
    import pandas as pd

    places = _places(model, sites, layers)
    given = as_batch(model, text, attention_mask)
    hooks = {site.hook_name_out(layer, "hooked_transformer") for site, layer in places}
    sums, count, counted = dict.fromkeys(hooks, 0.0), 0, given.ordinary(special_token_ids(model.tokenizer))
    parts = (one.split(batch_size) for one in (given.ids, given.attention_mask, counted))
    for ids, mask, ordinary in zip(*parts, strict=True):
        count += int(ordinary.sum())

        def add(value: torch.Tensor, hook: Any, name: str, ordinary: torch.Tensor = ordinary) -> None:
            norms = flatten_heads(value)[ordinary.to(value.device)].float().norm(dim=-1)
            sums[name] += norms.double().sum().item()

        pairs = [(name, lambda value, hook, name=name, add=add: add(value, hook, name)) for name in sorted(hooks)]
        model.run_with_hooks(ids, attention_mask=mask, fwd_hooks=pairs)
    if count == 0:
        raise GemmaScopeError("The text has no tokens except BOS, EOS and padding: give more text.")
    names = [site.hook_name_out(layer, "hooked_transformer") for site, layer in places]
    return pd.DataFrame(
        {
            "site": [site.name for site, _ in places],
            "layer": pd.array([layer for _, layer in places], dtype="Int64"),
            "hook": names,
            "mean_norm": [sums[name] / count for name in names],
            "tokens": count,
        }
    )


def _places(
    model: Any, sites: str | Iterable[str] | None, layers: int | Iterable[int] | None
) -> list[tuple[Site, int | None]]:
    if sites is None:
        sites = [name for name, site in model.family.sites.items() if not site.is_transcoder]
    sites = [sites] if isinstance(sites, str) else sites
    chosen = list(range(model.dims.n_layers)) if layers is None else as_indices(layers)
    places: list[tuple[Site, int | None]] = []
    for site in map(model.family.site, sites):
        places += [(site, layer) for layer in chosen] if site.per_layer else [(site, None)]
    for site, layer in places:
        site.check_layer(layer, model.dims)
    return places
