"""Export in Gemma Scope 2's layout: read back to the bit, by us and by stock SAELens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import gemma_scope_tl as gs
from gemma_scope_tl.cli import app
from gemma_scope_tl.contributing.check import check_release
from gemma_scope_tl.contributing.coder_paths import parse_coder_path
from gemma_scope_tl.contributing.draft import Options, draft_release
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry.schema import read_release
from gemma_scope_tl.release.contents import check_contents, read_contents
from gemma_scope_tl.release.export import export_suite
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from tests.coder_files import KINDS, LAYER, Coder, inputs
from tests.sae.test_coder_files import load_stock

ABOUT = gs.About("cc-by-4.0", base_model="google/gemma-3-1b-pt")


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder with one coder of every kind."""
    for made in KINDS.values():
        made.write(tmp_path / "released")
    return tmp_path / "released"


def files_of(root: Path) -> dict[str, bytes]:
    names = ("params.safetensors", "config.json")
    return {path.relative_to(root).as_posix(): path.read_bytes() for name in names for path in root.rglob(name)}


def test_a_folder_is_copied_byte_for_byte(released: Path, tmp_path: Path) -> None:
    (out,) = export_suite(released, tmp_path / "made-up", ABOUT, layout="gemma_scope_2", progress=False)
    assert files_of(out) == files_of(released)
    rows = {row.path: row for row in read_release(out / "made-up.yaml").rows}
    assert set(rows) == {made.path for made in KINDS.values()}
    for made in KINDS.values():
        row = rows[made.path]
        assert (row.site, row.layer, row.l0, row.label, row.model) == (made.site, LAYER, 60, "medium", "gemma-3-1b")
        assert row.affine == (made.affine if made.site == "transcoder" else None)
        assert row.format == "gemma_scope_2" and row.sha256 is not None
        sae, x = JumpReLUSAE.from_row(row), inputs(made, 20)
        np.testing.assert_allclose(sae(torch.from_numpy(x)).detach(), Coder(made.arrays()).forward(x), atol=2e-5)
    assert not check_release(out / "made-up.yaml").problems
    contents = read_contents(out)
    assert not contents.left_out and len(check_contents(contents)) == 2 + 2 * len(KINDS)
    (again,) = export_suite(out, tmp_path / "again", ABOUT, layout="gemma_scope_2", progress=False)
    assert files_of(again) == files_of(released)


def test_from_memory_and_from_other_layouts(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The L0 stands in place of a label; two transcoders of a layer differ by their skip connection."""
    saes = [JumpReLUSAE.from_folder(released / KINDS[kind].path) for kind in KINDS if kind != "res-all"]
    (out,) = export_suite(saes, tmp_path / "made-up", ABOUT, layout="gemma_scope_2", progress=False)
    paths = sorted(row.path for row in read_release(out / "made-up.yaml").rows)
    assert paths == [
        "attn_out/layer_13_width_512_l0_60",
        "mlp_out/layer_13_width_512_l0_60",
        "resid_post/layer_13_width_512_l0_60",
        "transcoder/layer_13_width_512_l0_60",
        "transcoder/layer_13_width_512_l0_60_affine",
    ]
    for path in paths:
        back = JumpReLUSAE.from_folder(out / path)
        (sae,) = [one for one in saes if type(one) is type(back) and one.site == back.site]
        theirs = load_stock(out / path, "google/gemma-scope-2-1b-pt", monkeypatch, path)
        for name, tensor in sae.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor) and torch.equal(theirs.state_dict()[name], tensor)
    simple = [sae for sae in saes if not sae.is_transcoder]
    for layout in ("gemma-scope", "sae-lens"):
        (first,) = export_suite(simple, tmp_path / layout, ABOUT, layout=layout, progress=False)
        (second,) = export_suite(first, tmp_path / f"{layout}-2", ABOUT, layout="gemma_scope_2", progress=False)
        wanted = {name: data for name, data in files_of(out).items() if not name.startswith("transcoder")}
        assert files_of(second) == wanted


@pytest.mark.parametrize("layout", ["gemma-scope", "sae-lens", "gemma_scope_2"])
def test_a_skip_connection_is_asked_for_by_name_in_every_layout(layout: str, released: Path, tmp_path: Path) -> None:
    """Both transcoders of a layer are exported and exported again, and ``affine=`` tells them apart."""
    from gemma_scope_tl.registry import locate

    both = [JumpReLUSAE.from_folder(released / KINDS[kind].path) for kind in ("transcoder", "affine")]
    (first,) = export_suite(both, tmp_path / "first", ABOUT, layout=layout, progress=False)
    (out,) = export_suite(first, tmp_path / "skips", ABOUT, layout=layout, progress=False)
    rows = read_release(out / "skips.yaml").rows
    assert {row.affine for row in rows} == {True, False}
    assert all(row.path.endswith("_affine") == row.affine for row in rows)
    assert not check_release(out / "skips.yaml").problems
    gs.register_release(out / "skips.yaml")
    try:
        place = ("gemma-3-1b", "transcoder", LAYER, "512", "closest:60")
        for affine in (True, False):
            found = gs.load_sae(*place, release="skips", affine=affine)
            assert (getattr(found, "W_skip", None) is not None) == affine
        with pytest.raises(GemmaScopeError, match="affine=True or affine=False"):
            gs.load_sae(*place, release="skips")
    finally:
        locate.remove_file((out / "skips.yaml").resolve())


def test_without_a_config_one_is_written(released: Path, tmp_path: Path) -> None:
    for config in released.rglob("config.json"):
        config.unlink()
    with pytest.raises(GemmaScopeError, match="The model is not known"):
        export_suite(released, tmp_path / "out", ABOUT, layout="gemma_scope_2", progress=False)
    options = Options("r", "gemma-3-1b", license="mit", l0=60.0)
    rows = draft_release(str(released), tmp_path, options).release.saes
    assert {row.path: row.site for row in rows} == {made.path: made.site for made in KINDS.values()}
    head: dict[str, Any] = {"release": "r", "repo": "./released", "model": "gemma-3-1b", "license": "mit"}
    listed = [row.model_dump(exclude_none=True) for row in rows]
    (tmp_path / "r.yaml").write_text(
        json.dumps({**head, "description": "Made up", "format": "gemma_scope_2", "saes": listed})
    )
    gs.register_release(tmp_path / "r.yaml")
    try:
        (out,) = export_suite("r", tmp_path / "out", ABOUT, layout="gemma_scope_2", progress=False)
    finally:
        from gemma_scope_tl.registry import locate

        locate.remove_file((tmp_path / "r.yaml").resolve())
    for made in KINDS.values():
        said = json.loads((out / made.path / "config.json").read_text())
        assert {**said, "model_name": made.config["model_name"]} == made.config


def test_damage_is_found(released: Path, tmp_path: Path) -> None:
    (out,) = export_suite(released, tmp_path / "made-up", ABOUT, layout="gemma_scope_2", progress=False)
    config = out / KINDS["res"].path / "config.json"
    config.write_text(config.read_text().replace("60", "59"))
    (problem,) = check_release(out / "made-up.yaml").problems
    assert problem.row == KINDS["res"].path and "has l0 59, should be 60" in problem.text
    wrong = released / KINDS["transcoder"].path
    wrong.rename(wrong.with_name(f"{wrong.name}_affine"))
    with pytest.raises(GemmaScopeError, match="disagree on whether there is a skip connection"):
        export_suite(released, tmp_path / "out", ABOUT, layout="gemma_scope_2", progress=False)


def test_what_has_no_folder_in_this_layout(tmp_path: Path) -> None:
    arrays = {name.replace("w_", "W_"): array for name, array in KINDS["res"].arrays().items()}
    sae = JumpReLUSAE.from_arrays(arrays, "gemma-2-2b", "embedding")
    sae.cfg.metadata.l0 = 7.0
    with pytest.raises(GemmaScopeError, match="no folder for site 'embedding'"):
        export_suite(sae, tmp_path / "out", ABOUT, layout="gemma_scope_2", progress=False)


def test_the_command_line(released: Path, tmp_path: Path) -> None:
    arguments = ["export", str(released), str(tmp_path / "out"), "--license", "mit", "--layout", "gemma_scope_2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert files_of(tmp_path / "out") == files_of(released)


def test_circuit_tracer_reads_behind_the_gain(released: Path, tmp_path: Path) -> None:
    from gemma_scope_tl.release.circuit_tracer import write_transcoder_set
    from gemma_scope_tl.release.export import collect

    folder = released / KINDS["affine"].path
    write_transcoder_set(tmp_path / "set", collect([JumpReLUSAE.from_folder(folder)]), "google/gemma-3-1b-pt")
    config = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "hook_mlp_out")


@pytest.mark.parametrize("path", ["layer_1_width_16k", "resid_post/layer_1_width_16k_l0_huge", "clt/width_262k_l0_big"])
def test_other_paths(path: str) -> None:
    assert parse_coder_path(path) is None


def test_seeds_and_unknown_folders() -> None:
    found = parse_coder_path("resid_post/layer_17_width_262k_l0_medium_seed_1")
    assert found is not None and (found.site, found.seed, found.affine) == ("res", 1, False)
    found = parse_coder_path("mine/layer_17_width_1m_l0_12.5")
    assert found is not None and (found.site, found.l0, found.label) == (None, 12.5, None)
