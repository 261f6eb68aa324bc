"""The self-check refuses a model in which one thing is wrong, and no model in which only rounding differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma_scope_tl.errors import AdapterMismatch
from gemma_scope_tl.families.gemma2 import GEMMA2
from gemma_scope_tl.model.bridge import build_bridge
from gemma_scope_tl.model.check import differences, repair, self_check
from gemma_scope_tl.model.hooked_transformer import build_hooked_transformer
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.model.plain import run_plain
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import DEFAULT, random_gemma

Edit = Callable[[Any], None]
DTYPES = [torch.float32, torch.bfloat16]


def deep_gemma(dtype: torch.dtype, layers: int = 12, **sizes: Any) -> Gemma2ForCausalLM:
    """A random Gemma 2 whose doubled queries and keys make rounding errors grow from layer to layer."""
    torch.manual_seed(0)
    config = Gemma2Config(**{**DEFAULT, "num_hidden_layers": layers, **sizes}, attn_implementation="eager")
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else 0.15)
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 2
    return model.to(dtype).eval()


class EightBits(torch.nn.Module):
    """A projection with weights in eight bits, and activations too: by row, or all with one scale."""

    def __init__(self, linear: torch.nn.Linear, per_row: bool) -> None:
        super().__init__()
        self.per_row = per_row
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = (x.abs().amax(-1, keepdim=True) if self.per_row else x.abs().max()).clamp_min(1e-12) / 127
        return torch.nn.functional.linear((x / step).round() * step, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def in_eight_bits(model: Any, per_row: bool) -> Any:
    with torch.no_grad():
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(parent, name, EightBits(child, per_row))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_deep_model_passes_in_every_dtype(dtype: torch.dtype, backend: str) -> None:
    layers = 12 if dtype == torch.bfloat16 else 5
    model = load_model(hf_model=deep_gemma(dtype, layers), backend=backend)
    assert model.cfg.dtype == dtype


def test_a_model_passes_whose_rounding_exceeds_any_fixed_tolerance() -> None:
    """HookedTransformer rounds elsewhere than Hugging Face, and twelve such layers make that a tenth."""
    hf_model = deep_gemma(torch.bfloat16)
    plain = run_plain(hf_model)
    found = differences(built(hf_model, "hooked_transformer"), plain)
    assert found["cached logits"].rows[0] > 0.1
    assert not any(value.wrong for value in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_layers_like_those_of_the_2b_pass_in_bfloat16(backend: str) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "attn_logit_softcapping": 50.0}
    load_model(hf_model=deep_gemma(torch.bfloat16, layers=6, **sizes), backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_row", [True, False], ids=["by row", "by tensor"])
def test_eight_bits_pass(per_row: bool, dtype: torch.dtype) -> None:
    model = load_model(hf_model=in_eight_bits(deep_gemma(dtype, layers=8), per_row))
    assert model.original_model.model.layers[0].self_attn is not None


def layer(hf_model: Any, index: int = 1) -> Any:
    return hf_model.model.layers[index]


def without_soft_cap(hf_model: Any) -> None:
    hf_model.config.attn_logit_softcapping = None
    for one in hf_model.model.layers:
        one.self_attn.attn_logit_softcapping = None


WRONG: dict[str, Edit] = {
    "a projection": lambda hf: layer(hf).mlp.up_proj.weight.copy_(layer(hf).mlp.up_proj.weight.roll(1, 0)),
    "key heads in another order": lambda hf: layer(hf).self_attn.k_proj.weight.copy_(
        layer(hf).self_attn.k_proj.weight.roll(32, 0)
    ),
    "a norm without its one": lambda hf: layer(hf).post_feedforward_layernorm.weight.sub_(1),
    "a gain a tenth too large": lambda hf: layer(hf).post_feedforward_layernorm.weight.add_(0.1),
    "an input norm": lambda hf: layer(hf).input_layernorm.weight.add_(0.1),
    "the final norm": lambda hf: hf.model.norm.weight.add_(0.1),
    "no soft-cap of attention": without_soft_cap,
    "no final soft-cap": lambda hf: setattr(hf.config, "final_logit_softcapping", None),
    "an embedding": lambda hf: hf.model.embed_tokens.weight.copy_(hf.model.embed_tokens.weight.roll(1, 0)),
}


def built(hf_model: Any, backend: str) -> Any:
    model: Any = (build_bridge if backend == "bridge" else build_hooked_transformer)(hf_model, None, None, GEMMA2)
    repair(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_one_wrong_thing_is_refused(wrong: str, dtype: torch.dtype, backend: str) -> None:
    hf_model = random_gemma(dtype=dtype)
    plain = run_plain(hf_model)
    with torch.no_grad():
        WRONG[wrong](hf_model)
    with pytest.raises(AdapterMismatch, match=r"relative differences\): .*\d\.\d\de"):
        self_check(built(hf_model, backend), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_that_attention_does_not_read_is_refused(dtype: torch.dtype) -> None:
    hf_model = random_gemma(dtype=dtype)
    plain = run_plain(hf_model)
    model = built(hf_model, "bridge")
    attention = model.blocks[2].attn
    fill = attention._update_kv_cache
    attention._update_kv_cache = lambda k, v, **kwargs: (fill(k, v, **kwargs), (k, v))[1]
    found = differences(model, plain)
    assert not any(value.wrong for name, value in found.items() if not name.startswith("cached "))
    with pytest.raises(AdapterMismatch, match=r"cached blocks.2.attn.o.hook_in"):
        self_check(model, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_of_hooked_transformer_that_loses_a_position_is_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry as Entry

    hf_model = random_gemma(dtype=dtype)
    plain = run_plain(hf_model)
    model = built(hf_model, "hooked_transformer")
    append = Entry.append

    def lossy(self: Any, new_keys: torch.Tensor, new_values: torch.Tensor) -> Any:
        keys, values = append(self, new_keys, new_values)
        if new_keys.shape[1] == 1:
            values = values.roll(1, dims=1)
        return keys, values

    monkeypatch.setattr(Entry, "append", lossy)
    with pytest.raises(AdapterMismatch, match=r"cached blocks.0.attn.hook_z"):
        self_check(model, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hook_that_shows_a_copy_is_refused(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are right, but what a hook returns goes nowhere: a spliced SAE would have no effect."""
    hf_model = random_gemma(dtype=dtype)
    plain = run_plain(hf_model)
    model = built(hf_model, backend)
    point = model.site_hook_point("blocks.1.hook_out" if backend == "bridge" else "blocks.1.hook_resid_post")
    run = type(point).__call__

    def aside(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, x, *args, **kwargs)
        return x if self is point else result

    monkeypatch.setattr(type(point), "__call__", aside)
    with pytest.raises(AdapterMismatch, match=r"blocks.2"):
        self_check(model, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_differences_by_hook(backend: str) -> None:
    hf_model = random_gemma()
    plain = run_plain(hf_model)
    found = self_check(built(hf_model, backend), plain)
    assert {"logits", "cached logits"} <= set(found)
    assert len(found) == 2 * (4 * 4 + 2)  # four sites in four layers, the embedding, the logits
    assert max(found.values()) < 1e-5


def test_the_message_says_what_to_do_other_than_not_to_check() -> None:
    hf_model = random_gemma()
    plain = run_plain(hf_model)
    with torch.no_grad():
        hf_model.model.norm.weight.add_(0.1)
    with pytest.raises(AdapterMismatch, match="gemma-scope doctor") as caught:
        self_check(built(hf_model, "bridge"), plain)
    assert "or load with check=False" not in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_plain_model_is_left_as_it_was(dtype: torch.dtype) -> None:
    hf_model = random_gemma(dtype=dtype)
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = hf_model(tokens).logits
        run_plain(hf_model)
        assert torch.equal(hf_model(tokens).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf_model.modules())


def test_no_probed_token_is_padding() -> None:
    tokens = run_plain(random_gemma()).tokens
    assert tokens[0, 0] == 2
    assert tokens[:, 1:].min() > 2


def test_a_short_context_is_checked_with_fewer_tokens() -> None:
    hf_model = deep_gemma(torch.float32, layers=1, max_position_embeddings=6)
    assert run_plain(hf_model).tokens.shape == (3, 6)
    load_model(hf_model=hf_model)
