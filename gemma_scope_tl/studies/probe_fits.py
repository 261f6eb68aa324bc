"""Fitting probes and scoring them, on NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_scope_tl.errors import unknown_name

Floats = NDArray[Any]
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # inverse strengths of the penalty from which a dense probe chooses
CANDIDATES = 50  # number of best features among which the one of best AUROC is searched
_CHUNK = 1024  # features that are ranked at once
_ROUNDING = 1e-12  # differences and deviations below this share of a feature's largest value are rounding


@dataclass(frozen=True)
class Units:
    """The rows or tokens on which a probe is fitted and tested.

    Attributes:
        features: features of each unit, ``[n, d]``.
        label: 0 or 1, ``[n]``.
        source: number of the source of each unit's document, ``[n]``.
        test: True for units of test documents, ``[n]``.
    """

    features: Floats
    label: NDArray[np.int64]
    source: NDArray[np.int64]
    test: NDArray[np.bool_]


@dataclass(frozen=True)
class Resamples:
    """Resamples of sources, the same for all probes, so that differences between probes are paired.

    Attributes:
        weights: how often each source occurs in each resample, ``[resamples, sources]``.
        confidence: confidence level of the intervals.
    """

    weights: NDArray[np.int64]
    confidence: float = 0.95

    def interval(self, values: Floats) -> tuple[float, float]:
        """Bounds of a number from its values in the resamples; NaN if all are NaN."""
        finite = values[np.isfinite(values)]
        if not len(finite):
            return math.nan, math.nan
        low, high = np.quantile(finite, ((1 - self.confidence) / 2, (1 + self.confidence) / 2))
        return float(low), float(high)


@dataclass(frozen=True)
class Fitted:
    """The result of a probe on the test units.

    Attributes:
        auroc, accuracy: AUROC, and balanced accuracy.
        read: features that the probe reads, best first; empty for all.
        areas: AUROC in each resample, NaN where a label is missing, ``[resamples]``.
    """

    auroc: float
    accuracy: float
    read: tuple[int, ...] = ()
    areas: Floats = field(default_factory=lambda: np.zeros(0), repr=False)


def sparse_probe(units: Units, order: NDArray[np.int64], k: int, resamples: Resamples) -> Fitted:
    """Fit a logistic regression on the first ``k`` features of ``order``, which :func:`ranked` returns."""
    chosen = order[:k]
    fitted = _logistic(1.0).fit(units.features[~units.test][:, chosen], units.label[~units.test])
    scores = fitted.decision_function(units.features[units.test][:, chosen])
    return _scored(units, scores, tuple(int(i) for i in chosen), resamples)


def dense_probe(units: Units, resamples: Resamples, seed: int) -> Fitted:
    """Fit a logistic regression on all features, with a penalty chosen on a quarter of the training sources."""
    train = ~units.test
    sources = np.random.default_rng(seed).permutation(np.unique(units.source[train]))
    held = train & np.isin(units.source, sources[: max(1, len(sources) // 4)])
    inner = train & ~held
    strength = PENALTIES[1]
    if min(len(np.unique(units.label[part])) for part in (held, inner)) == 2:
        trials = {
            c: auroc(
                _logistic(c).fit(units.features[inner], units.label[inner]).decision_function(units.features[held]),
                units.label[held],
            )
            for c in PENALTIES
        }
        strength = max(trials, key=lambda c: trials[c])
    fitted = _logistic(strength).fit(units.features[train], units.label[train])
    scores = fitted.decision_function(units.features[units.test])
    return _scored(units, scores, (), resamples)


def ranked(units: Units, select: str) -> NDArray[np.int64]:
    """Features sorted by how well each alone tells the labels of the training units apart, best first.

    Args:
        units: only the training units are read.
        select: a key of :data:`SELECT`. Equal scores are in the order of the features.

    Raises:
        UnknownNameError: ``select`` is unknown.
    """
    if select not in SELECT:
        raise unknown_name("way to select latents", select, SELECT)
    return np.argsort(-np.abs(SELECT[select](units.features[~units.test], units.label[~units.test])), kind="stable")


def differences(features: Floats, label: NDArray[Any]) -> Floats:
    """Difference of the means of the two labels, ``[d]``; it has the features' units."""
    return features[label == 1].mean(0, dtype=np.float64) - features[label == 0].mean(0, dtype=np.float64)


def standardised_differences(features: Floats, label: NDArray[Any]) -> Floats:
    """Difference of means over the pooled standard deviation within the labels, ``[d]``.

    Its square is the F statistic of a one-way analysis of variance, up to a factor that all features share. It does not
    change when a feature is multiplied by a positive number. A feature that is constant within both labels has an
    infinite score if the two constants differ, otherwise 0.
    """
    positive = label == 1

    def score(part: Floats) -> Floats:
        wide = part.astype(np.float64)
        size = np.abs(wide).max(0)
        wide /= np.where(size > 0, size, 1.0)
        one, other = wide[positive], wide[~positive]
        apart = one.mean(0) - other.mean(0)
        squares = ((one - one.mean(0)) ** 2).sum(0) + ((other - other.mean(0)) ** 2).sum(0)
        spread = np.sqrt(squares / max(len(wide) - 2, 1))
        spread[spread < _ROUNDING] = 0.0
        with np.errstate(all="ignore"):
            return np.where(np.abs(apart) < _ROUNDING, 0.0, apart / spread)

    return _by_parts(score, features)


def areas_over_chance(features: Floats, label: NDArray[Any]) -> Floats:
    """AUROC of each feature alone, minus 0.5, ``[d]``: negative where the feature is smaller for label 1.

    It depends on the order of each feature's values alone.
    """
    from scipy.stats import rankdata

    positive = label == 1
    ones, zeros = int(positive.sum()), int((~positive).sum())
    ranks = _by_parts(lambda part: rankdata(part, axis=0)[positive].sum(0), features)
    return (ranks - ones * (ones + 1) / 2) / (ones * zeros) - 0.5


def _by_parts(score: Callable[[Floats], Floats], features: Floats) -> Floats:
    starts = range(0, features.shape[1], _CHUNK)
    return np.concatenate([score(features[:, start : start + _CHUNK]) for start in starts])


SELECT: dict[str, Callable[[Floats, NDArray[Any]], Floats]] = {
    "standardised": standardised_differences,
    "auroc": areas_over_chance,
    "difference": differences,
}
"""Scores by which latents are selected. The first two are free of scale; ``"difference"`` is not: it prefers latents
with large activations, which differ between SAEs."""


def best_latent(units: Units, order: NDArray[np.int64]) -> tuple[int, float]:
    """The feature that best orders the training units, ascending or descending, and its AUROC on the test units.

    It is searched among the first :data:`CANDIDATES` features of ``order``, which :func:`ranked` returns.
    """
    candidates = order[:CANDIDATES]
    scores = areas_over_chance(units.features[~units.test][:, candidates], units.label[~units.test])
    at = int(np.argmax(np.abs(scores)))
    found = auroc(units.features[units.test][:, candidates[at]], units.label[units.test])
    return int(candidates[at]), found if scores[at] >= 0 else 1 - found


def auroc(scores: Floats, label: NDArray[Any], weights: Floats | None = None) -> Any:
    """Area under the ROC curve: the chance that a 1 scores higher than a 0, ties counting half.

    Args:
        scores, label: score and label of each unit, ``[n]``.
        weights: weights of the units, ``[n]``, or ``m`` sets of weights, ``[m, n]``.

    Returns:
        The area, or ``[m]`` areas for sets of weights; NaN if a label is missing.
    """
    order = np.argsort(scores, kind="stable")
    single = weights is None or weights.ndim == 1
    w = np.ones((1, len(scores))) if weights is None else np.atleast_2d(weights)
    w, ordered, positive = w[:, order], np.asarray(scores)[order], label[order] == 1
    zeros = np.concatenate([np.zeros((len(w), 1)), np.cumsum(np.where(positive, 0.0, w), 1)], 1)
    first = np.searchsorted(ordered, ordered, "left")
    last = np.searchsorted(ordered, ordered, "right")
    below = (zeros[:, first] + zeros[:, last]) / 2
    ones = np.where(positive, w, 0.0)
    with np.errstate(all="ignore"):
        area = (ones * below).sum(1) / (ones.sum(1) * zeros[:, -1])
    return float(area[0]) if single else area


def _scored(units: Units, scores: Floats, read: tuple[int, ...], resamples: Resamples) -> Fitted:
    from sklearn.metrics import balanced_accuracy_score

    label, source = units.label[units.test], units.source[units.test]
    areas = auroc(scores, label, resamples.weights[:, source].astype(float))
    return Fitted(auroc(scores, label), float(balanced_accuracy_score(label, scores > 0)), read, areas)


def _logistic(c: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000, class_weight="balanced"))
