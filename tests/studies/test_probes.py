"""Probes: fits against scikit-learn's own, planted concepts that must be found, controls that must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.evals.saes import latents_of
from gemma_scope_tl.studies import bundled_concepts, probe_concepts, random_twin
from gemma_scope_tl.studies.probe_data import labelled_rows, read_labelled
from gemma_scope_tl.studies.probe_fits import Units, auroc, best_latent, dense_probe, sparse_probe
from gemma_scope_tl.studies.probes import _is_test
from gemma_scope_tl.viz.study_figures import probe_figure
from tests.helpers import random_sae, shared_model

FIT: dict[str, Any] = {"seed": 0, "confidence": 0.9, "resamples": 200}


def _units(n: int = 600, d: int = 40, seed: int = 0) -> Units:
    """Feature 7 tells the label well, feature 3 a little."""
    draws = np.random.default_rng(seed)
    label = draws.integers(0, 2, n)
    features = draws.normal(size=(n, d)).astype(np.float32)
    features[:, 7] += 3.0 * label
    features[:, 3] -= 1.0 * label
    document = np.repeat(np.arange(n // 20), 20)
    return Units(features, label, document, document % 3 == 0)


def test_auroc_is_scikit_learns() -> None:
    draws = np.random.default_rng(0)
    scores, label = draws.integers(0, 20, 300).astype(float), draws.integers(0, 2, 300)  # many ties
    weights = draws.integers(0, 4, (5, 300)).astype(float)
    assert auroc(scores, label) == pytest.approx(roc_auc_score(label, scores))
    wanted = [roc_auc_score(label, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(auroc(scores, label, weights), wanted)
    assert np.isnan(auroc(scores, np.ones(300)))


def test_a_sparse_probe_is_a_logistic_regression_on_the_chosen_features() -> None:
    units = _units()
    fitted = sparse_probe(units, 2, **FIT)
    assert fitted.read == (7, 3)
    train, columns = ~units.test, [7, 3]
    scaler = StandardScaler().fit(units.features[train][:, columns])
    model = LogisticRegression(class_weight="balanced").fit(
        scaler.transform(units.features[train][:, columns]), units.label[train]
    )
    scores = model.decision_function(scaler.transform(units.features[units.test][:, columns]))
    assert fitted.auroc == pytest.approx(roc_auc_score(units.label[units.test], scores), abs=1e-4)
    assert fitted.low < fitted.auroc < fitted.high
    assert fitted.auroc > 0.95
    latent, area = best_latent(units)
    assert latent == 7
    assert area == pytest.approx(roc_auc_score(units.label[units.test], units.features[units.test][:, 7]))


def test_test_documents_choose_nothing() -> None:
    """A feature that tells the label in the test documents alone is not chosen."""
    units = _units()
    units.features[units.test, 11] += 50.0 * units.label[units.test]
    assert sparse_probe(units, 2, **FIT).read == (7, 3)
    noise = Units(np.random.default_rng(1).normal(size=(600, 5)), units.label, units.document, units.test)
    for fitted in (sparse_probe(noise, 2, **FIT), dense_probe(noise, **FIT)):
        assert fitted.low < 0.5 < fitted.high


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Over many draws, a 90 % interval of the AUROC of one feature holds the true one in about nine of ten."""
    from scipy.stats import norm

    true = norm.cdf(3.0 / 2**0.5)
    found = [sparse_probe(_units(seed=seed), 1, **FIT) for seed in range(60)]
    covered = sum(f.low <= true <= f.high for f in found)
    assert covered >= 46  # of 60; binomial(60, 0.9) is below that once in a thousand, the bootstrap is a little narrow


@pytest.fixture(scope="module")
def model() -> Any:
    """The bundled model."""
    return shared_model("bundled", "bridge")


@pytest.mark.parametrize("site", ["res", "att", "transcoder"])
def test_a_twin_has_the_same_l0(site: str) -> None:
    model = shared_model("grouped", "bridge")
    sae = random_sae(model.dims, site, 1)
    x = torch.randn(2000, sae.W_enc.shape[0], generator=torch.Generator().manual_seed(0)) + 1.0
    twin = random_twin(sae, x)
    assert twin.W_enc.shape == sae.W_enc.shape
    assert twin.W_dec.shape == sae.W_dec.shape
    assert latents_of(twin, x).l0 == pytest.approx(latents_of(sae, x).l0, rel=0.02)
    assert not torch.equal(twin.W_enc, random_twin(sae, x, seed=1).W_enc)
    with pytest.raises(GemmaScopeError, match="needs activations"):
        random_twin(sae, x[:0])


def test_bundled_concepts_mark_the_right_tokens(model: Any) -> None:
    data = bundled_concepts(model.tokenizer, context=32, rows=4)
    known = {concept.name: concept for concept in data.concepts}
    assert {"domain: code", "language: Spanish among prose", "code: in a string"} <= set(known)
    kinds = np.asarray(data.kinds)[data.documents.numpy()]
    np.testing.assert_array_equal(known["domain: code"].labels.numpy() == 1, kinds == "code")
    string = known["code: in a string"].labels
    assert set(kinds[(string >= 0).any(1).numpy()]) == {"code"}
    comment = known["code: in a comment"].labels
    marked = 0
    for row in np.flatnonzero((comment == 1).any(1).numpy()):
        line = model.tokenizer.decode(data.tokens[row, 1:])
        if "#" in line and "\n" not in line.strip():
            marked += 1
        first = int((comment[row] == 1).nonzero()[0])
        before = model.tokenizer.decode(data.tokens[row, 1 : first + 1])
        assert first == 1 or "#" in before
    assert (comment == 1).sum() > 50
    last = known["sentence: last word"].labels
    nexts = [
        model.tokenizer.decode(data.tokens[row, at + 1 :])[:1]
        for row, at in (last[:, :-1] == 1).nonzero()[:200].tolist()
        if last[row, at + 1] != 1
    ]
    assert np.mean([text in ".!?" for text in nexts]) > 0.95


def test_spans_by_hand(model: Any) -> None:
    def spans(text: str) -> list[tuple[int, int]]:
        return [(text.index("'"), text.rindex("'") + 1)]

    pairs = [("x = 'abc def' + y", "a"), ("it does not matter at all", "b")]
    data = labelled_rows(model.tokenizer, pairs, 32, 1, "kind", {"quoted": (("a",), spans)})
    (kind, quoted) = data.concepts
    assert kind.name == "kind: a"
    assert kind.labels.tolist() == [1, 0]
    inside = model.tokenizer.decode(data.tokens[0][quoted.labels[0] == 1])
    assert inside.strip() == "'abc def'"
    assert (quoted.labels[1] == -1).all()
    assert (quoted.labels[:, 0] == -1).all()
    assert data.tokens[1, -1] == model.tokenizer.pad_token_id


@pytest.mark.slow
def test_a_planted_concept_is_found(model: Any) -> None:
    """Digits mark the label; latents of an SAE on the embedding find it, documents never straddle the split."""
    draws = np.random.default_rng(0)
    words = ["the", "king", "said", "house", "water", "and", "people", "over"]
    pairs = []
    for number in range(40):
        body = draws.choice(words, 30).tolist()
        kind = "counted" if number % 2 else "told"
        for at in range(0, 30, 5):
            body[at] = "7" if kind == "counted" else "we"
        pairs.append((" ".join(body), kind))
    data = labelled_rows(model.tokenizer, pairs, 24, 3)
    sae = random_sae(model.dims, "embedding", None, d_sae=64)
    table = probe_concepts(model, sae, data, (1, 4), progress=False, resamples=50)
    assert table["features"].tolist() == ["latents"] * 2 + ["random"] * 2 + ["dense"]
    assert (table["auroc"] > 0.9).all()
    assert table["auroc"].iloc[-1] == pytest.approx(1.0)
    is_test = _is_test(data, 0)
    assert is_test.sum() == 12
    assert (table["train"] + table["test"] == len(data.documents)).all()
    assert table["test"].iloc[0] == is_test[data.documents.numpy()].sum()
    assert len(probe_figure(table).axes) == 2
    again = probe_concepts(model, sae, data, (1, 4), batch_size=3, progress=False, resamples=50)
    np.testing.assert_allclose(again["auroc"], table["auroc"], atol=1e-3)


def test_shuffled_labels_are_not_found(model: Any) -> None:
    """Labels that say nothing about the text: all intervals hold chance."""
    draws = np.random.default_rng(1)
    words = ["the", "king", "said", "house", "water", "and", "people", "over"]
    pairs = [(" ".join(draws.choice(words, 40)), "ab"[number % 2]) for number in range(60)]
    sae = random_sae(model.dims, "res", 1, d_sae=64)
    table = probe_concepts(
        model, sae, labelled_rows(model.tokenizer, pairs, 24, 1), (1, 5), progress=False, confidence=0.999
    )
    assert (table["auroc_low"] < 0.5).all()
    assert (table["auroc_high"] > 0.5).all()


def test_a_file_with_numbers_as_labels(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"sentence": f"text {i}", "label": i % 3}) for i in range(12)))
    pairs = read_labelled(str(path), "sentence", documents=3)
    assert pairs[:3] == [("text 0", "0"), ("text 3", "0"), ("text 6", "0")]
    assert len(pairs) == 9
    with pytest.raises(UnknownNameError, match="Nearest: sentence"):
        read_labelled(str(path), "sentences")
    with pytest.raises(GemmaScopeError, match="contains int, not text"):
        read_labelled(str(path), "label")


def test_what_is_wrong_is_said(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1, d_sae=64)
    pairs = [("some text that is long enough", "ab"[number % 2]) for number in range(6)]
    with pytest.raises(GemmaScopeError, match="Label 'a' has 3 documents"):
        probe_concepts(model, sae, labelled_rows(model.tokenizer, pairs, 8), progress=False)
    with pytest.raises(GemmaScopeError, match="two labels or more"):
        labelled_rows(model.tokenizer, pairs[::2], 8)
    with pytest.raises(GemmaScopeError, match="context cannot be 4"):
        labelled_rows(model.tokenizer, pairs, 4)
    data = bundled_concepts(model.tokenizer, 32, 1)
    with pytest.raises(UnknownNameError, match="Nearest: domain: code"):
        data.chosen(["domain: cod"])
    with pytest.raises(GemmaScopeError, match="reads 1 latent or more"):
        probe_concepts(model, sae, data, (0,), progress=False)
