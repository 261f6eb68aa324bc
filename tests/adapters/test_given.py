"""Arguments of ``load_model``: each is right, or refused in words before anything is loaded or changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2ForSequenceClassification, Gemma2Model, GenerationConfig

import gemma_scope_tl as gs
from gemma_scope_tl.errors import AdapterError, DeviceError, UnknownNameError
from gemma_scope_tl.families.gemma2 import GEMMA2
from gemma_scope_tl.model import loading
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import CharTokenizerFactory, random_gemma, random_tokens


class PeftLike(torch.nn.Module):
    """Looks like a ``PeftModel``: the model is two modules deep, and attributes are looked up in it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def merge_and_unload(self) -> Any:
        return self.base_model.model


class PipelineLike:
    def __init__(self, model: Any) -> None:
        self.model = model


def compiled_in_place(model: Any) -> Any:
    model.compile()
    return model


WRAPPED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "peft": (PeftLike, r"Give hf_model.base_model.model instead. Merge adapters first"),
    "data parallel": (torch.nn.DataParallel, r"Give hf_model.module instead"),
    "compiled": (torch.compile, r"Give hf_model._orig_mod instead"),
    "compiled in place": (compiled_in_place, r"is compiled"),
    "pipeline": (PipelineLike, r"Give hf_model.model instead"),
    "headless": (lambda model: model.model, r"Gemma2Model, which has no unembedding. Load it as a Gemma2ForCausalLM"),
    "another head": (lambda model: Gemma2ForSequenceClassification(model.config), r"has no unembedding"),
    "a name": (lambda model: "gemma-2-2b", r"Give a name or folder as the first argument"),
    "a config": (lambda model: model.config, r"Gemma2Config"),
    "a number": (lambda model: 3, r"takes a Gemma2ForCausalLM or Gemma3ForCausalLM, not 3"),
    "on meta": (lambda model: model.to("meta"), r'on the "meta" device'),
    "in eight-bit floats": (lambda model: model.to(torch.float8_e4m3fn), r"Pass dtype=, one of float32"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", WRAPPED)
def test_what_cannot_be_wrapped_is_named_with_what_to_give(kind: str, backend: str) -> None:
    wrap, words = WRAPPED[kind]
    with pytest.raises(AdapterError, match=words):
        load_model(hf_model=wrap(random_gemma()), backend=backend)


def test_the_place_named_in_a_wrapper_can_be_loaded() -> None:
    hf_model = PeftLike(random_gemma())
    with pytest.raises(AdapterError, match="hf_model.base_model.model"):
        load_model(hf_model=hf_model)
    load_model(hf_model=hf_model.base_model.model, check=False)


def test_hooked_transformer_does_not_copy_packed_weights() -> None:
    from tests.adapters.test_check import in_eight_bits

    with pytest.raises(AdapterError, match='of a quantised model. Use backend="bridge"'):
        load_model(hf_model=in_eight_bits(random_gemma(), True), backend="hooked_transformer")


def test_a_refused_model_is_as_it_was() -> None:
    hf_model = random_gemma().train()
    hf_model.config._attn_implementation = "sdpa"
    for kwargs, error in (
        ({"dtype": "float31"}, UnknownNameError),
        ({"device": "cuda:99"}, DeviceError),
        ({"tokenizer": "gemma"}, AdapterError),
        ({"name": "no-such-model"}, UnknownNameError),
        ({"name": "bundled"}, AdapterError),
        ({"backend": "both"}, UnknownNameError),
    ):
        with pytest.raises(error):
            load_model(hf_model=hf_model, **kwargs)
        assert hf_model.training
        assert hf_model.config._attn_implementation == "sdpa"
        assert hf_model.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_own_name_is_left_out_beside_a_given_model(backend: str) -> None:
    """A folder or Hub id is no remedy for someone who holds the model already."""
    with pytest.raises(UnknownNameError, match="leave name= out for a model of your own") as refused:
        load_model("my-gemma3", hf_model=random_gemma(), backend=backend)
    assert "tokenizer=" in str(refused.value) and "works too" not in str(refused.value)
    with pytest.raises(UnknownNameError, match="A local folder or a Hugging Face id works too"):
        load_model("my-gemma3", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_without_a_tokenizer_says_so_when_given_text(backend: str) -> None:
    model = load_model(hf_model=random_gemma(), backend=backend, check=False)
    with pytest.raises((AssertionError, gs.GemmaScopeError), match=r"tokenizer"):
        model.to_tokens("text")


BAD_DEVICES = ["cuda:99", "nonsense", "", 99, "cpu:1"]


@pytest.mark.parametrize("device", BAD_DEVICES)
def test_devices_are_checked_before_anything_is_loaded(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing should be loaded")

    monkeypatch.setattr(loading, "_load_config", refuse)
    monkeypatch.setattr("gemma_scope_tl.sae.reading.fetch", refuse)
    monkeypatch.setattr("gemma_scope_tl.sae.reading.load_arrays", refuse)
    arrays = {"W_enc": torch.zeros(2, 4)}
    calls: list[Callable[..., Any]] = [
        lambda **k: load_model("bundled", **k),
        lambda **k: gs.load_sae("bundled", "res", 2, width="1k", **k),
        lambda **k: gs.load_suite("bundled", width="1k", **k),
        lambda **k: gs.load_latents("bundled-res", "layer_2/width_1k/canonical", [3], **k),
        lambda **k: gs.JumpReLUSAE.from_folder("nowhere", **k),
        lambda **k: gs.JumpReLUSAE.from_arrays(arrays, **k),
    ]
    for call in calls:
        with pytest.raises(DeviceError, match="Available: cpu"):
            call(device=device)
        for dtype in ("float31", 32, torch.int8):
            with pytest.raises(UnknownNameError, match="Unknown dtype"):
                call(dtype=dtype)


def test_meta_holds_no_model() -> None:
    with pytest.raises(AdapterError, match="meta"):
        load_model("bundled", device="meta")


def test_names_that_are_none(tmp_path: Path) -> None:
    hf_model = random_gemma()
    with pytest.raises(UnknownNameError, match="gemma-2-2b"):
        load_model("GEMMA-2-2B")
    with pytest.raises(AdapterError, match="Give a loaded model as hf_model="):
        load_model(hf_model)  # pyright: ignore[reportArgumentType]
    for name in (tmp_path / "nothing" / "here", Path("a/b"), "~/nothing-here", "~nobody-at-all/x", "x" * 5000):
        with pytest.raises(UnknownNameError):
            load_model(name)


def saved(folder: Path) -> Path:
    random_gemma().save_pretrained(folder)
    CharTokenizerFactory.get().save_pretrained(folder)
    return folder


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def widen_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "A folder needs config.json"),
    "half a config": (cut("config.json", 40), "A folder needs config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "A folder needs config.json and complete weights"),
    "half the weights": (cut("model.safetensors", 90_000), "A folder needs config.json and complete weights"),
    "no bytes of weights": (cut("model.safetensors", 0), "A folder needs config.json and complete weights"),
    "a weight missing": (lose_a_weight, "lack 1 weights, such as model.layers.1.mlp.up_proj.weight"),
    "a weight of another shape": (widen_a_weight, "A folder needs config.json and complete weights"),
    "half a tokenizer": (cut("tokenizer.json", 300), "Cannot load the tokenizer"),
    "no bytes of a tokenizer": (cut("tokenizer.json", 0), "Cannot load the tokenizer"),
    "half a tokenizer config": (cut("tokenizer_config.json", 30), "Cannot load the tokenizer"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_folder_is_named_with_what_is_wrong(broken: str, tmp_path: Path) -> None:
    damage, words = BROKEN[broken]
    damage(saved(tmp_path))
    with pytest.raises(AdapterError, match=words) as caught:
        load_model(tmp_path, check=False)
    assert str(tmp_path) in str(caught.value)
    assert "gated" not in str(caught.value)


def test_the_machines_faults_are_not_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("transformers.Gemma2ForCausalLM.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(saved(tmp_path))


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("unsloth/gemma-2-2b", "gemma-2-2b"),
        ("google/Gemma-2-2B-it", "gemma-2-2b-it"),
        ("/x/gemma-2-2b/", "gemma-2-2b"),
        ("/x/models--google--gemma-2-2b/snapshots/0123abc", "gemma-2-2b"),
        ("/x/models--google--gemma-2-2b-it/snapshots/0123abc/", "gemma-2-2b-it"),
        ("unsloth/gemma-2-2b-bnb-4bit", None),
        ("/x/gemma-2-2b-finetuned", None),
        ("/gemma-2-2b/checkpoint-100", None),
        ("google/gemma-2-9b", None),  # other sizes than the config says
    ],
)
def test_the_name_that_saes_know_a_model_by(name: str, model_id: str | None) -> None:
    config = {"num_hidden_layers": 26, "hidden_size": 2304, "num_attention_heads": 8, "head_dim": 256}
    assert loading._model_id(name, name, GEMMA2, config, given=False) == model_id


def test_a_small_model_in_a_folder_with_a_large_ones_name_is_not_taken_for_it(tmp_path: Path) -> None:
    assert load_model(saved(tmp_path / "gemma-2-2b"), check=False).model_id is None


def test_a_name_with_hf_model_says_which_model_it_is() -> None:
    from transformers import Gemma2ForCausalLM

    model = load_model("bundled", hf_model=Gemma2ForCausalLM.from_pretrained(BUNDLED_MODEL), check=False)
    assert model.model_id == "bundled"
    assert model.to_tokens("In the beginning").shape[1] > 1
    with pytest.raises(AdapterError, match="but bundled is ModelDims"):
        load_model("bundled", hf_model=random_gemma())
    with pytest.raises(AdapterError, match="but gemma-2-2b is ModelDims"):
        load_model("gemma-2-2b", hf_model=random_gemma())


@pytest.mark.parametrize(("model", "layer", "width"), [("2b", 20, "16k"), ("9b", 20, "16k"), ("27b", 22, "131k")])
def test_the_sizes_of_the_named_models_are_those_of_their_saes(model: str, layer: int, width: str) -> None:
    row = gs.registry.find(f"gemma-2-{model}", "res", layer, width, "canonical")
    assert row.d_in == GEMMA2.sizes[f"gemma-2-{model}"].dims.d_model


@pytest.mark.parametrize("backend", BACKENDS)
def test_stop_ids_are_those_of_hugging_faces_generate(backend: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 57], "bos_token_id": 2}))
    assert load_model(folder, backend=backend, check=False).stop_token_ids == (1, 57)
    hf_model = random_gemma()
    hf_model.generation_config = GenerationConfig(eos_token_id=7)
    assert load_model(hf_model=hf_model, backend=backend, check=False).stop_token_ids == (7,)
    hf_model = random_gemma()
    hf_model.generation_config = GenerationConfig()
    hf_model.config.eos_token_id = [9, 8]
    assert load_model(hf_model=hf_model, backend=backend, check=False).stop_token_ids == (9, 8)
    hf_model = random_gemma()
    hf_model.generation_config, hf_model.config.eos_token_id = GenerationConfig(), None
    made = CharTokenizerFactory.get()
    assert load_model(hf_model=hf_model, tokenizer=made, backend=backend, check=False).stop_token_ids == (1,)
    hf_model = random_gemma()
    hf_model.generation_config, hf_model.config.eos_token_id = GenerationConfig(), None
    assert load_model(hf_model=hf_model, backend=backend, check=False).stop_token_ids == ()


def test_a_compiled_headless_model_is_refused_too() -> None:
    with pytest.raises(AdapterError, match="no unembedding"):
        load_model(hf_model=Gemma2Model(random_gemma().config))


def test_a_generation_config_that_is_none_loads(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "generation_config.json").unlink()
    model = load_model(folder, check=False)
    assert model.stop_token_ids == (1,)
    assert model(random_tokens(model)).shape == (2, 24, 96)
