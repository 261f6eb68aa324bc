"""load_model: what it accepts, what it refuses, and what its self-check would catch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gemma_scope_tl.model.check import relative_difference
from gemma_scope_tl.model.loading import load_model

from gemma_scope_tl.errors import AdapterError, UnknownNameError
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import hooked, random_gemma, random_tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_a_local_folder_with_its_tokenizer(tmp_path: Path, backend: str) -> None:
    from tests.helpers import CharTokenizerFactory

    hf = random_gemma()
    hf.save_pretrained(tmp_path)
    CharTokenizerFactory.get().save_pretrained(tmp_path)
    model = load_model(tmp_path, backend=backend)
    assert model.backend == backend
    assert model.tokenizer.encode("ab")[0] == 2
    assert model.to_tokens("ab").tolist() == [[2, *hf_ids("ab")]]  # one BOS, not two
    tokens = random_tokens(hf)
    with torch.no_grad():
        assert relative_difference(model(tokens), hf(tokens).logits) < 5e-6


def hf_ids(text: str) -> list[int]:
    from tests.helpers import CharTokenizerFactory

    return CharTokenizerFactory.get().encode(text, add_special_tokens=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bundled_model(backend: str) -> None:
    model = load_model("bundled", backend=backend)
    assert model.model_id == "bundled"
    assert model.cfg.n_heads * model.cfg.d_head != model.cfg.d_model
    ids = model.to_tokens("In the beginning God created the heaven and the earth.")
    assert ids[0, 0] == model.tokenizer.bos_token_id
    assert (ids == model.tokenizer.bos_token_id).sum() == 1
    with torch.no_grad():
        loss = model(ids, return_type="loss")
    assert loss < 5.5  # a uniform guess over 2,048 tokens costs 7.6 nats


def test_one_copy_of_the_weights_on_the_bridge() -> None:
    hf = random_gemma()
    pointers = {p.data_ptr() for p in hf.parameters()}
    size = sum(p.numel() for p in hf.parameters())
    model = load_model(hf_model=hf)
    ours = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert pointers <= set(ours)
    assert sum(ours.values()) - size <= hf.config.vocab_size  # TransformerLens adds an unembedding bias of zeros
    assert model.original_model is hf


def test_a_folder_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    random_gemma().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.tokenizer is None
    assert model(random_tokens(model)).shape == (2, 24, 96)


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_dtypes(dtype: Any) -> None:
    model = load_model(hf_model=random_gemma(), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cfg.dtype == torch.bfloat16


def test_attention_is_always_eager() -> None:
    hf = random_gemma()
    hf.config._attn_implementation = "sdpa"
    assert load_model(hf_model=hf).original_model.config._attn_implementation == "eager"


def test_refusals(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(UnknownNameError, match="gemma-2-2b"):
        load_model("gemma-2-2bb")
    with pytest.raises(UnknownNameError, match="Unknown backend 'brige'. Nearest: bridge"):
        load_model("bundled", backend="brige")
    with pytest.raises(UnknownNameError, match="Unknown dtype 'float31'"):
        load_model("bundled", dtype="float31")
    with pytest.raises(AdapterError, match="bundled"):
        load_model()
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, **small))
    with pytest.raises(AdapterError, match="'llama', not a Gemma 2"):
        load_model(hf_model=llama)
    llama.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="'llama', not a Gemma 2"):
        load_model(tmp_path)
    hf = random_gemma()
    load_model(hf_model=hf)
    with pytest.raises(AdapterError, match="wrapped by a bridge already"):
        load_model(hf_model=hf)
    with pytest.raises(AdapterError, match="gated"):
        load_model("no-such-owner/no-such-model")


@pytest.mark.parametrize("backend", BACKENDS)
def test_unknown_hook_names_raise_wherever_they_can_be_given(backend: str) -> None:
    model = hooked(random_gemma(), backend)
    tokens = random_tokens(model)
    wrong = "blocks.1.hook_resid_pots"

    def nothing(value: torch.Tensor, hook: Any) -> None:
        return None

    for call in (
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(wrong, nothing)]),
        lambda: model.run_with_hooks(tokens, bwd_hooks=[(wrong, nothing)]),
        lambda: model.hooks([(wrong, nothing)]),
        lambda: model.run_with_cache(tokens, names_filter=wrong),
        lambda: model.run_with_cache(tokens, names_filter=[wrong]),
        lambda: model.add_hook(wrong, nothing),
    ):
        with pytest.raises(UnknownNameError, match="blocks.1.hook_resid_post"):
            call()
    with pytest.raises(UnknownNameError, match="No SAE with that hook is attached"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post.hook_sae_acts_post", nothing)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_either_backends_names_read_the_same_tensor(backend: str) -> None:
    model = hooked(random_gemma(), backend)
    tokens = random_tokens(model)
    for ht, bridge in (
        ("blocks.1.hook_resid_post", "blocks.1.hook_out"),
        ("blocks.1.hook_mlp_out", "blocks.1.ln2_post.hook_out"),
        ("blocks.1.attn.hook_z", "blocks.1.attn.o.hook_in"),
        ("hook_embed", "embed.hook_out"),
    ):
        _, cache = model.run_with_cache(tokens, names_filter=[ht, bridge])
        assert torch.equal(cache[ht], cache[bridge])
        count: list[str] = []
        model.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda v, hook, count=count: count.append(hook.name)) for name in (ht, bridge)]
        )
        assert len(count) == 2


def test_bundled_folder_is_inside_the_package() -> None:
    assert (BUNDLED_MODEL / "config.json").is_file()
