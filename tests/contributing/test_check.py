"""Checks: every fault is found, all of them in one go, and a sound file has none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import gemma_scope_tl as gs
from gemma_scope_tl.cli.registry import registry_app
from gemma_scope_tl.contributing.check import CHECKS, Finding, check_release
from gemma_scope_tl.contributing.draft import Options, draft_release, write_draft
from gemma_scope_tl.contributing.measure import held_out_tokens, l0_of, measure_l0, spread, tolerated
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.registry import read_release
from gemma_scope_tl.registry.locate import EXTRA_FOLDERS_VARIABLE, builtin_folder
from gemma_scope_tl.sae.loading import load_row
from tests.helpers import shared_model

Draft = Callable[[str], Path]


@pytest.fixture
def draft(made_up: dict[str, Path], tmp_path: Path) -> Draft:
    """A copy of the made-up release in a layout, and its registry file beside it."""

    def make(layout: str = "gemma-scope") -> Path:
        folder = tmp_path / made_up[layout].name
        shutil.copytree(made_up[layout], folder)
        options = Options(model="bundled", license="MIT", unknown_l0=True)
        return write_draft(draft_release(str(folder), tmp_path, options), tmp_path)

    return make


def edit(path: Path, *changes: tuple[str, str]) -> Path:
    """Replace the first occurrence of each text in the file."""
    text = path.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


def problems(path: Path) -> dict[tuple[str, str], str]:
    """The problems of a file by check and row."""
    return {(f.check, f.row): f.text for f in check_release(path).problems}


@pytest.mark.parametrize("layout", ["gemma-scope", "sae-lens"])
def test_a_sound_file_has_no_problems(draft: Draft, layout: str) -> None:
    report = check_release(draft(layout))
    assert report.problems == [] and len(report.rows) == 4
    assert {f.check for f in report.findings if f.ok} == set(CHECKS) - {"l0"}
    assert [f.check for f in report.findings].count("sha256") == 4


def test_the_bundled_releases_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bundled-res", "bundled-mlp", "bundled-att", "bundled-transcoders"):
        report = check_release(builtin_folder() / f"{name}.yaml")
        assert report.problems == [] and len(report.findings) == 2 + 3 * len(report.rows) > 2
    google = check_release(builtin_folder() / "gemma-scope-27b-pt-res.yaml")
    assert google.problems == [] and {f.text for f in google.findings if f.ok is None} == {"give --remote"}


def test_all_faults_are_found_at_once(draft: Draft) -> None:
    path = draft("gemma-scope")
    att, emb, res30, res90 = (row.id for row in read_release(path).rows)
    folder = path.parent / "my-saes"
    (folder / emb / "params.npz").unlink()
    with (folder / res30 / "params.npz").open("r+b") as file:
        file.seek(-30, 2)
        file.write(b"\xff")  # in the zip's index
    arrays = dict(np.load(folder / res90 / "params.npz"))
    np.savez(folder / res90 / "params.npz", **{**arrays, "b_enc": arrays["b_enc"][:-1]})
    edit(path, ("release: my-saes", "release: bundled-res"), ("d_in: 96", "d_in: 95"), ("layer: null", "layer: 3"))
    edit(path, ("license: MIT", "licence: MIT"))
    found = problems(path)
    assert ("schema", emb) in found and "exists once" in found["schema", emb]
    assert "names" in {check for check, _ in found} and "schema" in {check for check, row in found if not row}
    assert "d_in 96, should be 95" in found["shapes", att]
    assert "b_enc is [1023], should be [1024]" in found["shapes", res90]
    assert ("shapes", res30) in found and ("sha256", res30) in found and ("sha256", res90) in found
    assert ("files", emb) not in found  # its row is broken, so nothing is known of its files
    texts = [f.text for f in check_release(path).problems if f.check == "names"]
    assert any("name it bundled-res.yaml" in text for text in texts)
    assert any("bundled-res.yaml" in text and "claim 'bundled-res'" in text for text in texts)


def test_missing_files_and_hashes(draft: Draft) -> None:
    path = draft("sae-lens")
    (path.parent / "lens-saes" / "sae_0" / "cfg.json").unlink()
    shutil.rmtree(path.parent / "lens-saes" / "sae_1")
    path.write_text(re.sub(r"path: sae_2, sha256: [^}]*", "path: sae_2", path.read_text()))
    found = problems(path)
    assert set(found) == {("files", "sae_0"), ("files", "sae_1")}
    assert "no sae_0/cfg.json" in found["files", "sae_0"]
    assert "no sae_1/sae_weights.safetensors and no sae_1/cfg.json" in found["files", "sae_1"]
    assert Finding("sha256", "sae_2", None, "none given") in check_release(path).findings
    shutil.rmtree(path.parent / "lens-saes")
    assert len([key for key in problems(path) if key[0] == "files"]) == 4


def test_a_cfg_that_contradicts_its_row(draft: Draft) -> None:
    path = draft("sae-lens")
    edit(path, ("site: res, layer: 2", "site: mlp, layer: 2"), ("site: res, layer: 2", "site: transcoder, layer: 2"))
    cfg = path.parent / "lens-saes" / "sae_2" / "cfg.json"
    facts = json.loads(cfg.read_text())
    facts["metadata"]["model_name"] = "gpt2"
    cfg.write_text(json.dumps(facts))
    found = problems(path)
    assert "names hook blocks.2.hook_resid_post, but the row says site mlp, layer 2" in found["shapes", "sae_0"]
    assert "does not fit site 'transcoder'" in found["shapes", "sae_1"]
    assert "names model gpt2, but the row says bundled" in found["shapes", "sae_2"]


def test_names_of_others(draft: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draft("gemma-scope")
    other = tmp_path / "other"
    other.mkdir()
    (other / "theirs.yaml").write_text(path.read_text().replace("release: my-saes", "release: theirs"))
    edit(other / "theirs.yaml", ("canonical_release: null", "canonical_release: my-saes"))
    (other / "broken.yaml").write_text("release: [")
    monkeypatch.setenv(EXTRA_FOLDERS_VARIABLE, f"{other}:{tmp_path}")  # the file itself is known: no clash with itself
    texts = [f.text for f in check_release(path).problems]
    assert len(texts) == 2
    assert any("Another registry file is broken" in text and "broken.yaml" in text for text in texts)
    assert any("claim 'my-saes'" in text and "theirs.yaml" in text and str(path) in text for text in texts)
    monkeypatch.delenv(EXTRA_FOLDERS_VARIABLE)
    taken = path.rename(tmp_path / "gpt2-small-res-jb.yaml")
    edit(taken, ("release: my-saes", "release: gpt2-small-res-jb"))
    assert "SAELens has its own release 'gpt2-small-res-jb'" in problems(taken)["names", ""]


def test_files_that_are_no_registry_files(tmp_path: Path) -> None:
    for text in ("", "[]", "saes: 3", "a: &a 1\nb: *a", "saes: [1, {id: x}]"):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        report = check_release(path)
        assert report.problems and report.rows == ()
    assert "cannot be read" in check_release(tmp_path / "none.yaml").problems[0].text


def test_links_out_of_the_folder(draft: Draft, tmp_path: Path) -> None:
    path = draft("gemma-scope")
    id_ = read_release(path).rows[0].id
    place = path.parent / "my-saes" / id_
    shutil.move(place, tmp_path / "outside")
    place.symlink_to(tmp_path / "outside")
    found = problems(path)
    assert set(found) == {("schema", id_)} and "leads out of" in found["schema", id_]


@pytest.mark.slow
def test_l0_is_measured(draft: Draft) -> None:
    path = draft("gemma-scope")
    rows = read_release(path).rows
    findings = measure_l0(rows, 9)
    assert [f.row for f in findings] == [row.id for row in rows] and all(f.ok for f in findings)
    assert "measured" in findings[0].text
    edit(path, ("l0: 90", "l0: 200"), ("l0: 20,", "l0: null,"))
    wrong = {f.row: f for f in measure_l0(read_release(path).rows, 4)}
    assert wrong[rows[3].id].ok is False and "51 off is tolerated" in wrong[rows[3].id].text
    assert wrong[rows[1].id].ok is None and "the row has none" in wrong[rows[1].id].text
    (path.parent / "my-saes" / rows[0].id / "params.npz").unlink()
    missing = measure_l0(rows, 1)
    assert [f.ok for f in missing] == [False] and "does not exist" in missing[0].text
    model = shared_model("bundled", "bridge")
    saes = [load_row(row) for row in rows[2:]]
    tokens = held_out_tokens(model)
    (ours,), table = l0_of(model, saes[:1], tokens[:3]), evaluate(model, saes[:1], tokens[:3], progress=False)
    assert ours == pytest.approx(float(table["l0"].iloc[0]), rel=1e-6)  # counts, averaged in another order
    (deep,) = l0_of(model, [gs.JumpReLUSAE.from_arrays(saes[0].state_dict(), site="res", layer=9)], tokens[:1])
    assert isinstance(deep, GemmaScopeError) and tokens.shape == (16, 256)
    (other,) = measure_l0([rows[1].model_copy(update={"model": "gemma-2-2b"})], 1)
    assert other.ok is False and "--model" in other.text
    assert measure_l0(rows, 0) == [] and measure_l0([], 3) == []
    assert [row.id for row in spread(rows, 2)] == [rows[0].id, rows[2].id] and tolerated(8) == 3


def test_the_command(draft: Draft) -> None:
    path = draft("gemma-scope")
    done = CliRunner().invoke(registry_app, ["check", str(path), "--json"])
    facts = json.loads(done.output)
    assert done.exit_code == 0 and facts["ok"] and {f["check"] for f in facts["findings"]} == set(CHECKS) - {"l0"}
    done = CliRunner().invoke(registry_app, ["check", str(path)])
    assert all(row.id in done.output for row in read_release(path).rows), "a name is broken where there is no terminal"
    edit(path, ("d_in: 96", "d_in: 95"), ("site: embedding", "site: '[red]x'"))
    done = CliRunner().invoke(registry_app, ["check", str(path)])
    assert done.exit_code == 1 and "✗" in done.output and "2 problems" in done.output
    assert "should be 95" in done.output and "[red]x" in done.output
    done = CliRunner().invoke(registry_app, ["check", str(path), "--json"])
    assert done.exit_code == 1 and not json.loads(done.output)["ok"]
