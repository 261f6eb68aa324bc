"""The small models that come with the package: what differs between them, as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from gemma_scope_tl.errors import unknown_name
from gemma_scope_tl.registry.locate import MODEL_FOLDER, bundle_folder
from scripts.bundled.tokenizer import BOS, CONTEXT, EOS, PAD, VOCAB_SIZE

REPO = Path(__file__).resolve().parents[2]
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}


@dataclass(frozen=True)
class Bundle:
    """A bundled model with its suite of SAEs.

    Attributes:
        name: what `load_model` calls it; the prefix of its releases, too.
        title: the family, in sentences.
        architecture: the class of Hugging Face.
        config: returns the architecture's configuration.
        dtype: of the weights that ship. Training is in float32.
        total_tokens: default length of the training.
        run: folder of the training run below the working folder.
        parts: what the card says of the architecture, with the names of `describe` in braces.
        suite: configuration of the training of the SAEs, below `configs/`.
        layout: layout of the SAEs that ship.
        releases: for each release its sites and a description.
    """

    name: str
    title: str
    architecture: Callable[[Any], Any]
    config: Callable[[], Any]
    dtype: torch.dtype
    total_tokens: int
    run: str
    parts: str
    suite: str
    layout: Literal["gemma-scope", "gemma_scope_2"]
    releases: Mapping[str, tuple[tuple[str, ...], str]]

    @property
    def folder(self) -> Path:
        """The folder of the package with `model/` and `saes/`."""
        found = bundle_folder(self.name)
        assert found is not None, f"no family has a bundled model {self.name}"
        return found

    @property
    def model_folder(self) -> Path:
        """The folder of the model that ships."""
        return self.folder / MODEL_FOLDER

    @property
    def suite_config(self) -> Path:
        """The file of the suite's configuration."""
        return REPO / "configs" / self.suite


def gemma2_config() -> Gemma2Config:
    """A small Gemma 2 with n_heads * head_dim (96) different from the width (128)."""
    layers = 4
    return Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        query_pre_attn_scalar=24,
        max_position_embeddings=CONTEXT,
        sliding_window=64,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        rms_norm_eps=1e-6,
        layer_types=["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)],
        tie_word_embeddings=True,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
        **SPECIAL,
    )


def gemma3_config() -> Gemma3TextConfig:
    """A small Gemma 3 with the shape rules of 270M: heads (4 of 48) wider than the width, one key-value head, 5:1."""
    layers = 6
    return Gemma3TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=416,  # 3.2 times the width, in whole 32s
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=48,
        query_pre_attn_scalar=48,
        max_position_embeddings=CONTEXT,
        sliding_window=64,
        rms_norm_eps=1e-6,
        layer_types=["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        tie_word_embeddings=True,
        attn_implementation="sdpa",  # equal without soft-caps, and twice as fast  # pyright: ignore[reportCallIssue]
        **SPECIAL,
    )


GEMMA2 = Bundle(
    name="bundled",
    title="Gemma 2",
    architecture=Gemma2ForCausalLM,
    config=gemma2_config,
    dtype=torch.float32,
    total_tokens=20_200_000,
    run="run",
    parts=(
        "{layers} layers alternating sliding (window {window}) and full attention, width {width}, {heads} heads of "
        "size {head_dim} sharing {kv_heads} key-value heads, soft-capped attention and output logits, RMS norms before "
        "and after each sub-layer, tied embeddings, and a byte-level BPE of {vocab} tokens"
    ),
    suite="bundled.yaml",
    layout="gemma-scope",
    releases={
        "bundled-res": (
            ("res", "embedding"),
            "Residual stream of the bundled small Gemma 2 in every layer, embeddings",
        ),
        "bundled-mlp": (("mlp",), "MLP outputs of the bundled small Gemma 2 in every layer"),
        "bundled-att": (("att",), "Attention head outputs of the bundled small Gemma 2 in every layer"),
        "bundled-transcoders": (("transcoder",), "Transcoders of the bundled small Gemma 2: MLP input to MLP output"),
    },
)

GEMMA3 = Bundle(
    name="bundled-gemma3",
    title="Gemma 3",
    architecture=Gemma3ForCausalLM,
    config=gemma3_config,
    dtype=torch.bfloat16,
    total_tokens=20_000_000,
    run="run-gemma3",
    parts=(
        "{layers} layers, five of sliding attention (window {window}, RoPE base 10,000) to one of full attention (RoPE "
        "base 1,000,000), width {width}, {heads} heads of size {head_dim} sharing {kv_heads} key-value head, RMS norms "
        "of queries and keys and before and after each sub-layer, no soft-caps, tied embeddings, and the byte-level "
        "BPE of {vocab} tokens of the other bundled model"
    ),
    suite="bundled-gemma3.yaml",
    layout="gemma_scope_2",
    releases={
        "bundled-gemma3-res": (("res",), "Residual stream of the bundled small Gemma 3 in every layer"),
        "bundled-gemma3-mlp": (("mlp",), "MLP outputs of the bundled small Gemma 3 in every layer"),
        "bundled-gemma3-att": (("att",), "Attention head outputs of the bundled small Gemma 3 in every layer"),
        "bundled-gemma3-transcoders": (
            ("transcoder",),
            "Transcoders of the bundled small Gemma 3 in every layer, with and without a skip connection",
        ),
    },
)

BUNDLES = {bundle.name: bundle for bundle in (GEMMA2, GEMMA3)}


def bundle_named(name: str) -> Bundle:
    """The bundle with this name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in BUNDLES:
        raise unknown_name("bundle", name, BUNDLES)
    return BUNDLES[name]
