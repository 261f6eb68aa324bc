"""Gemma 3 (270M, 1B, 4B, 12B, 27B; base and instruction-tuned), with the sites of Gemma Scope 2.

========== ============================================ ============================= ============================
site       tensor                                       HookedTransformer hook        TransformerBridge hook
========== ============================================ ============================= ============================
res        residual stream after the MLP                ``blocks.L.hook_resid_post``  ``blocks.L.hook_out``
mlp        MLP output after the post-MLP RMSNorm        ``blocks.L.hook_mlp_out``     ``blocks.L.ln2_post.hook_out``
att        heads, concatenated, before W_O              ``blocks.L.attn.hook_z``      ``blocks.L.attn.o.hook_in``
transcoder in: pre-MLP RMSNorm *with* its gain          ``blocks.L.mlp.hook_in``      ``blocks.L.ln2.hook_out``
           out: the mlp site                            ``blocks.L.hook_mlp_out``     ``blocks.L.ln2_post.hook_out``
========== ============================================ ============================= ============================

The transcoders of Gemma Scope read the pre-MLP norm *before* its gain, those of Gemma Scope 2 behind it
(``pre_feedforward_layernorm.output`` in their ``config.json``). ``blocks.L.mlp.hook_in`` is this tensor on both
backends: on the bridge it has the same values as ``ln2.hook_out``, and on HookedTransformer SAELens and ``load_model``
add it. A stock HookedTransformer lacks it and has only ``ln2.hook_normalized``, without the gain.

``blocks.L.hook_mlp_in``, which SAELens names for these transcoders, is the residual stream before the norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gemma_scope_tl.errors import AdapterError
from gemma_scope_tl.families.base import Family, ModelDims, ModelSizes, Wrapper
from gemma_scope_tl.families.gemma2 import GEMMA2, embedding_scale, shared_hooked_transformer_config

_RESIDUAL = (
    "it is the residual stream before the pre-MLP norm, and never the input of a transcoder. Transcoders of "
    "Gemma Scope 2 read the output of that norm, blocks.{layer}.mlp.hook_in"
)

_SITES = (
    *(GEMMA2.sites[name] for name in ("res", "mlp", "att")),
    replace(
        GEMMA2.sites["transcoder"],
        bridge="blocks.{layer}.ln2.hook_out",
        hooked_transformer="blocks.{layer}.mlp.hook_in",
        side="output",
        description="pre-MLP RMSNorm with gain -> MLP output",
        folded_gain="ln2",
    ),
)


def _hooked_transformer_config(config: Any, dims: ModelDims) -> dict[str, Any]:
    """The options of Gemma 3; TransformerLens's own table lacks the attention scale, sqrt(168) for 27B."""
    full, sliding = (config.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
    for name, rope, known in (("full", full, ("default", "linear")), ("sliding", sliding, ("default",))):
        if rope["rope_type"] not in known:
            raise AdapterError(f"HookedTransformer has no {rope['rope_type']!r} RoPE for layers of {name} attention.")
    return shared_hooked_transformer_config(config, dims) | {
        "rotary_base": full["rope_theta"],
        "rotary_base_local": sliding["rope_theta"],
        "rotary_scaling_factor": float(full.get("factor", 1.0)),
        "use_qk_norm": True,
    }


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
    bundled="bundled-gemma3",
    base_suffix="-pt",
    hub_without_suffix=("gemma-3-270m",),
    spellings={"gemma-v3-": "gemma-3-"},
    hooked_transformer_config=_hooked_transformer_config,
    hooked_transformer_weights="transformer_lens.pretrained.weight_conversions.gemma:convert_gemma_weights",
    embedding_scale=embedding_scale,  # Hugging Face's embedding rounds it further, to the weights' dtype
    # With the bridge, a norm holds Hugging Face's weight w, whose gain is 1 + w; HookedTransformer stores 1 + w.
    gain_offset={"bridge": 1.0, "hooked_transformer": 0.0},
    norm_before_mlp="ln2",
    norm_after_attention="ln1_post",
    turn_start="<start_of_turn>",
    turn_end="<end_of_turn>",
    # From 4B on, the repositories contain a model that reads images too.
    wrapper=Wrapper(
        architecture="Gemma3ForConditionalGeneration",
        config="text_config",
        decoder="model.language_model",
        unembedding="lm_head",
        weights={
            r"^language_model\.model\.": "model.",
            r"^language_model\.lm_head\.": "lm_head.",
            r"^model\.language_model\.": "model.",
        },
    ),
    refused_hooks={"blocks.{layer}.hook_mlp_in": _RESIDUAL},
)
