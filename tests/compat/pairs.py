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
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf, detect_tokenizer_bos_eos

from tests.helpers import hooked, random_gemma, random_sae, random_tokens

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
    stock = (_hooked_transformer if backend == "hooked_transformer" else _bridge)(ours.tokenizer)
    saes = {name: random_sae(ours.dims, s, n, d_sae=64, skip=skip, seed=7) for name, (s, n, skip) in SAES.items()}
    tokens = random_tokens(ours, batch=2, length=9)
    theirs = {name: stock_twin(sae) for name, sae in saes.items()}
    return Side(stock, theirs, tokens), Side(ours, saes, tokens, {"exclude_special_tokens": False})


def stock_twin(sae: Any) -> Any:
    """SAELens's SAE with the weights and the configuration of ours."""
    twin = STOCK[sae.cfg.architecture()](copy.deepcopy(sae.cfg))
    twin.load_state_dict(sae.state_dict())
    return twin.requires_grad_(False)


def _hooked_transformer(tokenizer: Any) -> Any:
    source = hooked(random_gemma("narrow-heads"), "hooked_transformer")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs["add_bos_token"] = True  # else TransformerLens loads it again, by a name that it has not
    tokenizer.init_kwargs.setdefault("name_or_path", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model: Any = HookedSAETransformer(source.cfg, tokenizer=tokenizer, default_padding_side="left")
    model.load_state_dict(source.state_dict(), strict=False)
    return model.eval()


def _bridge(tokenizer: Any) -> Any:
    """As ``boot_transformers`` makes one, from a model that is in memory."""
    hf_model = random_gemma("narrow-heads")
    config = build_bridge_config_from_hf(hf_model.config, "Gemma2ForCausalLM", "gemma-2", torch.float32)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    adapter.cfg.device = "cpu"
    adapter.prepare_model(hf_model)
    adapter.cfg.tokenizer_prepends_bos, adapter.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
    return SAETransformerBridge(hf_model, adapter, tokenizer).eval()
