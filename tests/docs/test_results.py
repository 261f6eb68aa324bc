"""What docs/results.md says of the bundled suite is what was measured."""

from __future__ import annotations

import pandas as pd

from scripts.results_page import PAGE, results, with_table


def test_the_table_is_that_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page


def test_what_the_text_says_holds() -> None:
    table = results()
    assert f"{len(table)} SAEs" in PAGE.read_text(encoding="utf-8")
    layered = table[table["site"].isin(["res", "mlp", "att"])]
    for _, rows in layered.groupby(["site", "layer", "d_sae"]):
        ordered = rows.sort_values("l0")
        assert ordered["fvu"].is_monotonic_decreasing and ordered["delta_loss"].is_monotonic_decreasing
    means = layered.groupby(["site", "d_sae", "rank"])[["fvu", "delta_loss", "dead", "dense"]].mean()
    res, mlp, att = (means.loc[site] for site in ("res", "mlp", "att"))
    assert (res["delta_loss"] > mlp["delta_loss"]).all() and (res["delta_loss"] > att["delta_loss"]).all()
    for site in (res, mlp, att):
        assert (site.loc[(1024, 0)] < site.loc[(256, 0)])[["fvu", "delta_loss"]].all()
    for site in (res, mlp):
        assert (site.loc[(256, 2)] < site.loc[(1024, 2)])[["fvu", "delta_loss"]].all()
        assert site.loc[(256, 2), "dense"] > 0.9
    assert 0.4 < att.loc[(1024, 2), "dead"] < 0.6
    failed = table[table["dead"] > 0.8]
    assert list(zip(failed["site"], failed["layer"], failed["d_sae"], failed["rank"], strict=True)) == [
        ("att", 3, 256, 0)
    ]


def test_deeper_layers_are_harder() -> None:
    table = results()
    layered = table[table["site"].isin(["res", "mlp", "att"])]
    fvu: pd.Series = layered.groupby(["site", "layer"])["fvu"].mean()
    for site in ("res", "mlp", "att"):
        assert fvu[site].iloc[-1] > fvu[site].iloc[0]
