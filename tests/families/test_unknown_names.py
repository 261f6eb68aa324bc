"""SAEs of a model whose name no family lists: the family is stated, told by hooks, or, where it matters, warned of."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig
from typer.testing import CliRunner

import gemma_scope_tl as gs
from gemma_scope_tl.cli import app
from gemma_scope_tl.contributing.check import check_release
from gemma_scope_tl.contributing.draft import Options, draft_release, write_draft
from gemma_scope_tl.errors import GemmaScopeError, RegistryError, UnknownNameError
from gemma_scope_tl.families import (
    AssumedFamilyWarning,
    Family,
    depends_on_family,
    families,
    family_named,
    forget_family,
    register_family,
    stated_family,
)
from gemma_scope_tl.registry.catalog import read_release
from gemma_scope_tl.sae.access import trained_family
from gemma_scope_tl.sae.jumprelu import JumpReLUSkipTranscoder
from gemma_scope_tl.studies.random_saes import random_twin

D, WIDTH, OWN = 32, 64, "my-gemma3"
HOOKS = {"gemma2": "blocks.2.ln2.hook_normalized", "gemma3": "blocks.2.mlp.hook_in"}
CLASSES = (gs.JumpReLUSAE, gs.JumpReLUTranscoder, JumpReLUSkipTranscoder)


def arrays(skip: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, WIDTH), "W_dec": (WIDTH, D), "b_enc": (WIDTH,), "b_dec": (D,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["threshold"] = torch.full((WIDTH,), 0.5)
    return made | ({"W_skip": torch.randn(D, D, generator=generator)} if skip else {})


def transcoder(cls: Any = gs.JumpReLUTranscoder, **given: Any) -> Any:
    skip = cls is JumpReLUSkipTranscoder
    return cls.from_arrays(arrays(skip), **{"model": OWN, "site": "transcoder", "layer": 2, **given})


@pytest.fixture(autouse=True)
def _no_other_warning() -> Iterator[None]:
    """An assumption that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumedFamilyWarning)
        yield


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("family", HOOKS)
def test_a_stated_family_gives_its_hooks_and_is_kept(cls: Any, family: str, tmp_path: Path) -> None:
    sae = transcoder(cls, family=family)
    assert sae.cfg.metadata.hook_name == HOOKS[family] and trained_family(sae).name == family
    gs.save_sae(sae, tmp_path / "lens", format="sae-lens")
    said = json.loads((tmp_path / "lens" / "cfg.json").read_text())["metadata"]
    assert (said["hook_name"], said["family"], said["model_name"]) == (HOOKS[family], family, OWN)
    again = gs.JumpReLUSAE.from_folder(tmp_path / "lens")
    assert (again.site, again.layer, again.cfg.metadata.hook_name) == ("transcoder", 2, HOOKS[family])
    gs.save_sae(sae, tmp_path / "npz")
    loaded = cls.from_folder(tmp_path / "npz", model=OWN, site="transcoder", layer=2, family=family)
    assert loaded.cfg.metadata.hook_name == HOOKS[family]
    with pytest.raises(UnknownNameError, match="model family"):
        transcoder(cls, family="gema3")


def test_gemma_scope_2s_layout_needs_the_family(tmp_path: Path) -> None:
    gs.save_sae(transcoder(family="gemma3"), tmp_path / "coder", format="gemma_scope_2")
    assert json.loads((tmp_path / "coder" / "config.json").read_text())["family"] == "gemma3"
    assert gs.JumpReLUSAE.from_folder(tmp_path / "coder").cfg.metadata.hook_name == HOOKS["gemma3"]
    with pytest.warns(AssumedFamilyWarning):
        assumed = transcoder()
    with pytest.raises(GemmaScopeError, match=r"give family= \(gemma2 or gemma3\)"):
        gs.save_sae(assumed, tmp_path / "no", format="gemma_scope_2")


@pytest.mark.parametrize("model", [OWN, None, "someone/my-model"])
def test_an_unknown_family_warns_where_families_differ(model: str | None, tmp_path: Path) -> None:
    """It is the first family then, as it has been, so that files of own Gemma 2 models go on working."""
    with pytest.warns(AssumedFamilyWarning, match=r"family= \(gemma2 or gemma3\)"):
        sae = transcoder(model=model)
    assert sae.cfg.metadata.hook_name == HOOKS[families()[0].name]
    assert sae.cfg.metadata.get("family") is None  # an assumption is not a fact
    gs.save_sae(sae, tmp_path / "t")  # the hooks of an SAE that exists tell the family
    with pytest.warns(AssumedFamilyWarning, match="later release"):
        gs.JumpReLUSAE.from_folder(tmp_path / "t", model=model, site="transcoder", layer=2)


@pytest.mark.parametrize("site", ["res", "mlp", "att", "embedding", None])
def test_sites_that_are_the_same_in_all_families_need_nothing(site: str | None, tmp_path: Path) -> None:
    layer = None if site in ("embedding", None) else 2
    sae = gs.JumpReLUSAE.from_arrays(arrays(), model=OWN, site=site, layer=layer)
    assert sae.cfg.metadata.get("family") is None
    gs.save_sae(sae, tmp_path / "s")
    gs.JumpReLUSAE.from_folder(tmp_path / "s", model=OWN, site=site, layer=layer)


@pytest.mark.parametrize(
    ("model", "family"), [("gemma-3-1b", "gemma3"), ("google/gemma-2-2b", "gemma2"), ("bundled-gemma3", "gemma3")]
)
def test_a_released_name_tells_the_family_and_cannot_be_contradicted(model: str, family: str) -> None:
    sae = transcoder(model=model)
    assert sae.cfg.metadata.hook_name == HOOKS[family] and sae.cfg.metadata.get("family") is None
    other = next(name for name in HOOKS if name != family)
    with pytest.raises(GemmaScopeError, match=f"family='{other}' was given"):
        transcoder(model=model, family=other)


def test_a_configuration_tells_the_family() -> None:
    config = Gemma3TextConfig(
        hidden_size=D, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    assert transcoder(model=config).cfg.metadata.hook_name == HOOKS["gemma3"]
    with pytest.raises(GemmaScopeError, match="is a Gemma 3, but family='gemma2'"):
        transcoder(model=config, family="gemma2")


@pytest.mark.parametrize("family", HOOKS)
def test_sae_lens_files_without_a_family_are_told_apart_by_their_hooks(family: str, tmp_path: Path) -> None:
    """SAELens's own files state none. A Gemma 3's got the hooks of Gemma 2 when they were loaded."""
    gs.save_sae(transcoder(family=family), tmp_path / "t", format="sae-lens")
    path = tmp_path / "t" / "cfg.json"
    config = json.loads(path.read_text())
    for key in ("family", "site", "layer", "hook_layer"):
        del config["metadata"][key]
    path.write_text(json.dumps(config))
    sae = gs.JumpReLUSAE.from_folder(tmp_path / "t")
    assert (sae.site, sae.layer, sae.cfg.metadata.hook_name) == ("transcoder", 2, HOOKS[family])
    assert trained_family(sae).name == family


def test_made_saes_keep_the_family() -> None:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(1))
    twin = random_twin(transcoder(family="gemma3"), x)
    assert twin.cfg.metadata.hook_name == HOOKS["gemma3"]


def test_drafts_and_exports_ask_for_the_family(tmp_path: Path) -> None:
    folder = tmp_path / "saes" / "transcoder" / "layer_2" / "width_64" / "average_l0_7"
    gs.save_sae(transcoder(family="gemma3"), folder)
    root, options = tmp_path / "saes", Options(license="MIT", model=OWN)
    with pytest.raises(RegistryError, match="Give --family: gemma2 or gemma3"):
        draft_release(str(root), tmp_path, options)
    drafts = {name: draft_release(str(root), tmp_path, replace(options, family=name)) for name in HOOKS}
    assert {name: draft.release.family for name, draft in drafts.items()} == {name: name for name in HOOKS}
    file = write_draft(drafts["gemma3"], tmp_path)
    assert not check_release(file).problems
    file.write_text(file.read_text().replace("family: gemma3\n", ""))
    (problem,) = check_release(file).problems
    assert problem.text.startswith("family: is not stated") and problem.text.endswith("gemma2 or gemma3")
    with pytest.warns(AssumedFamilyWarning, match="`family:` in the registry file of saes"):
        gs.JumpReLUSAE.from_row(read_release(file).rows[0])
    about = gs.About("mit")
    with pytest.raises(RegistryError, match="Give --family"):
        gs.export_suite(root, tmp_path / "no", about, model=OWN, progress=False)
    (out,) = gs.export_suite(root, tmp_path / "out", about, model=OWN, family="gemma3", progress=False)
    assert read_release(out / "out.yaml").family == "gemma3"
    command = ["export", str(root), str(tmp_path / "cli"), "--license", "mit", "--model", OWN, "--family", "gemma2"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert read_release(tmp_path / "cli" / "cli.yaml").family == "gemma2"


def test_an_export_of_saes_in_memory_states_their_family(tmp_path: Path) -> None:
    for name in HOOKS:
        sae = transcoder(family=name)
        sae.cfg.metadata.l0 = 7.0
        (out,) = gs.export_suite([sae], tmp_path / name, gs.About("mit"), progress=False)
        assert read_release(out / f"{name}.yaml").family == name


@pytest.fixture
def unscaled() -> Iterator[Family]:
    """A family with the sites of Gemma 2, whose embedding is not scaled."""
    gemma2 = family_named("gemma2")
    own: dict[str, Any] = {"name": "own", "title": "Own", "model_types": ("own",), "architecture": "Own", "sizes": {}}
    family = replace(gemma2, **own, bundled="", embedding_scale=lambda d_model: 1.0)
    register_family(family)
    yield family
    forget_family("own")


def test_the_units_of_an_embedding_are_a_difference_too(unscaled: Family, tmp_path: Path) -> None:
    """Files hold rows of the embedding table, which each family scales by its own factor."""
    assert depends_on_family("embedding") and not depends_on_family("res")
    np.savez(tmp_path / "params.npz", **{name: value.numpy() for name, value in arrays().items()})
    given = {"model": OWN, "site": "embedding"}
    with pytest.warns(AssumedFamilyWarning, match="gemma2 or own"):
        scaled = gs.JumpReLUSAE.from_folder(tmp_path, **given)
    same = gs.JumpReLUSAE.from_folder(tmp_path, **given, family="own")
    assert torch.equal(same.W_dec, arrays()["W_dec"]) and not torch.equal(scaled.W_dec, same.W_dec)


def test_what_files_state() -> None:
    gemma2, gemma3 = family_named("gemma2"), family_named("gemma3")
    assert stated_family(gemma2, None, "res") is None and stated_family(gemma2, OWN, "res", "transcoder") == "gemma2"
    assert stated_family(gemma3, "gemma-3-1b", "transcoder") is None and stated_family(gemma3, OWN) == "gemma3"
    assert stated_family(gemma2, "gemma-3-1b") == "gemma2"
    assert not depends_on_family(None) and not depends_on_family("no-such-site")
