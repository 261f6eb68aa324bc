"""Small random models and SAEs that the tests share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)

from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sites import ModelDims, get_site

DEFAULT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # 4 * 32 = 128, not 64
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 24,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one-kv-head": {"num_key_value_heads": 1, "num_hidden_layers": 3},
    "narrow-heads": {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 2},  # 4 * 8 = 32 < 64
}


_SIZES = {name: value for name, value in DEFAULT.items() if "softcapping" not in name}
DEFAULT_3 = _SIZES | {"num_key_value_heads": 1, "num_hidden_layers": 7}  # layer 5 has full attention
_LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
CONFIGS_3: dict[str, dict[str, Any]] = {
    "gemma3": {"rope_parameters": _LINEAR},
    "gemma3-narrow-heads": {"head_dim": 8, "sliding_window": 5, "num_key_value_heads": 2},  # 4 * 8 = 32 < 64
    "gemma3-in-a-wrapper": {"rope_parameters": _LINEAR, "num_key_value_heads": 2},
}
_VISION = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"num_hidden_layers": 1, "num_attention_heads": 2}
_PICTURE = {"image_size": 28, "patch_size": 14}


def random_gemma(config: str = "grouped", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random Gemma with weights and gains so large that a wrong tensor cannot look right; or the bundled one.

    Those of :data:`CONFIGS` are Gemma 2, those of :data:`CONFIGS_3` are Gemma 3.
    """
    if config == "bundled":
        bundled: Any = Gemma2ForCausalLM.from_pretrained(BUNDLED_MODEL, attn_implementation="eager")
        return bundled.to(dtype).eval()
    torch.manual_seed(seed)
    model = _new(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else 0.15)
    return model.to(dtype).eval()


def _new(config: str) -> Any:
    if config not in CONFIGS_3:
        sizes: Any = DEFAULT | CONFIGS[config]
        return _eager(Gemma2ForCausalLM(Gemma2Config(**sizes)))
    text: Any = DEFAULT_3 | CONFIGS_3[config]
    if config != "gemma3-in-a-wrapper":
        return _eager(Gemma3ForCausalLM(Gemma3TextConfig(**text)))
    images: Any = {"image_token_index": 93, "boi_token_index": 94, "eoi_token_index": 95, "mm_tokens_per_image": 1}
    both = Gemma3Config(text_config=text, vision_config=_VISION | _PICTURE, **images)
    return _eager(Gemma3ForConditionalGeneration(both))


def _eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def text_of(hf_model: Any) -> Any:
    """The configuration of the text model of a plain model."""
    return getattr(hf_model.config, "text_config", hf_model.config)


def decoder_of(hf_model: Any) -> Any:
    """The decoder of a plain model."""
    return getattr(hf_model.model, "language_model", hf_model.model)


class CharTokenizerFactory:
    """A tokenizer of single characters with Gemma's special tokens, made in memory."""

    _made: Any = None

    @classmethod
    def get(cls) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        special = ["<pad>", "<eos>", "<bos>"]
        vocab = {token: i for i, token in enumerate([*special, *(chr(c) for c in range(32, 125))])}
        core = Tokenizer(models.WordLevel(vocab, unk_token="?"))
        core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
        return PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="left"
        )


def hooked(hf_model: Any, backend: str, **kwargs: Any) -> Any:
    """``hf_model`` through ``load_model`` with the character tokenizer."""
    return load_model(hf_model=hf_model, tokenizer=CharTokenizerFactory.get(), backend=backend, **kwargs)


@functools.cache
def shared_model(config: str, backend: str) -> Any:
    """A hooked model that is made once in a process: ``random_gemma(config)``, or the bundled model for ``"bundled"``.

    Tests must leave it as it was, which ``conftest.py`` checks after each file. A test that adds hooks which it does
    not remove, or changes weights, makes its own model with :func:`hooked`.
    """
    made = load_model("bundled", backend=backend) if config == "bundled" else hooked(random_gemma(config), backend)
    SHARED.append((f"{config} on {backend}", made, state_of(made)))
    return made


SHARED: list[tuple[str, Any, dict[str, Any]]] = []
"""The models that :func:`shared_model` has made: name, model, and its state when it was last checked."""


def state_of(model: Any) -> dict[str, Any]:
    """The parts of a model's state that a test could change and forget to restore."""
    return {
        "SAEs": list(model.acts_to_saes),
        "hooks": {n: len(p.fwd_hooks) + len(p.bwd_hooks) for n, p in model.hook_dict.items() if p.has_hooks()},
        "weights": [(id(p), p._version, p.requires_grad) for p in model.parameters()],
        "training": model.training,
        "level": model.context_level,
        "generating": model.token_tracker.generating,
        "template": model.tokenizer.chat_template,
    }


def random_tokens(model: Any, batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """BOS and ordinary tokens, ``[batch, length]``."""
    vocab = text_of(model).vocab_size if hasattr(model, "config") else model.cfg.d_vocab
    tokens = torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 2
    return tokens


def random_sae(
    dims: ModelDims, site: str, layer: int | None, d_sae: int = 256, seed: int = 0, skip: bool = False
) -> Any:
    """A random JumpReLU SAE or transcoder at a site, of which a third of the latents fire; its parameters frozen."""
    generator = torch.Generator().manual_seed(seed)
    d_in = get_site(site).d_in(dims)
    d_out = dims.d_model if site == "transcoder" else d_in

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    arrays = {
        "W_enc": normal(d_in, d_sae, scale=d_in**-0.5),
        "W_dec": torch.nn.functional.normalize(normal(d_sae, d_out), dim=1),
        "b_enc": normal(d_sae, scale=0.1),
        "b_dec": normal(d_out, scale=0.1),
        "threshold": normal(d_sae).abs(),
    }
    if skip:
        arrays["W_skip"] = normal(d_out, d_in, scale=d_in**-0.5)
    return JumpReLUSAE.from_arrays(arrays, site=site, layer=layer).requires_grad_(False)


def random_layered(
    dims: ModelDims,
    kind: str = "clt",
    layers: Sequence[int] = (0, 1, 2, 3),
    widths: Sequence[int] | int = 96,
    skip: bool = False,
    seed: int = 0,
    model_name: str | None = None,
) -> LayeredCoder:
    """A random crosscoder or cross-layer transcoder, of which a third of the latents fire, as if mapped from its files.

    The planes lie within those of all layers, as in a file, so that latents are not adjacent in memory.
    """
    generator, count, d = torch.Generator().manual_seed(seed), len(layers), dims.d_model
    sizes = [widths] * count if isinstance(widths, int) else list(widths)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    whole = [torch.nn.functional.normalize(normal(m, count, d), dim=2) for m in sizes]
    return LayeredCoder(
        cast("Any", kind),
        layers,
        W_enc=[normal(d, m, scale=d**-0.5) for m in sizes],
        b_enc=[normal(m, scale=0.1) for m in sizes],
        threshold=[normal(m).abs() for m in sizes],
        W_dec=[planes[:, k:] for k, planes in enumerate(whole)],
        b_dec=[normal(d, scale=0.1) for _ in layers],
        W_skip=[normal(d, d, scale=d**-0.5) for _ in layers] if skip else None,
        model_name=model_name,
    )
