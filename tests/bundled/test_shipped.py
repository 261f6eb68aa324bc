"""What comes with the package: its size, and the second bundled model where it is present."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gemma_scope_tl as gs
from gemma_scope_tl.errors import AdapterError, RegistryError
from gemma_scope_tl.families import bundled_names, family_of_model
from gemma_scope_tl.files import file_sha256
from gemma_scope_tl.registry import locate
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.registry.locate import BUNDLED_DATA, BUNDLED_MODEL, MODEL_FOLDER, bundle_folder, is_bundled
from gemma_scope_tl.registry.schema import parse_release
from scripts.bundled.bundles import BUNDLES, GEMMA3
from scripts.bundled.sae_publish import store_narrow
from scripts.bundled.sae_suite import heldout_tokens, significant
from scripts.bundled.tokenizer import BOS, PAD

LARGEST = 40_000_000
PRESENT = (GEMMA3.model_folder / "config.json").is_file()
present = pytest.mark.skipif(not PRESENT, reason="the second bundled model has not been made")


def test_the_data_of_the_package_are_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED_DATA.rglob("*") if path.is_file()) < LARGEST


def test_each_bundle_is_named_by_its_family_and_has_a_folder() -> None:
    assert tuple(BUNDLES) == bundled_names()
    for name, bundle in BUNDLES.items():
        assert family_of_model(name).title == bundle.title
        assert bundle.folder.is_relative_to(BUNDLED_DATA)
        assert is_bundled(name)
        assert all(release.startswith(f"{name}-") for release in bundle.releases)
    assert bundle_folder("bundled-other") is None
    assert bundle_folder("") is None
    assert not is_bundled("google/gemma-scope-2b-pt-res")


def test_a_bundle_that_did_not_come_with_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "_PACKAGE", tmp_path)
    with pytest.raises(AdapterError, match="'bundled-gemma3' did not come with this installation"):
        gs.load_model(GEMMA3.name)


def test_a_repo_that_only_begins_like_a_bundle_is_refused() -> None:
    row = {"id": "a", "site": "res", "layer": 0, "width": "256", "d_sae": 256, "d_in": 8, "l0": 1.0, "path": "a"}
    about = {"release": "r", "model": "m", "license": "MIT", "description": "d", "saes": [row]}
    assert parse_release({**about, "repo": GEMMA3.name}, "r.yaml").repo == GEMMA3.name
    with pytest.raises(RegistryError, match="'bundled-other' is not a repository"):
        parse_release({**about, "repo": "bundled-other"}, "r.yaml")


def test_rounding_keeps_the_significant_digits() -> None:
    """Against the definition: the nearest multiple of 2^(e - bits), where 2^(e - 1) <= |x| < 2^e."""
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    found = significant(x, 5)
    unit = 2.0 ** (np.floor(np.log2(np.abs(x.astype(np.float64)))) + 1 - 5)
    assert np.array_equal(found, (np.round(x / unit) * unit).astype(np.float32))
    assert np.abs(found / x - 1).max() <= 2.0**-5


def test_narrow_files_load_to_the_same_bits(tmp_path: Path) -> None:
    exact = {"w_enc": torch.tensor([[1.0, -0.3125]]), "threshold": torch.tensor([0.1, 0.2])}
    path = tmp_path / "params.safetensors"
    save_file(exact, path)
    store_narrow(path)
    found = load_file(path)
    assert {name: array.dtype for name, array in found.items()} == {"w_enc": torch.bfloat16, "threshold": torch.float32}
    assert all(torch.equal(found[name].float(), array) for name, array in exact.items())
    save_file({"w_enc": torch.tensor([0.1])}, path)
    with pytest.raises(ValueError, match="cannot represent the values of w_enc"):
        store_narrow(path)


@present
def test_the_second_model_has_the_shape_rules_and_the_tokenizer_of_the_first() -> None:
    wanted = GEMMA3.config().to_dict()
    model = gs.load_model(GEMMA3.name)
    config = model.original_model.config.to_dict()
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "layer_types")
    assert {key: config[key] for key in keys} == {key: wanted[key] for key in keys}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (GEMMA3.model_folder / name).read_bytes() == (BUNDLED_MODEL / name).read_bytes()
    text = "In the beginning God created the heaven and the earth."
    tokens = model.to_tokens(text)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
    assert loss < 4.0  # nats; without training ln 2048 = 7.6


@present
def test_every_row_of_the_second_suite_has_its_file_and_its_results() -> None:
    rows = gs.list_saes(model=GEMMA3.name, with_metrics=True)
    assert rows["fvu"].notna().all(), "run scripts/bundled_results.py --model bundled-gemma3"
    assert (rows["fvu"] < 1).all()
    counts = {"att": 6, "mlp": 6, "res": 12, "transcoder": 12, "clt": 1, "crosscoder": 1}
    assert rows.groupby("site").size().to_dict() == counts
    for row in select_rows(GEMMA3.name):
        for path, sha256 in zip(row.weights_paths, row.hashes, strict=True):
            assert file_sha256(GEMMA3.folder / "saes" / path) == sha256, row.id
    assert (GEMMA3.folder / MODEL_FOLDER / "README.md").is_file()


@present
def test_the_coders_over_several_layers_predict_what_they_write() -> None:
    """On held-out text, through hooks of PyTorch on the plain model: FVUs far below 1, and L0 near its target."""
    model = AutoModelForCausalLM.from_pretrained(GEMMA3.model_folder, dtype=torch.float32).eval()
    tokens = heldout_tokens(limit=4)
    for kind, width, affine in (("clt", "768", True), ("crosscoder", "512", None)):
        coder = gs.load_sae(GEMMA3.name, kind, width=width, affine=affine)
        x, y = _tensors(model, coder, tokens)
        acts = [coder.encode_at(k, one) for k, one in enumerate(x)]
        l0 = sum(int((one.to_dense() > 0).sum()) for one in acts) / len(x[0])
        assert l0 == pytest.approx(coder.l0, rel=0.35)
        for found, wanted in zip(coder.decode(acts, x), y, strict=True):
            assert ((found - wanted) ** 2).sum() < 0.5 * ((wanted - wanted.mean(0)) ** 2).sum()


def _tensors(model: Any, coder: Any, tokens: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a coder reads and writes at ordinary tokens, ``[tokens, 128]`` for each layer."""
    names = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if coder.kind == "clt" else ("", "")
    seen: dict[tuple[int, int], torch.Tensor] = {}
    handles = []
    for layer in coder.layers:
        block = model.model.layers[layer]
        for side, name in enumerate(names):

            def keep(_module: Any, _args: Any, out: Any, at: tuple[int, int] = (layer, side)) -> None:
                seen[at] = out[0] if isinstance(out, tuple) else out

            handles.append((getattr(block, name) if name else block).register_forward_hook(keep))
    with torch.no_grad():
        model(tokens, attention_mask=(tokens != PAD).long())
    for handle in handles:
        handle.remove()
    mask = tokens > BOS
    x, y = ([seen[layer, side][mask] for layer in coder.layers] for side in (0, 1))
    return x, y
