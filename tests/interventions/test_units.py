"""Strengths in units of norms, and the norms themselves, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError
from gemma_scope_tl.interventions import clamp, mean_norms, scale, steer
from gemma_scope_tl.sites import BACKENDS, ModelDims
from tests.helpers import random_gemma, random_sae, random_tokens, shared_model

ROWS = ["hello there", "hi", "good morning to you"]


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("grouped", request.param)


def _long(sae: Any) -> Any:
    """The SAE with decoder rows of length 3, so that a missing division shows."""
    sae.W_dec.data *= 3
    return sae


def _seen(model: Any, tokens: Any, name: str, hooks: list[Any]) -> torch.Tensor:
    with torch.no_grad(), model.hooks(hooks):
        return model.run_with_cache(tokens, names_filter=name)[1][name].flatten(2)


def test_mean_norms_of_hugging_face_activations(model: Any) -> None:
    plain, tokens = random_gemma(), model.to_tokens(ROWS)
    assert (tokens[1] == 0).any()  # padding
    table = mean_norms(model, ROWS, sites=["res", "mlp", "att", "embedding", "transcoder"], layers=[0, 2], batch_size=2)
    kept: dict[str, list[np.ndarray]] = {"res": [], "mlp": [], "att": [], "embedding": []}

    def keep(site: str) -> Any:
        def hook(module: Any, args: Any, output: Any = None) -> None:
            value = args[0] if site == "att" else output[0] if isinstance(output, tuple) else output
            kept[site].append(value[0].double().numpy())

        return hook

    layer = plain.model.layers[2]
    layer.register_forward_hook(keep("res"))
    layer.post_feedforward_layernorm.register_forward_hook(keep("mlp"))
    layer.self_attn.o_proj.register_forward_pre_hook(keep("att"))
    plain.model.layers[0].register_forward_pre_hook(lambda m, args: keep("embedding")(m, (), args[0]))
    with torch.no_grad():
        for row in tokens:  # one at a time, without padding
            plain(row[row != 0][None])
    for site, rows in kept.items():
        wanted = np.concatenate([np.linalg.norm(row[1:], axis=1) for row in rows]).mean()  # without BOS
        found = table[(table["site"] == site) & (table["layer"].fillna(2) == 2)]
        assert found["mean_norm"].tolist() == pytest.approx([wanted], rel=1e-5)  # float32 activations
    assert (table["tokens"] == sum(map(len, ROWS))).all()
    mlp, transcoder = (table[table["site"] == site]["mean_norm"].tolist() for site in ("mlp", "transcoder"))
    assert mlp == transcoder
    assert table["layer"].isna().tolist() == (table["site"] == "embedding").tolist()


@pytest.mark.parametrize("site", ["res", "att", "transcoder"])
def test_units_of_length(model: Any, site: str) -> None:
    sae, tokens = _long(random_sae(model.dims, site, 1)), random_tokens(model)
    norms = mean_norms(model, tokens, sites=[site], layers=[1])
    chosen, s = [4, 11], np.array([0.5, -0.25])
    name = steer(sae, 0, 1.0)[0]
    clean = _seen(model, tokens, name, []).double().numpy()
    unit_rows = (lambda w: w / np.linalg.norm(w, axis=1, keepdims=True))(sae.W_dec[chosen].double().numpy())
    ordinary = (tokens > 2).numpy()
    mean = np.linalg.norm(clean, axis=-1)[ordinary].mean()
    for kwargs, length in (
        ({"unit": "mean_norm", "mean_norm": norms}, mean),
        ({"unit": "mean_norm", "mean_norm": 7.0}, 7.0),
        ({"unit": "norm"}, np.linalg.norm(clean, axis=-1, keepdims=True)),
    ):
        got = _seen(model, tokens, name, [steer(sae, chosen, s.tolist(), **kwargs)]).numpy()
        wanted = clean + ordinary[..., None] * length * (s @ unit_rows)
        np.testing.assert_allclose(got, wanted, atol=3e-5, rtol=1e-5)  # float32 of values up to about 30
    with model.saes([sae], use_error_term=True):
        pair = steer(sae, chosen, s.tolist(), unit="mean_norm", mean_norm=norms, on="features")
        got = _seen(model, tokens, name, [pair]).numpy()
    np.testing.assert_allclose(got, clean + ordinary[..., None] * mean * (s @ unit_rows), atol=1e-4, rtol=1e-5)


def test_defaults_of_mean_norms(model: Any) -> None:
    table = mean_norms(model, "hello")
    assert table.columns.tolist() == ["site", "layer", "hook", "mean_norm", "tokens"]
    assert len(table) == 3 * model.dims.n_layers + 1
    assert (table["mean_norm"] > 0).all()


def test_errors(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    norms = mean_norms(model, "hello", sites="res", layers=[0])
    with pytest.raises(UnknownNameError, match=r"blocks\.0\.hook_resid_post"):
        steer(sae, 0, 1.0, unit="mean_norm", mean_norm=norms)
    with pytest.raises(SpliceError, match="the table of mean_norms"):
        steer(sae, 0, 1.0, unit="mean_norm")
    with pytest.raises(SpliceError, match="mean_norm= needs unit="):
        steer(sae, 0, 1.0, mean_norm=3.0)
    with pytest.raises(SpliceError, match=r"has no access to \|\|x\|\|"):
        steer(sae, 0, 1.0, unit="norm", on="features")
    with pytest.raises(UnknownNameError, match="mean_norm"):
        steer(sae, 0, 1.0, unit="means")  # pyright: ignore
    with pytest.raises(UnknownNameError, match="res"):
        mean_norms(model, "hello", sites="ress")
    with pytest.raises(SpliceError, match="layers are 0..3"):
        mean_norms(model, "hello", layers=[4])
    with pytest.raises(GemmaScopeError, match="no tokens except"):
        mean_norms(model, torch.tensor([[2]]))


@pytest.mark.parametrize(
    "number", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), torch.tensor([np.inf])]
)
def test_numbers_are_finite(number: Any) -> None:
    """A strength that is no number would make every later activation NaN, and the text padding."""
    sae = random_sae(ModelDims(3, 96, 4, 24), "res", 1)
    for edit in (
        lambda: steer(sae, 3, number),
        lambda: steer(sae, 3, 1.0, unit="mean_norm", mean_norm=float(number)),
        lambda: clamp(sae, 3, number),
        lambda: scale(sae, 3, number),
        lambda: clamp(sae, [3, 4], [1.0, float(number)]),
    ):
        with pytest.raises(SpliceError, match="takes finite numbers"):
            edit()
