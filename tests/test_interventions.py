"""Steering and ablating: predicted effect against measured effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.interventions import ablate, steer
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import hooked, random_gemma, random_sae, random_tokens


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    return hooked(random_gemma(), request.param)


def _at(model: Any, tokens: torch.Tensor, name: str, hooks: list[Any]) -> torch.Tensor:
    with torch.no_grad(), model.hooks(hooks):
        return model.run_with_cache(tokens, names_filter=name)[1][name]


@pytest.mark.parametrize("site", ["res", "mlp", "att", "embedding", "transcoder"])
def test_steering_adds_the_decoder_row(model: Any, site: str) -> None:
    sae = random_sae(model.dims, site, None if site == "embedding" else 1)
    tokens = random_tokens(model)
    tokens[1, 9] = 1
    pair = steer(sae, latent=3, scale=12.5)
    clean, steered = _at(model, tokens, pair[0], []), _at(model, tokens, pair[0], [pair])
    wanted = (sae.W_dec[3] * 12.5).reshape(clean.shape[2:])
    change = steered - clean
    ordinary = tokens > 2
    # one float32 rounding of values up to about 30
    torch.testing.assert_close(change[ordinary], wanted.expand_as(change[ordinary]), atol=1e-5, rtol=0)
    assert not change[~ordinary].any()


def test_positions_and_special_tokens(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    tokens = random_tokens(model)
    for positions, everywhere, wanted in (
        (slice(0, 3), False, [1, 2]),
        ([0, 5], False, [5]),
        (slice(0, 3), True, [0, 1, 2]),
    ):
        pair = steer(sae, 3, 5.0, positions=positions, exclude_special_tokens=not everywhere)
        change = _at(model, tokens, pair[0], [pair]) != _at(model, tokens, pair[0], [])
        assert change.any(-1)[0].nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("site", ["res", "mlp", "att"])
def test_ablation_removes_only_the_latents_part(model: Any, site: str) -> None:
    sae = random_sae(model.dims, site, 1)
    tokens = random_tokens(model)
    latents = [2, 9]
    pair = ablate(sae, latents)
    clean, ablated = _at(model, tokens, pair[0], []), _at(model, tokens, pair[0], [pair])
    flat = clean.reshape(*clean.shape[:2], -1)
    acts = sae.encode(flat)[..., latents].masked_fill((tokens <= 2).unsqueeze(-1), 0)
    assert (acts != 0).any()
    wanted = flat - acts @ sae.W_dec[latents]
    torch.testing.assert_close(ablated.reshape(flat.shape), wanted, atol=1e-5, rtol=1e-5)


def test_ablating_by_hand_equals_editing_the_spliced_features(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    tokens = random_tokens(model)

    def zero(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = acts.clone()
        acts[..., [4, 11]] = 0
        return acts

    with torch.no_grad():
        plain = model.run_with_hooks(tokens, fwd_hooks=[ablate(sae, [4, 11])])
        spliced = model.run_with_hooks_with_saes(
            tokens, saes=[sae], use_error_term=True, fwd_hooks=[(model.get_sae_hook_name(sae), zero)]
        )
    torch.testing.assert_close(plain, spliced, atol=2e-4, rtol=1e-4)  # float32 through two more layers


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_steered_generation_is_steered_forward_passes(model: Any, use_cache: bool) -> None:
    sae = random_sae(model.dims, "res", 2)
    pair = steer(sae, 7, 40.0)
    tokens = random_tokens(model, batch=1, length=5)
    wanted = tokens
    with torch.no_grad():
        for _ in range(8):
            logits = model.run_with_hooks(wanted, fwd_hooks=[pair])
            wanted = torch.cat([wanted, logits[:, -1:].argmax(-1)], dim=1)
    with model.hooks([pair]):
        got = model.generate(tokens, max_new_tokens=8, do_sample=False, stop_at_eos=False, use_past_kv_cache=use_cache)
    assert got.tolist() == wanted.tolist()


def test_a_bfloat16_model_stays_bfloat16() -> None:
    model = hooked(random_gemma(dtype=torch.bfloat16), "bridge")
    sae = random_sae(model.dims, "att", 1)
    for pair in (steer(sae, 1, 2.0), ablate(sae, 1)):
        assert model.run_with_hooks(random_tokens(model), fwd_hooks=[pair]).dtype == torch.bfloat16


def test_errors(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    with pytest.raises(SpliceError, match=r"No latent 256: this SAE has latents 0\.\.255"):
        steer(sae, 256, 1.0)
    with pytest.raises(SpliceError, match="No latent -1"):
        ablate(sae, [0, -1])
    with pytest.raises(SpliceError, match="hook_sae_acts_post"):
        ablate(random_sae(model.dims, "transcoder", 1), 0)
