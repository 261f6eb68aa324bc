"""Splits by source: no source on both sides, every label on both; resamples of whole sources."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.studies.splits import split_documents
from gemma_scope_tl.text.documents import read_records

KINDS = ["a"] * 12 + ["b"] * 10 + ["c"] * 9
GROUPS = [f"a{n // 3}" for n in range(12)] + ["b0"] * 7 + ["b1"] * 3 + [f"c{n}" for n in range(9)]


@pytest.mark.parametrize("seed", range(20))
def test_no_source_is_on_both_sides_and_every_label_is(seed: int) -> None:
    split = split_documents(KINDS, GROUPS, seed=seed)
    sides = {(group, bool(side)) for group, side in zip(GROUPS, split.test, strict=True)}
    assert len(sides) == len(set(GROUPS))
    for kind in "abc":
        tested = split.test[[n for n, own in enumerate(KINDS) if own == kind]]
        assert 0 < tested.sum() < len(tested)
    assert split.test[KINDS.index("c") :].sum() == 3  # sources of one document can be split to the share: 0.3 of 9
    assert not split.divided
    assert {split.kind(kind) for kind in "abc"} == {"sources"}


def test_without_groups_each_document_is_a_source() -> None:
    split = split_documents(KINDS)
    assert Counter(np.asarray(KINDS)[split.test].tolist()) == {"a": 4, "b": 3, "c": 3}
    assert len(set(split.source.tolist())) == len(KINDS)
    assert split.kind("a") == "documents"


def test_a_label_of_one_source_is_divided_and_said_so() -> None:
    split = split_documents(["a"] * 6 + ["b"] * 6, ["only"] * 6 + [f"b{n}" for n in range(6)])
    assert split.divided == {"a"}
    assert (split.kind("a"), split.kind("b")) == ("within one source", "sources")
    assert 0 < split.test[:6].sum() < 6


def test_a_label_with_one_test_source_is_resampled_by_its_documents() -> None:
    split = split_documents(KINDS, GROUPS, seed=0)
    held = {GROUPS[n] for n in range(12, 22) if split.test[n]}
    assert len(held) == 1 and "b" in split.alone and "c" not in split.alone
    of_b = split.source[[n for n in range(12, 22) if split.test[n]]]
    assert len(set(of_b.tolist())) == len(of_b)


def test_sources_that_labels_share() -> None:
    """Two labels from the same authors: an author is on one side with all of both."""
    kinds, groups = ["a", "b"] * 20, [n // 4 for n in range(40)]
    for seed in range(10):
        split = split_documents(kinds, groups, seed=seed)
        assert len({(g, bool(t)) for g, t in zip(groups, split.test, strict=True)}) == 10
        assert {kind for kind, side in zip(kinds, split.test, strict=True) if side} == {"a", "b"}
        assert len(np.unique(split.stratum)) == 1


def test_resamples_keep_the_number_of_sources_of_each_label() -> None:
    split = split_documents(KINDS, GROUPS, share=0.5, seed=1)
    assert "a" not in split.alone
    weights = split.weights(300, 0)
    for stratum in np.unique(split.stratum[split.test]):
        members = np.unique(split.source[split.test & (split.stratum == stratum)])
        assert (weights[:, members].sum(1) == len(members)).all()
        if len(members) > 1:
            assert weights[:, members].std(0).min() > 0
    # All pieces of a source have the same weight in every resample.
    of_documents = weights[:, split.source]
    for group in {GROUPS[n] for n in range(12) if split.test[n]}:
        mine = of_documents[:, [n for n, own in enumerate(GROUPS) if own == group]]
        assert (mine == mine[:, :1]).all()


def test_what_cannot_be_split_is_said() -> None:
    with pytest.raises(GemmaScopeError, match="12 documents, but 2 groups"):
        split_documents(["a"] * 6 + ["b"] * 6, ["x", "y"])
    with pytest.raises(GemmaScopeError, match="Label 'b' has 3 documents"):
        split_documents(["a"] * 6 + ["b"] * 3)
    kinds = ["a"] * 4 + ["b"] * 4 + ["a", "b"]
    # One group holds most of a and the other most of b, and both labels need both groups on different sides: possible.
    assert split_documents(kinds, [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]).test.any()
    shared = [0, 0, 1, 1, 0, 0, 2, 2, 1, 1, 2, 2]  # a in 0 and 1, b in 0 and 2, c in 1 and 2: no split in two
    with pytest.raises(GemmaScopeError, match="No split by groups"):
        split_documents(["a"] * 4 + ["b"] * 4 + ["c"] * 4, shared)


def test_every_piece_of_the_bundled_text_has_a_source() -> None:
    """Two sources or more of each domain, so that a split by source exists; a source belongs to one domain."""
    records = list(read_records())
    sources: dict[str, set[str]] = {}
    for record in records:
        sources.setdefault(record["domain"], set()).add(record["source"])
    assert all(len(names) >= 2 for names in sources.values())
    split = split_documents(
        [record["domain"] for record in records], [f"{record['domain']} {record['source']}" for record in records]
    )
    assert not split.divided
    assert 0.2 < split.test.mean() < 0.4
