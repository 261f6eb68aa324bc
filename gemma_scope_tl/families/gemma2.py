"""Gemma 2 (2B, 9B, 27B; base and instruction-tuned), with the sites of Gemma Scope.

========== ======================================= ================================== ============================
site       tensor (section 3.1, appendix B)        HookedTransformer hook             TransformerBridge hook
========== ======================================= ================================== ============================
res        residual stream after the MLP           ``blocks.L.hook_resid_post``       ``blocks.L.hook_out``
mlp        MLP output after the post-MLP RMSNorm   ``blocks.L.hook_mlp_out``          ``blocks.L.ln2_post.hook_out``
att        heads, concatenated, before W_O         ``blocks.L.attn.hook_z``           ``blocks.L.attn.o.hook_in``
embedding  scaled token embedding                  ``hook_embed``                     ``embed.hook_out``
transcoder in: pre-MLP RMSNorm without its gain    ``blocks.L.ln2.hook_normalized``   the same
           out: the mlp site                       ``blocks.L.hook_mlp_out``          ``blocks.L.ln2_post.hook_out``
========== ======================================= ================================== ============================

``blocks.L.mlp.hook_out`` on the bridge is the output of the MLP *before* the post-MLP norm; it is not a
Gemma Scope site.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from gemma_scope_tl.families.base import Family, ModelDims, ModelSizes, Site

_MLP = ("blocks.{layer}.ln2_post.hook_out", "blocks.{layer}.hook_mlp_out")
_NORMALIZED = "blocks.{layer}.ln2.hook_normalized"

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
        name="embedding",
        bridge="embed.hook_out",
        hooked_transformer="hook_embed",
        module="embed_tokens",
        side="output",
        width_rule="d_model",
        reads=("embedding",),
        writes=("embedding",),
        joins="embedding",
        description="token embedding, scaled by sqrt(d_model)",
        per_layer=False,
    ),
    Site(
        name="transcoder",
        bridge=_NORMALIZED,
        hooked_transformer=_NORMALIZED,
        bridge_out=_MLP[0],
        hooked_transformer_out=_MLP[1],
        module="layers.{layer}.pre_feedforward_layernorm",
        side="normalized_input",
        width_rule="d_model",
        reads=("transcoder",),
        writes=("mlp",),
        joins="nowhere",
        description="pre-MLP RMSNorm without gain -> MLP output",
    ),
)


def embedding_scale(d_model: int) -> float:
    """``sqrt(d_model)`` rounded to float32, in which Hugging Face's embedding of Gemma 2 and later models stores it."""
    return float(struct.unpack("f", struct.pack("f", math.sqrt(d_model)))[0])


def shared_hooked_transformer_config(config: Any, dims: ModelDims) -> dict[str, Any]:
    """The options that Gemma 2 shares with later models: all but the rotary embedding's base and norms in attention."""
    return {
        "act_fn": config.hidden_activation,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": dims.d_head,
        "use_attn_scale": True,
        "attn_scale": float(config.query_pre_attn_scalar) ** 0.5,
        "use_local_attn": True,
        "window_size": config.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
        "use_normalization_before_and_after": True,
    }


def _hooked_transformer_config(config: Any, dims: ModelDims) -> dict[str, Any]:
    return shared_hooked_transformer_config(config, dims) | {"rotary_base": config.rope_parameters["rope_theta"]}


GEMMA2 = Family(
    name="gemma2",
    title="Gemma 2",
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    sites={site.name: site for site in _SITES},
    sizes={
        "gemma-2-2b": ModelSizes(ModelDims(26, 2304, 8, 256), kv_heads=4, d_ff=9216, d_vocab=256_000),
        "gemma-2-9b": ModelSizes(ModelDims(42, 3584, 16, 256), kv_heads=8, d_ff=14_336, d_vocab=256_000),
        "gemma-2-27b": ModelSizes(ModelDims(46, 4608, 32, 128), kv_heads=16, d_ff=36_864, d_vocab=256_000),
    },
    owner="google",
    tuned_suffix="-it",
    bundled="bundled",
    hooked_transformer_config=_hooked_transformer_config,
    hooked_transformer_weights="transformer_lens.pretrained.weight_conversions.gemma:convert_gemma_weights",
    embedding_scale=embedding_scale,
    # With the bridge, a norm holds Hugging Face's weight w, whose gain is 1 + w; HookedTransformer stores 1 + w.
    gain_offset={"bridge": 1.0, "hooked_transformer": 0.0},
    norm_before_mlp="ln2",
    norm_after_attention="ln1_post",
    turn_start="<start_of_turn>",
    turn_end="<end_of_turn>",
)
