"""How often latents fire, by width (section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.accumulators import LatentCounts
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET, clean_batches, rows_that_fit
from gemma_scope_tl.evals.packing import as_tokens
from gemma_scope_tl.evals.subjects import Subject, latents_and_output, subjects_of

if TYPE_CHECKING:
    import pandas as pd


def firing_frequencies(
    model: Any,
    saes: Any,
    data: Sequence[str] | torch.Tensor,
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
    *,
    bins: int = 50,
    memory_budget: int = MEMORY_BUDGET,
) -> pd.DataFrame:
    """Histograms of how often latents fire (section 4.3). Nothing is spliced, so a token costs one pass and encodings.

    Args:
        model, saes, data, context, batch_size, progress, memory_budget: as
            :func:`~gemma_scope_tl.evals.suite.evaluate` takes them.
        bins: of ``log10`` of the frequency, from one firing in all tokens to every token.

    Returns:
        A row per SAE and bin: ``release, id, site, layer, d_sae, low, high`` (edges, ``log10`` of the share of tokens),
        ``latents`` and ``share`` (of all latents) in the bin, ``l0, dead`` (share that never fired), ``dense`` (share
        that fired on more than a tenth of the tokens), ``median`` (of ``log10`` frequency among latents that fired) and
        ``tokens``. BOS, EOS and padding are not counted.

    Raises:
        GemmaScopeError: without an ordinary token, or for less than one bin.
    """
    import pandas as pd

    if bins < 1:
        raise GemmaScopeError(f"A histogram has a bin or more, not {bins}.")
    counted = count_firing(model, saes, data, context, batch_size, progress, memory_budget=memory_budget)
    return pd.DataFrame([row for subject, counts in counted for row in _rows(subject, counts, bins)])


@torch.no_grad()
def count_firing(
    model: Any,
    saes: Any,
    data: Sequence[str] | torch.Tensor,
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
    *,
    memory_budget: int = MEMORY_BUDGET,
) -> list[tuple[Subject, LatentCounts]]:
    """Each SAE with how often each of its latents fired; arguments as :func:`firing_frequencies` takes them."""
    from rich.progress import track

    subjects = subjects_of(model, saes)
    tokens = as_tokens(model, data, context)
    places = list(dict.fromkeys(subject.place for subject in subjects))
    rows = rows_that_fit(model, places, tokens.shape[1], batch_size, memory_budget)
    counts = [LatentCounts.empty(subject.d_sae) for subject in subjects]
    batches = clean_batches(model, tokens, places, model._excluded_ids(True), rows)
    total = -(-tokens.shape[0] // rows)
    for batch in track(batches, "counting", total, transient=True, disable=not progress):
        inputs = {place: batch.activations(place) for place in places}
        for subject, count in zip(subjects, counts, strict=True):
            count.update(latents_and_output(subject.get(), inputs[subject.place])[0])
    return list(zip(subjects, counts, strict=True))


def _rows(subject: Subject, counts: LatentCounts, bins: int) -> list[dict[str, Any]]:
    latents, edges = counts.histogram(bins)
    live = counts.frequencies[counts.fired > 0].log10()
    facts = {
        "l0": float(counts.fired.sum()) / counts.tokens,
        "dead": counts.dead,
        "dense": counts.dense,
        "median": float(live.quantile(0.5)) if live.numel() else float("nan"),
        "tokens": counts.tokens,
    }
    names = {"release": subject.release, "id": subject.id, "site": subject.place.site, "layer": subject.place.layer}
    return [
        {
            **names,
            "d_sae": subject.d_sae,
            "low": float(edges[at]),
            "high": float(edges[at + 1]),
            "latents": int(latents[at]),
            "share": int(latents[at]) / subject.d_sae,
            **facts,
        }
        for at in range(bins)
    ]
