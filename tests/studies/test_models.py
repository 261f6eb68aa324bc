"""Studies that compare models: two dtypes, and a base model with a tuned one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.model.plain import run_reference
from gemma_scope_tl.sae.suite import SAESuite, load_suite
from gemma_scope_tl.sites import Place
from gemma_scope_tl.studies import base_on_tuned, by_dtype, rescaled
from gemma_scope_tl.studies.transfer import norm_ratios
from tests.helpers import hooked, random_gemma, random_sae, random_tokens, shared_model


@pytest.mark.slow
def test_bfloat16_against_float32_on_the_bundled_model() -> None:
    loaded: list[str] = []

    def load(dtype: str) -> tuple[Any, SAESuite]:
        loaded.append(dtype)
        model = load_model("bundled", dtype=dtype)
        return model, load_suite("bundled", sites="res", layers=[1, 3], width="1k", dtype=dtype)

    texts = ["And God said, Let there be light: and there was light. " * 60]
    table = by_dtype(load, texts, context=64, progress=False, ablations=())
    assert loaded == ["float32", "bfloat16"]
    exact, rounded = table.iloc[:2], table.iloc[2:].reset_index(drop=True)
    assert (exact.filter(like="_change") == 0).all(axis=None)
    for name in ("l0", "fvu", "delta_loss", "loss_clean"):
        np.testing.assert_array_equal(rounded[f"{name}_change"], rounded[name] - exact[name])
    assert (rounded["fvu_change"] != 0).all()  # it was measured in another dtype
    assert (rounded["fvu_change"].abs() < 0.05 * exact["fvu"]).all()  # 8 bits of mantissa: 0.4 % a value
    assert (rounded["l0_change"].abs() < 0.05 * exact["l0"]).all()


def test_both_dtypes_need_the_same_saes() -> None:
    model = shared_model("grouped", "bridge")
    layers = {"float32": 0, "bfloat16": 1}
    with pytest.raises(GemmaScopeError, match="not those in float32"):
        by_dtype(
            lambda name: (model, random_sae(model.dims, "res", layers[name])), random_tokens(model), progress=False
        )
    with pytest.raises(GemmaScopeError, match="No dtype"):
        by_dtype(lambda _: (model, []), random_tokens(model), ())


@pytest.mark.parametrize("site", ["res", "mlp", "att"])
def test_rescaled_by_hand(site: str) -> None:
    dims = shared_model("grouped", "bridge").dims
    sae = random_sae(dims, site, 1)
    x = torch.randn(20, sae.cfg.d_in)
    made = rescaled(sae, 0.7)
    w_enc, w_dec, b_enc, b_dec, threshold = (
        getattr(sae, name).double().numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    )
    before = 0.7 * x.double().numpy() @ w_enc + b_enc
    acts = np.where(before > threshold, np.maximum(before, 0), 0)
    wanted = (acts @ w_dec + b_dec) / 0.7
    clear = (np.abs(before - threshold) > 1e-4).all(1)  # tokens where rounding cannot switch a latent
    assert clear.sum() > 10
    np.testing.assert_allclose(made(x).detach().numpy()[clear], wanted[clear], rtol=1e-4, atol=1e-4)  # float32
    np.testing.assert_array_equal(sae.W_enc.double().numpy(), w_enc)


def test_norm_ratios_by_hand() -> None:
    one, other = random_gemma(seed=0), random_gemma(seed=1)
    tokens = random_tokens(one, batch=3)
    places = [Place("res", 1), Place("att", 2), Place("mlp", 0)]
    found = norm_ratios(hooked(one, "bridge"), hooked(other, "bridge"), tokens, places, batch_size=2)
    for place in places:
        norms = [
            run_reference(random_gemma(seed=seed), tokens)
            .sites[place.site, place.layer][tokens > 2]
            .double()
            .norm(dim=1)
            for seed in (0, 1)
        ]
        assert found[place] == pytest.approx(float(norms[0].mean() / norms[1].mean()), rel=1e-5)


def test_base_saes_on_a_model_with_twice_the_residual_stream() -> None:
    """Twice the embedding and every gain that writes: twice the residual stream at layer 1, and nothing else, for the
    norms that read it divide by its size. Powers of two are exact, so rescaling gives the base model's numbers back."""
    base_hf = random_gemma()
    base_hf.config.rms_norm_eps = 0.0
    for module in base_hf.modules():
        if hasattr(module, "eps"):
            module.eps = 0.0
    tuned_hf = copy.deepcopy(base_hf)
    with torch.no_grad():
        tuned_hf.model.embed_tokens.weight.mul_(2)
        for layer in tuned_hf.model.layers:
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.copy_(2 * (1 + norm.weight) - 1)
    base, tuned = hooked(base_hf, "bridge"), hooked(tuned_hf, "bridge")
    tokens = random_tokens(base, batch=4)
    sae = random_sae(base.dims, "res", 1)
    table = base_on_tuned(base, tuned, tokens, [sae], [rescaled(sae, 0.5)], rescale=True, progress=False)
    assert table["model"].tolist() == ["base", "tuned", "tuned", "tuned"]
    assert table["saes"].tolist() == ["base", "base", "base rescaled", "tuned"]
    assert table["scale"].tolist() == pytest.approx([1, 1, 0.5, 1], rel=1e-5)
    for name in ("l0", "fvu"):
        assert table[name][2] == pytest.approx(table[name][0], rel=1e-3)  # a latent at its threshold
        assert table[name][3] == pytest.approx(table[name][0], rel=1e-3)
    assert abs(table["l0"][1] / table["l0"][0] - 1) > 0.05  # without rescaling it is another
    pd.testing.assert_frame_equal(
        table.iloc[:1].drop(columns=["model", "saes", "scale"]), evaluate(base, sae, tokens, progress=False)
    )


@pytest.mark.slow
def test_suites_are_rescaled_one_by_one() -> None:
    base = shared_model("bundled", "bridge")
    hf = random_gemma("bundled")
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(1.05)
    tuned = load_model(hf_model=hf, tokenizer=base.tokenizer)
    suite = load_suite("bundled", sites=["res", "att"], layers=[0, 2], width="1k", memory=1)
    texts = ["And God said, Let there be light: and there was light. " * 30]
    table = base_on_tuned(base, tuned, texts, suite, rescale=True, context=64, progress=False, ablations=())
    assert table["id"].tolist() == 3 * table["id"].tolist()[:4]
    assert len(suite.loaded) == 1
    kept = table[table["saes"] == "base"]
    assert (kept["scale"] == 1).all()
    assert (table[table["saes"] == "base rescaled"]["scale"] != 1).all()
    assert (kept[kept["model"] == "tuned"]["fvu"].to_numpy() > kept[kept["model"] == "base"]["fvu"].to_numpy()).any()


def test_what_cannot_be_compared() -> None:
    base, other = hooked(random_gemma(), "bridge"), hooked(random_gemma("narrow-heads"), "bridge")
    tokens = random_tokens(base)
    with pytest.raises(GemmaScopeError, match="differ in their sizes"):
        base_on_tuned(base, other, tokens, random_sae(base.dims, "res", 1))
    with pytest.raises(GemmaScopeError, match="one scale does not fit"):
        base_on_tuned(base, base, tokens, [random_sae(base.dims, "transcoder", 1)], rescale=True, progress=False)
    with pytest.raises(GemmaScopeError, match="positive"):
        rescaled(random_sae(base.dims, "res", 1), 0.0)
    tokens[:] = 2
    with pytest.raises(GemmaScopeError, match="no ordinary token"):
        norm_ratios(base, base, tokens, [Place("res", 1)])
