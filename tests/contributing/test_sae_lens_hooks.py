"""Metadata of releases that SAELens has too, loaded under our names, and stock splices with them on a random model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import HookedSAETransformer, SAETransformerBridge
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_CONFIG_GETTERS, NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

import gemma_scope_tl as gs
from gemma_scope_tl.interop.releases import LOADER_NAME
from gemma_scope_tl.registry import resolve
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.sae import loading
from gemma_scope_tl.sae.building import build
from gemma_scope_tl.sae.config import Identity

D, HEADS, M, LAYER = 32, 4 * 16, 48, 7


@pytest.fixture(autouse=True)
def clean_sae_lens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SAELens with our names, whose rows load small random arrays in place of files; afterwards SAELens as it was."""
    monkeypatch.setattr(loading, "load_row", lambda row, **_: build(arrays(row), Identity.of(row, "made up"), CPU, F32))
    gs.register_with_sae_lens()
    yield
    get_pretrained_saes_directory.cache_clear()
    for table in (NAMED_PRETRAINED_SAE_LOADERS, NAMED_PRETRAINED_SAE_CONFIG_GETTERS):
        table.pop(LOADER_NAME, None)


CPU, F32 = torch.device("cpu"), torch.float32


def arrays(row: SAERow) -> dict[str, torch.Tensor]:
    """Random arrays with the width of the small model below."""
    make = torch.Generator().manual_seed(0)
    d = HEADS if row.site == "att" else D
    shapes = {"W_enc": (d, M), "W_dec": (M, d), "b_enc": (M,), "b_dec": (d,)}
    return {name: torch.randn(shape, generator=make) / 4 for name, shape in shapes.items()} | {
        "threshold": torch.full((M,), 0.1)
    }


@pytest.fixture(scope="module")
def hf() -> Any:
    """A random Gemma 3 with gains far from 1, whose heads together are wider than the stream."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=D, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=8,
    )  # fmt: skip
    config.architectures = ["Gemma3ForCausalLM"]
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module")
def bridge(hf: Any) -> Any:
    """Stock SAELens's bridge on that model."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    copied = copy.deepcopy(hf)  # the bridge replaces modules
    return SAETransformerBridge.boot_transformers("google/gemma-3-1b-pt", hf_model=copied, tokenizer=tokenizer).eval()


def stock(kind: str, id_: str) -> Any:
    """The SAE that stock SAELens makes of a row of Gemma Scope 2 of the 1B model, by our name."""
    return sae_lens.SAE.from_pretrained(f"gemma_scope_tl/gemma-scope-2-1b-pt-{kind}", id_)


@pytest.mark.slow
def test_hooks_of_our_names_and_of_sae_lens() -> None:
    at = f"layer_{LAYER}_width_16k_l0_small"
    hooks = {
        "res": ("blocks.7.hook_resid_post", None),
        "mlp": ("blocks.7.hook_mlp_out", None),
        "att": ("blocks.7.attn.hook_z", None),
        "transcoders": ("blocks.7.mlp.hook_in", "blocks.7.hook_mlp_out"),
    }
    for kind, names in hooks.items():
        id_ = f"transcoder/{at}" if kind == "transcoders" else at
        sae = stock(kind, id_)
        metadata = sae.cfg.metadata
        assert (metadata.hook_name, metadata.hook_name_out) == names
        assert metadata.model_name == "gemma-3-1b-pt" and metadata.l0 == 18  # floor(10 + 10 * 21 / 26)
        assert metadata.dataset_path is None  # the data were not published
        assert sae.cfg.reshape_activations == ("hook_z" if kind == "att" else "none")
    entry = get_pretrained_saes_directory()["gemma_scope_tl/gemma-scope-2-270m-pt-res"]
    assert entry.model == "gemma-3-270m" and entry.repo_id == "google/gemma-scope-2-270m-pt"
    row = resolve("gemma-scope-2-270m-pt-res", "layer_9_width_16k_l0_medium")
    assert entry.expected_l0[row.id] == 60 and entry.neuronpedia_id[row.id] == row.neuronpedia is not None
    assert get_pretrained_saes_directory()["gemma-scope-2-270m-pt-res"].conversion_func == "gemma_3"


@pytest.mark.slow
def test_stock_hooked_transformer_reads_behind_the_gain(hf: Any, bridge: Any) -> None:
    """``HookedSAETransformer`` adds the hook that the metadata name; both stock models then splice alike."""
    ours = gs.load_model(hf_model=copy.deepcopy(hf), tokenizer=bridge.tokenizer, backend="hooked_transformer")
    model = HookedSAETransformer(ours.cfg, tokenizer=bridge.tokenizer)
    model.load_state_dict(ours.state_dict(), strict=False)
    sae, ids = stock("transcoders", f"transcoder/layer_{LAYER}_width_16k_l0_small"), torch.arange(5, 25)[None]
    with torch.no_grad(), bridge.saes(saes=[sae]):
        wanted = bridge(ids)
    with torch.no_grad(), model.saes(saes=[sae]):
        found = model(ids)
    clean = bridge(ids)
    assert (wanted - clean).abs().max() > 1e-2
    # HookedTransformer computes attention in another order than the bridge: 5e-5 is a few hundred roundings.
    assert torch.allclose(found.log_softmax(-1), wanted.log_softmax(-1), atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["res", "mlp", "att", "transcoders"])
def test_stock_splices_with_our_metadata_read_and_write_the_right_tensors(kind: str, hf: Any, bridge: Any) -> None:
    """Against hooks on the plain model; float32, 8 layers: 2e-5 is a hundred roundings of logits near 1."""
    at = f"layer_{LAYER}_width_16k_l0_small"
    sae = stock(kind, f"transcoder/{at}" if kind == "transcoders" else at)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        clean = hf(ids).logits
    layer, seen = hf.model.layers[LAYER], {}

    def output(module: Any, args: Any, out: Any) -> Any:
        return (sae(out[0]), *out[1:]) if isinstance(out, tuple) else sae(out)

    def behind_gain(module: Any, args: Any, out: torch.Tensor) -> None:
        seen["x"] = out

    if kind == "res":
        handles = [layer.register_forward_hook(output)]
    elif kind == "mlp":
        handles = [layer.post_feedforward_layernorm.register_forward_hook(output)]
    elif kind == "att":
        heads = lambda x: sae(x.unflatten(-1, (4, 16))).flatten(-2)  # noqa: E731 -- the SAE expects heads apart
        handles = [layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (heads(args[0]),))]
    else:
        handles = [
            layer.pre_feedforward_layernorm.register_forward_hook(behind_gain),
            layer.post_feedforward_layernorm.register_forward_hook(lambda *_: sae(seen["x"])),
        ]
    with torch.no_grad():
        wanted = _with(handles, lambda: hf(ids).logits)
        assert torch.allclose(bridge(ids), clean, atol=2e-5)
        with bridge.saes(saes=[sae]):
            found = bridge(ids)
    assert (wanted - clean).abs().max() > 1e-2
    assert torch.allclose(found, wanted, atol=2e-5)


def _with(handles: list[Any], call: Any) -> Any:
    """What the call returns; afterwards the hooks are removed."""
    try:
        return call()
    finally:
        for handle in handles:
            handle.remove()
