"""Probes that measure how well single latents distinguish concepts, compared with random directions and activations.

The probes are k-sparse (Gurnee et al. 2023, arXiv 2305.01610): on the training documents, k latents are selected by a
score of each alone, and a logistic regression is fitted on them. The score has no scale, because latents of different
SAEs differ in size and frequency: selecting by the raw difference of means, as SAEBench does, prefers the latents of
largest activation and handicaps one of two SAEs that are compared.

There are two controls: the same probe on a random SAE of equal shape and L0
(:func:`~gemma_scope_tl.studies.random_saes.random_twin`), and a logistic regression on all raw activations, with an L2
penalty chosen on a part of the training documents. No source of documents is on both sides of the split
(:mod:`~gemma_scope_tl.studies.splits`). The module needs scikit-learn (the extra ``probes``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray

from gemma_scope_tl.counts import whole_number
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET, ReadBatch, read_batches, rows_that_fit
from gemma_scope_tl.evals.metrics import check_intervals
from gemma_scope_tl.evals.saes import Subject, latents_of, subjects_of
from gemma_scope_tl.model.counted import CountedBatch, counted_tokens
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sites import Place
from gemma_scope_tl.studies.probe_data import Concept, LabelledRows
from gemma_scope_tl.studies.probe_fits import SELECT, Resamples, Units, best_latent, dense_probe, ranked, sparse_probe
from gemma_scope_tl.studies.probe_results import DENSE, LATENTS, RANDOM, Probes
from gemma_scope_tl.studies.random_saes import (
    FREQUENCIES,
    L0_BAND,
    checked_l0,
    drawn_tokens,
    random_twin,
    sampled_activations,
)
from gemma_scope_tl.studies.splits import Split, split_documents
from gemma_scope_tl.text.batch import TokenBatch
from gemma_scope_tl.text.rows import special_ids
from gemma_scope_tl.text.tokens import text_mask

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


def probe_concepts(model: GemmaModel, saes: Any, data: LabelledRows, *args: Any, **options: Any) -> pd.DataFrame:
    """Probe each SAE's latents, a random SAE's and the raw activations for each concept.

    Args:
        model, saes, data, args, options: as :func:`measure_probes` takes them.

    Returns:
        A row per SAE, concept, kind of features (``latents``, ``random``, ``dense``) and k (0 for dense):

        - ``release, id, site, layer, d_sae``; ``l0`` of the SAE or of its random twin on the same test tokens;
        - ``concept, features, k, auroc, auroc_low, auroc_high, accuracy`` (balanced);
        - for latents, ``over_random`` with ``_low`` and ``_high``: AUROC minus that of the random twin, and the
          interval of this difference;
        - ``select``; ``train, test`` (numbers of units), ``positive`` (test units with the property),
          ``positive_sources`` and ``negative_sources`` (test sources with units that have it, and that lack it);
        - ``split``: by ``sources`` or ``documents``; ``within one source`` where all documents of a label come from one
          source, so that training and test documents share it; ``interval``: what is resampled, ``sources`` or
          ``documents``, or ``documents of one source`` where only one test source has the label, so that the interval
          does not hold the difference between sources;
        - ``best_latent, best_auroc``: the latent that best orders the training units, and its AUROC on the test units.

    Raises:
        GemmaScopeError: as for :func:`measure_probes`.
    """
    return measure_probes(model, saes, data, *args, **options).table()


def _check_k(k: Sequence[int]) -> None:
    if not k or any(whole_number(number) is None or number < 1 for number in k):
        raise GemmaScopeError(f"A probe reads 1 latent or more, not {list(k)}.")


def measure_probes(
    model: GemmaModel,
    saes: Any,
    data: LabelledRows,
    k: Sequence[int] = (1, 2, 5, 20),
    batch_size: int = 8,
    progress: bool = True,
    *,
    select: str = "standardised",
    frequency: str = "equal",
    most: int = 2000,
    l0_band: float = L0_BAND,
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
    positions: Positions = None,
) -> Probes:
    """Probe as :func:`probe_concepts` does, and return all probes with their resamples instead of one table.

    A probe of rows reads the mean over the ordinary tokens of a row; a probe of tokens reads the activations of each
    token. About three tenths of each label's documents, in whole sources, are test documents.

    Args:
        model, saes, batch_size, progress, memory_budget, positions: as in :func:`~gemma_scope_tl.evals.suite.evaluate`.
        data: :func:`~gemma_scope_tl.studies.bundled_concepts`, or
            :func:`~gemma_scope_tl.studies.probe_data.labelled_rows`, whose ``groups`` are the sources of documents.
        k: numbers of latents that a probe reads.
        select: score by which latents are selected on the training units: ``"standardised"`` (difference of means over
            the pooled standard deviation, the F statistic of Gurnee et al.), ``"auroc"``, or ``"difference"`` (the raw
            difference of means, which depends on scale).
        frequency: how often the random twin's latents fire (:func:`~gemma_scope_tl.studies.random_twin`).
        most: maximum number of tokens for a concept of tokens, half of them of each label if there are enough.
            Memory: ``8 * d_sae`` bytes for each row and each such token, for an SAE and its twin.
        l0_band: largest difference of the twin's L0 from the SAE's, as a share, on test documents.
        confidence, resamples, seed: parameters of the confidence intervals, which resample test sources. The seed
            also determines the split and the random SAEs.

    Raises:
        UnknownNameError: ``select`` or ``frequency`` is unknown.
        GemmaScopeError: scikit-learn is not installed, a label has fewer than four documents, no split by groups has
            every label on both sides, or the L0 of a random twin is outside the band.
    """
    _need_sklearn()
    _check_k(k)
    check_intervals(resamples, confidence, seed)
    for kind, name, known in (("way to select latents", select, SELECT), ("frequency", frequency, FREQUENCIES)):
        if name not in known:
            raise unknown_name(kind, name, known)
    text = _counted(model, data, positions)
    split = split_documents(data.kinds, data.groups or None, seed=seed)
    asked = [_units(concept, data, split, text.counted, most, seed) for concept in data.concepts]
    subjects = subjects_of(model, saes)
    found = Probes(Resamples(split.weights(resamples, seed), confidence))
    run = _Run(data, split, asked, tuple(k), select, frequency, l0_band, seed, found)
    for place in _shown(list(dict.fromkeys(subject.place for subject in subjects)), progress):
        fit = rows_that_fit(model, [place], data.tokens.shape[1], batch_size, memory_budget)
        passes = partial(read_batches, model, text, [place], fit)
        run.probe([(n, one) for n, one in enumerate(subjects) if one.place == place], passes, text.counted)
    return found


def _counted(model: GemmaModel, data: LabelledRows, positions: Positions) -> CountedBatch:
    whole = TokenBatch(data.tokens, text_mask(data.tokens, model.tokenizer))
    return CountedBatch(whole.ids, whole.mask, counted_tokens(whole, special_ids(model), positions))


@dataclass(frozen=True)
class _Asked:
    """The rows or tokens of a concept: row, position, label and source of each, and whether it is a test unit."""

    concept: Concept
    row: NDArray[np.int64]
    position: NDArray[np.int64]
    label: NDArray[np.int64]
    source: NDArray[np.int64]
    test: NDArray[np.bool_]
    columns: dict[str, Any]


@dataclass(frozen=True)
class _Run:
    """The settings of a study of probes, and where its results are collected."""

    data: LabelledRows
    split: Split
    asked: list[_Asked]
    k: tuple[int, ...]
    select: str
    frequency: str
    l0_band: float
    seed: int
    found: Probes

    def probe(
        self,
        subjects: Sequence[tuple[int, Subject]],
        passes: Callable[[], Iterator[ReadBatch]],
        counted: Bool[torch.Tensor, "rows pos"],
    ) -> None:
        """Fit all probes of the SAEs of one place; each SAE's number seeds its random twin."""
        place = subjects[0][1].place
        training = ~self.split.test[self.data.documents.numpy()]
        marks = [drawn_tokens(counted, part, self.seed) for part in (training, ~training)]
        sample, other = sampled_activations(passes(), place, marks)
        dense: list[Any] = []
        for number, subject in subjects:
            sae = subject.get()
            twin = random_twin(sae, sample, self.seed + number, self.frequency)
            l0 = checked_l0(sae, twin, other, self.l0_band, f"{subject.release} {subject.id}")
            encoders = [sae, twin, *([] if dense else [None])]
            features = _features(encoders, passes(), place, self.asked)
            dense = dense or [dense_probe(raw, self.found.resamples, self.seed) for raw in features[-1]]
            for kind, own, units in zip((LATENTS, RANDOM), l0, features, strict=False):
                self._sparse({**subject.columns, "l0": own, "features": kind}, units)
            for asked, fitted in zip(self.asked, dense, strict=True):
                columns = {**subject.columns, "l0": float("nan"), "features": DENSE, "k": 0, **asked.columns}
                self.found.add({**columns, "select": "", "best_latent": None, "best_auroc": float("nan")}, fitted)

    def _sparse(self, columns: dict[str, Any], units: Sequence[Units]) -> None:
        for asked, features in zip(self.asked, units, strict=True):
            order = ranked(features, self.select)
            best, area = best_latent(features, order)
            more = {**asked.columns, "select": self.select, "best_latent": best, "best_auroc": area}
            for k in self.k:
                fitted = sparse_probe(features, order, k, self.found.resamples)
                self.found.add({**columns, "k": k, **more}, fitted)


def _units(concept: Concept, data: LabelledRows, split: Split, counted: torch.Tensor, most: int, seed: int) -> _Asked:
    documents = data.documents.numpy()
    labels = concept.labels.numpy()
    if concept.of_tokens:
        labels = np.where(counted.numpy(), labels, -1)
        row, position = np.nonzero(labels >= 0)
        label = labels[row, position]
        kept = _balanced(label, most, seed)
        row, position, label = row[kept], position[kept], label[kept]
    else:
        row = np.flatnonzero(labels >= 0)
        position, label = np.zeros(len(row), np.int64), labels[row]
    test = split.test[documents[row]]
    for part, name in ((~test, "train on"), (test, "test")):
        if len(np.unique(label[part])) < 2:
            raise GemmaScopeError(f"Concept {concept.name!r} has only one label in the documents to {name}.")
    columns = _counts(concept, data, split, documents[row], label, test)
    return _Asked(concept, row, position, label.astype(np.int64), split.source[documents[row]], test, columns)


def _counts(
    concept: Concept, data: LabelledRows, split: Split, document: NDArray[Any], label: NDArray[Any], test: NDArray[Any]
) -> dict[str, Any]:
    """The columns that say on what a concept's probes were fitted and tested."""
    whole = np.asarray(_group_numbers(data))
    having = set(whole[document[test & (label == 1)]].tolist())
    lacking = set(whole[document[test & (label == 0)]].tolist())
    kinds = dict.fromkeys(data.kinds[number] for number in np.unique(document[label == 1]).tolist())
    how = {split.kind(kind) for kind in kinds}
    one = any(kind in split.alone for kind in kinds) and len(having) == 1
    return {
        "concept": concept.name,
        "train": int((~test).sum()),
        "test": int(test.sum()),
        "positive": int((label[test] == 1).sum()),
        "positive_sources": len(having),
        "negative_sources": len(lacking),
        "split": "within one source" if "within one source" in how else how.pop(),
        "interval": "documents of one source" if one else "sources" if split.grouped else "documents",
    }


def _group_numbers(data: LabelledRows) -> list[int]:
    groups = data.groups or tuple(range(len(data.kinds)))
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]


def _balanced(label: NDArray[Any], most: int, seed: int) -> NDArray[np.int64]:
    """Ascending indices of at most ``most`` units, half of them of each label if there are enough."""
    generator = np.random.default_rng(seed)
    yes, no = (generator.permutation(np.flatnonzero(label == value)) for value in (1, 0))
    half = most // 2
    taken = min(len(yes), max(half, most - len(no)))
    return np.sort(np.concatenate([yes[:taken], no[: most - taken]]))


@torch.no_grad()
def _features(
    encoders: Sequence[Any], batches: Iterator[ReadBatch], place: Place, asked: Sequence[_Asked]
) -> list[list[Units]]:
    """For each encoder, the latents (for None, the raw activations) of each concept's units, from one pass."""
    held: list[list[NDArray[np.float32]]] = [[] for _ in encoders]
    for batch in batches:
        raw, (count, width) = batch.activations(place), batch.tokens.shape
        lengths = batch.counted.sum(1, keepdim=True).clamp_min(1)
        numbers = batch.rows.numpy()
        order = np.argsort(numbers)
        for encoder, tables in zip(encoders, held, strict=True):
            values = raw.float() if encoder is None else latents_of(encoder, raw).to_dense().float()
            full = values.new_zeros(count, width, values.shape[1])
            full[batch.counted] = values
            means = (full.sum(1) / lengths).cpu().numpy()
            if not tables:  # zeros stay where a row has no text
                tables += [np.zeros((len(one.row), values.shape[1]), np.float32) for one in asked]
            for one, table in zip(asked, tables, strict=True):
                mine = np.isin(one.row, numbers)
                rows = order[np.searchsorted(numbers, one.row[mine], sorter=order)]
                at = torch.from_numpy(rows), torch.from_numpy(one.position[mine])
                table[mine] = full[at].cpu().numpy() if one.concept.of_tokens else means[rows]
    return [
        [Units(table, one.label, one.source, one.test) for one, table in zip(asked, tables, strict=True)]
        for tables in held
    ]


def _shown(places: list[Place], progress: bool) -> Iterator[Place]:
    from rich.progress import track

    yield from track(places, "probing", len(places), transient=True, disable=not progress)


def _need_sklearn() -> None:
    import importlib.util

    if importlib.util.find_spec("sklearn") is None:
        raise GemmaScopeError("Probes need scikit-learn: pip install 'gemma-scope-tl[probes]'.")
