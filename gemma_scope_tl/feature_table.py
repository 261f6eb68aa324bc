"""Which latents fire on which token, as a tidy table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int

from gemma_scope_tl.sites import flatten_heads
from gemma_scope_tl.splicing import locate
from gemma_scope_tl.tokens import special_mask, special_token_ids

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def features(
    model: Any,
    text: str | Sequence[str] | Int[torch.Tensor, "batch pos"],
    saes: Any | Iterable[Any],
    top: int | None = None,
    exclude_special_tokens: bool = True,
) -> pd.DataFrame:
    """The active latents of ``saes`` on ``text``, from one forward pass of the unchanged model.

    Args:
        model: from ``load_model``.
        text: a text, several (padded on the left), or token ids.
        saes: one SAE or transcoder, or several.
        top: keep the strongest latents of each token and SAE; None for all.
        exclude_special_tokens: leave out BOS, EOS and padding, on which Gemma Scope was not trained.

    Returns:
        A row per active latent, strongest first within a token: ``sequence, position, token, site, layer, latent,
        activation``. Positions count from 0 at the first token that is not padding.
    """
    import pandas as pd

    several: list[Any] = [saes] if isinstance(saes, torch.nn.Module) else list(saes)
    tokens = text if isinstance(text, torch.Tensor) else model.to_tokens(text)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    places = [locate(sae) for sae in several]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        (name, lambda value, hook, name=name: seen.__setitem__(name, value))
        for name in {site.hook_name(layer, "hooked_transformer") for site, layer in places}
    ]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    padding, counted = _padding_and_counted(model, tokens, exclude_special_tokens)
    frames: list[pd.DataFrame] = []
    for sae, (site, layer) in zip(several, places, strict=True):
        value = seen[site.hook_name(layer, "hooked_transformer")]
        acts = sae.encode(flatten_heads(value))
        acts = acts.float() * counted.unsqueeze(-1).to(acts.device)
        frames.append(_frame(model, tokens, padding, acts, site.name, layer, top))
    return pd.concat(frames, ignore_index=True)


def _padding_and_counted(model: Any, tokens: torch.Tensor, exclude: bool) -> tuple[torch.Tensor, torch.Tensor]:
    pad = getattr(model.tokenizer, "pad_token_id", None)
    leading = (tokens == pad) if pad is not None else torch.zeros_like(tokens, dtype=torch.bool)
    padding = leading.long().cumprod(-1).sum(-1)
    ids = special_token_ids(model.tokenizer) if exclude else ()
    return padding, ~special_mask(tokens, ids)


def _frame(
    model: Any,
    tokens: torch.Tensor,
    padding: torch.Tensor,
    acts: torch.Tensor,
    site: str,
    layer: int | None,
    top: int | None,
) -> pd.DataFrame:
    import pandas as pd

    values, latents = acts.sort(dim=-1, descending=True)
    active = values > 0
    if top is not None:
        active[..., top:] = False
    sequence, position, rank = active.nonzero(as_tuple=True)
    chosen = latents[sequence, position, rank]
    names = [[model.tokenizer.decode([int(i)]) if model.tokenizer else str(int(i)) for i in row] for row in tokens]
    pairs = zip(sequence.tolist(), position.tolist(), strict=True)
    return pd.DataFrame(
        {
            "sequence": sequence.tolist(),
            "position": (position - padding[sequence]).tolist(),
            "token": [names[s][p] for s, p in pairs],
            "site": site,
            "layer": pd.array([layer] * len(chosen), dtype="Int64"),
            "latent": chosen.tolist(),
            "activation": values[sequence, position, rank].tolist(),
        }
    )
