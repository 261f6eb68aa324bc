"""The training SAE: initialisation, loss, fold, and the saved SAE as stock SAELens reads it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError, WeightsError
from gemma_scope_tl.interop.training_sae import ARCHITECTURE, GemmaScopeTrainingSAE, GemmaScopeTrainingSAEConfig
from gemma_scope_tl.weights.fold import fold


def _sae(d_in: int = 6, d_sae: int = 10, **changes: Any) -> GemmaScopeTrainingSAE:
    return GemmaScopeTrainingSAE(GemmaScopeTrainingSAEConfig(d_in=d_in, d_sae=d_sae, **changes))


def _trained(seed: int = 0, **changes: Any) -> GemmaScopeTrainingSAE:
    """Parameters as after some training: everything moved."""
    sae = _sae(**changes)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (sae.W_enc, sae.b_enc, sae.b_dec, sae.log_threshold):
            p.add_(0.3 * torch.randn(p.shape, generator=gen, dtype=p.dtype))
        sae.log_threshold.add_(5.0)
    return sae


def _step_input(x: Tensor, l0: float) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x, coefficients={"l0": l0}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    sae = _sae(d_in=64, d_sae=512)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(512))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr(), "tied only at the start"
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    torch.testing.assert_close(sae.threshold, torch.full((512,), 1e-3))
    kurtosis = (sae.W_dec**4).mean() / (sae.W_dec**2).mean() ** 2
    assert kurtosis.item() == pytest.approx(1.8, abs=0.05), "uniform entries, not normal ones"


def test_loss_is_squared_error_plus_lambda_l0() -> None:
    sae = _trained(dtype="float64")
    x = torch.randn(32, 6, dtype=torch.float64)
    out = sae.training_forward_pass(_step_input(x, 0.02))
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = pre * (pre > sae.threshold)
    x_hat = f @ sae.W_dec + sae.b_dec
    expected = ((x - x_hat) ** 2).sum(1).mean() + 0.02 * (f != 0).double().sum(1).mean()
    assert 0 < (f != 0).double().mean() < 1
    torch.testing.assert_close(out.hidden_pre, pre)
    torch.testing.assert_close(out.feature_acts, f)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(sum(out.losses.values()), out.loss)


def test_grad_scale_scales_gradients_and_not_the_loss() -> None:
    sae, x = _trained(dtype="float64", bandwidth=0.5), torch.randn(32, 6, dtype=torch.float64)
    plain = sae.training_forward_pass(_step_input(x, 0.02))
    plain.loss.backward()
    grads = [p.grad.clone() for p in sae.parameters() if p.grad is not None]
    sae.zero_grad()
    sae.grad_scale = 0.25
    scaled = sae.training_forward_pass(_step_input(x, 0.02))
    scaled.loss.backward()
    assert scaled.loss.item() == plain.loss.item()
    assert len(grads) == 5
    for grad, p in zip(grads, sae.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, 0.25 * grad)


def _reconstruct(params: dict[str, np.ndarray], x: np.ndarray, pre_bias: bool) -> np.ndarray:
    pre = (x - params["b_dec"] * pre_bias) @ params["W_enc"] + params["b_enc"]
    return (pre * (pre > params["threshold"])) @ params["W_dec"] + params["b_dec"]


@given(st.integers(0, 2**32 - 1), st.floats(1e-2, 1e3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_folded_reconstruction_equals_the_unfolded_one(seed: int, scale: float, pre_bias: bool) -> None:
    rng = np.random.default_rng(seed)
    params = {
        "W_enc": rng.normal(size=(5, 9)),
        "W_dec": rng.normal(size=(9, 5)),
        "b_enc": 0.1 * rng.normal(size=9),
        "b_dec": rng.normal(size=5),
        "threshold": rng.uniform(0.1, 1.0, size=9),
    }
    x = rng.normal(size=(20, 5))
    folded = fold(params, scale, pre_encoder_bias=pre_bias)
    expected = scale * _reconstruct(params, x, pre_bias)
    actual = _reconstruct(folded, scale * x, pre_bias=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-11 * scale)
    assert folded["W_dec"] is params["W_dec"]


def test_fold_names_what_is_missing() -> None:
    with pytest.raises(WeightsError, match="b_enc, threshold"):
        fold({"W_enc": 0, "W_dec": 0, "b_dec": 0}, 1.0)
    with pytest.raises(WeightsError, match="positive finite"):
        fold(dict.fromkeys(("W_enc", "W_dec", "b_enc", "b_dec", "threshold"), 1.0), float("nan"))


def test_folding_the_scale_keeps_reconstructions_and_unit_rows() -> None:
    sae, x = _trained(dtype="float64"), torch.randn(40, 6, dtype=torch.float64)
    expected = 7.5 * sae(x)
    sae.fold_activation_norm_scaling_factor(1 / 7.5)
    torch.testing.assert_close(sae(7.5 * x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(10, dtype=torch.float64))


def test_folding_decoder_norms_keeps_reconstructions() -> None:
    sae, x = _trained(dtype="float64"), torch.randn(40, 6, dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 10, dtype=torch.float64)[:, None])
    expected = sae(x)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae(x), expected)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(10, dtype=torch.float64))


STOCK = """
import sys, json, torch
from sae_lens import SAE
for folder in sys.argv[1:]:
    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        torch.save(sae(torch.load(folder + "/x.pt")), folder + "/y.pt")
    facts = [type(sae).__name__, sae.cfg.architecture(), sae.cfg.apply_b_dec_to_input, sae.cfg.reshape_activations]
    sys.stdout.write(json.dumps([*facts, sorted(sae.state_dict())]) + chr(10))
assert not [name for name in sys.modules if name.startswith("gemma_scope_tl")]
"""


@pytest.mark.slow
def test_stock_saelens_loads_what_is_saved(tmp_path: Path) -> None:
    """One SAE as at the mlp site, one as at the att site, whose hook keeps heads apart."""
    x = torch.randn(40, 6)
    hooks = {"none": "blocks.0.hook_mlp_out", "hook_z": "blocks.0.attn.hook_z"}
    expected: dict[str, Tensor] = {}
    for reshape, hook in hooks.items():
        sae = _trained(seed=len(expected))
        sae.cfg.metadata.hook_name = hook
        expected[reshape] = sae(x).detach()
        before = {name: value.clone() for name, value in sae.state_dict().items()}
        sae.save_inference_model(tmp_path / reshape)
        assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items()), "saving only reads"
        cfg = json.loads((tmp_path / reshape / "cfg.json").read_text())
        assert cfg["metadata"]["training_architecture"] == ARCHITECTURE
        torch.save(x.reshape(40, 1, 2, 3) if reshape == "hook_z" else x, tmp_path / reshape / "x.pt")

    command = [sys.executable, "-c", STOCK, *(str(tmp_path / reshape) for reshape in hooks)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    names = ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
    for line, reshape in zip(run.stdout.splitlines(), hooks, strict=True):
        assert json.loads(line) == ["JumpReLUSAE", "jumprelu", False, reshape, names]
        actual = torch.load(tmp_path / reshape / "y.pt").reshape(40, 6)
        torch.testing.assert_close(actual, expected[reshape], rtol=1e-5, atol=1e-5)


def test_checkpoints_round_trip(tmp_path: Path) -> None:
    sae, x = _trained(), torch.randn(8, 6)
    sae.save_model(tmp_path)
    back = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(back, GemmaScopeTrainingSAE)
    assert torch.equal(back(x), sae(x))
    assert back.cfg.bandwidth == sae.cfg.bandwidth


def test_thresholds_load_as_they_are() -> None:
    sae = _trained()
    state = dict(sae.state_dict())
    state["threshold"] = state.pop("log_threshold").exp()
    sae.process_state_dict_for_loading(state)
    torch.testing.assert_close(state["log_threshold"], sae.log_threshold.detach())


def test_the_architecture_is_registered_under_its_own_name() -> None:
    cfg = TrainingSAEConfig.from_dict({"architecture": ARCHITECTURE, "d_in": 4, "d_sae": 8, "bandwidth": 0.1})
    assert isinstance(cfg, GemmaScopeTrainingSAEConfig)
    assert cfg.bandwidth == 0.1
    assert math.isclose(cfg.l0_coefficient, 6e-4)


def test_settings_that_the_recipe_excludes_raise() -> None:
    with pytest.raises(UnknownNameError, match="expected_average_only_in"):
        _sae(normalize_activations="layer_norm")
    with pytest.raises(UnknownNameError, match="float32"):
        _sae(dtype="bfloat16")
    with pytest.raises(GemmaScopeError, match="bandwidth=0"):
        _sae(bandwidth=0)
