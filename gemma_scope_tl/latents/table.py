"""A tidy table of the active latents on each token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int

from gemma_scope_tl.counts import checked_count, checked_real, checked_top
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.counted import CountedBatch, counted_tokens
from gemma_scope_tl.model.finite import visit_finite_places
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.access import check_trained_on, encode_latents, locate
from gemma_scope_tl.sae.base import GemmaScopeMixin
from gemma_scope_tl.sae.choices import as_saes, bring
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sae.sparse import SparseActs, encode_sparse
from gemma_scope_tl.sae.sparse_ops import starts_of
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.batch import Text, as_batch
from gemma_scope_tl.text.tokenizing import decoded_ids
from gemma_scope_tl.text.tokens import ExcludeTokens, excluded_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


_CHUNK = 128  # tokens whose dense activations are held, for SAEs that cannot encode sparsely


@torch.no_grad()
def features(
    model: GemmaModel,
    text: Text,
    saes: Any | Iterable[Any],
    top: int | None = None,
    exclude_special_tokens: ExcludeTokens = True,
    min_activation: float = 0.0,
    attention_mask: Any = None,
    batch_size: int = 8,
    positions: Positions = None,
) -> pd.DataFrame:
    """The active latents of ``saes`` on ``text``, from one forward pass over each text for all SAEs.

    A pass ends at the last place that an SAE reads: later layers and the unembedding do not run. It includes the hooks
    and SAEs that are attached to the model up to there, and none behind. SAEs read hooks and not Hugging Face's
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
        batch_size: number of texts in a forward pass, which texts of similar length share.
        positions: the only positions to list, as in :func:`~gemma_scope_tl.splice`; None for all.

    Returns:
        A table with a row per active latent, strongest first within a token: ``sequence, position, token, sae, site,
        layer, latent, activation``. ``position`` counts from 0 at the first token of the text, as for interventions.
        ``sae`` is the index in ``saes``, which distinguishes SAEs of one site and layer. ``""`` (BOS alone) gives no
        rows.

    Raises:
        GemmaScopeError: for ``top`` or ``batch_size`` below 1, ``min_activation`` below 0, no text, or a text that is
            too long; when activations of the model or latents of an SAE are not finite.
        SpliceError: for no SAE, an SAE of unknown site, or a position that a text does not have.
    """
    import pandas as pd

    top, batch_size = checked_top(top), checked_count(batch_size, "batch_size")
    min_activation = checked_real(min_activation, "min_activation", least=0)
    several, batch = as_saes(saes), as_batch(model, text, attention_mask)
    for sae in several:
        check_trained_on(sae, model.family, model.model_id)
    places = [Place(site.name, layer) for site, layer in (locate(sae, model.family) for sae in several)]
    special = excluded_ids(model.tokenizer, exclude_special_tokens)
    whole = CountedBatch(batch.ids, batch.mask, counted_tokens(batch, special, positions))
    reader = _Reader(several, places, special, top, min_activation)
    parts = [reader.read(model, rows, whole.part(rows, columns)) for rows, columns in whole.parts(batch_size)]
    frames = [
        _joined([part[number] for part in parts]).frame(model.tokenizer, number, place)
        for number, place in enumerate(places)
    ]
    return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True)
class _Active:
    """The active latents of one SAE, a row per token and latent, with the columns of the table."""

    sequence: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    latent: torch.Tensor
    activation: torch.Tensor

    def frame(self, tokenizer: Any, number: int, place: Place) -> pd.DataFrame:
        """The rows of the table for SAE ``number``."""
        import pandas as pd

        listed = {
            "sequence": self.sequence.numpy(),
            "position": self.position.numpy(),
            "token": decoded_ids(tokenizer, self.token.tolist()),
            "sae": number,
            "site": place.site,
            "layer": pd.array([place.layer] * len(self.latent), dtype="Int64"),
            "latent": self.latent.numpy(),
            "activation": self.activation.double().numpy(),
        }
        return pd.DataFrame(listed)


@dataclass(frozen=True)
class _Reader:
    """The SAEs of a table, the place that each reads, and what is listed."""

    saes: list[Any]
    places: list[Place]
    special: tuple[int, ...]
    top: int | None
    min_activation: float

    def read(self, model: GemmaModel, rows: Int[torch.Tensor, " batch"], batch: CountedBatch) -> list[_Active]:
        """The active latents of each SAE, from one pass over rows of the text, whose numbers are ``rows``.

        SAEs encode while the pass is at their place, so no tensor of the model is kept.
        """
        found: dict[int, _Active] = {}

        def visit(place: Place, x: torch.Tensor) -> None:
            for number, sae in enumerate(self.saes):
                if self.places[number] == place:
                    found[number] = self._active(sae, place, x, rows, batch)

        ordinary = batch.ordinary(self.special)
        visit_finite_places(model, batch.ids, self.places, visit, ordinary, batch.attention_mask, rows)
        return [found[number] for number in range(len(self.saes))]

    def _active(
        self,
        sae: Any,
        place: Place,
        x: Float[torch.Tensor, "batch pos d_in"],
        rows: Int[torch.Tensor, " batch"],
        batch: CountedBatch,
    ) -> _Active:
        """The active latents on the counted tokens of ``batch``, by row and column, then strongest first."""
        # All ordinary tokens are encoded, as products of other shapes would round the same token differently.
        ordinary = batch.ordinary(self.special)
        acts = _encoded(sae, x[ordinary.to(x.device)])
        _check_latents(sae, place, acts)
        tokens, values = acts.tokens(), acts.values.float()
        order = values.argsort(descending=True, stable=True)  # sort by value, then stably by token
        order = order[tokens[order].argsort(stable=True)]
        kept = (values > 0) & (values >= self.min_activation) & batch.counted[ordinary].to(tokens.device)[tokens]
        if self.top is not None:
            kept &= torch.empty_like(tokens).scatter_(0, order, _ranks(acts)) < self.top
        order = order[kept[order]].cpu()
        tokens, latents, values = tokens.cpu()[order], acts.latents.cpu()[order], values.cpu()[order]
        if isinstance(sae, Latents):
            latents = torch.tensor(sae.latents)[latents]
        row, column = (at.cpu()[tokens] for at in ordinary.nonzero(as_tuple=True))
        ids, position = batch.ids.cpu(), batch.place.cpu()
        return _Active(rows.cpu()[row], position[row, column], ids[row, column], latents, values)


def _encoded(sae: Any, x: Float[torch.Tensor, "n d_in"]) -> SparseActs:
    """The latents of ``x`` without dense activations, where the class of the SAE allows it; otherwise a few tokens at a
    time. Hooks on the SAE do not run (:func:`~gemma_scope_tl.sae.access.encode_latents`)."""
    if isinstance(sae, GemmaScopeMixin) and x.shape[-1] == sae.cfg.d_in:  # encode raises for another width
        bring(sae, x.device)
        return encode_sparse(x, sae.W_enc, sae.b_enc, sae.threshold)
    parts = [SparseActs.from_dense(encode_latents(sae, part)) for part in x.split(_CHUNK)]
    counts = torch.cat([part.offsets.diff() for part in parts])
    latents, values = torch.cat([part.latents for part in parts]), torch.cat([part.values for part in parts])
    return SparseActs(starts_of(counts), latents, values, (x.shape[0], parts[0].d_sae))


def _check_latents(sae: Any, place: Place, acts: SparseActs) -> None:
    """Raise for latents that are not finite, though the activations were. A NaN would be left out of the table."""
    threshold = getattr(sae, "threshold", None)
    wrong = acts.latents[~acts.values.isfinite()]
    if threshold is not None and not len(wrong):
        wrong = threshold.detach().isnan().nonzero().flatten()
    if len(wrong):
        latent = int(wrong[0])
        latent = sae.latents[latent] if isinstance(sae, Latents) else latent
        raise GemmaScopeError(
            f"Latent {latent} of the SAE of {place.key} is not finite on activations that are: its "
            "weights hold an infinity or NaN, or overflow in its dtype."
        )


def _ranks(acts: SparseActs) -> Int[torch.Tensor, " nnz"]:
    """The place of each entry within its token, from 0."""
    entries = torch.arange(acts.latents.shape[0], device=acts.latents.device)
    return entries - acts.offsets[acts.tokens()]


def _joined(parts: list[_Active]) -> _Active:
    """Parts in one, by sequence."""
    if not parts:
        none = torch.zeros(0, dtype=torch.long)
        return _Active(none, none, none, none, none.float())
    columns = [torch.cat([getattr(part, column.name) for part in parts]) for column in fields(_Active)]
    order = columns[0].argsort(stable=True)
    return _Active(*(column[order] for column in columns))
