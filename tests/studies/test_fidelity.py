"""Sparsity against fidelity, and the uniformity of latents."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from gemma_scope_tl import load_model, load_sae, load_suite
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.studies import importance_uniformity, sparsity_fidelity
from gemma_scope_tl.studies.fidelity import on_frontier
from gemma_scope_tl.viz.study_figures import fidelity_figure, uniformity_figure
from tests.helpers import random_sae, random_tokens, shared_model


def test_frontier_against_a_sweep() -> None:
    draws = np.random.default_rng(0)
    values = draws.permutation(60)[:40] / 10, draws.permutation(60)[:40] / 10  # all different: a sweep is exact
    table = pd.DataFrame({"site": "res", "layer": 1, "l0": values[0], "fvu": values[1]})
    wanted, lowest = set(), np.inf
    for at in np.argsort(values[0]):
        if values[1][at] < lowest:
            lowest = values[1][at]
            wanted.add(at)
    assert {at for at, best in enumerate(on_frontier(table, "fvu")) if best} == wanted
    assert 1 < len(wanted) < 40


def test_frontier_of_ties_missing_values_and_places() -> None:
    layer = pd.array([1, 1, 1, 1, None, None], dtype="Int64")
    table = pd.DataFrame({"site": ["res"] * 4 + ["embedding"] * 2, "layer": layer})
    table["l0"], table["fvu"] = [5.0, 5.0, 6.0, 1.0, 9.0, 9.5], [0.2, 0.2, 0.2, np.nan, 0.9, 0.95]
    assert on_frontier(table, "fvu") == [True, True, False, False, True, False]


def test_table_is_that_of_evaluate() -> None:
    model = shared_model("grouped", "bridge")
    saes = [random_sae(model.dims, "mlp", 1, d, seed=d) for d in (256, 64)]
    tokens = random_tokens(model)
    table = sparsity_fidelity(model, saes, tokens, progress=False, ablations=())
    plain = evaluate(model, saes, tokens, progress=False, ablations=()).sort_values("d_sae", ignore_index=True)
    pd.testing.assert_frame_equal(table[list(plain.columns)], plain)
    assert table["width"].tolist() == ["64", "256"]
    assert table["fvu_best"].dtype == bool
    with pytest.raises(TypeError, match="by_position"):
        sparsity_fidelity(model, saes, tokens, by_position=True)


def test_transcoders_with_and_without_skip_are_two_series() -> None:
    """One line of the figures joined them, and no printed column told them apart."""
    model = load_model("bundled-gemma3")
    skips = {
        affine: load_sae("bundled-gemma3", "transcoder", 2, "256", "small", affine=affine) for affine in (False, True)
    }
    tokens = random_tokens(model)
    suite = load_suite("bundled-gemma3", "transcoder", [2], "256", "small", affine=True)
    for saes in (skips.values(), iter(skips.values())):
        table = sparsity_fidelity(model, saes, tokens, progress=False, ablations=())
        assert dict(zip(table["skip"], table["id"], strict=True)) == {k: sae.row.id for k, sae in skips.items()}
    assert sparsity_fidelity(model, suite, tokens, progress=False, ablations=())["skip"].tolist() == [True]
    assert "skip" not in sparsity_fidelity(model, skips[False], tokens, progress=False, ablations=())
    lines = fidelity_figure(table).axes[0].lines
    assert [line.get_label() for line in lines] == ["layer 2, 256 latents", "layer 2, with skip, 256 latents"]
    assert len({line.get_color() for line in lines}) == 2 and all(np.size(line.get_xdata()) == 1 for line in lines)
    uniform = importance_uniformity(model, skips.values(), tokens, sampled=2, progress=False)
    assert sorted(uniform["skip"]) == [False, True] and len(uniformity_figure(uniform).axes[0].lines) == 2


def test_uniformity_stays_within_its_bounds() -> None:
    model = shared_model("grouped", "bridge")
    saes = [random_sae(model.dims, "res", 1, d, seed=d) for d in (256, 64)]
    table = importance_uniformity(model, saes, random_tokens(model, batch=4), sampled=5, progress=False)
    assert table["l0"].is_monotonic_increasing
    assert ((table["uniformity"] > 1 / table["l0"]) & (table["uniformity"] < 1)).all()  # appendix C.3
    assert (table["uniformity_low"] < table["uniformity"]).all()
    with pytest.raises(GemmaScopeError, match="sampled must be 1 or more, not 0"):
        importance_uniformity(model, saes, random_tokens(model), sampled=0)
