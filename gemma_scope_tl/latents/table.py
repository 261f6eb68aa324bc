"""A tidy table of the active latents on each token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.read import read_places
from gemma_scope_tl.sae.access import encode_latents, locate
from gemma_scope_tl.sae.choices import as_saes
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.batch import Text, as_batch
from gemma_scope_tl.text.tokens import ExcludeTokens, excluded_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


@torch.no_grad()
def features(
    model: GemmaModel,
    text: Text,
    saes: Any | Iterable[Any],
    top: int | None = None,
    exclude_special_tokens: ExcludeTokens = True,
    min_activation: float = 0.0,
    attention_mask: Any = None,
) -> pd.DataFrame:
    """The active latents of ``saes`` on ``text``, from one forward pass for all SAEs.

    The pass includes the hooks and SAEs that are attached to the model. SAEs read hooks and not Hugging Face's
    ``hidden_states``, whose last entry is after the final norm and thus not the residual stream of the last layer.

    Args:
        model: from ``load_model``.
        text: a text, several (padded on the left), chat messages, or token ids, in any form that
            :func:`~gemma_scope_tl.text.batch.as_batch` accepts; no longer than the context of the model.
        saes: one SAE, transcoder or :class:`~gemma_scope_tl.sae.latents.Latents` (with encoder columns), or several: a
            list, an iterator, a mapping, a suite.
        top: number of the strongest latents of each token and SAE to keep; None for all.
        exclude_special_tokens: whether to leave out BOS, EOS and padding, or the ids to leave out. Gemma Scope was not
            trained on these tokens, and thousands of latents may be active on BOS. Padding is never listed.
        min_activation: the smallest activation to list, in units of the latent.
        attention_mask: ``[batch, pos]``, 1 at text; by default it follows from the text, or the padding of token ids.

    Returns:
        A table with a row per active latent, strongest first within a token: ``sequence, position, token, sae, site,
        layer, latent, activation``. ``position`` counts from 0 at the first token of the text, as for interventions.
        ``sae`` is the index in ``saes``, which distinguishes SAEs of one site and layer. ``""`` (BOS alone) gives no
        rows.

    Raises:
        GemmaScopeError: for ``top`` below 1, ``min_activation`` below 0, no text, or a text that is too long.
        SpliceError: for no SAE, or an SAE of unknown site.
    """
    import pandas as pd

    if (top is not None and top < 1) or not min_activation >= 0:
        raise GemmaScopeError(f"top must be at least 1 and min_activation at least 0; given: {top}, {min_activation}.")
    several, batch = as_saes(saes), as_batch(model, text, attention_mask)
    places = [Place(site.name, layer) for site, layer in (locate(sae, model.family) for sae in several)]
    tensors = read_places(model, batch.ids, places, batch.attention_mask)
    counted = batch.ordinary(excluded_ids(model.tokenizer, exclude_special_tokens))
    frames: list[pd.DataFrame] = []
    for i, (sae, place) in enumerate(zip(several, places, strict=True)):
        rows, columns, latents, values = _active(sae, tensors[place], counted, top, min_activation)
        listed = {
            "sequence": rows.tolist(),
            "position": batch.place[rows, columns].tolist(),
            "token": _texts(model.tokenizer, batch.ids[rows, columns].tolist()),
            "sae": i,
            "site": place.site,
            "layer": pd.array([place.layer] * len(latents), dtype="Int64"),
            "latent": latents.tolist(),
            "activation": values.tolist(),
        }
        frames.append(pd.DataFrame(listed))
    return pd.concat(frames, ignore_index=True)


def _active(
    sae: Any,
    x: Float[torch.Tensor, "batch pos d_in"],
    counted: Bool[torch.Tensor, "batch pos"],
    top: int | None,
    min_activation: float,
) -> tuple[torch.Tensor, ...]:
    """Row, column, latent and value of each active latent, ordered by row and column, then strongest first."""
    acts = encode_latents(sae, x)
    counted = counted.to(acts.device)[..., None]
    if top is None:
        rows, columns, latents = ((acts > 0) & (acts >= min_activation) & counted).nonzero(as_tuple=True)
        values = acts[rows, columns, latents].float()
    else:
        strongest, which = acts.topk(min(top, acts.shape[-1]), dim=-1)
        rows, columns, rank = ((strongest > 0) & (strongest >= min_activation) & counted).nonzero(as_tuple=True)
        latents, values = which[rows, columns, rank], strongest[rows, columns, rank].float()
    order = values.argsort(descending=True, stable=True)  # sort by value, then stably by position
    order = order[(rows * x.shape[1] + columns)[order].argsort(stable=True)]
    names = latents if not isinstance(sae, Latents) else torch.tensor(sae.latents, device=acts.device)[latents]
    return rows[order].cpu(), columns[order].cpu(), names[order].cpu(), values[order].cpu()


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    texts = {i: tokenizer.decode([i]) if tokenizer else str(i) for i in set(ids)}
    return [texts[i] for i in ids]
