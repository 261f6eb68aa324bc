"""Attributions as a tidy table: a row per latent and token, and rows for what is no latent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.attributions.parts import Moves
from gemma_scope_tl.attributions.passes import Place, Prompt

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["sequence", "position", "token", "site", "layer", "kind", "latent", "activation", "attribution"]


def table_of(model: Any, prompt: Prompt, place: Place, moves: Moves, gradient: torch.Tensor) -> pd.DataFrame:
    """The rows of one SAE, in the order of tokens: its latents, then the other parts.

    Args:
        model: whose tokenizer names the tokens.
        prompt: the token ids.
        place: the SAE.
        moves: each part's distance from the baseline.
        gradient: ``[batch, pos, d]``, at the SAE's output.
    """
    import pandas as pd

    sequence, position, latent = (column.tolist() for column in moves.index.cpu())
    columns: dict[str, list[Any]] = {
        "sequence": sequence,
        "position": position,
        "kind": ["latent"] * len(latent),
        "latent": latent,
        "activation": moves.activation.tolist(),
        "attribution": moves.latents_along(gradient, place.sae.W_dec).tolist(),
    }
    for kind, shares in moves.vectors_along(gradient).items():
        where = ((prompt.mask & ~prompt.spliced) if kind == "unspliced" else prompt.spliced).nonzero()
        columns["sequence"] += where[:, 0].tolist()
        columns["position"] += where[:, 1].tolist()
        columns["kind"] += [kind] * len(where)
        columns["latent"] += [None] * len(where)
        columns["activation"] += [float("nan")] * len(where)
        columns["attribution"] += shares[tuple(where.T)].tolist()
    table = pd.DataFrame(columns)
    names, starts = token_names(model, prompt.ids), prompt.start.tolist()
    pairs = list(zip(columns["sequence"], columns["position"], strict=True))
    table["token"] = [names[s][p] for s, p in pairs]
    table["site"], table["layer"] = place.site.name, pd.array([place.layer] * len(table), dtype="Int64")
    table["latent"] = table["latent"].astype("Int64")
    table["position"] = [p - starts[s] for s, p in pairs]
    return table[COLUMNS]


def strongest(table: pd.DataFrame, top: int | None) -> pd.DataFrame:
    """Rows by falling size of attribution within a sequence; of the latents, the first ``top`` of each sequence."""
    order = table["attribution"].abs().sort_values(ascending=False, kind="stable").index
    ranked = table.loc[order].sort_values("sequence", kind="stable").reset_index(drop=True)
    ranked.attrs = table.attrs
    if top is None:
        return ranked
    latents = ranked["kind"] == "latent"
    rank = latents.groupby(ranked["sequence"]).cumsum()
    kept = ranked[~latents | (rank <= top)].reset_index(drop=True)
    kept.attrs = table.attrs
    return kept


def token_names(model: Any, ids: torch.Tensor) -> list[list[str]]:
    """The text of every token; its id where the model has no tokenizer."""
    names = {i: model.tokenizer.decode([i]) if model.tokenizer else str(i) for i in set(ids.flatten().tolist())}
    return [[names[i] for i in row] for row in ids.tolist()]
