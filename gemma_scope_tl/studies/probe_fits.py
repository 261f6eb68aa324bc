"""Fitting probes and scoring them, on NumPy arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # inverse strengths of the penalty from which a dense probe chooses
CANDIDATES = 50  # number of latents of largest difference of means among which the best is searched


@dataclass(frozen=True)
class Units:
    """The rows or tokens on which a probe is fitted and tested.

    Attributes:
        features: features of each unit, ``[n, d]``.
        label: 0 or 1, ``[n]``.
        document: number of each unit's document, ``[n]``.
        test: True for units of test documents, ``[n]``.
    """

    features: Floats
    label: NDArray[np.int64]
    document: NDArray[np.int64]
    test: NDArray[np.bool_]


@dataclass(frozen=True)
class Fitted:
    """The result of a probe on the test units: AUROC with its interval, balanced accuracy, and the features used."""

    auroc: float
    low: float
    high: float
    accuracy: float
    read: tuple[int, ...] = ()


def sparse_probe(units: Units, k: int, *, seed: int, confidence: float, resamples: int) -> Fitted:
    """Fit a logistic regression on the ``k`` features of largest absolute difference of means on the training units."""
    chosen = by_difference(units)[:k]
    fitted = _logistic(1.0).fit(units.features[~units.test][:, chosen], units.label[~units.test])
    scores = fitted.decision_function(units.features[units.test][:, chosen])
    return _scored(units, scores, tuple(int(i) for i in chosen), seed, confidence, resamples)


def dense_probe(units: Units, *, seed: int, confidence: float, resamples: int) -> Fitted:
    """Fit a logistic regression on all features, with a penalty chosen on a quarter of the training documents."""
    train = ~units.test
    documents = np.random.default_rng(seed).permutation(np.unique(units.document[train]))
    held = train & np.isin(units.document, documents[: max(1, len(documents) // 4)])
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
    return _scored(units, scores, (), seed, confidence, resamples)


def by_difference(units: Units) -> NDArray[np.int64]:
    """Features sorted by the absolute difference of means between the labels on the training units, largest first."""
    features, label = units.features[~units.test], units.label[~units.test]
    difference = np.abs(features[label == 1].mean(0, dtype=np.float64) - features[label == 0].mean(0, dtype=np.float64))
    return np.argsort(-difference, kind="stable")


def best_latent(units: Units) -> tuple[int, float]:
    """The feature that best orders the training units, ascending or descending, and its AUROC on the test units."""
    train = ~units.test
    candidates = by_difference(units)[:CANDIDATES]
    trials = [auroc(units.features[train][:, i], units.label[train]) for i in candidates]
    at = int(np.argmax([abs(value - 0.5) for value in trials]))
    found = auroc(units.features[units.test][:, candidates[at]], units.label[units.test])
    return int(candidates[at]), found if trials[at] >= 0.5 else 1 - found


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


def _scored(
    units: Units, scores: Floats, read: tuple[int, ...], seed: int, confidence: float, resamples: int
) -> Fitted:
    from sklearn.metrics import balanced_accuracy_score

    label, document = units.label[units.test], units.document[units.test]
    _, where = np.unique(document, return_inverse=True)
    count = int(where.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    areas = auroc(scores, label, draws[:, where].astype(float))
    areas = areas[np.isfinite(areas)]
    ends = ((1 - confidence) / 2, (1 + confidence) / 2)
    low, high = np.quantile(areas, ends) if len(areas) else (math.nan, math.nan)
    accuracy = float(balanced_accuracy_score(label, scores > 0))
    return Fitted(auroc(scores, label), float(low), float(high), accuracy, read)


def _logistic(c: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000, class_weight="balanced"))
