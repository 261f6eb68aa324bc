"""Gemma 3: names, sizes, text models inside wrappers, and the tensor behind the gain, on random models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemma_scope_tl as gs
from gemma_scope_tl.errors import AdapterError, SpliceError, UnknownNameError
from gemma_scope_tl.families import family_named, family_of_model, hub_ids, plain_name
from gemma_scope_tl.model.gain import with_folded_gain
from gemma_scope_tl.model.loading import _source, load_model  # pyright: ignore[reportPrivateUsage]
from gemma_scope_tl.model.plain import relative_difference, run_reference
from gemma_scope_tl.model.sizes import family_and_sizes
from gemma_scope_tl.sites import BACKENDS, site_of_hook
from tests.helpers import decoder_of, hooked, random_gemma, random_sae, random_tokens, shared_model

FAMILY = family_named("gemma3")
WRAPPER = "gemma3-in-a-wrapper"


@pytest.mark.parametrize(
    ("name", "layers", "d_model", "att", "kv_heads", "millions"),
    [  # the technical paper of Gemma Scope 2, table 1; parameters as published with the models
        ("gemma-3-270m", 18, 640, 1024, 1, 268),
        ("gemma-3-1b", 26, 1152, 1024, 1, 1000),
        ("gemma-3-4b", 34, 2560, 2048, 4, 3880),
        ("gemma-3-12b", 48, 3840, 4096, 8, 11766),
        ("gemma-3-27b", 62, 5376, 4096, 16, 27009),
    ],
)
def test_sizes_of_the_released_models(
    name: str, layers: int, d_model: int, att: int, kv_heads: int, millions: int
) -> None:
    family, sizes = family_and_sizes(f"google/{name}-it")
    assert family is FAMILY
    assert (sizes.dims.n_layers, sizes.dims.d_model, sizes.kv_heads) == (layers, d_model, kv_heads)
    assert {site: FAMILY.site(site).d_in(sizes.dims) for site in FAMILY.sites} == {
        "res": d_model,
        "mlp": d_model,
        "att": att,
        "transcoder": d_model,
    }
    assert round(sizes.parameters / 1e6) == millions


def test_names_with_and_without_the_suffix_are_the_base_model() -> None:
    for name in ("gemma-3-1b", "gemma-3-1b-pt", "google/gemma-3-1b-pt"):
        assert plain_name(name) == "gemma-3-1b"
        assert _source(name) == "google/gemma-3-1b-pt"
        assert family_of_model(name) is FAMILY
    for name in ("gemma-3-270m", "gemma-3-270m-pt", "google/gemma-3-270m-pt"):
        assert _source(name) == "google/gemma-3-270m"
    assert hub_ids()["gemma-3-27b-it"] == _source("gemma-3-27b-it") == "google/gemma-3-27b-it"
    assert plain_name("gemma-3-4b-it") == plain_name("google/gemma-v3-4b-it") == "gemma-3-4b-it"
    assert FAMILY.base_name("gemma-v3-4b-it") == FAMILY.base_name("gemma-v3-4b-pt") == "gemma-3-4b"
    for other in ("someone/gemma-3-1b-pt", "gemma-2-2b-pt", "gemma-v3-9b", "my-gemma-v3-1b"):
        assert plain_name(other) == other
    with pytest.raises(UnknownNameError, match="gemma-3-1b"):
        _source("gemma-3-1b-ptt")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_text_model_is_taken_out_of_a_wrappers_folder(backend: str, prefix: str, tmp_path: Path) -> None:
    hf = random_gemma(WRAPPER)
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({name.replace("language_model.model.", prefix): w for name, w in weights.items()}, file, {"format": "pt"})
    tokens = random_tokens(hf)
    model = load_model(tmp_path, backend=backend)
    assert model.family is FAMILY
    assert relative_difference(model(tokens), run_reference(hf, tokens).logits) < (
        1e-7 if backend == "bridge" else 5e-6
    )
    assert not any("vision" in name for name, _ in model.named_parameters())
    family, sizes = family_and_sizes(str(tmp_path))
    assert (family, sizes.dims, sizes.d_vocab) == (FAMILY, model.dims, 96)


def test_a_wrappers_folder_may_leave_the_defaults_out(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert family_and_sizes(str(tmp_path)) == (FAMILY, FAMILY.sizes["gemma-3-4b"])


@pytest.mark.parametrize("config", ["gemma3", WRAPPER])
def test_a_folder_that_lacks_weights_is_refused(config: str, tmp_path: Path) -> None:
    hf = random_gemma(config)
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("layers.3.self_attn.q_norm.weight"))
    save_file({name: w for name, w in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"lack 1 weights, such as model\.layers\.3\.self_attn\.q_norm\.weight"):
        load_model(tmp_path)


def test_a_given_wrapper_is_hooked_in_place_without_a_copy() -> None:
    hf = random_gemma(WRAPPER)
    pointers = {weight.data_ptr() for weight in decoder_of(hf).parameters()}
    hf.generation_config.eos_token_id = [1, 7]
    model = hooked(hf, "bridge")
    ours = {weight.data_ptr(): weight.numel() for weight in model.original_model.parameters()}
    assert pointers <= set(ours)
    assert sum(ours[pointer] for pointer in set(ours) - pointers) <= 96  # TransformerLens's unembedding bias of zeros
    assert set(model.stop_token_ids) >= {1, 7}
    assert model.original_model.config.model_type == "gemma3_text"
    with pytest.raises(AdapterError, match="wrapped by a bridge already"):
        hooked(hf, "bridge")
    with pytest.raises(AdapterError, match="no unembedding. Load it as a Gemma3ForCausalLM"):
        hooked(random_gemma(WRAPPER).model, "bridge")


def test_the_attention_scale_is_that_of_the_configuration() -> None:
    """27B divides scores by sqrt(168), while its heads have 128 entries, which TransformerLens would take."""
    from transformers import Gemma3TextConfig

    config: Any = Gemma3TextConfig(head_dim=128, query_pre_attn_scalar=168, num_hidden_layers=6, sliding_window=1024)
    made = FAMILY.hooked_transformer_config(config, FAMILY.sizes["gemma-3-27b"].dims)
    assert made["attn_scale"] == pytest.approx(168**0.5)
    assert made["attn_types"] == ["local"] * 5 + ["global"]
    model = shared_model("gemma3", "hooked_transformer")
    assert {block.attn.attn_scale for block in model.blocks} == {24**0.5}
    config.rope_parameters["full_attention"] = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}
    with pytest.raises(AdapterError, match="'yarn' RoPE"):
        FAMILY.hooked_transformer_config(config, FAMILY.sizes["gemma-3-27b"].dims)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_that_was_rounded_is_exact_again_in_a_wider_dtype(backend: str) -> None:
    """``model.to`` rounds sqrt(d_model) to bfloat16, and it stays rounded when the model goes back."""
    hf = random_gemma("gemma3")
    for module in (one for one in hf.modules() if hasattr(one, "scalar_embed_scale")):
        module.scalar_embed_scale = 48.0**0.5  # 8 = sqrt(64) would be exact
        module.embed_scale = torch.tensor(48.0**0.5)
    rounded = copy.deepcopy(hf).to(torch.bfloat16).to(torch.float32)
    tokens = random_tokens(hf)
    assert relative_difference(rounded.model.embed_tokens(tokens), hf.model.embed_tokens(tokens)) > 1e-3
    if backend == "hooked_transformer":  # which computes the scale from d_model, so these models do not load
        return
    model = load_model(hf_model=rounded, backend=backend)
    scale = model.original_model.get_input_embeddings().embed_scale
    assert torch.equal(scale, torch.tensor(48.0**0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hook_before_the_norm_is_refused_with_the_reason(backend: str) -> None:
    model, name = shared_model("gemma3", backend), "blocks.3.hook_mlp_in"
    tokens = random_tokens(model)
    for call in (
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: None)]),
        lambda: model.run_with_cache(tokens, names_filter=name),
        lambda: model.add_hook(name, lambda value, hook: None),
        lambda: site_of_hook(name, "blocks.3.hook_mlp_out", FAMILY),
    ):
        with pytest.raises(SpliceError, match=r"residual stream before the pre-MLP norm.*blocks\.3\.mlp\.hook_in"):
            call()
    sae = random_sae(model.dims, "transcoder", 3)
    stock = stock_transcoder(sae, name)
    with pytest.raises(SpliceError, match="never the input of a transcoder"):
        model.run_with_saes(tokens, saes=stock)
    assert not model.acts_to_saes


def stock_transcoder(sae: Any, hook_name: str) -> Any:
    """SAELens's own transcoder with the weights of ``sae`` that reads ``hook_name``."""
    from sae_lens import JumpReLUTranscoder, JumpReLUTranscoderConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=hook_name, hook_name_out=sae.cfg.metadata.hook_name_out)
    d_in, d_sae = sae.W_enc.shape
    stock: Any = JumpReLUTranscoder(
        JumpReLUTranscoderConfig(
            d_in=d_in, d_sae=d_sae, d_out=sae.W_dec.shape[1], apply_b_dec_to_input=False, metadata=metadata
        )
    )
    stock.load_state_dict({name: getattr(sae, name) for name, _ in stock.named_parameters()})
    return stock


def test_saelens_own_model_and_transcoder_are_right_at_this_hook() -> None:
    """The name that SAEs carry for HookedTransformer holds in SAELens's HookedSAETransformer too."""
    from sae_lens import HookedSAETransformer

    ours = shared_model("gemma3", "hooked_transformer")
    stock: Any = HookedSAETransformer(ours.cfg)
    stock.load_state_dict(ours.state_dict(), strict=False)
    tokens = random_tokens(ours)
    sae = random_sae(ours.dims, "transcoder", 3)
    with torch.no_grad():
        name = FAMILY.site("transcoder").hook_name(3, "hooked_transformer")
        got = stock.run_with_saes(tokens, saes=[stock_transcoder(sae, name)])
        wanted = ours.run_with_saes(tokens, saes=sae, exclude_special_tokens=False)
    assert relative_difference(wanted, ours(tokens)) > 1e-2
    assert relative_difference(got, wanted) < 1e-5


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_a_folded_gain_is_the_transcoder_behind_the_gain(skip: bool) -> None:
    """On a stock HookedTransformer, which has no hook behind the gain, against the bridge and the given transcoder.

    The bound is that of two float32 programs: pre-activations are sums in another order, relative 1e-6, and none of
    the random thresholds is so near that a latent appears in only one of them.
    """
    from transformer_lens import HookedTransformer

    bridge, ours = (shared_model("gemma3", backend) for backend in BACKENDS)
    tokens, sae = random_tokens(bridge), random_sae(bridge.dims, "transcoder", 3, skip=skip)
    before = {name: weight.clone() for name, weight in sae.named_parameters()}
    folded = with_folded_gain(sae, bridge)
    assert all(torch.equal(weight, before[name]) for name, weight in sae.named_parameters())
    stock = HookedTransformer(ours.cfg)
    stock.load_state_dict(ours.state_dict(), strict=False)
    seen: dict[str, torch.Tensor] = {}

    def read(value: torch.Tensor, hook: Any) -> None:
        seen["x"] = value

    def write(value: torch.Tensor, hook: Any) -> torch.Tensor:
        special = (tokens <= 2).unsqueeze(-1)
        return torch.where(special, value, folded(seen["x"]))

    metadata = folded.cfg.metadata
    assert metadata.hook_name == "blocks.3.ln2.hook_normalized"
    with torch.no_grad():
        got = stock.run_with_hooks(tokens, fwd_hooks=[(metadata.hook_name, read), (metadata.hook_name_out, write)])
        wanted = bridge.run_with_saes(tokens, saes=sae)
    assert relative_difference(got, wanted) < 1e-5
    again = with_folded_gain(sae, ours)  # HookedTransformer stores 1 + w in place of w
    assert all(torch.equal(one, two) for one, two in zip(folded.parameters(), again.parameters(), strict=True))
    with pytest.raises(SpliceError, match="has no gain to fold"):
        with_folded_gain(random_sae(bridge.dims, "res", 3), bridge)
    with pytest.raises((SpliceError, UnknownNameError)):  # it would get the gain twice
        bridge.run_with_saes(tokens, saes=folded)


@pytest.mark.parametrize("backend", BACKENDS)
def test_folding_the_gains_of_the_model_away_is_refused(backend: str) -> None:
    hf = random_gemma("gemma3")
    tokens = random_tokens(hf)
    sae = random_sae(FAMILY.sizes["gemma-3-1b"].dims.__class__(7, 64, 4, 32), "transcoder", 3)
    model = hooked(hf, backend)
    with torch.no_grad():
        before = torch.log_softmax(model.run_with_saes(tokens, saes=sae), -1)
        process = model.enable_compatibility_mode if backend == "bridge" else model.process_weights_
        with pytest.raises(SpliceError, match="Give fold_ln=False"):
            process()
        process(fold_ln=False)
        after = torch.log_softmax(model.run_with_saes(tokens, saes=sae), -1)
    assert relative_difference(after, before) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attaching_and_detaching_restores_everything_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    model = hooked(random_gemma("gemma3", dtype=dtype), backend)
    tokens = random_tokens(model)
    places = [("res", 3), ("att", 3), ("transcoder", 3), ("res", 5), ("att", 5), ("mlp", 5)]
    saes = [random_sae(model.dims, site, layer, seed=layer, skip=site == "transcoder") for site, layer in places]
    weights = {id(one): {n: w.clone() for n, w in one.state_dict().items()} for one in (model, *saes)}
    with torch.no_grad():
        clean = model(tokens)
        with model.saes(saes):
            assert not torch.equal(model(tokens), clean)
        assert torch.equal(model(tokens), clean)
    for one in (model, *saes):
        assert all(torch.equal(weight, weights[id(one)][name]) for name, weight in one.state_dict().items())
    assert not any(point.has_hooks() for point in model.hook_dict.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_reader_sees_the_tensor_behind_the_gain(backend: str) -> None:
    from gemma_scope_tl.activations.harvest import Harvester
    from gemma_scope_tl.model.read import read_places
    from gemma_scope_tl.sites import Place

    hf = random_gemma("gemma3")
    tokens, place = random_tokens(hf), Place("transcoder", 5)
    wanted = run_reference(hf, tokens).sites[place]
    model = shared_model("gemma3", backend)
    sae = random_sae(model.dims, "transcoder", 5)
    assert relative_difference(read_places(model, tokens, [place])[place], wanted) < 5e-6
    kept = Harvester(model, [place]).run(tokens, torch.ones_like(tokens).bool())[place]
    assert relative_difference(kept, wanted.flatten(0, 1)) < 5e-6
    table = gs.features(model, tokens, sae, top=1)
    acts = sae.encode(wanted)
    assert len(table) > 20
    for sequence, position, activation in table[["sequence", "position", "activation"]].to_numpy():
        strongest = acts[int(sequence), int(position)].max()
        assert activation == pytest.approx(float(strongest), rel=1e-4)


@pytest.mark.slow
def test_both_backends_measure_steer_and_attribute_alike() -> None:
    found: dict[str, list[Any]] = {}
    for backend in BACKENDS:
        model = shared_model("gemma3", backend)
        tokens = random_tokens(model, batch=3, length=20)
        places = [("res", 3), ("mlp", 2), ("att", 5), ("transcoder", 5)]
        saes = [random_sae(model.dims, site, layer, skip=site == "transcoder") for site, layer in places]
        table = gs.evaluate(model, saes, tokens)
        assert table["site"].tolist() == [site for site, _ in places]
        steered = model.run_with_hooks(tokens, fwd_hooks=[gs.steer(saes[3], 3, 20.0)])
        assert relative_difference(steered, model(tokens)) > 1e-2
        effects = gs.attribute(model, tokens[:1], saes[2:], lambda logits: logits[0, -1, 5])
        top = gs.top_tokens(model, saes[3], 3, k=3)
        numbers = [table[["l0", "fvu", "delta_loss"]], effects[["attribution"]].head(20), top[["logit"]]]
        found[backend] = [steered.detach(), *(torch.tensor(one.to_numpy(dtype=float)) for one in numbers)]
    for one, other in zip(*found.values(), strict=True):
        assert relative_difference(one, other) < 1e-4
