"""The self-check on Gemma 3: norms of queries and keys, sliding and full layers, RoPE, and the embedding's scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_scope_tl.errors import AdapterMismatch
from gemma_scope_tl.families import family_named
from gemma_scope_tl.model.bridge import build_bridge
from gemma_scope_tl.model.check import differences, repair, self_check
from gemma_scope_tl.model.hooked_transformer import build_hooked_transformer
from gemma_scope_tl.model.plain import run_plain
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import CONFIGS_3, DEFAULT_3

FAMILY = family_named("gemma3")
WINDOWS = {"exceeded": 8, "not reached": 64}  # by the dozen tokens of the check; the context has 128


def gemma3(window: int = 8, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    torch.manual_seed(0)
    options: Any = DEFAULT_3 | CONFIGS_3["gemma3"] | {"sliding_window": window} | sizes
    model: Any = Gemma3ForCausalLM(Gemma3TextConfig(**options))
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else 0.15)
    return model.to(dtype).eval()


def built(hf_model: Any, backend: str, family: Any = FAMILY) -> Any:
    model: Any = (build_bridge if backend == "bridge" else build_hooked_transformer)(hf_model, None, None, family)
    repair(model)
    return model


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_right_model_passes_and_keeps_its_window(backend: str, window: int) -> None:
    hf_model = gemma3(window)
    plain = run_plain(hf_model)
    assert plain.window == (None if window == 8 else (7, 64))
    model = built(hf_model, backend)
    assert max(self_check(model, plain).values()) < 1e-5
    assert hf_model.config.sliding_window == window
    assert backend == "bridge" or {block.attn.cfg.window_size for block in model.blocks} == {window}


def attention(hf_model: Any, layer: int) -> Any:
    return hf_model.model.layers[layer].self_attn


def slide(hf_model: Any, layer: int, kind: str) -> None:
    hf_model.config.layer_types[layer] = f"{kind}_attention"


EDITS: dict[str, Callable[[Any], Any]] = {
    "a query norm": lambda hf: attention(hf, 1).q_norm.weight.add_(0.1),
    "a key norm": lambda hf: attention(hf, 5).k_norm.weight.copy_(attention(hf, 5).k_norm.weight.roll(1)),
    "a full layer that slides": lambda hf: slide(hf, 5, "sliding"),
    "a sliding layer that is full": lambda hf: slide(hf, 2, "full"),
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", EDITS)
def test_one_wrong_thing_is_refused(wrong: str, backend: str, window: int) -> None:
    hf_model = gemma3(window)
    plain = run_plain(hf_model)
    with torch.no_grad():
        EDITS[wrong](hf_model)
    with pytest.raises(AdapterMismatch, match="relative differences"):
        self_check(built(hf_model, backend), plain)


OPTIONS: dict[str, dict[str, Any]] = {
    "no scaling of RoPE": {"rotary_scaling_factor": 1.0},
    "one base of RoPE": {"rotary_base_local": None},
    "bases of RoPE exchanged": {"rotary_base": 1e4, "rotary_base_local": 1e6},
    "the scale of TransformerLens": {"attn_scale": 32**0.5},
    "a window that is one longer": {"window_size": 9},
    "a window that is one shorter": {"window_size": 7},
    "a soft-cap": {"attn_scores_soft_cap": 50.0},
    "every layer slides": {"attn_types": ["local"] * 7},
}


@pytest.mark.parametrize("wrong", OPTIONS)
def test_a_wrong_option_of_hooked_transformer_is_refused(wrong: str) -> None:
    hf_model = gemma3()
    plain = run_plain(hf_model)
    made = FAMILY.hooked_transformer_config
    family = replace(FAMILY, hooked_transformer_config=lambda config, dims: made(config, dims) | OPTIONS[wrong])
    with pytest.raises(AdapterMismatch, match="relative differences"):
        self_check(built(hf_model, "hooked_transformer", family), plain)


@pytest.mark.parametrize("kind", ["local", "global"])
def test_masks_on_the_wrong_layers_are_seen_though_no_window_is_reached(kind: str) -> None:
    """RoPE is right in every layer, and a dozen tokens are fewer than the window: only a shorter window shows it."""
    hf_model = gemma3(64)
    plain = run_plain(hf_model)
    model = built(hf_model, "hooked_transformer")
    layer = 5 if kind == "local" else 2
    model.blocks[layer].attn.attn_type = kind
    wrong = [name for name, value in differences(model, plain).items() if value.wrong]
    assert wrong[0] == f"blocks.{layer}.attn.hook_z"
    model.blocks[layer].attn.attn_type = "global" if kind == "local" else "local"
    for block in model.blocks:
        block.attn.cfg.window_size = 63
    with pytest.raises(AdapterMismatch):
        self_check(model, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_embedding_scale_in_another_precision_is_refused(backend: str) -> None:
    """sqrt(48) is 6.9282, in bfloat16 6.9375: less than bfloat16 rounds in all that follows."""
    hf_model = gemma3(dtype=torch.bfloat16, hidden_size=48)
    plain = run_plain(hf_model)
    model = built(hf_model, backend)
    assert not any(value.wrong for value in differences(model, plain).values())
    embedding = hf_model.get_input_embeddings() if backend == "bridge" else model.embed
    exact = 48.0**0.5
    with torch.no_grad():
        if backend == "bridge":
            embedding.embed_scale = torch.tensor(exact)
            inner = getattr(embedding, "original_component", embedding)
            inner.forward = lambda ids: (inner.weight[ids].float() * exact).bfloat16()
        else:
            rows = hf_model.model.embed_tokens.weight.float()
            embedding.W_E.copy_((rows * exact).bfloat16())
    wrong = [name for name, value in differences(model, plain).items() if value.wrong]
    assert wrong == [FAMILY.embedding_hooks[backend]]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_site_that_lacks_the_gain_is_refused(backend: str) -> None:
    hf_model = gemma3()
    plain = run_plain(hf_model)
    site = replace(FAMILY.sites["transcoder"], **{backend: "blocks.{layer}.ln2.hook_normalized"})
    family = replace(FAMILY, sites={**FAMILY.sites, "transcoder": site})
    with pytest.raises(AdapterMismatch, match=r"blocks\.0\.ln2\.hook_normalized"):
        self_check(built(hf_model, backend, family), plain)
