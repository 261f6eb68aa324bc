"""A second model family in one value: a Llama without norms behind its sub-layers is loaded, spliced and measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gemma_scope_tl as gs
from gemma_scope_tl.errors import AdapterError, GemmaScopeError, SpliceError, UnknownNameError
from gemma_scope_tl.families import Family, ModelDims, ModelSizes, Site, families, forget_family, register_family
from gemma_scope_tl.model.plain import relative_difference, run_reference
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sites import get_site
from tests.families.tiny import tiny_model
from tests.helpers import CharTokenizerFactory, random_tokens
from tests.training import planted


def _site(name: str, bridge: str, hooked_transformer: str, module: str, **facts: Any) -> Site:
    facts = {"side": "output", "width_rule": "d_model", "reads": (name,), "writes": (name,)} | facts
    return Site(name, bridge, hooked_transformer, module, description=name, **facts)


SITES = (
    _site("stream", "blocks.{layer}.hook_out", "blocks.{layer}.hook_resid_post", "layers.{layer}", joins="residual"),
    _site("mlp", "blocks.{layer}.mlp.hook_out", "blocks.{layer}.hook_mlp_out", "layers.{layer}.mlp", joins="branch"),
    _site(
        "heads",
        "blocks.{layer}.attn.o.hook_in",
        "blocks.{layer}.attn.hook_z",
        "layers.{layer}.self_attn.o_proj",
        side="input",
        width_rule="heads",
        joins="attention",
    ),
    _site("tokens", "embed.hook_out", "hook_embed", "embed_tokens", joins="embedding", per_layer=False),
)
LLAMA = Family(
    name="made_up",
    title="Made-Up",
    model_types=("made_up",),
    architecture="LlamaForCausalLM",
    sites={site.name: site for site in SITES},
    sizes={"made-up-1b": ModelSizes(ModelDims(2, 48, 4, 16), kv_heads=2, d_ff=64, d_vocab=96)},
    owner="nobody",
    tuned_suffix="-chat",
    hooked_transformer_config=lambda config, dims: {},
    hooked_transformer_weights="",
    embedding_scale=lambda d_model: 1.0,
    gain_offset={"bridge": 0.0, "hooked_transformer": 0.0},
    norm_before_mlp="ln2",
    norm_after_attention=None,
    turn_start="<turn>",
    turn_end="</turn>",
)


def llama() -> LlamaForCausalLM:
    return tiny_model(LlamaConfig, LlamaForCausalLM, "made_up", head_dim=16)


@pytest.fixture(autouse=True)
def family() -> Iterator[Family]:
    register_family(LLAMA)
    yield LLAMA
    forget_family("made_up")


@pytest.fixture
def model() -> Any:
    return gs.load_model("nobody/made-up-1b", hf_model=llama(), tokenizer=CharTokenizerFactory.get())


def sae_at(model: Any, site: str, layer: int | None, d_sae: int = 64) -> JumpReLUSAE:
    d = model.family.site(site).d_in(model.dims)
    torch.manual_seed(0)
    w_dec = torch.nn.functional.normalize(torch.randn(d_sae, d), dim=1)
    arrays = {"W_enc": torch.randn(d, d_sae), "W_dec": w_dec, "b_enc": torch.randn(d_sae) * 0.1}
    arrays |= {"b_dec": torch.randn(d) * 0.1, "threshold": torch.randn(d_sae).abs()}
    return JumpReLUSAE.from_arrays(arrays, site=site, layer=layer).requires_grad_(False)


PLACES = [("stream", 0), ("stream", 1), ("mlp", 0), ("heads", 1), ("tokens", None)]


def test_it_is_known_by_its_config_and_by_its_name(model: Any) -> None:
    assert model.family is LLAMA
    assert model.model_id == "made-up-1b"
    assert [family.name for family in families()][-1] == "made_up"
    other: Any = llama()
    other.config.model_type = "llama"
    with pytest.raises(AdapterError, match="'llama'.*not a .*Made-Up"):
        gs.load_model(hf_model=other)
    with pytest.raises(GemmaScopeError, match="belongs to the family 'made_up'"):
        register_family(LLAMA)


def test_names_that_it_lacks_raise_with_the_nearest(model: Any) -> None:
    with pytest.raises(UnknownNameError, match=r"(?s)site of Made-Up.*'strem'.*stream"):
        model.family.site("strem")
    with pytest.raises(UnknownNameError, match="model family"):
        get_site("stream", "made_upp")
    with pytest.raises(SpliceError, match="no layer 7"):
        gs.splice(model, sae_at(model, "stream", 7)).__enter__()
    with pytest.raises(UnknownNameError, match="site of Made-Up"):
        gs.mean_norms(model, "abc", sites="res")


@torch.no_grad()
def test_every_site_is_the_plain_models_tensor(model: Any) -> None:
    tokens = random_tokens(model, length=12)
    reference = run_reference(llama(), tokens)
    assert {place.site for place in reference.sites} == set(LLAMA.sites)
    for place, wanted in reference.sites.items():
        name = model.family.site(place.site).hook_name(place.layer)
        _, cache = model.run_with_cache(tokens, names_filter=name)
        assert torch.equal(cache[name].reshape(wanted.shape), wanted), place.key


@pytest.mark.parametrize(("site", "layer"), PLACES)
@torch.no_grad()
def test_an_sae_is_spliced_at_every_site(model: Any, site: str, layer: int | None) -> None:
    tokens, sae = random_tokens(model, length=12), sae_at(model, site, layer)
    plain = model(tokens)
    assert relative_difference(model.run_with_saes(tokens, saes=sae, error_term=True), plain) < 1e-5
    seen: dict[tuple[str, int | None], torch.Tensor] = {}
    special = torch.isin(tokens, torch.tensor([0, 1, 2]))[..., None]

    def change(place: Any, value: torch.Tensor) -> torch.Tensor | None:
        seen[place] = value
        return torch.where(special, value, sae(value)) if place == (site, layer) else None

    wanted = run_reference(llama(), tokens, change=change).logits
    assert relative_difference(wanted, plain) > 1e-3
    assert relative_difference(model.run_with_saes(tokens, saes=sae), wanted) < 1e-5


@pytest.mark.parametrize(("site", "layer"), PLACES)
@torch.no_grad()
def test_latents_are_listed_steered_and_read_through_the_unembedding(model: Any, site: str, layer: int | None) -> None:
    sae, text = sae_at(model, site, layer), "the cat sat"
    assert set(gs.features(model, text, sae)["site"]) == {site}
    norms = gs.mean_norms(model, text, sites=[site])
    steered = model.run_with_hooks(text, fwd_hooks=[gs.steer(sae, 3, 2.0, unit="mean_norm", mean_norm=norms)])
    assert not torch.equal(steered, model(text))
    top = gs.top_tokens(model, sae, 3, k=2)
    direction = sae.W_dec[3]
    if site == "heads":
        direction = direction @ model.blocks[layer].attn.W_O.reshape(len(direction), -1)
    logits = (direction * llama().model.norm.weight) @ llama().lm_head.weight.T
    assert top["logit"].iloc[0] == pytest.approx(float(logits.max()), rel=1e-4)


def test_it_is_evaluated(model: Any) -> None:
    tokens = random_tokens(model, batch=4, length=16)
    saes = [
        sae_at(model, "stream", 1),
        sae_at(model, "heads", 0),
        sae_at(model, "mlp", 1),
        sae_at(model, "tokens", None),
    ]
    table = gs.evaluate(model, saes, tokens)
    assert table["site"].tolist() == ["stream", "heads", "mlp", "tokens"]
    clean = model(tokens, return_type="loss", loss_per_token=True)[:, 1:].mean()  # predictions from BOS do not count
    for sae, delta in zip(saes, table["delta_loss"], strict=True):
        spliced = model.run_with_saes(tokens, saes=sae, return_type="loss", loss_per_token=True)[:, 1:].mean()
        assert delta == pytest.approx(float(spliced - clean), rel=1e-3, abs=1e-5)


def test_another_family_cannot_give_a_site_of_this_name_another_meaning() -> None:
    stream = LLAMA.sites["stream"]
    hooks = {"bridge_out": stream.bridge, "hooked_transformer_out": stream.hooked_transformer}
    site = replace(LLAMA.sites["mlp"], writes=("stream",), **hooks)
    with pytest.raises(UnknownNameError, match="joins of site 'mlp'"):
        replace(site, joins="stream")  # pyright: ignore[reportArgumentType]
    with pytest.raises(GemmaScopeError, match="give it another name"):
        register_family(replace(LLAMA, name="another", model_types=("another",), sites={"mlp": site, "stream": stream}))


def test_a_table_that_contradicts_itself_is_refused() -> None:
    site = _site("in", "blocks.{layer}.ln2.hook_in", "blocks.{layer}.hook_mid", "layers.{layer}", joins="nowhere")
    wrong = replace(site, writes=("mlp",), bridge_out="blocks.{layer}.mlp.hook_in")
    with pytest.raises(SpliceError, match=r"site 'in' of Made-Up write 'mlp', whose hook on the backend 'bridge'"):
        replace(LLAMA, sites={**LLAMA.sites, "in": wrong})
    with pytest.raises(UnknownNameError, match="mpl"):
        replace(LLAMA, sites={**LLAMA.sites, "in": replace(site, writes=("mpl",))})


def test_a_suite_is_trained_on_it(model: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    config = {
        "output": str(tmp_path / "run"),
        "model": {"name": "made-up-1b", "device": "cpu"},
        "data": {"dataset": str(texts), "context": 16},
        "source": {"bucket_rows": 512, "scale_rows": 512, "batch_rows": 16},
        "steps": 8,
        "recipe": {"preset": "fast", "batch_size": 64, "l0_warm_up_steps": 2, "lr_warm_up_steps": 2},
        "grid": [{"sites": ["stream", "heads", "mlp"], "layers": [1], "widths": [64], "target_l0s": [4]}],
        "eval_batches": 2,
        "threads": 1,
    }
    table = gs.train_suite(config, model=model, progress=False)
    assert table["site"].tolist() == ["stream", "heads", "mlp"]
    assert table["d_in"].tolist() == [48, 64, 48]
    assert (table["fvu"] < 2).all()


@pytest.mark.parametrize("given", [True, False], ids=["model", "name"])
def test_what_is_trained_is_released_in_the_familys_units(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    monkeypatch.setattr(planted, "DIMS", model.dims)
    table = gs.train_suite(
        {
            "output": str(tmp_path / "run"),
            "model": {"name": "elsewhere/something" if given else "made-up-1b"},
            "source": {"kind": "store", "path": "planted", "bucket_rows": 64, "scale_rows": 64},
            "steps": 2,
            "recipe": {"batch_size": 32, "l0_warm_up_steps": 1, "lr_warm_up_steps": 1},
            "grid": [{"sites": ["tokens", "heads"], "layers": [1], "widths": [64], "target_l0s": [4]}],
            "eval_batches": 1,
            "threads": 1,
        },
        model=model if given else None,
        source=planted.PlantedSource,
        progress=False,
    )
    assert table["d_in"].tolist() == [48, 64]
    arrays = np.load(tmp_path / "run" / table["path"][0] / "params.npz")
    # Trained decoder rows have norm 1; a family that does not scale its embedding releases them as they are.
    assert np.linalg.norm(arrays["W_dec"], axis=1) == pytest.approx(np.ones(64), rel=1e-5)
