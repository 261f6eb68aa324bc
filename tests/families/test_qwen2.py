"""A Qwen 2 as a made-up family, on both backends, for what a Llama does not show.

TransformerLens's adapter puts no BOS before its texts, its configuration has no ``head_dim``, and the model is the
"assistant" in its chats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.families import Family, ModelDims, ModelSizes, forget_family, register_family
from gemma_scope_tl.families.gemma2 import GEMMA2
from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.text.tokenizing import chat_wrapping
from tests.families.tiny import tiny_model
from tests.helpers import CharTokenizerFactory, random_tokens

MLP = {"bridge": "blocks.{layer}.mlp.hook_out", "hooked_transformer": "blocks.{layer}.hook_mlp_out"}
CHANGES: dict[str, dict[str, Any]] = {
    "mlp": MLP | {"module": "layers.{layer}.mlp"},
    "transcoder": {f"{backend}_out": name for backend, name in MLP.items()}
    | {"module": "layers.{layer}.post_attention_layernorm"},
}


def _hooked_transformer_config(config: Any, dims: ModelDims) -> dict[str, Any]:
    return {
        "act_fn": config.hidden_act,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_base": config.rope_parameters["rope_theta"],
        "rotary_dim": dims.d_head,
    }


QWEN2 = Family(
    name="qwen2",
    title="Qwen 2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    sites={name: replace(site, **CHANGES.get(name, {})) for name, site in GEMMA2.sites.items()},
    sizes={"qwen2-tiny": ModelSizes(ModelDims(2, 48, 4, 12), kv_heads=2, d_ff=64, d_vocab=96)},
    owner="nobody",
    tuned_suffix="-instruct",
    hooked_transformer_config=_hooked_transformer_config,
    hooked_transformer_weights="transformer_lens.pretrained.weight_conversions.qwen2:convert_qwen2_weights",
    embedding_scale=lambda d_model: 1.0,
    gain_offset={"bridge": 0.0, "hooked_transformer": 0.0},
    norm_before_mlp="ln2",
    norm_after_attention=None,
    turn_start="<pad>",  # tokens that the tokenizer of the tests has
    turn_end="<eos>",
    answer_role="assistant",
    gated=False,
)


def qwen2() -> Qwen2ForCausalLM:
    return tiny_model(Qwen2Config, Qwen2ForCausalLM)


@pytest.fixture(autouse=True)
def family() -> Iterator[Family]:
    register_family(QWEN2)
    yield QWEN2
    forget_family("qwen2")


def sae_at(model: Any, site: str, layer: int | None) -> Any:
    d_in, d_out = model.family.site(site).d_in(model.dims), model.family.d_out(site, model.dims)
    torch.manual_seed(0)
    arrays = {"W_enc": torch.randn(d_in, 64), "W_dec": torch.nn.functional.normalize(torch.randn(64, d_out), dim=1)}
    arrays |= {"b_enc": torch.zeros(64), "b_dec": torch.randn(d_out) * 0.1, "threshold": torch.ones(64)}
    return gs.JumpReLUSAE.from_arrays(arrays, model=model, site=site, layer=layer).requires_grad_(False)


@torch.no_grad()
def test_both_backends_read_the_same_tokens_and_splice_the_same() -> None:
    tokenizer = CharTokenizerFactory.get()
    backends = "bridge", "hooked_transformer"
    models: list[Any] = [
        gs.load_model("qwen2-tiny", hf_model=qwen2(), tokenizer=tokenizer, backend=backend) for backend in backends
    ]
    one, other = models
    assert one.dims.d_head == 12
    assert one.to_tokens("abc").tolist() == other.to_tokens("abc").tolist() == [[2, 68, 69, 70]]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert one.generate("the cat", **options) == other.generate("the cat", **options)
    tokens = random_tokens(one, length=12)
    for site, layer in [("res", 1), ("mlp", 0), ("att", 1), ("embedding", None), ("transcoder", 1)]:
        sae = sae_at(one, site, layer)
        spliced = one.run_with_saes(tokens, saes=sae)
        assert relative_difference(spliced, one(tokens)) > 1e-3, site
        assert relative_difference(other.run_with_saes(tokens, saes=sae), spliced) < 1e-5, site


def test_a_release_whose_model_no_family_knows_is_not_spliced_into_another_family(tmp_path: Path) -> None:
    model = gs.load_model(hf_model=qwen2(), tokenizer=CharTokenizerFactory.get())
    path = "embedding/width_64/average_l0_30"
    sae = sae_at(model, "embedding", None)
    gs.save_sae(sae, tmp_path / "my-saes" / path)
    row = f"{{id: {path}, site: embedding, layer: null, width: '64', d_sae: 64, d_in: 48, l0: 30, path: {path}}}"
    head = "release: my-saes\nrepo: ./my-saes\nmodel: my-qwen\nlicense: MIT\ndescription: '-'\n"
    for name, family in (("without", ""), ("with", "family: qwen2\n")):
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"{head.replace('my-saes', name, 1)}{family}saes:\n  - {row}\n")
        loaded = gs.JumpReLUSAE.from_row(gs.registry.read_release(file).rows[0])
        if family:
            assert torch.equal(loaded.W_dec, sae.W_dec)
            model.run_with_saes("abc", saes=loaded)
        else:
            with pytest.raises(SpliceError, match="as an SAE of a Gemma 2, .* a Qwen 2. .*`family: qwen2`"):
                model.run_with_saes("abc", saes=loaded)
            with pytest.raises(SpliceError, match="as an SAE of a Gemma 2"):
                gs.evaluate(model, loaded, random_tokens(model))


def test_chats_without_a_template_name_the_familys_own_speaker() -> None:
    tokenizer = CharTokenizerFactory.get()
    prefix, suffix = chat_wrapping(tokenizer)
    assert tokenizer.decode(prefix, skip_special_tokens=True).replace(" ", "").startswith("user")
    assert "assistant" in tokenizer.decode(suffix, skip_special_tokens=True).replace(" ", "")
    forget_family("qwen2")
    with pytest.raises(GemmaScopeError, match="does not know <start_of_turn> and <end_of_turn>: chat=True"):
        chat_wrapping(tokenizer)
    register_family(replace(QWEN2, turn_start="<start>"))
    with pytest.raises(GemmaScopeError, match="<start_of_turn> and <end_of_turn>, or <start>: chat=True"):
        chat_wrapping(tokenizer)
