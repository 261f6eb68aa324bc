"""A site's tensor as the sum of its parts, and what each part contributes along a gradient."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int

from gemma_scope_tl.attributions.passes import Place, Prompt
from gemma_scope_tl.errors import unknown_name
from gemma_scope_tl.sae.access import decode_with_skip
from gemma_scope_tl.sae.placement import bring
from gemma_scope_tl.sites import flatten_heads

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("zero", "bias", "latents")
CHUNK = 8192  # rows of W_dec gathered at a time


@dataclass
class Parts:
    """``x = f W_dec + bias + skip + error`` where spliced, and ``x = unspliced`` elsewhere.

    Attributes:
        acts: ``f [batch, pos, d_sae]``, 0 where not spliced.
        vectors: ``error``, ``bias``, ``unspliced``, and ``skip`` of skip transcoders: each ``[batch, pos, d]``, 0 where
            it does not apply.
    """

    acts: Float[torch.Tensor, "batch pos d_sae"]
    vectors: dict[str, Float[torch.Tensor, "batch pos d"]]


@dataclass
class Moves:
    """How far each part of a site's tensor is from its baseline; latents that neither has are left out.

    Attributes:
        index: sequence, position and latent.
        activation: of each latent in ``index``.
        moved: activation minus the baseline's.
        vectors: as in :class:`Parts`, minus the baseline's.
    """

    index: Int[torch.Tensor, "3 n"]
    activation: Float[torch.Tensor, " n"]
    moved: Float[torch.Tensor, " n"]
    vectors: dict[str, Float[torch.Tensor, "batch pos d"]]

    def total(self, w_dec: torch.Tensor) -> Float[torch.Tensor, "batch pos d"]:
        """The sum of all parts: the site's tensor minus its baseline."""
        out = sum(self.vectors.values(), torch.zeros_like(next(iter(self.vectors.values()))))
        batch, pos = out.shape[:2]
        flat = out.view(batch * pos, -1)
        for start in range(0, self.moved.numel(), CHUNK):
            some = slice(start, start + CHUNK)
            rows = w_dec[self.index[2, some]].to(flat.dtype) * self.moved[some, None]
            flat.index_add_(0, self.index[0, some] * pos + self.index[1, some], rows)
        return out

    def latents_along(
        self, gradient: Float[torch.Tensor, "batch pos d"], w_dec: torch.Tensor
    ) -> Float[torch.Tensor, " n"]:
        """``moved_{t,i} (g_t . W_dec[i])`` for the latents in ``index``."""
        found = [torch.zeros(0, dtype=self.moved.dtype, device=self.moved.device)]
        for start in range(0, self.moved.numel(), CHUNK):
            sequence, position, latent = self.index[:, start : start + CHUNK]
            rows = w_dec[latent].to(self.moved.dtype)
            found.append((gradient[sequence, position].to(rows.dtype) * rows).sum(-1))
        return torch.cat(found) * self.moved

    def vectors_along(self, gradient: Float[torch.Tensor, "batch pos d"]) -> dict[str, torch.Tensor]:
        """``v_t . g_t``, ``[batch, pos]``, for every vector part."""
        return {kind: (vector * gradient.to(vector.dtype)).sum(-1) for kind, vector in self.vectors.items()}


def decompose(place: Place, read: torch.Tensor, write: torch.Tensor, spliced: Bool[torch.Tensor, "batch pos"]) -> Parts:
    """Take apart what an SAE reconstructs, in float32 or wider.

    Args:
        place: the SAE.
        read, write: the tensors at its hooks, heads apart or not; the same one but for transcoders.
        spliced: where the SAE applies.
    """
    sae = bring(place.sae, read.device)
    x, y = flatten_heads(read).to(sae.dtype), flatten_heads(write)
    wide = torch.promote_types(torch.promote_types(y.dtype, sae.dtype), torch.float32)
    where = spliced.unsqueeze(-1)
    with _flat(sae):
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
    return Parts(torch.where(where, acts.to(wide), zero), vectors)


def moves_from(parts: Parts, baseline: str, reference: Parts | None = None) -> Moves:
    """What moves between the baseline and ``parts``.

    Args:
        parts: the prompt's.
        baseline: ``"zero"``: the whole tensor is 0. ``"bias"``: latents, error and skip are 0; ``b_dec`` stays, and the
            positions that are not spliced. ``"latents"``: the latents are 0, everything else stays.
        reference: the counterfactual's parts, instead of ``baseline``.

    Raises:
        UnknownNameError: another baseline.
    """
    acts, before = parts.acts, None
    if reference is not None:
        before = reference.acts
        vectors = {kind: vector - reference.vectors[kind] for kind, vector in parts.vectors.items()}
    elif baseline in BASELINES:
        still = {"zero": (), "bias": ("bias", "unspliced"), "latents": tuple(parts.vectors)}[baseline]
        vectors = {k: torch.zeros_like(v) if k in still else v for k, v in parts.vectors.items()}
    else:
        raise unknown_name("baseline", baseline, BASELINES)
    active = acts != 0
    index = (active if before is None else active | (before != 0)).nonzero().T
    at = tuple(index)
    return Moves(index, acts[at], acts[at] if before is None else acts[at] - before[at], vectors)


@contextmanager
def _flat(sae: Any) -> Generator[None]:
    """Tell a stock SAELens SAE, which otherwise wants heads apart, that they are flattened; ours see for themselves."""
    from gemma_scope_tl.sae.base import GemmaScopeMixin

    told = not isinstance(sae, GemmaScopeMixin) and getattr(sae, "hook_z_reshaping_mode", False)
    try:
        if told:
            sae.turn_off_forward_pass_hook_z_reshaping()
        yield
    finally:
        if told:
            sae.turn_on_forward_pass_hook_z_reshaping()


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
