"""A model of SAELens and ours, of the same random weights, and SAEs of equal weights for both."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import HookedSAETransformer, SAETransformerBridge
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder

from gemma_scope_tl.sites import ModelDims
from tests.helpers import CharTokenizerFactory, hooked, random_gemma, random_sae, random_tokens

STOCK = {
    "jumprelu": JumpReLUSAE,
    "jumprelu_transcoder": JumpReLUTranscoder,
    "jumprelu_skip_transcoder": JumpReLUSkipTranscoder,
}
SAES: dict[str, tuple[str, int | None, bool]] = {
    "res": ("res", 1, False),
    "early": ("res", 0, False),
    "att": ("att", 0, False),
    "mlp": ("mlp", 1, False),
    "embedding": ("embedding", None, False),
    "transcoder": ("transcoder", 1, False),
    "skip": ("transcoder", 0, True),
}


@dataclass
class Side:
    """A model, SAEs for it by the names of :data:`SAES`, and token ids without padding.

    Attributes:
        plain: options that make ours do what SAELens does by default; empty for SAELens's own.
    """

    model: Any
    saes: dict[str, Any]
    tokens: torch.Tensor
    plain: dict[str, Any] = field(default_factory=dict[str, Any])


def make_pair(backend: str) -> tuple[Side, Side]:
    """SAELens's model and ours."""
    ours = hooked(random_gemma("narrow-heads"), backend)
    stock = _hooked_transformer() if backend == "hooked_transformer" else _bridge()
    saes = {name: random_sae(ours.dims, s, n, d_sae=64, skip=skip, seed=7) for name, (s, n, skip) in SAES.items()}
    tokens = random_tokens(ours, batch=2, length=9)
    theirs = {name: stock_twin(sae) for name, sae in saes.items()}
    return Side(stock, theirs, tokens), Side(ours, saes, tokens, {"exclude_special_tokens": False})


def stock_twin(sae: Any) -> Any:
    """SAELens's SAE with the weights and the configuration of ours."""
    twin = STOCK[sae.cfg.architecture()](copy.deepcopy(sae.cfg))
    twin.load_state_dict(sae.state_dict())
    return twin.requires_grad_(False)


def _hooked_transformer() -> Any:
    source = hooked(random_gemma("narrow-heads"), "hooked_transformer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model: Any = HookedSAETransformer(source.cfg, tokenizer=source.tokenizer, default_padding_side="left")
    model.load_state_dict(source.state_dict(), strict=False)
    return model.eval()


def _bridge() -> Any:
    """As SAELens makes one, from a model that is in memory."""
    from gemma_scope_tl.adapters import bridge as adapter

    made: Any = adapter.build_bridge(random_gemma("narrow-heads"), CharTokenizerFactory.get(), None)
    stock: Any = SAETransformerBridge(made.original_model, made.adapter, made.tokenizer)
    assert isinstance(made.dims, ModelDims)
    return stock.eval()
