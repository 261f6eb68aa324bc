"""Splits of labelled documents into training and test documents by source, and resamples of test documents by source.

Documents of one source (pieces of one book, comments of one user) resemble each other. A probe that was fitted on some
of them and tested on the others is tested on text that it half knows, so no source is on both sides of a split; and
since they are not independent, confidence intervals resample whole sources.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_scope_tl.errors import GemmaScopeError

SHARE = 0.3
"""Share of the documents of each label that are test documents."""
LEAST = 4
"""Fewest documents of a label that can be split."""


@dataclass(frozen=True)
class Split:
    """Which documents test a probe, and which documents belong together.

    Attributes:
        test: True for test documents, ``[documents]``.
        source: number of the source of each document, ``[documents]``: what is split and resampled as a whole. A source
            that had to be divided is replaced by its documents.
        stratum: number of the set of labels that occur in each document's source, ``[documents]``; resamples keep the
            number of sources of each stratum.
        grouped: whether sources were given.
        divided: labels whose documents all come from one source, which is therefore on both sides.
        alone: labels with one source among the test documents, whose documents are resampled in its place.
    """

    test: NDArray[np.bool_]
    source: NDArray[np.int64]
    stratum: NDArray[np.int64]
    grouped: bool
    divided: frozenset[str]
    alone: frozenset[str]

    def weights(self, resamples: int, seed: int) -> NDArray[np.int64]:
        """How often each source occurs in each resample of the test sources, ``[resamples, sources]``.

        Every stratum is resampled by itself, with replacement, to its own size. Sources of training documents, and a
        stratum of a single source, have weight 1.
        """
        generator = np.random.default_rng(seed)
        weights = np.ones((resamples, int(self.source.max()) + 1), np.int64)
        for stratum in np.unique(self.stratum[self.test]):
            members = np.unique(self.source[self.test & (self.stratum == stratum)])
            if len(members) > 1:
                share = np.full(len(members), 1 / len(members))
                weights[:, members] = generator.multinomial(len(members), share, resamples)
        return weights

    def kind(self, label: str) -> str:
        """How the documents of a label were split: by ``sources``, by ``documents``, or ``within one source``."""
        if not self.grouped:
            return "documents"
        return "within one source" if label in self.divided else "sources"


def split_documents(
    kinds: Sequence[str], groups: Sequence[Hashable] | None = None, share: float = SHARE, seed: int = 0
) -> Split:
    """Choose test documents: about ``share`` of each label's documents, in whole sources, at least one source.

    Args:
        kinds: label of each document.
        groups: source of each document; None if each document is a source of its own. The documents of a source may
            have different labels.
        share: wanted share of test documents. A source is added to them while that brings the share closer.
        seed: seed of the order in which sources are considered.

    Raises:
        GemmaScopeError: there are not as many sources as documents, a label has fewer than four documents, or no split
            was found that leaves every label on both sides.
    """
    if groups is not None and len(groups) != len(kinds):
        raise GemmaScopeError(
            f"There are {len(kinds)} documents, but {len(groups)} groups: give one for each document."
        )
    labels = np.asarray(kinds)
    given = _numbered(range(len(kinds)) if groups is None else groups)
    members = {kind: np.flatnonzero(labels == kind) for kind in dict.fromkeys(kinds)}
    for kind, documents in members.items():
        if len(documents) < LEAST:
            raise GemmaScopeError(
                f"Label {kind!r} has {len(documents)} documents; a probe needs four, to fit and to test it. Give more, "
                "or leave the label out."
            )
    divided = {kind for kind, documents in members.items() if len(np.unique(given[documents])) == 1}
    apart = np.isin(given, [given[members[kind][0]] for kind in divided])
    source = _numbered([("document", n) if apart[n] else ("source", given[n]) for n in range(len(kinds))])
    test = _chosen(members, source, share, seed)
    source, alone = _resampled(members, source, test)
    stratum = _strata(labels, source)
    return Split(test, source, stratum, groups is not None, frozenset(divided), frozenset(alone))


def _chosen(
    members: dict[str, NDArray[np.int64]], source: NDArray[np.int64], share: float, seed: int
) -> NDArray[np.bool_]:
    generator = np.random.default_rng(seed)
    side: dict[int, bool] = {}
    ordered = sorted(members, key=lambda kind: len(np.unique(source[members[kind]])))  # the hardest to split first
    for kind in ordered:
        names, sizes = np.unique(source[members[kind]], return_counts=True)
        size = dict(zip(names.tolist(), sizes.tolist(), strict=True))
        target = max(2.0, share * len(members[kind]))
        tested = sum(size[name] for name in size if side.get(name))
        undecided = [name for name in generator.permutation(names).tolist() if name not in side]
        for number, name in enumerate(undecided):
            last = number + 1 == len(undecided)
            must_train = last and all(side.get(other, True) for other in size if other != name)
            closer = abs(tested + size[name] - target) < abs(tested - target)
            side[name] = not must_train and (closer or (last and not tested))
            tested += size[name] * side[name]
        if {side[name] for name in size} != {True, False}:
            raise GemmaScopeError(
                f"No split by groups has documents of label {kind!r} on both sides: its groups are shared with other "
                "labels. Try another seed, or give finer groups."
            )
    return np.asarray([side[number] for number in source.tolist()])


def _resampled(
    members: dict[str, NDArray[np.int64]], source: NDArray[np.int64], test: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], set[str]]:
    """Sources where a label's only test source is replaced by its documents, and these labels."""
    alone = {
        kind
        for kind, documents in members.items()
        if len(np.unique(source[documents[test[documents]]])) == 1 and test[documents].sum() > 1
    }
    single = [source[members[kind][test[members[kind]]][0]] for kind in alone]
    apart = test & np.isin(source, single)
    names = [("document", n) if apart[n] else ("source", source[n]) for n in range(len(source))]
    return _numbered(names), alone


def _strata(labels: NDArray[np.str_], source: NDArray[np.int64]) -> NDArray[np.int64]:
    held = {number: frozenset(labels[source == number].tolist()) for number in np.unique(source).tolist()}
    return _numbered([held[number] for number in source.tolist()])


def _numbered(names: Sequence[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
