"""Decomposition of a site's tensor into a sum of terms, and the contribution of each term along a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int

from gemma_scope_tl.attributions.passes import PlacedSAE, SplicedPrompt
from gemma_scope_tl.errors import unknown_name
from gemma_scope_tl.sae.access import decode_with_skip, flat_heads
from gemma_scope_tl.sae.choices import bring
from gemma_scope_tl.sites import flatten_heads
from gemma_scope_tl.text.tokenizing import decoded_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel

BASELINES = ("zero", "bias", "latents")
COLUMNS = ["sequence", "position", "token", "site", "layer", "kind", "latent", "activation", "attribution"]
_CHUNK = 8192  # rows of W_dec gathered at a time


@dataclass
class Terms:
    """``x = f W_dec + bias + skip + error`` where spliced, and ``x = unspliced`` elsewhere.

    Attributes:
        acts: ``f [batch, pos, d_sae]``, 0 where not spliced.
        vectors: ``error``, ``bias``, ``unspliced``, and ``skip`` of skip transcoders; each ``[batch, pos, d]``, with 0
            where the term does not apply.
    """

    acts: Float[torch.Tensor, "batch pos d_sae"]
    vectors: dict[str, Float[torch.Tensor, "batch pos d"]]


@dataclass
class Change:
    """The difference of each term of a site's tensor from the baseline; latents that are 0 in both are left out.

    Attributes:
        index: sequence, position and latent of each entry.
        activation: activation of each entry of ``index``.
        activation_change: activation minus that of the baseline.
        vectors: the vectors of :class:`Terms` minus those of the baseline.
    """

    index: Int[torch.Tensor, "3 n"]
    activation: Float[torch.Tensor, " n"]
    activation_change: Float[torch.Tensor, " n"]
    vectors: dict[str, Float[torch.Tensor, "batch pos d"]]

    def total(self, w_dec: torch.Tensor) -> Float[torch.Tensor, "batch pos d"]:
        """The sum of all terms: the site's tensor minus its baseline."""
        out = sum(self.vectors.values(), torch.zeros_like(next(iter(self.vectors.values()))))
        batch, pos = out.shape[:2]
        flat = out.view(batch * pos, -1)
        for start in range(0, self.activation_change.numel(), _CHUNK):
            some = slice(start, start + _CHUNK)
            rows = w_dec[self.index[2, some]].to(flat.dtype) * self.activation_change[some, None]
            flat.index_add_(0, self.index[0, some] * pos + self.index[1, some], rows)
        return out

    def latents_along(
        self, gradient: Float[torch.Tensor, "batch pos d"], w_dec: torch.Tensor
    ) -> Float[torch.Tensor, " n"]:
        """``(f_{t,i} - f'_{t,i}) (g_t . W_dec[i])`` for the entries of ``index``; f' are the baseline's activations."""
        found = [torch.zeros(0, dtype=self.activation_change.dtype, device=self.activation_change.device)]
        for start in range(0, self.activation_change.numel(), _CHUNK):
            sequence, position, latent = self.index[:, start : start + _CHUNK]
            rows = w_dec[latent].to(self.activation_change.dtype)
            found.append((gradient[sequence, position].to(rows.dtype) * rows).sum(-1))
        return torch.cat(found) * self.activation_change

    def vectors_along(self, gradient: Float[torch.Tensor, "batch pos d"]) -> dict[str, torch.Tensor]:
        """``v_t . g_t``, ``[batch, pos]``, for every term but the latents."""
        return {kind: (vector * gradient.to(vector.dtype)).sum(-1) for kind, vector in self.vectors.items()}


def decompose(
    placed: PlacedSAE, read: torch.Tensor, write: torch.Tensor, spliced: Bool[torch.Tensor, "batch pos"]
) -> Terms:
    """The terms of the tensor that an SAE reconstructs, in float32 or wider.

    Args:
        placed: the SAE.
        read, write: the tensors at the SAE's hooks, with or without a heads dimension; they differ for transcoders.
        spliced: True at positions where the SAE applies.
    """
    sae = bring(placed.sae, read.device)
    x, y = flatten_heads(read).to(sae.dtype), flatten_heads(write)
    wide = torch.promote_types(torch.promote_types(y.dtype, sae.dtype), torch.float32)
    where = spliced.unsqueeze(-1)
    with flat_heads(sae):
        acts = sae.encode(x)
        decoded, whole = sae.decode(acts).to(wide), decode_with_skip(sae, acts, x).to(wide)
    y, zero = y.to(wide), torch.zeros((), dtype=wide, device=y.device)
    vectors = {
        "error": torch.where(where, y - whole, zero),
        "bias": torch.where(where, sae.b_dec.to(wide).expand_as(y), zero),
        "unspliced": torch.where(where, zero, y),
    }
    if getattr(sae, "W_skip", None) is not None:
        vectors["skip"] = torch.where(where, whole - decoded, zero)
    return Terms(torch.where(where, acts.to(wide), zero), vectors)


def change_from(terms: Terms, baseline: str, reference: Terms | None = None) -> Change:
    """The difference of ``terms`` from a baseline.

    Args:
        terms: the terms of the prompt.
        baseline: ``"zero"``: the whole tensor is 0. ``"bias"``: latents, error and skip are 0; ``b_dec`` and positions
            that are not spliced are unchanged. ``"latents"``: the latents are 0, all other terms are unchanged.
        reference: terms of the counterfactual, used in place of ``baseline``.

    Raises:
        UnknownNameError: the baseline is unknown.
    """
    acts, before = terms.acts, None
    if reference is not None:
        before = reference.acts
        vectors = {kind: vector - reference.vectors[kind] for kind, vector in terms.vectors.items()}
    elif baseline in BASELINES:
        unchanged = {"zero": (), "bias": ("bias", "unspliced"), "latents": tuple(terms.vectors)}[baseline]
        vectors = {k: torch.zeros_like(v) if k in unchanged else v for k, v in terms.vectors.items()}
    else:
        raise unknown_name("baseline", baseline, BASELINES)
    active = acts != 0
    index = (active if before is None else active | (before != 0)).nonzero().T
    at = tuple(index)
    return Change(index, acts[at], acts[at] if before is None else acts[at] - before[at], vectors)


def table_of(
    model: GemmaModel, prompt: SplicedPrompt, placed: PlacedSAE, change: Change, gradient: torch.Tensor
) -> pd.DataFrame:
    """The rows of one SAE in the order of tokens: first its latents, then the other terms.

    Args:
        model: a model whose tokenizer decodes the tokens.
        prompt: the token ids.
        placed: the SAE.
        change: the difference of each term from the baseline.
        gradient: gradient at the SAE's output, ``[batch, pos, d]``.
    """
    import pandas as pd

    sequence, position, latent = (column.tolist() for column in change.index.cpu())
    columns: dict[str, list[Any]] = {
        "sequence": sequence,
        "position": position,
        "kind": ["latent"] * len(latent),
        "latent": latent,
        "activation": change.activation.tolist(),
        "attribution": change.latents_along(gradient, placed.sae.W_dec).tolist(),
    }
    for kind, shares in change.vectors_along(gradient).items():
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
    table["site"], table["layer"] = placed.place.site, pd.array([placed.place.layer] * len(table), dtype="Int64")
    table["latent"] = table["latent"].astype("Int64")
    table["position"] = [p - starts[s] for s, p in pairs]
    return table[COLUMNS]


def strongest(table: pd.DataFrame, top: int | None) -> pd.DataFrame:
    """Rows sorted by absolute attribution within a sequence, largest first, with at most ``top`` latents in each."""
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


def token_names(model: GemmaModel, ids: torch.Tensor) -> list[list[str]]:
    """The text of every token, or its id if the model has no tokenizer."""
    names = iter(decoded_ids(model.tokenizer, ids.flatten().tolist()))
    return [list(islice(names, ids.shape[1])) for _ in ids]
