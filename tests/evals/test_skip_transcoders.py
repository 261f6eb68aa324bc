"""Skip transcoders in ``evaluate``, of this package's class and SAELens's: the skip path counts in FVU and loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig

from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.model.plain import run_reference
from gemma_scope_tl.sites import BACKENDS
from tests.evals.test_suite import _loss
from tests.helpers import random_gemma, random_sae, random_tokens, shared_model
from tests.parity.test_splice import spliced_by_hand

LAYER = 2


def _stock(sae: Any, model: Any) -> JumpReLUSkipTranscoder:
    """SAELens's object with the same weights and the hooks of the tensors that they belong to."""
    site = model.family.site("transcoder")
    reads, writes = site.hook_name(LAYER, model.backend), site.hook_name_out(LAYER, model.backend)
    config = JumpReLUSkipTranscoderConfig(
        d_in=sae.cfg.d_in,
        d_out=sae.cfg.d_out,
        d_sae=sae.cfg.d_sae,
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(hook_name=reads, hook_name_out=writes),
    )
    found = JumpReLUSkipTranscoder(config)
    found.load_state_dict(sae.state_dict())
    return found.requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("owner", ["ours", "saelens"])
def test_numbers_are_those_of_numpy_on_the_plain_model(backend: str, owner: str) -> None:
    """NumPy in float64 from Hugging Face's tensors; the model and the splice are float32 (relative 1e-4)."""
    hf = random_gemma()
    tokens = random_tokens(hf, batch=4)
    model = shared_model("grouped", backend)
    sae = random_sae(model.dims, "transcoder", LAYER, seed=3, skip=True)
    measured = sae if owner == "ours" else _stock(sae, model)
    row = evaluate(model, measured, tokens, batch_size=2, progress=False).iloc[0]
    reference, keep = run_reference(hf, tokens), tokens > 2
    x, y = (reference.sites[site, LAYER][keep].double().numpy() for site in ("transcoder", "mlp"))
    w = {name: value.detach().double().numpy() for name, value in sae.state_dict().items()}
    z = x @ w["W_enc"] + w["b_enc"]
    on = z > w["threshold"]
    without = (z * on) @ w["W_dec"] + w["b_dec"]
    out = without + x @ w["W_skip"].T

    def fvu(out: np.ndarray) -> float:
        return float(((y - out) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())

    assert row["l0"] == pytest.approx(on.sum(1).mean(), rel=1e-3)  # a latent at its threshold
    assert row["fvu"] == pytest.approx(fvu(out), rel=1e-4)
    assert abs(fvu(without) - fvu(out)) > 0.05 * fvu(out)
    clean, spliced = _loss(reference.logits, tokens), _loss(spliced_by_hand(hf, tokens, [sae]), tokens)
    assert row["loss_clean"] == pytest.approx(clean, rel=1e-5)
    assert row["delta_loss"] == pytest.approx(spliced - clean, rel=1e-3, abs=1e-5)
    assert row["d_sae"] == sae.cfg.d_sae


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_its_error_term_the_loss_is_the_clean_one(backend: str) -> None:
    """The error is ``y - y_hat`` with the skip path in ``y_hat``: adding both gives y back, up to float32 rounding."""
    model = shared_model("grouped", backend)
    tokens, sae = random_tokens(model, batch=4), random_sae(model.dims, "transcoder", LAYER, seed=3, skip=True)
    with torch.no_grad():
        clean = model(tokens)
        with model.saes([sae], error_term=True):
            exact = model(tokens)
        with model.saes([sae], error_term=False):
            spliced = model(tokens)
    assert abs(_loss(exact, tokens) - _loss(clean, tokens)) < 1e-6
    assert (exact - clean).abs().max() < 1e-4 < (spliced - clean).abs().max()
