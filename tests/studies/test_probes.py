"""Probes: fits against scikit-learn's own, planted concepts that must be found, controls that must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.studies import bundled_concepts, measure_probes, probe_concepts
from gemma_scope_tl.studies.probe_data import labelled_rows, read_grouped, read_labelled
from gemma_scope_tl.studies.probe_fits import (
    SELECT,
    Fitted,
    Resamples,
    Units,
    auroc,
    best_latent,
    dense_probe,
    ranked,
    sparse_probe,
)
from gemma_scope_tl.studies.splits import split_documents
from gemma_scope_tl.viz.study_figures import probe_figure
from tests.helpers import random_sae, shared_model

FREE_OF_SCALE = [name for name in SELECT if name != "difference"]


def _resamples(units: Units, count: int = 200, confidence: float = 0.9) -> Resamples:
    """Resamples of the test sources."""
    sources = int(units.source.max()) + 1
    tested = np.unique(units.source[units.test])
    weights = np.ones((count, sources), np.int64)
    share = np.full(len(tested), 1 / len(tested))
    weights[:, tested] = np.random.default_rng(0).multinomial(len(tested), share, count)
    return Resamples(weights, confidence)


def _sparse(units: Units, k: int, select: str = "standardised") -> Fitted:
    return sparse_probe(units, ranked(units, select), k, _resamples(units))


def _bounds(units: Units, fitted: Fitted) -> tuple[float, float]:
    return _resamples(units).interval(fitted.areas)


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


@pytest.mark.parametrize("select", list(SELECT))
def test_a_sparse_probe_is_a_logistic_regression_on_the_chosen_features(select: str) -> None:
    units = _units()
    fitted = _sparse(units, 2, select)
    assert fitted.read == (7, 3)
    train, columns = ~units.test, [7, 3]
    scaler = StandardScaler().fit(units.features[train][:, columns])
    model = LogisticRegression(class_weight="balanced").fit(
        scaler.transform(units.features[train][:, columns]), units.label[train]
    )
    scores = model.decision_function(scaler.transform(units.features[units.test][:, columns]))
    assert fitted.auroc == pytest.approx(roc_auc_score(units.label[units.test], scores), abs=1e-4)
    low, high = _bounds(units, fitted)
    assert low < fitted.auroc < high
    assert fitted.auroc > 0.95
    latent, area = best_latent(units, ranked(units, select))
    assert latent == 7
    assert area == pytest.approx(roc_auc_score(units.label[units.test], units.features[units.test][:, 7]))


def _scores(units: Units, select: str) -> Any:
    return SELECT[select](units.features[~units.test], units.label[~units.test])


def test_scores_are_those_of_scikit_learn() -> None:
    """The square of the standardised difference is the F statistic, up to a factor; areas are scikit-learn's. Some
    features have many zeros and ties, as latents have; one is constant."""
    units = _units(n=500, d=30, seed=2)
    units.features[:, 10:20] = np.maximum(units.features[:, 10:20].round(1) - 1.0, 0.0)
    units.features[:, 20] = 0.1
    features, label = units.features[~units.test].astype(np.float64), units.label[~units.test]
    ones, zeros = (label == 1).sum(), (label == 0).sum()
    live = np.arange(30) != 20
    found = _scores(units, "standardised")
    np.testing.assert_allclose(
        found[live] ** 2 * ones * zeros / (ones + zeros), f_classif(features[:, live], label)[0], rtol=1e-9
    )
    assert found[20] == 0
    wanted = [roc_auc_score(label, column) - 0.5 for column in features.T]
    np.testing.assert_allclose(_scores(units, "auroc"), wanted, atol=1e-12)
    np.testing.assert_array_equal(ranked(units, "auroc"), np.argsort(-np.abs(np.round(wanted, 12)), kind="stable"))
    # The same by hand.
    one, other = features[label == 1], features[label == 0]
    pooled = ((len(one) - 1) * one.var(0, ddof=1) + (len(other) - 1) * other.var(0, ddof=1)) / (len(label) - 2)
    wanted = (one.mean(0) - other.mean(0))[live] / np.sqrt(pooled[live])
    np.testing.assert_allclose(found[live], wanted, rtol=1e-9)


@pytest.mark.parametrize("select", FREE_OF_SCALE)
def test_the_scale_of_latents_changes_nothing(select: str) -> None:
    """Factors from 1e-12 to 1e12, with float32 features: the order of selection stays, and so do the probes."""
    units = _units(d=60)
    units.features[:, 20:] = np.maximum(units.features[:, 20:], 0)
    factors = 10.0 ** np.random.default_rng(3).uniform(-12, 12, 60)
    scaled = Units(units.features * factors.astype(np.float32), units.label, units.source, units.test)
    assert ranked(units, select).tolist() == ranked(scaled, select).tolist()
    np.testing.assert_allclose(_scores(scaled, select), _scores(units, select), rtol=1e-5, atol=1e-12)
    before, after = _sparse(units, 3, select), _sparse(scaled, 3, select)
    assert before.read == after.read
    assert after.auroc == pytest.approx(before.auroc, abs=1e-4)
    assert ranked(units, "difference").tolist() != ranked(scaled, "difference").tolist()


def test_features_that_separate_the_labels_come_first_and_dead_ones_last() -> None:
    units = _units(d=20)
    units.features[:, 4] = 5.0 + 1e-3 * units.label  # constant within both labels
    units.features[:, 9] = 0.0
    for select in FREE_OF_SCALE:
        order = ranked(units, select)
        assert order[0] == 4 and order[-1] == 9
    with pytest.raises(UnknownNameError, match="Nearest: standardised"):
        ranked(units, "standardized")


def test_test_documents_choose_nothing() -> None:
    """A feature that tells the label in the test documents alone is not chosen."""
    units = _units()
    units.features[units.test, 11] += 50.0 * units.label[units.test]
    for select in SELECT:
        assert _sparse(units, 2, select).read == (7, 3)
    noise = Units(np.random.default_rng(1).normal(size=(600, 5)), units.label, units.source, units.test)
    for fitted in (_sparse(noise, 2), dense_probe(noise, _resamples(noise), 0)):
        low, high = _bounds(noise, fitted)
        assert low < 0.5 < high


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Over many draws, a 90 % interval of the AUROC of one feature holds the true one in about nine of ten."""
    from scipy.stats import norm

    true = norm.cdf(3.0 / 2**0.5)
    drawn = [_units(seed=seed) for seed in range(60)]
    bounds = [_bounds(units, _sparse(units, 1)) for units in drawn]
    covered = sum(low <= true <= high for low, high in bounds)
    assert covered >= 46  # of 60; binomial(60, 0.9) is below that once in a thousand, the bootstrap is a little narrow


@pytest.fixture(scope="module")
def model() -> Any:
    """The bundled model."""
    return shared_model("bundled", "bridge")


def test_bundled_concepts_mark_the_right_tokens(model: Any) -> None:
    data = bundled_concepts(model.tokenizer, context=32, rows=4)
    known = {concept.name: concept for concept in data.concepts}
    assert len(data.groups) == len(data.kinds) and len(set(data.groups)) < len(data.kinds)
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
    is_test = split_documents(data.kinds).test
    assert is_test.sum() == 12
    assert set(table["split"]) == set(table["interval"]) == {"documents"}
    assert (table["train"] + table["test"] == len(data.documents)).all()
    assert table["test"].iloc[0] == is_test[data.documents.numpy()].sum()
    assert len(probe_figure(table).axes) == 2
    again = probe_concepts(model, sae, data, (1, 4), batch_size=3, progress=False, resamples=50)
    np.testing.assert_allclose(again["auroc"], table["auroc"], atol=1e-3)


def _stories(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of common words, of two labels in turn that say nothing about them."""
    draws = np.random.default_rng(seed)
    words = ["the", "king", "said", "house", "water", "and", "people", "over"]
    return [(" ".join(draws.choice(words, 40)), "ab"[number % 2]) for number in range(count)]


def test_what_only_a_source_tells_is_not_found_in_other_sources() -> None:
    """Each source has a feature of its own, and a label that nothing else tells. A split by documents finds the label;
    a split by sources is at chance, on average over splits."""
    kinds, groups = ["a", "b"] * 200, [number % 20 for number in range(400)]
    draws = np.random.default_rng(0)
    features = draws.normal(size=(400, 30)).astype(np.float32)
    features[np.arange(400), groups] += 10.0
    label = (np.asarray(kinds) == "b").astype(np.int64)
    found: dict[str, list[float]] = {"sources": [], "documents": []}
    for seed in range(12):
        for name, given in (("sources", groups), ("documents", None)):
            split = split_documents(kinds, given, seed=seed)
            units = Units(features, label, split.source, split.test)
            found[name].append(dense_probe(units, Resamples(split.weights(20, seed)), seed).auroc)
    assert min(found["documents"]) > 0.95
    # Six test sources of twenty: the AUROC of one split has a standard deviation near 0.2, the mean of twelve 0.07.
    assert abs(np.mean(found["sources"]) - 0.5) < 0.25


def test_the_table_says_how_documents_were_split(model: Any) -> None:
    pairs, sources = _stories(24), [f"author {number % 6}" for number in range(24)]
    sae = random_sae(model.dims, "embedding", None, d_sae=64)
    options: dict[str, Any] = {"progress": False, "resamples": 20, "l0_band": 1.0}
    data = labelled_rows(model.tokenizer, pairs, 64, 1, groups=sources)
    table = probe_concepts(model, sae, data, (1,), **options)
    assert set(table["split"]) == {"sources"}
    assert (table["positive_sources"] == 1).all() and (table["negative_sources"] == 1).all()
    assert set(table["interval"]) == {"documents of one source"}
    assert (table["positive"] == 4).all() and (table["test"] == 8).all() and (table["train"] == 16).all()
    data = labelled_rows(model.tokenizer, pairs, 64, 1, groups=["b" if kind == "b" else name for (_, kind), name in
                                                                 zip(pairs, sources, strict=True)])  # fmt: skip
    table = probe_concepts(model, sae, data, (1,), **options)
    assert data.concepts[0].name == "label: a" and set(table["split"]) == {"sources"}


def test_contrasts_are_paired_means_of_the_table(model: Any) -> None:
    saes = [random_sae(model.dims, "res", 1, d_sae=64), random_sae(model.dims, "mlp", 2, d_sae=64, seed=1)]
    data = bundled_concepts(model.tokenizer, 32, 2).chosen(["domain: code", "domain: maths", "sentence: last word"])
    found = measure_probes(model, saes, data, (1, 3), progress=False, resamples=40, l0_band=1.0, most=300)
    table, parts = found.table(), {"rows": ["domain: code", "domain: maths"], "tokens": ["sentence: last word"]}
    contrasts = found.contrasts(parts)
    assert contrasts[["part", "k"]].to_numpy().tolist() == [["rows", 1], ["rows", 3], ["tokens", 1], ["tokens", 3]]
    for row in contrasts.to_dict("records"):
        mine = table[table["concept"].isin(parts[row["part"]]) & table["k"].isin([0, row["k"]])]
        means = mine.groupby("features")["auroc"].mean()
        for kind in ("latents", "random", "dense"):
            assert row[kind] == pytest.approx(means[kind])
        assert row["over_random"] == pytest.approx(means["latents"] - means["random"])
        assert row["over_random_low"] <= row["over_random_high"]
        assert row["resolved"] == (row["over_random_low"] > 0 or row["over_random_high"] < 0)
    one = table[(table["features"] == "latents")]
    assert (one["over_random_low"] <= one["over_random_high"]).all()
    assert table.loc[table["features"] != "latents", "over_random"].isna().all()
    # Pairing: the interval of a difference of equal probes is zero.
    same = found.fits[0].areas - found.fits[0].areas
    assert found.resamples.interval(same) == (0, 0)
    l0 = table.dropna(subset="l0").groupby(["site", "features"])["l0"].first()
    assert l0["res", "latents"] != l0["res", "random"]
    with pytest.raises(UnknownNameError, match="Nearest: domain: code"):
        found.contrasts({"x": ["domain: cod"]})
    with pytest.raises(GemmaScopeError, match="'x' has no concept"):
        found.contrasts({"x": []})


def test_shuffled_labels_are_not_found(model: Any) -> None:
    """Labels that say nothing about the text: all intervals hold chance."""
    sae = random_sae(model.dims, "res", 1, d_sae=64)
    data = labelled_rows(model.tokenizer, _stories(60, 1), 24, 1)
    table = probe_concepts(model, sae, data, (1, 5), progress=False, confidence=0.999, l0_band=1.0)
    assert (table["auroc_low"] < 0.5).all()
    assert (table["auroc_high"] > 0.5).all()


def test_a_file_with_numbers_as_labels(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"sentence": f"text {i}", "label": i % 3}) for i in range(12)))
    pairs = read_labelled(str(path), "sentence", documents=3)
    assert pairs[:3] == [("text 0", "0"), ("text 3", "0"), ("text 6", "0")]
    assert len(pairs) == 9
    grouped, groups = read_grouped(str(path), "label", "sentence", documents=3)
    assert grouped == pairs and groups == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    with pytest.raises(UnknownNameError, match="Nearest: label"):
        read_grouped(str(path), "labels", "sentence")
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
    with pytest.raises(UnknownNameError, match="Nearest: auroc"):
        probe_concepts(model, sae, data, progress=False, select="auc")
    with pytest.raises(UnknownNameError, match="Nearest: equal"):
        probe_concepts(model, sae, data, progress=False, frequency="equals")
    with pytest.raises(GemmaScopeError, match="6 documents, but 2 groups"):
        labelled_rows(model.tokenizer, pairs, 8, groups=["x", "y"])
