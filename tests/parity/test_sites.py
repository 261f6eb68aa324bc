"""Every site, every layer, both backends, against plain PyTorch hooks on Hugging Face's Gemma 2 and Gemma 3."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma_scope_tl.families import family_named
from gemma_scope_tl.model.check import site_hooks
from gemma_scope_tl.model.plain import Reference, relative_difference, run_reference
from gemma_scope_tl.sites import BACKENDS, Place
from tests.helpers import CONFIGS, CONFIGS_3, decoder_of, hooked, random_gemma, random_tokens, text_of

FAMILY_OF = {"grouped": "gemma2", "gemma3": "gemma3"}
EDITED = [(config, name) for config in ("grouped", "gemma3") for name in family_named(FAMILY_OF[config]).sites]

# float32: the bridge runs Hugging Face's own kernels (0.0); HookedTransformer orders the same sums differently.
# bfloat16: the bridge is bit-exact again; HookedTransformer rounds to 8 bits in other places, a few percent in all.
TOLERANCE = {
    ("bridge", torch.float32): 0.0,
    ("bridge", torch.bfloat16): 0.0,
    ("hooked_transformer", torch.float32): 5e-6,
    ("hooked_transformer", torch.bfloat16): 6e-2,
}


@torch.no_grad()
def site_differences(model: Any, reference: Reference) -> dict[str, float]:
    """Relative difference from one plain pass, of the logits and of every site and layer, by hook name."""
    seen: dict[str, torch.Tensor] = {}
    names = site_hooks(model, reference.sites)
    keep = [(name, lambda value, hook, name=name: seen.__setitem__(name, value)) for name in names.values()]
    logits = model.run_with_hooks(reference.tokens, fwd_hooks=keep)
    found = {"logits": relative_difference(logits, reference.logits)}
    for key, name in names.items():
        wanted = reference.sites[key]
        found[name] = relative_difference(seen[name].reshape(wanted.shape), wanted) if name in seen else float("inf")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [*CONFIGS, *CONFIGS_3, "bundled"])
def test_every_site_and_layer_beyond_the_window(config: str, backend: str, dtype: torch.dtype) -> None:
    hf = random_gemma(config, dtype=dtype)
    tokens = random_tokens(hf, length=text_of(hf).sliding_window + 16)
    reference = run_reference(hf, tokens)
    model = hooked(hf, backend)
    assert {key[0] for key in reference.sites} == set(model.family.sites)
    differences = site_differences(model, reference)
    embedding = "embedding" in model.family.sites
    assert len(differences) == 1 + embedding + 4 * text_of(hf).num_hidden_layers  # logits, four sites a layer
    assert max(differences.values()) <= TOLERANCE[backend, dtype], differences


@pytest.mark.parametrize("config", ["grouped", "gemma3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_is_masked_without_being_asked(backend: str, config: str) -> None:
    hf = random_gemma(config)
    rows = [random_tokens(hf, batch=1, length=n, seed=n) for n in (24, 19, 11)]
    alone = [run_reference(hf, row) for row in rows]
    padded = torch.cat([torch.nn.functional.pad(row, (24 - row.shape[1], 0), value=0) for row in rows])
    model = hooked(hf, backend)
    seen: dict[str, torch.Tensor] = {}
    names = site_hooks(model, alone[0].sites)
    keep = [(name, lambda value, hook, name=name: seen.__setitem__(name, value)) for name in names.values()]
    with torch.no_grad():
        logits = model.run_with_hooks(padded, fwd_hooks=keep)
    for i, (row, reference) in enumerate(zip(rows, alone, strict=True)):
        n = row.shape[1]
        assert relative_difference(logits[i : i + 1, -n:], reference.logits) < 5e-6
        for key, name in names.items():
            wanted = reference.sites[key]
            assert relative_difference(seen[name][i : i + 1, -n:].reshape(wanted.shape), wanted) < 5e-6, name


@pytest.mark.parametrize("config", ["grouped", "gemma3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_mask_left_padding_would_be_wrong(backend: str, config: str) -> None:
    """The check above can fail: with an all-ones mask the same comparison is off by far more than rounding."""
    hf = random_gemma(config)
    row = random_tokens(hf, batch=1, length=16)
    reference = run_reference(hf, row)
    padded = torch.nn.functional.pad(row, (8, 0), value=0)
    with torch.no_grad():
        logits = hooked(hf, backend)(padded, attention_mask=torch.ones_like(padded))
    assert relative_difference(logits[:, -16:], reference.logits) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("config", "site"), EDITED)
def test_an_edit_at_a_site_propagates_as_in_plain_pytorch(config: str, site: str, backend: str) -> None:
    hf = random_gemma(config)
    tokens = random_tokens(hf)
    layer = None if site == "embedding" else 2
    wanted = _edited_reference(hf, tokens, site, layer)
    model = hooked(hf, backend)
    name = model.family.site(site).hook_name(layer, backend)
    delta = _delta(model.family.site(site).d_in(model.dims))
    with torch.no_grad():
        got = model.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda value, hook: value + delta.reshape(value.shape[2:]))]
        )
    assert relative_difference(wanted, run_reference(hf, tokens).logits) > 1e-2  # the edit matters
    assert relative_difference(got, wanted) < 5e-6


def _delta(width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(5))


def _edited_reference(hf: Any, tokens: torch.Tensor, site: str, layer: int | None) -> torch.Tensor:
    decoder = decoder_of(hf)
    block = decoder.layers[layer or 0]
    if site == "att":
        delta = _delta(block.self_attn.o_proj.in_features)
        handle = block.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: (args[0] + delta,))
    else:
        delta = _delta(text_of(hf).hidden_size)
        if site == "transcoder" and text_of(hf).model_type == "gemma2":  # the gain multiplies what is added before it
            delta = delta * (1 + block.pre_feedforward_layernorm.weight.detach())
        module = {
            "res": block,
            "mlp": block.post_feedforward_layernorm,
            "embedding": decoder.embed_tokens,
            "transcoder": block.pre_feedforward_layernorm,
        }[site]

        def add(_module: Any, _args: Any, out: Any) -> Any:
            return (out[0] + delta, *out[1:]) if isinstance(out, tuple) else out + delta

        handle = module.register_forward_hook(add)
    try:
        return run_reference(hf, tokens).logits
    finally:
        handle.remove()


def test_the_reference_is_the_model() -> None:
    hf = random_gemma()
    tokens = random_tokens(hf)
    with torch.no_grad():
        out = hf(tokens, output_hidden_states=True)
    reference = run_reference(hf, tokens)
    assert isinstance(reference, Reference)
    assert torch.equal(reference.logits, out.logits)
    assert torch.equal(reference.sites[Place("embedding", None)], out.hidden_states[0])
    for layer in range(hf.config.num_hidden_layers - 1):  # the last hidden state is after the final norm
        assert torch.equal(reference.sites[Place("res", layer)], out.hidden_states[layer + 1])
