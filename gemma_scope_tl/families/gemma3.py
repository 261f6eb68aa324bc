"""Gemma 3 (270M, 1B, 4B, 12B, 27B; base and instruction-tuned), with the sites of Gemma Scope 2.

========== ======================================= ================================== ============================
site       tensor                                  HookedTransformer hook             TransformerBridge hook
========== ======================================= ================================== ============================
res        residual stream after the MLP           ``blocks.L.hook_resid_post``       ``blocks.L.hook_out``
mlp        MLP output after the post-MLP RMSNorm   ``blocks.L.hook_mlp_out``          ``blocks.L.ln2_post.hook_out``
att        heads, concatenated, before W_O         ``blocks.L.attn.hook_z``           ``blocks.L.attn.o.hook_in``
transcoder in: pre-MLP RMSNorm with its gain       ``blocks.L.mlp.hook_in``           ``blocks.L.ln2.hook_out``
           out: the mlp site                       ``blocks.L.hook_mlp_out``          ``blocks.L.ln2_post.hook_out``
========== ======================================= ================================== ============================

A stock HookedTransformer has no hook on the tensor that a transcoder reads; SAELens adds ``mlp.hook_in``, which on the
bridge has the values of ``ln2.hook_out``.
"""

from __future__ import annotations

from typing import Any

from gemma_scope_tl.families.base import Family, ModelDims, ModelSizes, Site
from gemma_scope_tl.families.gemma2 import GEMMA2

_SITES = (
    *(GEMMA2.sites[name] for name in ("res", "mlp", "att")),
    Site(
        name="transcoder",
        bridge="blocks.{layer}.ln2.hook_out",
        hooked_transformer="blocks.{layer}.mlp.hook_in",
        bridge_out=GEMMA2.sites["mlp"].bridge,
        hooked_transformer_out=GEMMA2.sites["mlp"].hooked_transformer,
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


def _sizes(layers: int, d_model: int, heads: int, d_head: int, kv_heads: int, d_ff: int, d_vocab: int) -> ModelSizes:
    return ModelSizes(ModelDims(layers, d_model, heads, d_head), kv_heads, d_ff, d_vocab)


def _hooked_transformer_config(config: Any, dims: ModelDims) -> dict[str, Any]:
    ropes = config.rope_parameters
    return {
        "act_fn": config.hidden_activation,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_base": int(ropes["full_attention"]["rope_theta"]),
        "rotary_base_local": int(ropes["sliding_attention"]["rope_theta"]),
        "rotary_scaling_factor": float(ropes["full_attention"].get("factor", 1.0)),
        "rotary_dim": dims.d_head,
        "use_attn_scale": True,
        "attn_scale": float(config.query_pre_attn_scalar) ** 0.5,
        "use_local_attn": True,
        "use_qk_norm": True,
        "window_size": config.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        "use_normalization_before_and_after": True,
    }


GEMMA3 = Family(
    name="gemma3",
    title="Gemma 3",
    model_types=("gemma3_text", "gemma3"),
    architecture="Gemma3ForCausalLM",
    sites={site.name: site for site in _SITES},
    sizes={
        "gemma-3-270m": _sizes(18, 640, 4, 256, 1, 2048, 262_144),
        "gemma-3-1b": _sizes(26, 1152, 4, 256, 1, 6912, 262_144),
        "gemma-3-4b": _sizes(34, 2560, 8, 256, 4, 10_240, 262_208),
        "gemma-3-12b": _sizes(48, 3840, 16, 256, 8, 15_360, 262_208),
        "gemma-3-27b": _sizes(62, 5376, 32, 128, 16, 21_504, 262_208),
    },
    owner="google",
    tuned_suffix="-it",
    base_suffix="-pt",
    hooked_transformer_config=_hooked_transformer_config,
    hooked_transformer_weights="transformer_lens.pretrained.weight_conversions.gemma:convert_gemma_weights",
    embedding_scale=GEMMA2.embedding_scale,
    gain_offset={"bridge": 1.0, "hooked_transformer": 0.0},
    norm_before_mlp="ln2",
    norm_after_attention="ln1_post",
    turn_start="<start_of_turn>",
    turn_end="<end_of_turn>",
)
