"""Names, shapes and values of hook points, beside SAELens's own hooked models with SAELens's own SAEs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.sites import BACKENDS, get_site
from tests.helpers import random_gemma, random_tokens, shared_model

SITES = ["res", "mlp", "att", "embedding"]
ROUNDING = 1e-5  # float32, through other orders of the same sums


@pytest.fixture(params=BACKENDS, scope="module")
def pair(request: pytest.FixtureRequest) -> Any:
    """Ours, and SAELens's model with the same weights."""
    ours = shared_model("narrow-heads", request.param)
    if request.param == "hooked_transformer":
        stock: Any = HookedSAETransformer(ours.cfg)
        missing = stock.load_state_dict(ours.state_dict(), strict=False).unexpected_keys
        assert not missing
        return ours, stock.eval()
    plain = random_gemma("narrow-heads")
    config = build_bridge_config_from_hf(plain.config, "Gemma2ForCausalLM", "gemma-2", torch.float32)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    adapter.prepare_model(plain)
    stock = TransformerBridge(plain, adapter, None)  # as its boot_transformers does, which wants a name on the Hub
    stock.__class__ = SAETransformerBridge
    stock._acts_to_saes, stock._transcoder_output_hooks = {}, {}
    return ours, stock.eval()


def stock_sae(model: Any, site: str) -> Any:
    """An SAE of SAELens's, at a site by the name that the backend understands."""
    where = get_site(site)
    backend = model.backend if site == "mlp" else "hooked_transformer"  # SAELens's bridge knows aliases
    name = where.hook_name(1 if where.per_layer else None, backend)
    torch.manual_seed(3)
    heads = {"reshape_activations": "hook_z"} if site == "att" else {}
    config = StandardSAEConfig(
        d_in=where.d_in(model.dims), d_sae=48, apply_b_dec_to_input=False, metadata=SAEMetadata(hook_name=name), **heads
    )
    return StandardSAE(config)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("error_term", [False, True])
def test_the_same_keys_shapes_and_values(pair: Any, site: str, error_term: bool) -> None:
    ours, stock = pair
    if ours.backend == "bridge" and site == "embedding":
        pytest.skip("SAELens never attaches an SAE to the bridge's embedding")
    tokens = random_tokens(ours, length=4)
    with torch.no_grad():
        wanted = stock.run_with_cache_with_saes(tokens, saes=[stock_sae(ours, site)], use_error_term=error_term)
        got = ours.run_with_cache_with_saes(
            tokens, saes=[stock_sae(ours, site)], use_error_term=error_term, exclude_special_tokens=False
        )
    assert relative_difference(got[0], wanted[0]) < ROUNDING
    keys = [key for key in wanted[1] if ".hook_sae_" in key]
    assert len(keys) >= 5 + error_term
    for key in keys:
        assert got[1][key].shape == wanted[1][key].shape, key
        assert relative_difference(got[1][key], wanted[1][key]) < (1e-3 if "error" in key else ROUNDING)
