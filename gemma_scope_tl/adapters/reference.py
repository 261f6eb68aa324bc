"""The plain Hugging Face model as a reference: every site's tensor, read with ordinary PyTorch hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

SiteKey = tuple[str, int | None]
Change = Callable[[SiteKey, torch.Tensor], torch.Tensor | None]


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


def _rms_normalized(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x)`` in float32, without a gain: the transcoder's input (paper, appendix B)."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class _Taps:
    """Hooks on the plain model: what passes a site is kept, and ``change`` may give what goes on in its place."""

    def __init__(self, change: Change | None) -> None:
        self.sites: dict[SiteKey, torch.Tensor] = {}
        self.handles: list[Any] = []
        self._change = change

    def _pass(self, key: SiteKey, value: torch.Tensor) -> torch.Tensor | None:
        self.sites[key] = value
        return self._change(key, value) if self._change is not None else None

    def output(self, module: Any, key: SiteKey) -> None:
        """Tap what ``module`` gives."""

        def hook(_module: Any, _args: Any, given: Any) -> Any:
            plain = not isinstance(given, tuple)  # older layers give a tuple
            changed = self._pass(key, given if plain else given[0])
            return changed if plain or changed is None else (changed, *given[1:])

        self.handles.append(module.register_forward_hook(hook))

    def input(self, module: Any, key: SiteKey) -> None:
        """Tap what ``module`` takes."""

        def hook(_module: Any, args: Any) -> Any:
            changed = self._pass(key, args[0])
            return None if changed is None else (changed, *args[1:])

        self.handles.append(module.register_forward_pre_hook(hook))

    def normalized_input(self, module: Any, key: SiteKey, eps: float) -> None:
        """Keep what ``module`` takes, normalised."""
        self.handles.append(
            module.register_forward_pre_hook(
                lambda _m, args: self.sites.__setitem__(key, _rms_normalized(args[0], eps))
            )
        )


@torch.no_grad()
def run_reference(
    hf_model: Any,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    change: Change | None = None,
    **kwargs: Any,
) -> Reference:
    """Run a plain ``Gemma2ForCausalLM`` and keep what passes through every Gemma Scope site.

    Args:
        hf_model: not wrapped by a bridge.
        tokens: ``[batch, pos]`` ids.
        attention_mask: ``[batch, pos]``, 1 at text.
        change: takes ``(site, layer)`` and the site's tensor, and returns what the pass goes on with, or None for the
            same; it is not asked about transcoder inputs.
        **kwargs: for the model.
    """
    taps = _Taps(change)
    eps = hf_model.config.rms_norm_eps
    decoder = hf_model.model
    taps.output(decoder.embed_tokens, ("embedding", None))
    for index, layer in enumerate(decoder.layers):
        taps.output(layer, ("res", index))
        taps.output(layer.post_feedforward_layernorm, ("mlp", index))
        taps.input(layer.self_attn.o_proj, ("att", index))
        taps.normalized_input(layer.pre_feedforward_layernorm, ("transcoder", index), eps)
    try:
        logits = hf_model(tokens, attention_mask=attention_mask, **{"use_cache": False, **kwargs}).logits
    finally:
        for handle in taps.handles:
            handle.remove()
    return Reference(tokens, logits, taps.sites)


def cache_keyword(hf_model: Any) -> str:
    """The name by which this version of transformers takes a key-value cache."""
    return "cache" if "cache" in inspect.signature(type(hf_model).forward).parameters else "past_key_values"


def probe_tokens(hf_model: Any, length: int = 12) -> Int[torch.Tensor, "1 pos"]:
    """BOS and ``length - 1`` fixed pseudo-random ids of ordinary tokens, fewer where the model's context is shorter."""
    config = hf_model.config
    length = min(length, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    given = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "eos", "bos")]
    special = [i for one in given for i in (one if isinstance(one, list) else [one]) if isinstance(i, int)]
    if (ordinary := max(special, default=-1) + 1) < config.vocab_size // 2:
        tokens = tokens.clamp_min(ordinary)  # padding would be masked
    tokens[0, 0] = config.bos_token_id if isinstance(config.bos_token_id, int) else 2 % config.vocab_size
    return tokens.to(hf_model.get_input_embeddings().weight.device)
