"""Metrics by kind of text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.registry.locate import HELD_OUT_TEXT
from gemma_scope_tl.studies import by_domain, labelled_texts, pile_texts
from gemma_scope_tl.studies.domains import PILE_SUBSETS
from tests.helpers import random_sae, random_tokens, shared_model


def test_each_domain_is_measured_by_itself_and_read_no_further_than_needed() -> None:
    model = shared_model("grouped", "bridge")
    saes = [random_sae(model.dims, "res", layer) for layer in (0, 1)]
    tokens = random_tokens(model, batch=3)
    read: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(100):
            read.append(number)
            yield "abcdefghij"

    domains = {"ids": tokens, "letters": texts()}
    table = by_domain(model, saes, domains, rows=2, context=12, progress=False)
    assert table["domain"].tolist() == ["ids"] * 2 + ["letters"] * 2
    alone = evaluate(model, saes, tokens[:2], progress=False)
    pd.testing.assert_frame_equal(table.iloc[:2].drop(columns="domain"), alone)
    letters = evaluate(model, saes, ["abcdefghij"] * 2, context=12, progress=False)
    pd.testing.assert_frame_equal(table.iloc[2:].drop(columns="domain").reset_index(drop=True), letters)
    assert len(read) <= 3


def test_a_domain_that_is_too_short_is_named() -> None:
    model = shared_model("grouped", "bridge")
    sae = random_sae(model.dims, "res", 0)
    with pytest.raises(GemmaScopeError, match=r"Domain 'tiny': The texts have 3 tokens"):
        by_domain(model, sae, {"tiny": ["ab"]}, context=12, progress=False)
    with pytest.raises(GemmaScopeError, match="No domain"):
        by_domain(model, sae, {}, progress=False)


def test_bundled_text_by_its_labels() -> None:
    found = labelled_texts()
    records = [json.loads(line) for line in HELD_OUT_TEXT.read_text(encoding="utf-8").splitlines()]
    assert {name: len(texts) for name, texts in found.items()} == pd.Series(
        [record["domain"] for record in records]
    ).value_counts().to_dict()
    assert [text for texts in found.values() for text in texts] == [record["text"] for record in records]
    with pytest.raises(UnknownNameError, match="Nearest: domain"):
        labelled_texts(label="domains")


def test_pile_subsets_by_name(tmp_path: Path) -> None:
    """A folder with the data set's configurations, read by the ``datasets`` library."""
    configs = ""
    for subset in PILE_SUBSETS.values():
        (tmp_path / "data" / subset).mkdir(parents=True)
        (tmp_path / "data" / subset / "test.jsonl").write_text(json.dumps({"text": f"of {subset}", "domain": subset}))
        configs += f"  - config_name: {subset}\n    data_files:\n      - split: test\n"
        configs += f"        path: data/{subset}/*.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    found = pile_texts(["wikipedia_en", "dm_mathematics"], source=str(tmp_path))
    assert {name: list(texts) for name, texts in found.items()} == {
        "wikipedia_en": ["of Wikipedia (en)"],
        "dm_mathematics": ["of DM Mathematics"],
    }
    with pytest.raises(UnknownNameError, match="Unknown subset of the Pile 'wikipedia'. Nearest: wikipedia_en"):
        pile_texts(["wikipedia"])
    with pytest.raises(GemmaScopeError, match="Cannot read the data set"):
        list(pile_texts(["github"], source=str(tmp_path / "absent"))["github"])
