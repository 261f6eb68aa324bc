"""What docs/results.md and docs/studies.md say of the bundled suite is what was measured."""

from __future__ import annotations

import json

import pandas as pd

from benchmarks.frontier import load_points
from benchmarks.recipe_search import chosen
from scripts.page_numbers.sources import ROOT
from scripts.results_page import results

SITES = ("res", "mlp", "att")


def layered() -> pd.DataFrame:
    """The SAEs that are there at two widths."""
    table = results()
    return table[table["site"].isin(SITES)]


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
        assert means.loc[(site, 256, 2), "dense"] > 0.6 and means.loc[(site, 1024, 2), "dense"] < 0.1
        assert (means.loc[(site, 1024), "dead"] < 0.01).all()
    assert means.loc[("att", 1024), "dead"].is_monotonic_increasing
    assert means.loc[("att", 1024, 0), "dead"] < 0.05 and means.loc[("att", 1024, 2), "dead"] > 1 / 3
    table = results()
    assert table[table["site"] == "embedding"]["l0"].max() < 30  # its target is 32


def test_what_is_said_of_attributions() -> None:
    """README.md: integrated gradients predict single ablations less well."""
    facts = json.loads((ROOT / "docs" / "attribution.json").read_text(encoding="utf-8"))["results"]
    r = {(row["site"], row["method"]): row["pearson"] for row in facts}
    assert all(r[site, "integrated"] < r[site, "gradient"] - 0.02 for site in ("res", "mlp"))


def test_what_is_said_of_the_comparisons() -> None:
    """docs/paper.md: both metrics are lower for ``fast`` at every L0, on both models."""
    rows = load_points("pareto")["rows"]
    assert len(rows) == 10 and all(row["ratio"] > 1 and row["seeds"] == 3 for row in rows)
    assert sum(row["ratio_low"] <= 1 for row in rows) == 1
    rows = load_points("smollm2_pareto")["rows"]
    assert len(rows) == 10 and all(row["ratio"] > 1 and row["seeds"] == 3 for row in rows)


def test_the_step_penalty_was_not_best_at_any_l0() -> None:
    assert {one["settings"]["mode"] for one in chosen("bundled")["peer"].values()} == {"tanh"}
