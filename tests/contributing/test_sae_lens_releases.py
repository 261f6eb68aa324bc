"""Entries in SAELens's directory: ours beside its own, brought up to date by a second call."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import sae_lens
import torch
from sae_lens.evals import all_loadable_saes
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
    NAMED_PRETRAINED_SAE_LOADERS,
    load_sae_config_from_huggingface,
)
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

import gemma_scope_tl as gs
from gemma_scope_tl.interop.releases import LOADER_NAME, PREFIX
from gemma_scope_tl.registry import locate


@pytest.fixture(autouse=True)
def clean_sae_lens() -> Iterator[None]:
    """SAELens as it was."""
    yield
    get_pretrained_saes_directory.cache_clear()
    for table in (NAMED_PRETRAINED_SAE_LOADERS, NAMED_PRETRAINED_SAE_CONFIG_GETTERS):
        table.pop(LOADER_NAME, None)


@pytest.mark.slow
def test_entries_are_added_beside_sae_lens_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = get_pretrained_saes_directory()
    before = copy.deepcopy(directory)
    added = gs.register_with_sae_lens()
    kinds = ("att", "mlp", "res", "transcoders")
    ours = sorted(f"{model}-{kind}" for model in ("bundled", "bundled-gemma3") for kind in kinds)
    unlisted = [f"gemma-scope-2-27b-pt-{kind}" for kind in ("att", "att-all", "mlp", "mlp-all", "transcoders")]
    shared = [f"{PREFIX}{name}" for name in gs.registry.releases(canonical=True) if name in before]
    assert added == [*ours, *unlisted, *shared] and len(shared) == 17 + 75
    assert set(directory) == {*before, *added}
    assert {name: directory[name] for name in before} == before  # Google's too: SAELens goes on loading them
    assert directory["gemma-scope-2b-pt-res"].conversion_func == "gemma_2"

    text = (Path(locate.builtin_folder()) / "bundled-res.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("bundled-res", "mine", 1).replace(": null", ": mine-canonical", 1))
    gs.register_release(tmp_path / "mine.yaml")
    for _ in range(2):  # the second call changes nothing
        assert gs.register_with_sae_lens() == [*ours, *unlisted, "mine", "mine-canonical", *shared]
        assert get_pretrained_saes_directory() is directory and len(directory) == len(before) + len(added) + 2
    rows = gs.registry.read_release(tmp_path / "mine.yaml").rows
    canonical = sum(row.canonical for row in rows)
    assert len(directory["mine"].saes_map) == len(rows) + canonical
    assert len(directory["mine-canonical"].saes_map) == canonical
    assert all(id_.endswith("/canonical") for id_ in directory["mine-canonical"].saes_map)

    monkeypatch.setattr(locate, "_registered", {})
    gs.registry.clear_cache()
    assert gs.register_with_sae_lens() == added and "mine" not in directory
    get_pretrained_saes_directory.cache_clear()  # SAELens forgets; another call tells it again
    assert "bundled-res" not in get_pretrained_saes_directory()
    assert gs.register_with_sae_lens() == added and "bundled-res" in get_pretrained_saes_directory()


@pytest.mark.slow
@pytest.mark.parametrize(("site", "dtype"), [("res", "float32"), ("att", "float32"), ("mlp", "bfloat16")])
def test_what_stock_sae_lens_loads(site: str, dtype: str) -> None:
    gs.register_with_sae_lens()
    id_ = "layer_1/width_1k/canonical"
    stock, cfg, sparsity = sae_lens.SAE.from_pretrained_with_cfg_and_sparsity(f"bundled-{site}", id_, dtype=dtype)
    ours = gs.JumpReLUSAE.from_pretrained(f"bundled-{site}", id_, dtype=dtype)
    assert type(stock) is sae_lens.saes.jumprelu_sae.JumpReLUSAE and sparsity is None
    assert stock.dtype == ours.dtype and not stock.cfg.apply_b_dec_to_input and cfg["d_in"] == ours.cfg.d_in
    for name, value in ours.state_dict().items():
        assert torch.equal(stock.state_dict()[name], value.to(stock.dtype)), name
    mine, theirs = ours.cfg.metadata, stock.cfg.metadata
    for name in ("model_name", "hook_name", "neuronpedia_id", "prepend_bos", "site", "layer", "l0", "release", "id"):
        assert getattr(theirs, name) == getattr(mine, name), name
    assert stock.cfg.reshape_activations == ("hook_z" if site == "att" else "none")


@pytest.mark.slow
def test_the_rest_of_sae_lens_knows_them() -> None:
    gs.register_with_sae_lens()
    id_ = "layer_1/width_1k/canonical"
    cfg = load_sae_config_from_huggingface("bundled-res", id_)
    assert cfg["architecture"] == "jumprelu" and cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    (entry,) = [entry for entry in all_loadable_saes() if entry[:2] == ("bundled-res", id_)]
    assert math.isnan(entry[2]) and entry[3] == gs.registry.resolve("bundled-res", id_).l0
    with pytest.raises(ValueError, match="ID nothing not found"):
        sae_lens.SAE.from_pretrained("bundled-res", "nothing")
