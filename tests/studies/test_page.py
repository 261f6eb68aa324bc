"""The conclusions of docs/studies.md: right where the truth is planted, and the same page from the stored tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scripts import study_claims, study_page
from scripts.study_sources import KEYS, Resampled, Value, source_rows
from tests.helpers import shared_model


def _sums(effects: dict[str, float], sources: int = 8, spread: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """Delta loss and error of one SAE by domain; every source has an offset of its own."""
    draws = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for domain, effect in effects.items():
        for number in range(sources):
            tokens = int(draws.integers(200, 400))
            value = effect + spread * draws.normal()
            rows.append(
                {
                    "domain": domain, "source": f"s{number}", "site": "res", "error": tokens * value,
                    "deviation": tokens * 1.0, "delta_loss": tokens * value, "predictions": tokens,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_a_difference_that_is_there_is_resolved_and_one_that_is_not_is_not() -> None:
    text = study_claims.domain_claims(_sums({"a": 0.0, "b": 0.001, "c": 2.0}))
    lines = text.splitlines()
    assert len(lines) == 4
    lowest, highest = (
        next(line for line in lines if f"The {word} delta loss" in line) for word in ("lowest", "highest")
    )
    assert "no difference is resolved from" in lowest and "c" not in lowest.rpartition("from ")[2]
    assert "is that of c; the difference from every other kind of text is resolved" in highest


def test_the_interval_of_a_mean_over_sources_covers() -> None:
    """Over 80 draws, the 95 % interval of a mean over 12 sources holds the true value in at least nine of ten; an
    interval over rows would be narrower by the number of rows in a source."""
    covered = 0
    for seed in range(80):
        sums = _sums({"a": 1.0}, sources=12, seed=seed)
        draws = Resampled(sums)
        value = draws.value(draws.ratio(sums, "delta_loss", "predictions"))
        assert value.value == pytest.approx(sums["delta_loss"].sum() / sums["predictions"].sum())
        covered += value.low <= 1.0 <= value.high
    assert covered >= 66  # binomial(80, 0.9), about what the bootstrap of 12 reaches, is below that once in 200


def test_resamples_are_paired_and_keep_each_domains_number_of_sources() -> None:
    sums = _sums({"a": 0.0, "b": 5.0})
    draws = Resampled(sums)
    for _, members in draws.keys.groupby("domain"):
        assert (draws.weights[:, members.index].sum(1) == 8).all()
    both = sums.assign(twice=2 * sums["delta_loss"])
    difference = draws.ratio(both, "twice", "predictions") - 2 * draws.ratio(sums, "delta_loss", "predictions")
    assert np.abs(difference).max() < 1e-12  # the same sources in both
    reference = np.average(sums["delta_loss"] / sums["predictions"], weights=sums["predictions"])
    assert draws.ratio(sums, "delta_loss", "predictions")[0] == pytest.approx(reference)


def test_words_follow_the_interval() -> None:
    assert study_claims.judged(Value(0.2, 0.1, 0.3)) == "higher, +0.200 (+0.100 to +0.300)"
    assert study_claims.judged(Value(-0.2, -0.3, -0.1)) == "lower, \u22120.200 (\u22120.300 to \u22120.100)"
    assert study_claims.judged(Value(0.2, -0.1, 0.3)).startswith("no difference is resolved")
    assert Value(-0.0001, -0.0004, 0.2).text(signed=True) == "+0.000 (+0.000 to +0.200)"
    missing = study_claims.judged(Value(0.2, float("nan"), float("nan")))
    assert missing.startswith("no difference is resolved")


def test_probe_claims_count_concepts_by_their_intervals() -> None:
    def row(part: str, over: float, width: float) -> dict[str, Any]:
        bounds = {"over_random": over, "over_random_low": over - width, "over_random_high": over + width}
        dense = {"over_dense": -0.1, "over_dense_low": -0.2, "over_dense_high": -0.05}
        return {"part": part, "k": 1, "latents": 0.9, "random": 0.9 - over, "dense": 1.0, **bounds, **dense}

    table = pd.DataFrame([row("rows", 0.1, 0.05), row("x", 0.3, 0.1), row("y", -0.3, 0.1), row("z", 0.1, 0.2)])
    text = study_claims.probe_claims(table, {"rows": ["x", "y", "z"]})
    assert "higher for 1, lower for 1, not resolved for 1" in text
    assert "Latents against random: higher, +0.100 (+0.050 to +0.150)" in text
    assert "raw activations: lower" in text


def test_rows_are_of_one_source_each() -> None:
    model = shared_model("bundled", "bridge")
    rows = source_rows(model, 256, 3)
    assert rows.tokens.shape == (len(rows.sources), 256) and len(rows.domains) == len(rows.sources)
    counts = pd.Series(rows.domains).value_counts()
    assert len(counts) == 9 and (counts == 3).all()
    play = rows.of("shakespeare")
    assert len(play) == 3
    text = model.tokenizer.decode(play[0, 1:])
    from gemma_scope_tl.text.documents import read_records

    first = next(record for record in read_records() if record["domain"] == "shakespeare")
    assert text[:200] in first["text"]


@pytest.mark.parametrize("name", [name for name, study in study_page.STUDIES.items() if study.more])
def test_sums_by_source_are_of_known_sources(name: str) -> None:
    """Two sources or more of every kind of text, and each source whole in one table."""
    more = study_page.STUDIES[name].more[0]
    if more != "sources":
        return
    table = study_page.stored(name, more)
    sources = table[KEYS].drop_duplicates()
    assert (sources.groupby("domain").size() >= 2).all()


def test_the_means_by_source_are_those_of_the_study() -> None:
    """The sums by source add up to the metrics that ``by_domain`` and ``binned_by_position`` measured."""
    sums, table = study_page.stored("domains", "sources"), study_page.stored("domains")
    totals = sums.groupby(["domain", "site"])[["error", "deviation", "delta_loss", "predictions"]].sum()
    wanted = table.set_index(["domain", "site"])
    ratio = (totals["delta_loss"] / totals["predictions"]).reindex(wanted.index)
    np.testing.assert_allclose(ratio, wanted["delta_loss"], atol=2e-5)  # six digits are stored
    np.testing.assert_allclose((totals["error"] / totals["deviation"]).reindex(wanted.index), wanted["fvu"], rtol=1e-4)
    sums, table = study_page.stored("position", "sources"), study_page.stored("position")
    for (site, first, last), part in sums.groupby(["site", "first", "last"]):
        own = table[(table["site"] == site) & (table["start"] >= first) & (table["stop"] <= last + 1)]
        mean = np.average(own["squared_error"], weights=own["tokens"])
        assert part["squared_error"].sum() / part["tokens"].sum() == pytest.approx(mean, rel=1e-4)


def test_the_page_is_as_the_script_writes_it() -> None:
    text = study_page.PAGE.read_text(encoding="utf-8")
    assert study_page.with_all_tables(text) == text


def test_the_stored_probes_are_of_the_method_that_the_page_describes() -> None:
    table = study_page.stored("probes")
    assert set(table["select"].dropna()) == {"standardised"}
    assert set(table["split"]) == {"sources"}
    l0 = table.dropna(subset=["l0"]).groupby(["id", "features"])["l0"].first().unstack()
    assert (l0["random"] / l0["latents"] - 1).abs().max() < 0.1
