"""From training to somebody else, as the pages on training and publishing walk it: one path, the same bits."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sae_lens import SAE
from typer.testing import CliRunner

import gemma_scope_tl as gs
from gemma_scope_tl.cli import app
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry import locate
from gemma_scope_tl.training.recipe_table import trained_recipes
from tests.hub.server import LocalHub
from tests.training.planted import PlantedSource, tiny_config

ID = "my-name/my-saes"
SITES = ["res", "mlp", "att", "transcoder"]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No registered release stays."""
    monkeypatch.setattr(locate, "_registered", {})
    yield
    gs.registry.clear_cache()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``train_suite`` leaves of a short run on the bundled model, at four sites and the embedding."""
    folder = tmp_path_factory.mktemp("walk") / "my-suite"
    config: dict[str, Any] = {
        "output": str(folder),
        "model": {"name": "bundled", "device": "cpu"},
        "data": {"dataset": "bundled", "column": "text", "context": 128, "limit_tokens": 8192},
        "source": {"bucket_rows": 1024, "scale_rows": 1024, "batch_rows": 8},
        "steps": 12,
        "recipe": {"preset": "fast", "batch_size": 128, "lr_warm_up_steps": 4, "l0_warm_up_steps": 4},
        "grid": [
            {"sites": SITES, "layers": [1], "widths": [128], "target_l0s": [20]},
            {"sites": ["embedding"], "widths": [128], "target_l0s": [10]},
        ],
        "eval_batches": 1,
    }
    gs.train_suite(config, progress=False)
    return folder


def _released(folder: Path) -> dict[tuple[str, int | None], dict[str, np.ndarray]]:
    """What training wrote, read by NumPy, by place."""
    rows = json.loads((folder / "suite.json").read_text())["saes"]
    return {(row["site"], row["layer"]): dict(np.load(folder / row["path"] / "params.npz")) for row in rows}


def _assert_same_bits(folder: Path, rows: Any, release: str) -> None:
    wanted = _released(folder)
    assert {(row.site, row.layer) for row in rows} == set(wanted)
    for row in rows:
        sae = gs.JumpReLUSAE.from_pretrained(release, row.id)
        for name, array in wanted[row.site, row.layer].items():
            got = getattr(sae, name)
            scale = np.float32(np.sqrt(sae.cfg.d_in)) if row.site == "embedding" else np.float32(1)
            factor = {"W_enc": 1 / scale, "W_dec": scale, "b_dec": scale}.get(name, np.float32(1))
            exact = row.site != "embedding" or factor == 1
            expected = torch.from_numpy(array) * float(factor)
            assert torch.equal(got, expected) if exact else torch.allclose(got, expected, rtol=3e-7), (row.id, name)


@pytest.mark.slow
def test_from_python(trained: Path, hub: LocalHub, token: str, tmp_path: Path) -> None:
    about = gs.About("cc-by-4.0", base_model="my-name/my-model")
    (folder,) = gs.export_suite(trained, tmp_path / "my-saes", about, layout="both", progress=False)
    done = gs.upload_suite(folder, ID, progress=False)
    assert done.registry_file is not None and hub.repos["models", ID].private
    gs.register_release(done.registry_file)
    rows = gs.registry.read_release(done.registry_file).rows
    assert {row.repo for row in rows} == {ID} and {row.model for row in rows} == {"bundled"}
    _assert_same_bits(trained, rows, "my-saes")
    mirror = f"sae_lens/{next(row.path for row in rows if row.site == 'res')}"
    theirs = SAE.load_from_disk(folder / mirror)  # stock SAELens, without this package
    assert torch.equal(theirs.W_dec, torch.from_numpy(_released(trained)["res", 1]["W_dec"]))


def test_from_the_command_line(trained: Path, hub: LocalHub, token: str, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    out = tmp_path / "my-saes"
    run("export", trained, out, "--license", "cc-by-4.0", "--base-model", "my-name/my-model", "--canonical")
    shown = json.loads(run("upload", out, ID, "--yes", "--json"))
    pinned = Path(shown["registry_file"])
    assert {row["revision"] for row in yaml.safe_load(pinned.read_text())["saes"]} == {shown["revision"]}
    run("registry", "check", pinned, "--remote")
    gs.register_release(pinned)
    _assert_same_bits(trained, gs.registry.read_release(pinned).rows, "my-saes")


def test_the_card_states_the_recipe_that_the_suite_has_recorded(trained: Path, tmp_path: Path) -> None:
    def rows_of(about: gs.About, name: str) -> dict[str, list[str]]:
        (out,) = gs.export_suite(trained, tmp_path / name, about, progress=False)
        section = (out / "README.md").read_text().partition("## Recipe\n")[2].partition("\n## ")[0]
        lines = [line.strip("| ").replace("\\", "").split(" | ") for line in section.splitlines() if line[:1] == "|"]
        return {html.unescape(line[0]): line[1:] for line in lines[2:]}

    recipes, found = trained_recipes(trained), rows_of(gs.About("mit"), "recorded")
    assert set(found) == set(recipes.columns)
    assert found["steps"][0] == "12" and found["batch_size"] == ["128", "4096", "set beforehand"]
    assert found["eps"] == ["1e-08", "1e-08", "the paper"]
    assert found["target_l0"][0] == "10 to 20"
    low, high = recipes["bandwidth"].min(), recipes["bandwidth"].max()
    assert found["bandwidth"][0] == f"{low:.3g} to {high:.3g}" and low < high
    assert list(rows_of(gs.About("mit", recipe={"lr": 0.5}), "given")) == ["lr"]


def test_l0s_that_round_to_one_number(tmp_path: Path) -> None:
    """Training gives such SAEs decimals in their folders' names; the export does too."""
    (tmp_path / "my-model").mkdir()
    shutil.copyfile(locate.BUNDLED_MODEL / "config.json", tmp_path / "my-model" / "config.json")
    grid = [{"sites": ["res"], "layers": [0], "widths": [64], "target_l0s": [4.0, 4.1, 4.2]}]
    config = {**tiny_config(tmp_path / "run"), "grid": grid, "model": {"name": f"{tmp_path}/my-model/"}}
    table = gs.train_suite(config, source=PlantedSource, progress=False)
    assert table["l0"].round().nunique() < len(table)
    (out,) = gs.export_suite(tmp_path / "run", tmp_path / "out", gs.About("mit"), progress=False)
    rows = gs.registry.read_release(out / "out.yaml").rows
    assert {row.model for row in rows} == {"my-model"}
    l0s = sorted(row.l0 for row in rows if row.l0)
    assert l0s == pytest.approx(sorted(table["l0"]), abs=0.5)


def test_saes_of_two_sites_with_one_l0(trained: Path, tmp_path: Path) -> None:
    """Their ids in ``suite.json`` lack the site, and are then the same."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    facts = json.loads((copy / "suite.json").read_text())
    for row in facts["saes"]:
        old, row["id"] = row["path"], f"{row['id'].rpartition('/')[0]}/average_l0_7"
        row["path"] = f"{old.rpartition('/')[0]}/average_l0_7"
        (copy / old).rename(copy / row["path"])
    (copy / "suite.json").write_text(json.dumps(facts))
    (out,) = gs.export_suite(copy, tmp_path / "out", gs.About("mit"), progress=False)
    assert {row.site for row in gs.registry.read_release(out / "out.yaml").rows} == {*SITES, "embedding"}


def test_a_suite_that_was_changed_by_hand(trained: Path, tmp_path: Path) -> None:
    """Only what ``suite.json`` lists is exported, and all of it. Other folders may be those of another run."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    shutil.copytree(copy / "res", copy / "jobs" / "one" / "res")  # as a run on Ray leaves it
    shutil.copytree(copy / "res", copy / ".earlier" / "res")  # as a process leaves it that was killed
    (out,) = gs.export_suite(copy, tmp_path / "whole", gs.About("mit"), progress=False)
    assert len(gs.registry.read_release(out / "whole.yaml").rows) == len(SITES) + 1
    shutil.rmtree(copy / "jobs")
    (copy / "att").rename(tmp_path / "att")
    with pytest.raises(GemmaScopeError, match=f"{copy} lacks att/layer_1/.*, which its suite.json lists. Make them"):
        gs.export_suite(copy, tmp_path / "less", gs.About("mit"), progress=False)
    (tmp_path / "att").rename(copy / "att")
    shutil.copytree(copy / "res" / "layer_1", copy / "res" / "layer_3")
    with pytest.raises(GemmaScopeError, match="suite.json does not list res/layer_3/.*, which the folder holds"):
        gs.export_suite(copy, tmp_path / "more", gs.About("mit"), progress=False)
    assert not (tmp_path / "less").exists() and not (tmp_path / "more").exists()
    shutil.rmtree(copy / "res" / "layer_3")
    facts = json.loads((copy / "suite.json").read_text())
    (copy / "suite.json").write_text("{")
    with pytest.raises(GemmaScopeError, match="is not JSON"):
        gs.export_suite(copy, tmp_path / "x", gs.About("mit"), progress=False)
    (copy / "suite.json").write_text(json.dumps({**facts, "config": 3}))
    with pytest.raises(GemmaScopeError, match="The model is not known"):
        gs.export_suite(copy, tmp_path / "x", gs.About("mit"), progress=False)
