"""Tiny random models of other architectures than Gemma's."""

from __future__ import annotations

from typing import Any

import torch


def tiny_model(config_class: Any, model_class: Any, model_type: str | None = None, **options: Any) -> Any:
    """A random Hugging Face model with two layers, in eager attention; ``model_type`` replaces that of its config."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        **options,
    )
    config._attn_implementation = "eager"
    config.model_type = model_type or config.model_type
    model = model_class(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.15)
    return model.eval()
