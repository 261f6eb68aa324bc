"""The export in Neuronpedia's shape: its numbers against dense computations, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import gemma_scope_tl as gs
from gemma_scope_tl.cli import app
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.interp import Sampling, export_neuronpedia

FIELDS = {
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero"),
    *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_values", "logits_hist_data_bar_heights"),
    *("n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist", "activations"),
}
"""Of ``NeuronpediaDashboardFeature.to_dict``."""
SAMPLING = Sampling(top=2, quantiles=2, per_quantile=2, silent=0, window=32)
OPTIONS: dict[str, Any] = {"latents": range(20, 50), "features_per_batch": 12, "sampling": SAMPLING, "progress": False}


@pytest.fixture(scope="module")
def exported(model: Any, sae: Any, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of features."""
    return export_neuronpedia(model, sae, tokens, tmp_path_factory.mktemp("np"), dataset="held out", **OPTIONS)


def test_shape_and_numbers(exported: list[Path], model: Any, sae: Any, tokens: torch.Tensor) -> None:
    batches = [json.loads(path.read_text()) for path in exported]
    assert [path.name for path in exported] == ["batch-0.json", "batch-1.json", "batch-2.json"]
    assert [len(batch["features"]) for batch in batches] == [12, 12, 6]
    assert {(batch["model_id"], batch["layer"], batch["sae_set"]) for batch in batches} == {
        ("bundled", 2, sae.row.release)
    }
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        acts = sae.encode(cache["blocks.2.hook_out"])[(tokens != 2) & (tokens != 1)].numpy()
    features = [feature for batch in batches for feature in batch["features"]]
    assert [feature["feature_index"] for feature in features] == list(range(20, 50))
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    for feature in features:
        assert set(feature) >= FIELDS
        i = feature["feature_index"]
        active = acts[:, i][acts[:, i] > 0]
        assert feature["frac_nonzero"] == pytest.approx(len(active) / len(acts))
        assert sum(feature["freq_hist_data_bar_heights"]) == len(active)
        if len(active):
            heights, edges = np.histogram(active, 50, (0, active.max()))
            assert np.abs(np.cumsum(heights) - np.cumsum(feature["freq_hist_data_bar_heights"])).max() <= 1
            np.testing.assert_allclose(feature["freq_hist_data_bar_values"], (edges[1:] + edges[:-1]) / 2, atol=6e-4)
            top = [max(one["values"]) for one in feature["activations"] if one["bin_min"] == -1]
            assert top[0] == pytest.approx(active.max(), abs=2e-3)
        cosines = rows[i] @ rows.T
        assert feature["topkCosSimIndices"][0] == i
        np.testing.assert_allclose(feature["topkCosSimValues"], cosines.topk(6).values.numpy(), atol=6e-4)
    promoted = gs.top_tokens(model, sae, 20)
    wanted = promoted[promoted["kind"] == "promoted"]
    assert features[0]["pos_str"] == wanted["token"].tolist()
    np.testing.assert_allclose(features[0]["pos_values"], wanted["logit"], atol=6e-4)
    assert sum(features[0]["logits_hist_data_bar_heights"]) == model.cfg.d_vocab


def test_it_goes_on(
    exported: list[Path], model: Any, sae: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported[0].parent
    before = [path.read_bytes() for path in exported]
    stamp = exported[0].stat().st_mtime_ns
    exported[1].unlink()
    again = export_neuronpedia(model, sae, tokens, folder, dataset="held out", **OPTIONS)
    assert [path.read_bytes() for path in again] == before
    assert exported[0].stat().st_mtime_ns == stamp

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass was made")

    monkeypatch.setattr("gemma_scope_tl.interp.neuronpedia.top_examples", refuse)
    export_neuronpedia(model, sae, tokens, folder, dataset="held out", **OPTIONS)
    with pytest.raises(GemmaScopeError, match="an export with other settings"):
        export_neuronpedia(model, sae, tokens, folder, dataset="another", **OPTIONS)
    other = gs.load_sae("bundled", "res", 1, width="1k")
    with pytest.raises(GemmaScopeError, match="an export with other settings"):
        export_neuronpedia(model, other, tokens, folder, dataset="held out", **OPTIONS)
    with pytest.raises(GemmaScopeError, match="takes one SAE"):
        export_neuronpedia(model, [sae, other], tokens, folder, **OPTIONS)


def test_the_verb(tmp_path: Path) -> None:
    args = ["neuronpedia", "--site", "att", "--layer", "1", "--width", "1k", "--canonical", "--rows", "4"]
    args += ["--context", "64", "--latent", "5", "--latent", "7", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0
    (row,) = json.loads(result.stdout)
    (file,) = Path(row["folder"]).glob("batch-*.json")
    assert [feature["feature_index"] for feature in json.loads(file.read_text())["features"]] == [5, 7]
