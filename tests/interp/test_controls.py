"""The random SAE beside explanations: same shape, L0, frequencies, client and examples; intervals by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from gemma_scope_tl.cli import app
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.interp import ChatClient, Sampling, compare_explanations, explanation_study
from gemma_scope_tl.viz.study_figures import scores_figure
from tests.interp.llm_server import Endpoint

SAMPLING = Sampling(top=4, quantiles=2, per_quantile=4, silent=8, window=16)
OPTIONS: dict[str, Any] = {"progress": False, "sampling": SAMPLING}


def test_latents_of_one_word_score_above_a_random_sae(
    endpoint: Endpoint, model: Any, planted: Any, tokens: torch.Tensor
) -> None:
    """Latents that fire on one token each are explained by the server's rule; random directions of equal frequency on
    the same text are not. Both are asked in the same way: the same number of prompts of each kind."""
    sae, words = planted
    client = ChatClient("m", endpoint.url)
    table = explanation_study(client, model, sae, tokens, l0_band=1.0, **OPTIONS)
    own, random = (table[table["features"] == kind].set_index("latent") for kind in ("latents", "random"))
    assert own["explanation"].to_dict() == words
    assert own.index.tolist() == random.index.tolist() == [0, 1, 2]
    assert (own["detection"] > 0.9).all() and (own["simulation"] > 0.98).all()
    # The control is calibrated on half of the rows, so the counts on all of them agree within sampling error.
    assert (random["fired"] > 0).all()
    assert random["fired"].sum() == pytest.approx(own["fired"].sum(), rel=0.5)
    assert table["l0"].notna().all()
    systems = [body["messages"][0]["content"] for body in endpoint.bodies]
    assert len(set(systems)) == 3  # to explain, to detect, to simulate
    (row,) = compare_explanations(table).query("method == 'simulation'").to_dict("records")
    assert row["pairs"] == 3
    assert row["latents"] == pytest.approx(own["simulation"].mean())
    assert random["simulation_constant"].equals(random["simulation"].isna())
    assert row["random"] == pytest.approx(random["simulation"].fillna(0).mean())  # predicting nothing is chance
    assert row["difference"] == pytest.approx(row["latents"] - row["random"])
    assert row["difference_low"] > 0
    assert len(scores_figure(table).axes[0].get_xticklabels()) == 2


def test_without_control_the_table_is_that_of_the_functions(
    endpoint: Endpoint, model: Any, sae: Any, tokens: torch.Tensor
) -> None:
    client = ChatClient("m", endpoint.url)
    table = explanation_study(client, model, sae, tokens, control=False, count=4, methods=["detection"], **OPTIONS)
    asked = len(endpoint.bodies)
    assert len(table) == 4 and set(table["features"]) == {"latents"}
    assert "simulation" not in table.columns
    both = explanation_study(client, model, sae, tokens, count=4, methods=["detection"], l0_band=0.5, **OPTIONS)
    mine = both[both["features"] == "latents"].drop(columns="l0")
    pd.testing.assert_frame_equal(mine.reset_index(drop=True), table.drop(columns="l0"))
    assert len(endpoint.bodies) > asked  # the prompts of the random SAE; the others are answered from memory
    l0 = both.groupby("features")["l0"].first()
    assert l0["random"] == pytest.approx(l0["latents"], rel=0.25)
    fired = both.pivot_table(index="latent", columns="features", values="fired").dropna()
    assert fired["random"].sum() == pytest.approx(fired["latents"].sum(), rel=0.5)


def _table(rng: Any, saes: int = 1, latents: int = 40) -> pd.DataFrame:
    rows = []
    for number in range(saes):
        for latent in range(latents):
            shared = rng.normal()  # how easy a frequency is to explain: the same for both
            for kind, shift in (("latents", 0.3), ("random", 0.0)):
                score = 0.5 + shift + shared + 0.1 * rng.normal()
                names = {"release": None, "id": f"s{number}", "site": "res", "layer": number}
                rows.append({**names, "latent": latent, "features": kind, "detection": score})
    return pd.DataFrame(rows)


def test_intervals_are_paired_over_latents() -> None:
    """Against a bootstrap written here; and the paired interval is far narrower than those of the two means."""
    table = _table(np.random.default_rng(0))
    (row,) = compare_explanations(table, confidence=0.9, resamples=4000).to_dict("records")
    scores = table.pivot_table(index="latent", columns="features", values="detection")
    difference = (scores["latents"] - scores["random"]).to_numpy()
    draws = np.random.default_rng(1).integers(0, 40, (4000, 40))
    low, high = np.quantile(difference[draws].mean(1), [0.05, 0.95])
    # Two bootstraps of 4,000 resamples: the ends differ by a few per cent of the width.
    assert row["difference_low"] == pytest.approx(low, abs=0.05 * (high - low) + 1e-3)
    assert row["difference_high"] == pytest.approx(high, abs=0.05 * (high - low) + 1e-3)
    assert row["difference_high"] - row["difference_low"] < 0.3 * (row["latents_high"] - row["latents_low"])
    assert row["difference_low"] > 0 and row["latents_low"] < row["random_high"]


def test_all_saes_together_and_missing_scores() -> None:
    table = _table(np.random.default_rng(0), saes=2, latents=10)
    table.loc[(table["latent"] == 3) & (table["features"] == "random") & (table["id"] == "s1"), "detection"] = np.nan
    table = table[~((table["latent"] == 4) & (table["features"] == "random") & (table["id"] == "s0"))]
    found = compare_explanations(table).set_index("id")
    assert found["pairs"].to_dict() == {"s0": 9, "s1": 9, "all": 18}
    assert found["unscored"].to_dict() == {"s0": 1, "s1": 1, "all": 2}
    assert found.loc["all", "difference"] == pytest.approx(
        (found.loc["s0", "difference"] + found.loc["s1", "difference"]) / 2
    )
    with pytest.raises(GemmaScopeError, match="control=True"):
        compare_explanations(table[table["features"] == "latents"])


def test_what_is_wrong_is_said(model: Any, sae: Any, tokens: torch.Tensor) -> None:
    client: Any = None
    with pytest.raises(UnknownNameError, match="Nearest: detection"):
        explanation_study(client, model, sae, tokens, methods=["detect"])
    with pytest.raises(GemmaScopeError, match="two rows"):
        explanation_study(client, model, sae, tokens[:1], count=1, **OPTIONS)


@pytest.mark.slow
def test_the_study_scores_the_control_by_default(endpoint: Endpoint, tmp_path: Path) -> None:
    args = ["--site", "res", "--layer", "2", "--width", "1k", "--canonical", "--rows", "16", "--context", "64"]
    args += ["--llm", "m", "--base-url", endpoint.url, "--count", "3", "--answers", str(tmp_path / "a.jsonl"), "--json"]
    run = CliRunner()
    result = run.invoke(app, ["study", "explanations", *args], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["features"] for row in rows].count("random") >= 1
    assert "random SAE" in result.stderr and "difference" in result.stderr
    with_control = run.invoke(app, ["explain", *args, "--control"], catch_exceptions=False, env={"COLUMNS": "200"})
    assert json.loads(with_control.stdout) == rows
    without = run.invoke(app, ["explain", *args], catch_exceptions=False, env={"COLUMNS": "200"})
    assert {row["features"] for row in json.loads(without.stdout)} == {"latents"}
