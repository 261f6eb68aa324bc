"""Drafts: from both layouts, with sizes from the headers, and an answer for everything that is not known."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma_scope_tl.cli.registry import registry_app
from gemma_scope_tl.contributing.check import check_release
from gemma_scope_tl.contributing.draft import Options, draft_release, mark_canonical, write_draft
from gemma_scope_tl.contributing.folder_metadata import ARCHITECTURES, parse_setting
from gemma_scope_tl.errors import GemmaScopeError, RegistryError
from gemma_scope_tl.registry import read_release
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.sae.sae_lens_config import ARCHITECTURES as LOADED
from gemma_scope_tl.sae.save import save_sae
from gemma_scope_tl.sites import ModelDims
from tests.contributing.conftest import PLACES, folder_name
from tests.helpers import random_sae

BASE = Options(model="bundled", license="MIT")
DIMS = ModelDims(n_layers=4, d_model=12, n_heads=2, d_head=8)


def refused(source: Path, options: Options | None = None) -> str:
    """What a draft that cannot be made says."""
    with pytest.raises(GemmaScopeError) as caught:
        draft_release(str(source), options=options)
    return str(caught.value)


def write_npz(folder: Path, d_in: int = 12, d_sae: int = 24, d_out: int | None = None) -> None:
    """Zeros of an SAE's shapes."""
    folder.mkdir(parents=True)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out or d_in), "b_enc": (d_sae,), "b_dec": (d_out or d_in,)}
    np.savez(folder / "params.npz", **{k: np.zeros(v, "f4") for k, v in (shapes | {"threshold": (d_sae,)}).items()})


def test_gemma_scopes_layout(made_up: dict[str, Path], tmp_path: Path) -> None:
    folder = made_up["gemma-scope"]
    draft = draft_release(str(folder), tmp_path, Options(model="google/bundled", license="MIT", canonical=True))
    path = write_draft(draft, tmp_path)
    assert path == tmp_path / "my-saes.yaml" and draft.remarks == []
    release = read_release(path)
    assert (release.model, release.repo, release.format) == ("bundled", str(folder), "gemma-scope")
    rows = {row.id: row for row in release.rows}
    assert set(rows) == {folder_name(*place) for place in PLACES}
    for site, layer, l0 in PLACES:
        row = rows[folder_name(site, layer, l0)]
        arrays = np.load(folder / row.weights_path)
        assert (row.site, row.layer, row.l0, row.path) == (site, layer, l0, row.id)
        assert (row.d_in, row.d_sae, row.width) == (*arrays["W_enc"].shape, "1k")
        assert row.sha256 == hashlib.sha256((folder / row.weights_path).read_bytes()).hexdigest()
        assert row.revision is None
    assert [row.id for row in release.rows if not row.canonical] == ["res/layer_2/width_1k/average_l0_30"]


def test_sae_lens_layout_with_folders_named_anyhow(made_up: dict[str, Path], tmp_path: Path) -> None:
    text = refused(made_up["sae-lens"])
    assert "The model is not known. Give --model" in text and "give --license" in text and "--unknown-l0" in text
    assert "The l0 of 4 folders is not known (sae_0, sae_1, sae_2, …): give --l0 for all" in text
    settings = [f"sae_{i}:l0={l0}" for i, (_, _, l0) in enumerate(PLACES)]
    options = Options(model="bundled", license="MIT", settings=settings, release="lens")
    release = draft_release(str(made_up["sae-lens"]), tmp_path, options).release.at(tmp_path)
    assert release.format == "sae-lens" and release.repo == str(made_up["sae-lens"])
    assert [(row.site, row.layer, row.l0) for row in release.rows] == list(PLACES)
    assert all(row.width == "1k" and row.id == row.path for row in release.rows)
    assert draft_release(str(made_up["sae-lens"]), options=Options(**{**vars(BASE), "unknown_l0": True})).release


def test_the_site_of_googles_layout_must_be_given(tmp_path: Path) -> None:
    for name in (
        "layer_10/width_24/average_l0_9",
        "layer_2/width_24/average_l0_9.5",
        "embedding/width_24/average_l0_3",
    ):
        write_npz(tmp_path / "google" / name)
    text = refused(tmp_path / "google", BASE)
    assert "The site of 2 folders is not known (layer_2/width_24/average_l0_9.5, layer_10/" in text and "--site" in text
    assert "To settle (1)" in text
    options = Options(model="m", license="MIT", site="mlp")
    rows = draft_release(str(tmp_path / "google"), options=options).release.saes
    assert [(r.site, r.layer, r.l0) for r in rows] == [("embedding", None, 3), ("mlp", 2, 9.5), ("mlp", 10, 9)]


def test_everything_is_reported_at_once(tmp_path: Path) -> None:
    root = tmp_path / "bad"
    write_npz(root / "att" / "layer_1" / "average_l0_5", d_in=16, d_out=12)
    save_sae(random_sae(DIMS, "res", 3, d_sae=24), root / "layer_2" / "x", format="sae-lens")
    assert "1 folders of gemma-scope and 1 folders of sae-lens" in refused(root) and "--format" in refused(root)
    save_sae(random_sae(DIMS, "res", 0, d_sae=24), root / "odd", format="sae-lens")
    cfg = json.loads((root / "odd" / "cfg.json").read_text())
    (root / "odd" / "cfg.json").write_text(json.dumps(cfg | {"architecture": "topk", "d_sae": 7, "d_in": 8}))
    save_sae(random_sae(DIMS, "res", 0, d_sae=24), root / "cut", format="sae-lens")
    (root / "cut" / "sae_weights.safetensors").write_bytes(b"\0" * 100)
    options = Options(format="sae-lens", settings=["nowhere:layer=3"], l0=3, model="m", license="MIT", site="mlp")
    text = refused(root, options)
    for part in [
        "--set 'nowhere:layer=3' names a folder without weights",
        "layer_2/x: layer is 2 according to the folder's name, 3 according to cfg.json. Give --set layer_2/x:layer=",
        "layer_2/x: site is res according to cfg.json, mlp according to --site",
        "odd: cfg.json is of a 'topk' SAE",
        "odd: cfg.json has d_in 8, the weights have 12",
        "odd: cfg.json has d_sae 7, the weights have 24",
        "cut: ",
    ]:
        assert part in text, (part, text)
    assert "site att is wrong" in refused(root, Options(format="gemma-scope", model="m", license="MIT"))
    assert "layer_2" not in refused(root, Options(format="gemma-scope", model="m", license="MIT"))


def test_a_width_label_that_the_weights_contradict_is_reported_and_noted(tmp_path: Path) -> None:
    write_npz(tmp_path / "s" / "res" / "layer_0" / "width_16k" / "average_l0_5")
    draft = draft_release(str(tmp_path / "s"), options=BASE)
    (row,) = draft.release.saes
    assert (row.width, row.d_sae) == ("24", 24) and "16384 latents, the weights have 24" in str(row.note)
    assert draft.remarks and "16384" in draft.remarks[0]
    write_npz(tmp_path / "t" / "res" / "layer_0" / "width_17k" / "average_l0_5")
    assert "17k" in refused(tmp_path / "t", BASE)


def test_a_transcoder_that_writes_another_width_than_it_reads(tmp_path: Path) -> None:
    write_npz(tmp_path / "s" / "transcoder" / "layer_0" / "width_24" / "average_l0_5", d_out=10)
    path = write_draft(draft_release(str(tmp_path / "s"), tmp_path, BASE), tmp_path)
    (row,) = read_release(path).rows
    assert (row.d_in, row.d_out) == (12, 10)
    assert check_release(path).problems == []
    assert load_row(row).W_dec.shape == (24, 10)
    path.write_text(path.read_text().replace("d_out: 10", "d_out: 11"))
    (problem,) = check_release(path).problems
    assert problem.check == "shapes" and "d_out" in problem.text


def test_models_and_places_that_cannot_be(tmp_path: Path) -> None:
    for name, model in (("a", "gemma-2-2b"), ("b", "gemma-2-9b")):
        save_sae(random_sae(DIMS, "res", 0, d_sae=24), tmp_path / "two" / name, format="sae-lens")
        path = tmp_path / "two" / name / "cfg.json"
        cfg = json.loads(path.read_text())
        cfg["metadata"]["model_name"] = f"google/{model}"
        path.write_text(json.dumps(cfg))
    options = Options(license="MIT", unknown_l0=True)
    assert "is one of gemma-2-2b, gemma-2-9b" in refused(tmp_path / "two", options)
    shutil.rmtree(tmp_path / "two" / "b")
    assert draft_release(str(tmp_path / "two"), options=options).release.model == "gemma-2-2b"
    (tmp_path / "empty").mkdir()
    assert "has no params.npz or sae_weights.safetensors" in refused(tmp_path / "empty")
    assert "is not a folder" in refused(tmp_path / "none")
    write_npz(tmp_path / "empty" / "top")
    shutil.move(tmp_path / "empty" / "top" / "params.npz", tmp_path / "empty")
    assert "put them into a folder" in refused(tmp_path / "empty", BASE)


def test_nothing_outside_the_folder_is_drafted(tmp_path: Path) -> None:
    write_npz(tmp_path / "outside" / "res" / "layer_0" / "average_l0_5")
    write_npz(tmp_path / "in" / "res" / "layer_0" / "average_l0_5")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "outside")  # folders behind links are not walked
    assert len(draft_release(str(tmp_path / "in"), options=BASE).release.saes) == 1
    file = tmp_path / "in" / "res" / "layer_0" / "average_l0_5" / "params.npz"
    file.unlink()
    file.symlink_to(tmp_path / "outside" / "res" / "layer_0" / "average_l0_5" / "params.npz")
    assert "leads out of" in refused(tmp_path / "in", BASE)


def test_files_are_never_overwritten_unasked(made_up: dict[str, Path], tmp_path: Path) -> None:
    draft = draft_release(str(made_up["gemma-scope"]), tmp_path, BASE)
    path = tmp_path / "my-saes.yaml"
    path.write_text("mine")
    with pytest.raises(GemmaScopeError, match="exists. Give --force"):
        write_draft(draft, tmp_path)
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["my-saes.yaml"]
    assert write_draft(draft, path, force=True) == path and "repo:" in path.read_text()
    with pytest.raises(GemmaScopeError, match=r"named RELEASE\.yaml"):
        write_draft(draft, tmp_path / "other.yaml")
    assert write_draft(draft, tmp_path / "new" / "folder").is_file()


def test_a_source_beside_the_file_is_written_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "a" / "b" / "res" / "layer_0" / "average_l0_5")
    monkeypatch.chdir(tmp_path / "a")
    assert draft_release("b", options=BASE).release.repo == "./b"
    assert draft_release("b", tmp_path, BASE).release.repo == "./a/b"
    assert draft_release("b", tmp_path / "a" / "b", BASE).release.repo == "."
    assert draft_release("b", tmp_path / "c" / "b.yaml", BASE).release.repo == str(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert draft_release(".", options=BASE).release.release == "b"


def test_canonical_is_nearest_to_an_l0_of_100() -> None:
    rows = [{"id": str(l0), "site": "res", "layer": 0, "d_sae": 8, "l0": l0} for l0 in (136, 64, 20, None)]
    rows += [{"id": "x", "site": "mlp", "layer": 0, "d_sae": 8, "l0": 700}]
    (remark,) = mark_canonical(rows)
    assert [row["id"] for row in rows if row.get("canonical")] == ["64", "x"] and "64 and 136 are as near" in remark


def test_settings() -> None:
    assert parse_setting("a/b:site=res") == ("a/b", "site", "res") and parse_setting("a:b:l0=2.5") == ("a:b", "l0", 2.5)
    for text in ("a", "a:b=c", ":layer=1", "a:layer=x", "a:site=ress", "a:layer"):
        with pytest.raises(GemmaScopeError):
            parse_setting(text)
    assert set(ARCHITECTURES) == set(LOADED)  # written out there, because importing SAELens takes seconds


def test_the_command(made_up: dict[str, Path], tmp_path: Path) -> None:
    command = ["new", str(made_up["gemma-scope"]), "--model", "bundled", "--license", "MIT", "--out", str(tmp_path)]
    done = CliRunner().invoke(registry_app, command)
    assert done.exit_code == 0 and "4 SAEs of bundled" in done.output and "registry check" in done.output
    again = CliRunner().invoke(registry_app, command)
    assert isinstance(again.exception, GemmaScopeError)
    assert CliRunner().invoke(registry_app, [*command, "--force"]).exit_code == 0
    wrong = CliRunner().invoke(registry_app, [*command, "--format", "npz"])
    assert "Nearest: sae-lens" in str(wrong.exception) or "Nearest: gemma-scope" in str(wrong.exception)
    assert not isinstance(wrong.exception, RegistryError)
