"""How often latents fire, by width (section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.accumulators import LatentCounts
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET, clean_batches, rows_that_fit
from gemma_scope_tl.evals.run import facts_of
from gemma_scope_tl.evals.saes import Subject, latents_of, subjects_of
from gemma_scope_tl.evals.store import Store, key_of
from gemma_scope_tl.text.batch import Text, TokenBatch
from gemma_scope_tl.text.rows import as_rows, special_ids

if TYPE_CHECKING:
    import pandas as pd

CHECKPOINT = 16


def firing_frequencies(
    model: Any,
    saes: Any,
    data: Text,
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
    *,
    bins: int = 50,
    memory_budget: int = MEMORY_BUDGET,
    cache: str | PathLike[str] | None = None,
) -> pd.DataFrame:
    """Histograms of how often latents fire (section 4.3). Nothing is spliced, so a token costs one pass and encodings.

    Args:
        model, saes, data, context, batch_size, progress, memory_budget, cache: as
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
    counted = count_firing(model, saes, data, context, batch_size, progress, memory_budget=memory_budget, cache=cache)
    return pd.DataFrame([row for subject, counts in counted for row in _rows(subject, counts, bins)])


@torch.no_grad()
def count_firing(
    model: Any,
    saes: Any,
    data: Text,
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
    *,
    memory_budget: int = MEMORY_BUDGET,
    cache: str | PathLike[str] | None = None,
) -> list[tuple[Subject, LatentCounts]]:
    """Each SAE with how often each of its latents fired; arguments as :func:`firing_frequencies` takes them.

    With a cache folder, an SAE that was counted there on the same model and tokens is not counted again, and a count
    that was stopped goes on where it last saved, every :data:`CHECKPOINT` batches.
    """
    from rich.progress import track

    subjects = subjects_of(model, saes)
    given, special = as_rows(model, data, context), special_ids(model)
    tokens = given.ids
    store, keys = Store(cache), _keys(model, given, special, subjects) if cache is not None else []
    kept = [store.load(key) for key in keys] or [None] * len(subjects)
    pairs = list(zip(subjects, kept, strict=True))
    counts = [LatentCounts.empty(s.d_sae) if k is None else LatentCounts.from_state(k) for s, k in pairs]
    pending = [number for number, state in enumerate(kept) if state is None]
    if not pending:
        return list(zip(subjects, counts, strict=True))
    places = list(dict.fromkeys(subjects[number].place for number in pending))
    rows = rows_that_fit(model, places, tokens.shape[1], batch_size, memory_budget)
    unfinished = key_of({"counting": [keys[number] for number in pending]}) if keys else ""
    start = _resumed(store, unfinished, counts, pending) if keys else 0
    batches = clean_batches(model, tokens, places, special, rows, start, given.mask)
    total = -(-(tokens.shape[0] - start) // rows)
    for done, batch in enumerate(track(batches, "counting", total, transient=True, disable=not progress), 1):
        inputs = {place: batch.activations(place) for place in places}
        for number in pending:
            counts[number].update(latents_of(subjects[number].get(), inputs[subjects[number].place]))
        if keys and done % CHECKPOINT == 0:
            store.save(unfinished, _unfinished(batch.start + batch.tokens.shape[0], counts, pending))
    for number in pending if keys else ():
        store.save(keys[number], counts[number].state())
    if keys:
        store.drop(unfinished)
    return list(zip(subjects, counts, strict=True))


def _keys(model: Any, rows: TokenBatch, special: tuple[int, ...], subjects: Sequence[Subject]) -> list[str]:
    common = facts_of(model, rows, special)
    return [key_of({**common, "unit": "fired", "place": s.place.key, "sae": s.fingerprint()}) for s in subjects]


def _unfinished(rows: int, counts: Sequence[LatentCounts], pending: Sequence[int]) -> dict[str, torch.Tensor]:
    states = {f"{n}/{key}": value for n in pending for key, value in counts[n].state().items()}
    return {"rows": torch.tensor(rows), **states}


def _resumed(store: Store, key: str, counts: list[LatentCounts], pending: Sequence[int]) -> int:
    """Take over what was counted before a stop; the row to go on with."""
    state = store.load(key)
    if state is None:
        return 0
    for number in pending:
        start = f"{number}/"
        mine = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        counts[number] = LatentCounts.from_state(mine)
    return int(state["rows"])


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
