"""Explanations of latents scored beside those of a random SAE, the control of section 4.4.

A language model finds something to say about any set of excerpts, and a latent that fires on common words is easy to
predict. So the score of a trained SAE's explanations means little by itself. The control is an SAE of the same shape
with random weights, of which latent ``i`` fires as often as latent ``i`` of the trained one
(:func:`~gemma_scope_tl.studies.random_twin`, ``frequency="matched"``): same L0, same frequencies, same text, same
examples, same client.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET, read_batches, rows_that_fit
from gemma_scope_tl.evals.metrics import Bootstrap
from gemma_scope_tl.evals.saes import Subject, subjects_of
from gemma_scope_tl.interp.client import Answerer
from gemma_scope_tl.interp.examples import Examples, top_examples
from gemma_scope_tl.interp.explanations import detection_scores, explain, simulation_scores
from gemma_scope_tl.interp.sampling import Sampling
from gemma_scope_tl.model.counted import CountedBatch, counted_rows
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.arguments import as_indices
from gemma_scope_tl.studies.random_saes import (
    L0_BAND,
    checked_l0,
    drawn_tokens,
    random_twin,
    sampled_activations,
)
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.text.rows import special_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel

SCORES = {"detection": detection_scores, "simulation": simulation_scores}
LATENTS, RANDOM = "latents", "random"


def explanation_study(
    client: Answerer,
    model: GemmaModel,
    saes: Any,
    data: Text,
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
    *,
    latents: Iterable[int] | None = None,
    count: int = 10,
    methods: Sequence[str] = tuple(SCORES),
    control: bool = True,
    l0_band: float = L0_BAND,
    sampling: Sampling | None = None,
    seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
    positions: Positions = None,
) -> pd.DataFrame:
    """Explain latents of each SAE and of a random SAE, and score all explanations alike.

    Args:
        client: the language model.
        model, saes, data, context, batch_size, progress, memory_budget, positions: as
            :func:`~gemma_scope_tl.evals.suite.evaluate` takes them.
        latents, count: indices of latents of every SAE; by default ``count`` of each, drawn among those that fire.
        methods: ``"detection"``, ``"simulation"`` or both.
        control: also score the same latents of a random SAE, which takes as many requests again, and three more passes.
        l0_band: largest difference of the random SAE's L0, as a share. Its thresholds are computed on every other row
            of the text and checked on the rest.
        sampling: number of examples of each kind, length of a window, and seed.
        seed: seed of the drawn latents, the random SAE, the order of examples and the intervals of the scores.

    Returns:
        A row per explained latent: ``release, id, site, layer, latent, features`` (``latents`` or ``random``), ``l0``
        (measured where the control was checked; NaN without control), ``fired`` (tokens on which the latent fired),
        ``explanation``, and the columns of the scores. :func:`compare_explanations` sums it up.

    Raises:
        UnknownNameError: a method is unknown.
        GemmaScopeError: there is less text than two rows, or the L0 of a random SAE is outside the band.
    """
    import pandas as pd

    _check(methods)
    subjects, text = subjects_of(model, saes), counted_rows(model, data, context, special_ids(model), positions)
    given = None if latents is None else as_indices(latents)
    options: dict[str, Any] = {"sampling": sampling or Sampling(seed=seed), "memory_budget": memory_budget}
    options |= {"batch_size": batch_size, "progress": progress, "positions": text.counted}
    parts: list[pd.DataFrame] = []
    for subject, found in zip(subjects, top_examples(model, saes, text, latents=given, **options), strict=True):
        chosen = drawn_latents(found, count, seed) if given is None else given
        l0, compared = (np.nan, np.nan), [(LATENTS, found)]
        if control and chosen:  # before any request is made, because it may fail
            twin, l0 = _twin(model, subject, text, (batch_size, memory_budget), l0_band, seed)
            compared.append((RANDOM, top_examples(model, twin, text, latents=chosen, **options)[0]))
        for (features, examples), own in zip(compared, l0, strict=False):
            table = scored_explanations(client, examples, chosen, methods, seed)
            parts.append(_named(table, examples, features, own, found))
    return pd.concat(parts, ignore_index=True)


def drawn_latents(examples: Examples, count: int, seed: int) -> list[int]:
    """At most ``count`` latents that fire, drawn at random, ascending."""
    firing = examples.latents[examples.fired > 0]
    drawn = np.random.default_rng(seed).permutation(len(firing))[:count]
    return sorted(int(i) for i in firing[drawn])


def scored_explanations(
    client: Answerer, examples: Examples, latents: Sequence[int], methods: Sequence[str], seed: int = 0
) -> pd.DataFrame:
    """Explanations of some latents, with the columns of the scores by each method."""
    table = explain(client, examples, latents)
    words = dict(zip(table["latent"].tolist(), table["explanation"].tolist(), strict=True))
    for name in methods if words else ():
        scores = SCORES[name](client, examples, words, seed=seed)
        own = [column for column in scores.columns if column not in table.columns]
        table = table.merge(scores[["latent", *own]], on="latent", how="left")
    return table


def compare_explanations(
    table: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Mean scores of an SAE's explanations and of its random SAE's, and the difference, with intervals over latents.

    A simulation that predicts the same on every token has no correlation, and counts as 0, which is chance: without it,
    the mean of an SAE whose explanations predict nothing would be that of its luckier latents.

    Args:
        table: of :func:`explanation_study`, with the control.
        confidence, resamples, seed: parameters of the intervals, which resample latents; latent ``i`` of the SAE and
            latent ``i`` of the random SAE, which fire equally often, are resampled together.

    Returns:
        A row per SAE and method, and with several SAEs a row for all (``id`` ``"all"``): ``release, id, site, layer,
        method, pairs`` (latents with both scores), ``latents, random, difference``, each with ``_low`` and ``_high``,
        and ``unscored`` (latents that lack one of the scores).

    Raises:
        GemmaScopeError: the table has no random SAE, or no score.
    """
    import pandas as pd

    methods = [name for name in SCORES if name in table.columns]
    if not methods or RANDOM not in set(table.get("features", [])):
        raise GemmaScopeError("A comparison needs scores of a random SAE: make the table with control=True.")
    keys = ["release", "id", "site", "layer"]
    by_sae = table.groupby(keys, dropna=False, sort=False)
    numbered = table.assign(sae=by_sae.ngroup())
    if "simulation_constant" in table.columns:
        constant = table["simulation_constant"].fillna(False).astype(bool)
        numbered["simulation"] = numbered["simulation"].mask(constant, 0.0)
    groups = [(dict(zip(keys, name, strict=True)), numbered.loc[part.index]) for name, part in by_sae]
    if len(groups) > 1:
        groups.append(({"release": "all", "id": "all", "site": "all", "layer": None}, numbered))
    rows: list[dict[str, Any]] = []
    for names, part in groups:
        for method in methods:
            both = part.set_index(["sae", "latent", "features"])[method].unstack().reindex(columns=[LATENTS, RANDOM])
            whole = both.dropna()
            bootstrap = Bootstrap(len(whole), resamples, confidence, seed)
            row = {**names, "method": method, "pairs": len(whole)}
            whole = whole.assign(difference=whole[LATENTS] - whole[RANDOM])
            ones = torch.ones(len(whole))
            for name in (LATENTS, RANDOM, "difference"):
                values = torch.tensor(whole[name].to_numpy(float))
                row[name] = float(values.mean()) if len(values) else np.nan
                row[f"{name}_low"], row[f"{name}_high"] = bootstrap.interval(np.divide, values, ones)
            rows.append(row | {"unscored": len(both) - len(whole)})
    return pd.DataFrame(rows)


def _check(methods: Sequence[str]) -> None:
    for name in methods:
        if name not in SCORES:
            raise unknown_name("method of scoring", name, SCORES)


def _twin(
    model: GemmaModel, subject: Subject, text: CountedBatch, limits: tuple[int, int], band: float, seed: int
) -> tuple[Any, tuple[float, float]]:
    """A random SAE with the frequencies of the subject, and the L0 of both on the rows that it was not made from.

    ``limits`` are the largest number of rows in a pass and the memory budget.
    """
    if text.ids.shape[0] < 2:
        raise GemmaScopeError(
            "A random SAE needs two rows of text: one to compute its thresholds, one to check its L0."
        )
    even = np.arange(text.ids.shape[0]) % 2 == 0
    marks = [drawn_tokens(text.counted, part, seed) for part in (even, ~even)]
    rows = rows_that_fit(model, [subject.place], text.ids.shape[1], *limits)
    batches = read_batches(model, text, [subject.place], rows)
    sample, other = sampled_activations(batches, subject.place, marks)
    sae = subject.get()
    twin = random_twin(sae, sample, seed, "matched")
    return twin, checked_l0(sae, twin, other, band, f"{subject.release} {subject.id}")


def _named(table: pd.DataFrame, examples: Examples, features: str, l0: float, sae: Examples) -> pd.DataFrame:
    """The table with the name of the trained SAE, the kind of features, and how often each latent fired."""
    table = table.assign(**sae.sae_columns, features=features, l0=l0)
    fired = dict(zip(examples.latents.tolist(), examples.fired.tolist(), strict=True))
    table["fired"] = table["latent"].map(fired)
    first = [*sae.sae_columns, "latent", "features", "l0", "fired", "explanation"]
    return table[[*first, *(name for name in table.columns if name not in first)]]
