"""Firing frequencies of latents, by width (section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track

from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.evals.accumulators import LatentCounts
from gemma_scope_tl.evals.cache import Checkpoint, MetricsCache, key_of
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET, read_batches, rows_that_fit
from gemma_scope_tl.evals.facts import facts_of
from gemma_scope_tl.evals.saes import Subject, latents_of, subjects_of
from gemma_scope_tl.model.counted import CountedBatch, counted_rows
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.text.rows import special_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel

CHECKPOINT = 16


def firing_frequencies(
    model: GemmaModel,
    saes: Any,
    data: Text,
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
    *,
    bins: int = 50,
    memory_budget: int = MEMORY_BUDGET,
    cache: str | PathLike[str] | None = None,
    positions: Positions = None,
) -> pd.DataFrame:
    """Histograms of how often latents fire (section 4.3), from one clean pass and one encoding for each SAE.

    Args:
        model, saes, data, context, batch_size, progress, memory_budget, cache, positions: as
            :func:`~gemma_scope_tl.evals.suite.evaluate` takes them.
        bins: number of bins of ``log10`` of the frequency, from one firing in all tokens to every token.

    Returns:
        A row per SAE and bin: ``release, id, site, layer, d_sae, low, high`` (edges, ``log10`` of the share of tokens),
        ``latents`` and ``share`` (of all latents) in the bin, ``l0, dead`` (share that never fired), ``dense`` (share
        that fired on more than a tenth of the tokens), ``median`` (of ``log10`` frequency among latents that fired) and
        ``tokens``. BOS, EOS and padding are not counted.

    Raises:
        GemmaScopeError: the data have no ordinary token, or ``bins`` is below 1.
    """
    import pandas as pd

    bins = checked_count(bins, "bins")
    counted = count_firing(
        model, saes, data, context, batch_size, progress, memory_budget=memory_budget, cache=cache, positions=positions
    )
    return pd.DataFrame([row for subject, counts in counted for row in _rows(subject, counts, bins)])


@torch.no_grad()
def count_firing(
    model: GemmaModel,
    saes: Any,
    data: Text,
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
    *,
    memory_budget: int = MEMORY_BUDGET,
    cache: str | PathLike[str] | None = None,
    positions: Positions = None,
) -> list[tuple[Subject, LatentCounts]]:
    """Count how often each latent of each SAE fires; arguments are as for :func:`firing_frequencies`.

    With a cache folder, an SAE that was counted before on the same model and tokens is not counted again, and an
    interrupted count continues from the last save, made every :data:`CHECKPOINT` batches.
    """
    subjects = subjects_of(model, saes)
    special = special_ids(model)
    rows = counted_rows(model, data, context, special, positions)
    kept = MetricsCache(cache)
    keys = [""] * len(subjects) if cache is None else _keys(model, rows, special, subjects)
    counts = [LatentCounts.empty(subject.d_sae) for subject in subjects]
    pending: dict[int, LatentCounts] = {}
    for number, (key, one) in enumerate(zip(keys, counts, strict=True)):
        state = kept.load(key)
        if state is None:
            pending[number] = one
        else:
            one.restore(state)
    if pending:
        # Rows of several lengths are not counted in the given order, so an earlier version's checkpoint does not fit.
        order = {"order": "by length"} if rows.ragged else {}
        facts = {"counting": [keys[number] for number in pending], **order}
        checkpoint = Checkpoint(kept, key_of(facts), pending)
        places = list(dict.fromkeys(subjects[number].place for number in pending))
        fitting = rows_that_fit(model, places, rows.ids.shape[1], batch_size, memory_budget)
        start = checkpoint.restore()
        batches = read_batches(model, rows, places, fitting, start)
        total = -(-(rows.ids.shape[0] - start) // fitting)
        for done, batch in enumerate(track(batches, "counting", total, transient=True, disable=not progress), 1):
            inputs = {place: batch.activations(place) for place in places}
            for number, one in pending.items():
                one.update(latents_of(subjects[number].get(), inputs[subjects[number].place]))
            if done % CHECKPOINT == 0:
                checkpoint.save(batch.done)
        for number, one in pending.items():
            kept.save(keys[number], one.state())
        checkpoint.drop()
    return list(zip(subjects, counts, strict=True))


def _keys(model: GemmaModel, rows: CountedBatch, special: tuple[int, ...], subjects: Sequence[Subject]) -> list[str]:
    common = facts_of(model, rows, special)
    return [key_of({**common, "unit": "fired", "place": s.place.key, "sae": s.facts()}) for s in subjects]


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
    return [
        {
            **subject.columns,
            "low": float(edges[at]),
            "high": float(edges[at + 1]),
            "latents": int(latents[at]),
            "share": int(latents[at]) / subject.d_sae,
            **facts,
        }
        for at in range(bins)
    ]
