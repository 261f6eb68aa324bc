"""What docs/results.md and docs/studies.md say of the bundled suite is what was measured."""

from __future__ import annotations

import pandas as pd

from scripts import results_page, study_page
from scripts.results_page import results

SITES = ("res", "mlp", "att")


def layered() -> pd.DataFrame:
    """The SAEs that are there at two widths."""
    table = results()
    return table[table["site"].isin(SITES)]


def test_the_tables_are_those_of_the_results() -> None:
    for page, made in ((results_page.PAGE, results_page.with_table), (study_page.PAGE, study_page.with_all_tables)):
        text = page.read_text(encoding="utf-8")
        assert made(text) == text


def test_the_suite_is_that_of_the_page() -> None:
    assert f"{len(results())} SAEs" in results_page.PAGE.read_text(encoding="utf-8")


def test_more_latents_and_more_active_ones_reconstruct_better() -> None:
    for _, rows in layered().groupby(["site", "layer", "d_sae"]):
        ordered = rows.sort_values("l0")
        assert ordered["fvu"].is_monotonic_decreasing and ordered["delta_loss"].is_monotonic_decreasing
    means = layered().groupby(["site", "d_sae", "rank"])[["fvu", "delta_loss"]].mean()
    for site in SITES:
        assert (means.loc[(site, 1024)] < means.loc[(site, 256)]).all(axis=None)
    for other in ("mlp", "att"):
        assert (means.loc["res", "delta_loss"] > means.loc[other, "delta_loss"]).all()


def test_the_last_layers_are_harder() -> None:
    means = layered().groupby(["site", "layer"])["fvu"].mean()
    for site in SITES:
        assert means[site].loc[[2, 3]].min() > means[site].loc[[0, 1]].max()


def test_which_latents_are_dense_or_dead() -> None:
    means = layered().groupby(["site", "d_sae", "rank"])[["dead", "dense"]].mean()
    for site in ("res", "mlp"):
        assert 0.65 < means.loc[(site, 256, 2), "dense"] < 0.75 and means.loc[(site, 1024, 2), "dense"] < 0.045
    assert (means.loc[("att", 1024), "dead"] > 1 / 3).all() and (means.loc[("att", 256), "dead"] < 0.01).all()
    last = layered().query("site == 'att' and layer == 3 and d_sae == 1024")
    assert last["dead"].between(0.45, 0.6).all()
    table = results()
    assert 26 < table[table["site"] == "embedding"]["l0"].max() < 28
