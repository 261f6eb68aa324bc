"""Layered coders spliced on both backends, against hooks on the plain Hugging Face model with the dense equations."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import decoder_of, random_gemma, random_layered, random_tokens, shared_model

ROUNDING = 2e-5  # float32 on values of 1 to 30, through up to seven layers
CODERS: dict[str, dict[str, Any]] = {
    "clt": {"kind": "clt", "layers": range(7)},
    "clt with skip": {"kind": "clt", "layers": range(7), "skip": True},
    "clt of some layers": {"kind": "clt", "layers": (1, 2, 5), "widths": (64, 48, 80)},
    "crosscoder": {"kind": "crosscoder", "layers": (1, 2, 4, 5)},
}
of_coders = pytest.mark.parametrize("which", CODERS)
on_backends = pytest.mark.parametrize("backend", BACKENDS)
TOKENS = {"length": 40}


def dense(coder: Any, inputs: list[torch.Tensor], k: int) -> torch.Tensor:
    """The output at layer k for the inputs of the layers up to it (Gemma Scope 2, section 2.6), in float64."""
    out = coder.b_dec[k].double()
    for j in range(k + 1):
        pre = inputs[j].double() @ coder.W_enc[j].double() + coder.b_enc[j].double()
        out = out + (pre * (pre > coder.threshold[j])) @ coder.W_dec[j][:, k - j].double()
    return out if coder.W_skip is None else out + inputs[k].double() @ coder.W_skip[k].double()


def same_sums(coder: Any, inputs: list[torch.Tensor], k: int) -> torch.Tensor:
    """As :func:`dense`, with the coder's own sums."""
    acts = [coder.encode_at(j, x) for j, x in enumerate(inputs)]
    return coder.decode_at(k, acts, inputs[k])


def by_hand(
    hf: Any, tokens: torch.Tensor, coder: Any, untouched: torch.Tensor | None = None, sums: Any = dense, **kwargs: Any
) -> torch.Tensor:
    """Logits of the plain model with every output replaced outside ``untouched`` (BOS, EOS, padding)."""
    special = (tokens <= 2 if untouched is None else untouched).unsqueeze(-1)
    inputs: list[torch.Tensor] = []

    def replaced(y: torch.Tensor) -> torch.Tensor:
        k = len(inputs) - 1
        out = torch.where(special, y, sums(coder, inputs, k).to(y.dtype))
        if k == len(coder.layers) - 1:
            inputs.clear()
        return out

    def written(_m: Any, _a: Any, out: Any) -> Any:
        if coder.kind == "clt":
            return replaced(out)
        y = out[0] if isinstance(out, tuple) else out
        inputs.append(y)
        return (replaced(y), *out[1:]) if isinstance(out, tuple) else replaced(y)

    with ExitStack() as stack, torch.no_grad():
        for layer in coder.layers:
            block = decoder_of(hf).layers[layer]
            if coder.kind == "clt":
                read = block.pre_feedforward_layernorm.register_forward_hook(lambda _m, _a, out: inputs.append(out))
                stack.callback(read.remove)
                block = block.post_feedforward_layernorm
            stack.callback(block.register_forward_hook(written).remove)
        return hf(tokens, use_cache=False, **kwargs).logits


@on_backends
@of_coders
def test_all_layers_in_one_pass(which: str, backend: str) -> None:
    hf, model = random_gemma("gemma3"), shared_model("gemma3", backend)
    tokens = random_tokens(hf, **TOKENS)
    tokens[1, 7] = 1  # an EOS in the middle
    coder = random_layered(model.dims, **CODERS[which])
    with torch.no_grad():
        clean = hf(tokens).logits
        got = model.run_with_saes(tokens, saes=coder)
        after = model(tokens)
    assert relative_difference(got, by_hand(hf, tokens, coder)) < ROUNDING
    assert relative_difference(got, clean) > 1e-2
    assert relative_difference(after, clean) < ROUNDING  # nothing is left behind
    if backend == "bridge":
        assert torch.equal(got, by_hand(hf, tokens, coder, sums=same_sums))  # the same sums in the same order


@on_backends
@of_coders
def test_with_error_terms_the_model_does_not_change(which: str, backend: str) -> None:
    model = shared_model("gemma3", backend)
    tokens = random_tokens(model, **TOKENS)
    coder = random_layered(model.dims, **CODERS[which])
    with torch.no_grad():
        clean = model(tokens)
        got = model.run_with_saes(tokens, saes=[coder], use_error_term=True)
    assert relative_difference(got, clean) < 5e-6  # y - x_hat + x_hat is y to rounding, in each of seven layers


@on_backends
@of_coders
def test_left_padding_has_no_effect(which: str, backend: str) -> None:
    hf, model = random_gemma("gemma3"), shared_model("gemma3", backend)
    tokens = random_tokens(hf, length=20)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), tokens], dim=1)
    coder = random_layered(model.dims, **CODERS[which])
    with torch.no_grad():
        got = model.run_with_saes(padded, saes=coder)[:, 5:]
    assert relative_difference(got, by_hand(hf, tokens, coder)) < ROUNDING


@on_backends
@of_coders
@pytest.mark.parametrize("error_term", [False, True])
def test_an_ablated_latent_is_missing_in_all_layers(which: str, backend: str, error_term: bool) -> None:
    """With error terms, on the plain model's tensors; without, on the sums."""
    model = shared_model("gemma3", backend)
    tokens = random_tokens(model, length=16)
    coder = random_layered(model.dims, **CODERS[which])
    name = model.get_sae_hook_name(coder, layer=coder.layers[1])
    with torch.no_grad():
        spliced, cache = model.run_with_cache_with_saes(tokens, saes=coder, use_error_term=error_term)
        latent = int(cache[name][0, 5].argmax())

        def zero(acts: torch.Tensor, hook: Any) -> torch.Tensor:
            acts[..., latent] = 0.0
            return acts

        edited = model.run_with_hooks_with_saes(tokens, saes=coder, use_error_term=error_term, fwd_hooks=[(name, zero)])
        without = random_layered(model.dims, **CODERS[which])
        if not error_term:
            without.W_dec[1][latent] = 0.0
            wanted = model.run_with_saes(tokens, saes=without)
        else:
            keep, acts = (tokens > 2).unsqueeze(-1), cache[name][..., latent : latent + 1]
            hooks = [
                (model.get_sae_hook_name(coder, "x", layer=layer)[: -len(".x")], removed(keep * acts * row))
                for layer, row in zip(coder.layers[1:], coder.W_dec[1][latent], strict=True)
            ]
            wanted = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert relative_difference(edited, wanted) < ROUNDING
    assert relative_difference(edited, spliced) > 1e-4


def removed(part: torch.Tensor) -> Any:
    return lambda value, hook: value - part


@on_backends
def test_generation_with_a_cache_gives_the_tokens_without(backend: str) -> None:
    model = shared_model("gemma3", backend)
    prompt = random_tokens(model, batch=1, length=6)
    for coder in (random_layered(model.dims, "clt", range(7)), random_layered(model.dims, "crosscoder", (1, 4))):
        options = {"max_new_tokens": 12, "do_sample": False, "stop_at_eos": False, "verbose": False}
        with torch.no_grad(), gs.splice(model, coder):
            cached = model.generate(prompt, use_past_kv_cache=True, **options)
            uncached = model.generate(prompt, use_past_kv_cache=False, **options)
            stepwise = prompt
            for _ in range(12):
                stepwise = torch.cat([stepwise, model(stepwise)[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(cached, uncached)
        assert torch.equal(cached, stepwise)


@on_backends
def test_gradients_are_those_of_the_dense_equations(backend: str) -> None:
    model = shared_model("gemma3", backend)
    tokens = random_tokens(model, batch=1, length=8)
    coder = random_layered(model.dims, "clt", (1, 2, 3), skip=True)
    names = {layer: model.get_sae_hook_name(coder, layer=layer) for layer in coder.layers}
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(acts: torch.Tensor, hook: Any) -> torch.Tensor:
            acts.retain_grad()
            found[layer] = acts
            return acts

        return hook

    embeddings = model.embedding_module()
    handle = embeddings.register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    try:
        with model.saes(coder, exclude_special_tokens=False):
            hooks = [(names[layer], keep(layer)) for layer in coder.layers]
            model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1, 5].backward()
            grads = {layer: _grad(acts) for layer, acts in found.items()}
            shift = torch.zeros_like(grads[1])
            latent = int(found[1][0, -1].argmax())
            shift[0, -1, latent] = 1e-2
            moved = [
                model.run_with_hooks(tokens, fwd_hooks=[(names[1], lambda acts, hook, sign=sign: acts + sign * shift)])[
                    0, -1, 5
                ].item()
                for sign in (1, -1)
            ]
    finally:
        handle.remove()
        model.zero_grad()
    slope = (moved[0] - moved[1]) / 2e-2
    assert all(grad.abs().max() > 0 for grad in grads.values())
    assert abs(slope - grads[1][0, -1, latent].item()) < 2e-2 * abs(slope) + 1e-3  # a difference quotient in float32


def _grad(acts: torch.Tensor) -> torch.Tensor:
    assert acts.grad is not None
    return acts.grad.clone()
