"""The plain Hugging Face model as a reference: every site's tensor, read with ordinary PyTorch hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

SiteKey = tuple[str, int | None]


@dataclass(frozen=True)
class Reference:
    """One forward pass of the plain model.

    Attributes:
        tokens: ``[batch, pos]`` ids.
        logits: ``[batch, pos, vocab]``.
        sites: tensors by ``(site, layer)``; ``("transcoder", L)`` is the transcoder's input.
    """

    tokens: Int[torch.Tensor, "batch pos"]
    logits: Float[torch.Tensor, "batch pos vocab"]
    sites: dict[SiteKey, torch.Tensor]


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def _rms_normalized(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x)`` in float32, without a gain: the transcoder's input (paper, appendix B)."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@torch.no_grad()
def run_reference(
    hf_model: Any, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> Reference:
    """Run a plain ``Gemma2ForCausalLM`` and keep what passes through every Gemma Scope site."""
    sites: dict[SiteKey, torch.Tensor] = {}
    handles: list[Any] = []

    def keep_output(module: Any, key: SiteKey) -> None:
        handles.append(module.register_forward_hook(lambda _m, _i, out: sites.__setitem__(key, _first(out))))

    def keep_input(module: Any, key: SiteKey, change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        handles.append(module.register_forward_pre_hook(lambda _m, args: sites.__setitem__(key, change(args[0]))))

    eps = hf_model.config.rms_norm_eps
    decoder = hf_model.model
    keep_output(decoder.embed_tokens, ("embedding", None))
    for index, layer in enumerate(decoder.layers):
        keep_output(layer, ("res", index))
        keep_output(layer.post_feedforward_layernorm, ("mlp", index))
        keep_input(layer.self_attn.o_proj, ("att", index))
        keep_input(layer.pre_feedforward_layernorm, ("transcoder", index), lambda x: _rms_normalized(x, eps))
    try:
        logits = hf_model(tokens, attention_mask=attention_mask, use_cache=False, **kwargs).logits
    finally:
        for handle in handles:
            handle.remove()
    return Reference(tokens, logits, sites)


def probe_tokens(hf_model: Any, length: int = 12) -> Int[torch.Tensor, "1 pos"]:
    """BOS and ``length - 1`` fixed pseudo-random ids."""
    config = hf_model.config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    tokens[0, 0] = config.bos_token_id if isinstance(config.bos_token_id, int) else 2 % config.vocab_size
    return tokens.to(next(hf_model.parameters()).device)
