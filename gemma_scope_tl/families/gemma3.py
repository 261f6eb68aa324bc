"""Gemma 3 (270M, 1B, 4B, 12B, 27B; base and instruction-tuned), with the sites of Gemma Scope 2.

========== ======================================= ================================== ============================
site       tensor                                  HookedTransformer hook             TransformerBridge hook
========== ======================================= ================================== ============================
res        residual stream after the MLP           ``blocks.L.hook_resid_post``       ``blocks.L.hook_out``
mlp        MLP output after the post-MLP RMSNorm   ``blocks.L.hook_mlp_out``          ``blocks.L.ln2_post.hook_out``
att        heads, concatenated, before W_O         ``blocks.L.attn.hook_z``           ``blocks.L.attn.o.hook_in``
transcoder in: pre-MLP RMSNorm *with* its gain     ``blocks.L.ln2.hook_normalized``   ``blocks.L.ln2.hook_out``
           out: the mlp site                       ``blocks.L.hook_mlp_out``          ``blocks.L.ln2_post.hook_out``
========== ======================================= ================================== ============================

HookedTransformer has no hook behind the gain of the pre-MLP norm, so the gain is folded into the transcoder there
(``folded_gain``). Gemma Scope 2 has no SAEs of the token embedding.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from gemma_scope_tl.families.base import Family, ModelDims, ModelSizes, Site

_MLP = ("blocks.{layer}.ln2_post.hook_out", "blocks.{layer}.hook_mlp_out")

_SITES = (
    Site(
        name="res",
        bridge="blocks.{layer}.hook_out",
        hooked_transformer="blocks.{layer}.hook_resid_post",
        module="layers.{layer}",
        side="output",
        width_rule="d_model",
        reads=("res",),
        writes=("res",),
        joins="residual",
        description="residual stream after the MLP sub-layer",
    ),
    Site(
        name="mlp",
        bridge=_MLP[0],
        hooked_transformer=_MLP[1],
        module="layers.{layer}.post_feedforward_layernorm",
        side="output",
        width_rule="d_model",
        reads=("mlp",),
        writes=("mlp",),
        joins="branch",
        description="MLP output after the post-MLP RMSNorm",
    ),
    Site(
        name="att",
        bridge="blocks.{layer}.attn.o.hook_in",
        hooked_transformer="blocks.{layer}.attn.hook_z",
        module="layers.{layer}.self_attn.o_proj",
        side="input",
        width_rule="heads",
        reads=("att",),
        writes=("att",),
        joins="attention",
        description="concatenated head outputs before W_O",
    ),
    Site(
        name="transcoder",
        bridge="blocks.{layer}.ln2.hook_out",
        hooked_transformer="blocks.{layer}.ln2.hook_normalized",
        bridge_out=_MLP[0],
        hooked_transformer_out=_MLP[1],
        module="layers.{layer}.pre_feedforward_layernorm",
        side="output",
        width_rule="d_model",
        reads=("transcoder",),
        writes=("mlp",),
        joins="nowhere",
        description="pre-MLP RMSNorm with its gain -> MLP output",
        folded_gain="ln2",
    ),
)


def _embedding_scale(d_model: int) -> float:
    """``sqrt(d_model)`` rounded to float32, before it is rounded to the dtype of the weights."""
    return float(struct.unpack("f", struct.pack("f", math.sqrt(d_model)))[0])


def _hooked_transformer_config(config: Any, dims: ModelDims) -> dict[str, Any]:
    return {
        "act_fn": config.hidden_activation,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "use_qk_norm": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": dims.d_head,
        "use_attn_scale": True,
        "attn_scale": float(config.query_pre_attn_scalar) ** 0.5,
        "use_local_attn": True,
        "window_size": config.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        "use_normalization_before_and_after": True,
    }


# Sizes of the MLP and the vocabulary reproduce the technical report's numbers of parameters (table 1): 100, 698, 3,209,
# 10,759 and 25,600 million in the blocks.
GEMMA3 = Family(
    name="gemma3",
    title="Gemma 3",
    model_types=("gemma3_text", "gemma3"),
    architecture="Gemma3ForCausalLM",
    sites={site.name: site for site in _SITES},
    sizes={
        "gemma-3-270m": ModelSizes(ModelDims(18, 640, 4, 256), kv_heads=1, d_ff=2048, d_vocab=262_144),
        "gemma-3-1b": ModelSizes(ModelDims(26, 1152, 4, 256), kv_heads=1, d_ff=6912, d_vocab=262_144),
        "gemma-3-4b": ModelSizes(ModelDims(34, 2560, 8, 256), kv_heads=4, d_ff=10_240, d_vocab=262_208),
        "gemma-3-12b": ModelSizes(ModelDims(48, 3840, 16, 256), kv_heads=8, d_ff=15_360, d_vocab=262_208),
        "gemma-3-27b": ModelSizes(ModelDims(62, 5376, 32, 128), kv_heads=16, d_ff=21_504, d_vocab=262_208),
    },
    owner="google",
    tuned_suffix="-it",
    base_suffix="-pt",
    hub_without_suffix=("gemma-3-270m",),
    hooked_transformer_config=_hooked_transformer_config,
    hooked_transformer_weights="transformer_lens.pretrained.weight_conversions.gemma:convert_gemma_weights",
    embedding_scale=_embedding_scale,
    gain_offset={"bridge": 1.0, "hooked_transformer": 0.0},
    norm_before_mlp="ln2",
    norm_after_attention="ln1_post",
    turn_start="<start_of_turn>",
    turn_end="<end_of_turn>",
)
