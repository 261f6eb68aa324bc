"""The numbers on a latent's page: where it fires, how strongly, the tokens it promotes, and similar latents."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float

from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.latents.logit_lens import top_tokens
from gemma_scope_tl.model.counted import counted_rows
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.model.read import read_places
from gemma_scope_tl.sae.access import check_trained_on, chosen_latents, decoder_rows, encode_latents, locate
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.text.documents import read_texts
from gemma_scope_tl.text.tokenizing import decoded_ids
from gemma_scope_tl.text.tokens import special_token_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel
    from gemma_scope_tl.registry.schema import SAERow

NEURONPEDIA = "https://www.neuronpedia.org"
_BINS = 24
_CHUNK = 16384  # decoder rows in float32 at once


class PageText:
    """The text of latents' pages as token rows, with the model's activations at the places that were read last.

    While the activations of a place are held, further latents of it need no forward pass.

    Args:
        model: a model from ``load_model``, with its hooks and attached SAEs.
        data: texts, token ids or conversations; None for the held-out text in the package.
        rows: maximum number of token rows.
        context: number of tokens in a row, BOS included.
        batch_size: number of rows in a forward pass.
        memory: bytes of activations to hold. The activations of one place are held even if they take more.
        positions: the only positions of each row that count, as in :func:`~gemma_scope_tl.splice`; None for all.

    Raises:
        GemmaScopeError: the texts hold less than one row, or ``rows`` or ``batch_size`` is below 1.
        SpliceError: a row lacks one of the positions.
    """

    def __init__(
        self,
        model: GemmaModel,
        data: Text | None = None,
        rows: int = 64,
        context: int = 128,
        batch_size: int = 8,
        memory: int = 1 << 29,
        positions: Positions = None,
    ) -> None:
        rows, batch_size = checked_count(rows, "rows"), checked_count(batch_size, "batch_size")
        special, data = special_token_ids(model.tokenizer), read_texts() if data is None else data
        batch = counted_rows(model, data, context, special, positions, limit=rows)
        self.model, self.tokens, self.batch_size, self.memory = model, batch.ids, batch_size, memory
        self._text = batch
        self.counted: Bool[torch.Tensor, "rows pos"] = batch.counted
        self._held: OrderedDict[Place, torch.Tensor] = OrderedDict()

    @torch.no_grad()
    def activations(self, sae: Any) -> Float[torch.Tensor, "rows pos d_in"]:
        """The activations that ``sae`` reads at every token, with flattened heads, on the CPU; zero at padding."""
        check_trained_on(sae, self.model.family, self.model.model_id)
        site, layer = locate(sae, self.model.family)
        site.check_layer(layer, self.model.dims)
        place = Place(site.name, layer)
        if place in self._held:
            self._held.move_to_end(place)
            return self._held[place]
        for rows, columns in self._text.parts(self.batch_size):
            x = read_places(self.model, self.tokens[rows, columns].to(self.model.cfg.device), [place])[place]
            if place not in self._held:
                self._held[place] = torch.zeros(*self.tokens.shape, x.shape[-1], dtype=x.dtype)
            self._held[place][rows, columns] = x.cpu()
        while len(self._held) > 1 and sum(x.nbytes for x in self._held.values()) > self.memory:
            self._held.popitem(last=False)
        return self._held[place]

    def parts(self) -> Iterator[tuple[torch.Tensor, slice]]:
        """Rows and columns of the text for one pass each: ``tokens[rows, columns]``."""
        return iter(self._text.parts(self.batch_size))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token id."""
        return decoded_ids(self.model.tokenizer, ids)


@dataclass(frozen=True)
class Excerpt:
    """A window of text around the token on which the latent fires strongest in a row.

    Attributes:
        row: row of the page's text; ``start``: position of the first token shown.
        tokens, activations: the tokens and their activations; 0 where a token does not count.
        peak: index of the strongest token in ``tokens``.
    """

    row: int
    start: int
    tokens: list[str]
    activations: list[float]
    peak: int


@dataclass(frozen=True)
class LatentFacts:
    """All numbers of a latent's page.

    Attributes:
        latent: index of the latent; ``d_sae``: number of latents.
        name: release and id of the SAE; site and layer if the SAE is not in the registry.
        site, layer: the place that the SAE reads.
        tokens: number of tokens that count; ``fired``: number of tokens on which the latent fires.
        maximum: the strongest activation; 0 if the latent never fires.
        examples: examples, strongest first, each from a different row of the text.
        edges, counts: histogram of the activations above 0; empty if there are none.
        lens: rows of :func:`~gemma_scope_tl.latents.logit_lens.top_tokens`.
        neighbours: ``latent, cosine``: the nearest decoder rows, nearest first.
        neuronpedia: address of the latent's dashboard, if the registry has one.
        neuronpedia_warning: why the dashboard does not show this latent correctly, if the registry says so.
    """

    latent: int
    d_sae: int
    name: str
    site: str
    layer: int | None
    tokens: int
    fired: int
    maximum: float
    examples: list[Excerpt]
    edges: list[float]
    counts: list[int]
    lens: pd.DataFrame
    neighbours: pd.DataFrame
    neuronpedia: str | None
    neuronpedia_warning: str | None = None

    @property
    def density(self) -> float:
        """Share of the ordinary tokens on which the latent is active."""
        return self.fired / self.tokens if self.tokens else math.nan


@torch.no_grad()
def latent_facts(
    text: PageText,
    sae: Any,
    latent: int,
    examples: int = 10,
    around: int = 14,
    k: int = 10,
    neighbours: int = 8,
) -> LatentFacts:
    """Compute the numbers of a latent's page, without BOS, EOS and padding.

    Args:
        text: the text of the page.
        sae: a whole SAE or transcoder.
        latent: index of the latent.
        examples: maximum number of examples; ``around``: number of tokens on each side of the strongest.
        k: number of promoted tokens, and of suppressed tokens.
        neighbours: maximum number of similar latents.

    Raises:
        SpliceError: the latent does not exist, or the SAE does not fit the model.
        GemmaScopeError: ``sae`` is a ``Latents``, which lacks the other decoder rows, or a number is below 1.
    """
    if isinstance(sae, Latents):
        raise GemmaScopeError("A latent's page compares it with all others: load the whole SAE with load_sae.")
    examples, k = checked_count(examples, "examples"), checked_count(k, "k")
    neighbours, around = checked_count(neighbours, "neighbours"), checked_count(around, "around", least=0)
    (index,) = chosen_latents(sae, latent)
    site, layer = locate(sae, text.model.family)
    x = text.activations(sae).to(text.model.device_of(layer))
    acts = encode_latents(sae, x, [index])[..., 0].float().cpu()
    acts = torch.where(text.counted, acts, 0.0)
    active = acts[acts > 0]
    counts, edges = _histogram(active)
    row: SAERow | None = getattr(sae, "row", None)
    return LatentFacts(
        latent=index,
        d_sae=int(sae.cfg.d_sae),
        name=f"{row.release}/{row.id}" if row else site.name + ("" if layer is None else f", layer {layer}"),
        site=site.name,
        layer=layer,
        tokens=int(text.counted.sum()),
        fired=len(active),
        maximum=float(active.max()) if len(active) else 0.0,
        examples=excerpts(text, acts, examples, around),
        edges=edges,
        counts=counts,
        lens=top_tokens(text.model, sae, index, k=k),
        neighbours=similar_latents(sae, index, neighbours),
        neuronpedia=f"{NEURONPEDIA}/{row.neuronpedia}/{index}" if row and row.neuronpedia else None,
        neuronpedia_warning=row.neuronpedia_warning if row else None,
    )


@torch.no_grad()
def similar_latents(sae: Any, latent: int, n: int = 8) -> pd.DataFrame:
    """The latents whose decoder rows have the largest cosine with this latent's.

    ``cosine(i, j) = W_dec[i] . W_dec[j] / (||W_dec[i]|| ||W_dec[j]||)``, in float32.

    Returns:
        A row per latent, nearest first, without the latent itself: ``latent, cosine``.

    Raises:
        SpliceError: the latent does not exist.
    """
    import pandas as pd

    (index,) = chosen_latents(sae, latent)
    row = torch.nn.functional.normalize(decoder_rows(sae, [index]).float(), dim=-1)[0]
    parts = [torch.nn.functional.normalize(rows.float(), dim=-1) @ row for rows in sae.W_dec.split(_CHUNK)]
    cosines = torch.cat(parts).cpu()
    cosines[index] = -math.inf
    values, found = cosines.topk(min(n, len(cosines) - 1))
    return pd.DataFrame({"latent": found.tolist(), "cosine": values.tolist()})


def _histogram(active: torch.Tensor) -> tuple[list[int], list[float]]:
    if not len(active):
        return [], []
    top = float(active.max())
    return torch.histc(active, bins=_BINS, min=0.0, max=top).long().tolist(), torch.linspace(0, top, _BINS + 1).tolist()


def excerpts(text: PageText, acts: Float[torch.Tensor, "rows pos"], most: int, around: int) -> list[Excerpt]:
    """The strongest excerpts, each from a different row; ``acts`` are 0 where a token does not count."""
    strongest, where = acts.max(dim=1)
    order = strongest.argsort(descending=True, stable=True)[:most].tolist()
    found: list[Excerpt] = []
    for row in order:
        if strongest[row] <= 0:
            break
        peak = int(where[row])
        start, end = max(0, peak - around), min(acts.shape[1], peak + around + 1)
        tokens = text.texts(text.tokens[row, start:end].tolist())
        found.append(Excerpt(row, start, tokens, acts[row, start:end].tolist(), peak - start))
    return found
