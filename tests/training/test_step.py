"""The sparse step against the training SAE under autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainStepInput

from gemma_scope_tl.sae.training import GemmaScopeTrainingSAE, GemmaScopeTrainingSAEConfig
from gemma_scope_tl.training.recipe import FAST
from gemma_scope_tl.training.step import Weights, loss_and_gradients


def _weights(d_in: int, d_sae: int, seed: int) -> Weights:
    gen = torch.Generator().manual_seed(seed)
    w = Weights.initial(d_in, d_sae, FAST, gen)
    moved = [t.double() + 0.2 * torch.randn(t.shape, generator=gen, dtype=torch.float64) for t in w.tensors()]
    moved[-1] = moved[-1] + 2.0
    return Weights(*moved)


def _autograd(w: Weights, x: torch.Tensor, lam: float, eps: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    cfg = GemmaScopeTrainingSAEConfig(d_in=x.shape[1], d_sae=w.enc.shape[0], dtype="float64", bandwidth=eps)
    sae = GemmaScopeTrainingSAE(cfg)
    state = w.named()
    state["log_threshold"] = state.pop("threshold").log()
    sae.load_state_dict(state)
    out = sae.training_forward_pass(TrainStepInput(x, {"l0": lam}, None, 0, False))
    out.loss.backward()
    params = [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, sae.log_threshold]
    grads = [p.grad for p in params if p.grad is not None]
    grads[0] = grads[0].T
    return out.loss.detach(), grads


@given(
    st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 9), st.integers(2, 20), st.sampled_from([0.01, 0.3, 2.0])
)
@settings(max_examples=60, deadline=None)
def test_gradients_agree_with_autograd(seed: int, batch: int, d_in: int, d_sae: int, eps: float) -> None:
    w = _weights(d_in, d_sae, seed)
    x = torch.randn(batch, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    result = loss_and_gradients(w, x, 0.07, eps)
    loss, grads = _autograd(w, x, 0.07, eps)
    assert result.error + 0.07 * result.l0 == pytest.approx(loss.item(), rel=1e-12)
    for mine, theirs in zip(result.grads, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert result.fired.sum().item() / batch == result.l0


def test_a_batch_in_which_nothing_fires() -> None:
    w = _weights(4, 6, 0)
    w.log_threshold += 20.0
    result = loss_and_gradients(w, torch.ones(3, 4, dtype=torch.float64), 0.1, 0.1)
    assert result.l0 == 0.0
    assert not result.grads[0].any()


def test_initial_weights() -> None:
    w = Weights.initial(8, 32, FAST, torch.Generator().manual_seed(1))
    assert torch.equal(w.enc, w.dec)
    assert w.enc.data_ptr() != w.dec.data_ptr()
    torch.testing.assert_close(w.dec.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(w.log_threshold.exp(), torch.full((32,), FAST.init_threshold))
