"""Exports read back by NumPy, by this package and by stock SAELens, to the bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sae_lens import SAE
from safetensors.numpy import load_file

from gemma_scope_tl.contributing.check import check_release
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.registry import read_release, releases
from gemma_scope_tl.release.card import cell, code
from gemma_scope_tl.release.circuit_tracer import write_transcoder_set
from gemma_scope_tl.release.export import collect, export_suite
from gemma_scope_tl.release.release_saes import About
from gemma_scope_tl.release.upload import upload_suite
from gemma_scope_tl.sae.loading import load_folder, load_row
from gemma_scope_tl.sae.save import save_sae
from gemma_scope_tl.sites import ModelDims
from tests.helpers import random_sae

DIMS = ModelDims(4, 64, 4, 16)
ABOUT = About("mit", base_model="me/model")
PLACES = (("res", 2, 30), ("res", 2, 90), ("att", 1, 30), ("embedding", None, 20))


def named(site: str, layer: int | None, l0: float, seed: int) -> Any:
    """A random SAE that says its model and its L0."""
    sae = random_sae(DIMS, site, layer, d_sae=1024, seed=seed)
    sae.cfg.metadata.model_name, sae.cfg.metadata.l0 = "tiny", l0
    return sae


@pytest.fixture
def saes() -> list[Any]:
    return [named(site, layer, l0, seed) for seed, (site, layer, l0) in enumerate(PLACES)]


@pytest.fixture
def trained(saes: list[Any], tmp_path: Path) -> Path:
    """A folder as training leaves it, without a ``suite.json``."""
    folder = tmp_path / "trained"
    for sae, (site, layer, l0) in zip(saes, PLACES, strict=True):
        head = "embedding" if layer is None else f"{site}/layer_{layer}"
        save_sae(sae, folder / head / "width_1k" / f"average_l0_{l0}")
    return folder


def test_a_folder_is_copied_byte_for_byte(trained: Path, tmp_path: Path) -> None:
    (out,) = export_suite(trained, tmp_path / "out", ABOUT, model="tiny", layout="both", progress=False)
    files = sorted(p.relative_to(trained) for p in trained.rglob("params.npz"))
    assert len(files) == 4
    for file in files:
        assert (out / file).read_bytes() == (trained / file).read_bytes()
        sae = load_folder(out / file)
        lens = SAE.load_from_disk(str(out / "sae_lens" / file.parent))
        if "embedding" in file.parts:
            continue
        with np.load(trained / file) as arrays:
            for name in arrays.files:
                assert np.array_equal(arrays[name], sae.state_dict()[name].numpy())
                assert np.array_equal(arrays[name], lens.state_dict()[name].numpy())
    report = check_release(out / "out.yaml")
    assert report.problems == [] and len(report.rows) == 4 and all(row.sha256 for row in report.rows)


@pytest.mark.parametrize("written", ["gemma-scope-2", "gemma_scope_2"])
def test_layouts_are_known_by_either_spelling(written: str, saes: list[Any], tmp_path: Path) -> None:
    (out,) = export_suite(saes[:1], tmp_path / "out", ABOUT, layout=written, progress=False)  # pyright: ignore
    assert len(list(out.rglob("params.safetensors"))) == 1
    alone = save_sae(saes[0], tmp_path / "alone", format=written)  # pyright: ignore
    assert (alone / "params.safetensors").is_file()
    with pytest.raises(UnknownNameError, match="Unknown layout 'gemma'"):
        export_suite(saes[:1], tmp_path / "no", ABOUT, layout="gemma", progress=False)  # pyright: ignore


def test_saes_in_memory_keep_their_bits(saes: list[Any], tmp_path: Path) -> None:
    (out,) = export_suite(saes, tmp_path / "mine", ABOUT, progress=False)
    rows = {(r.site, r.layer, r.l0): r for r in read_release(out / "mine.yaml").rows}
    for sae, (site, layer, l0) in zip(saes, PLACES, strict=True):
        state = load_row(rows[site, layer, float(l0)]).state_dict()
        for name, value in sae.state_dict().items():
            assert torch.equal(state[name], value), name  # d_model 64: the embedding's scale of 8 is exact


def test_one_repository_a_site(saes: list[Any], tmp_path: Path) -> None:
    outs = export_suite(saes, tmp_path / "all", ABOUT, repos="site", name="tiny-scope", progress=False)
    assert [out.name for out in outs] == ["tiny-scope-att", "tiny-scope-res"]
    found = sorted(p.parent.relative_to(outs[1]).as_posix() for p in outs[1].rglob("params.npz"))
    assert found == [
        "embedding/width_1k/average_l0_20",
        "layer_2/width_1k/average_l0_30",
        "layer_2/width_1k/average_l0_90",
    ]
    for out in outs:
        assert check_release(out / f"{out.name}.yaml").problems == []


def test_the_card_says_what_is_known_and_nothing_else(saes: list[Any], tmp_path: Path) -> None:
    about = About("mit", "me/model", recipe={"lr": 7e-5, "bandwidth": 0.01, "epochs": 2}, searched=["bandwidth"])
    frame = pd.DataFrame(
        [{"site": "res", "layer": 2, "d_sae": 1024, "l0": l0, "fvu": fvu} for l0, fvu in ((88.5, 0.125), (31.5, 0.25))]
    )
    (out,) = export_suite(saes, tmp_path / "c", about, metrics=frame, progress=False)
    text = (out / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "mit" and head["base_model"] == "me/model" and head["library_name"] == "gemma-scope-tl"
    assert "| tiny | res | 2 | 1k (1024) | 2 | 30-90 |" in text
    assert "| `res/layer_2/width_1k/average_l0_30` | res | 2 | 1024 | 31.5 | 0.25 |" in text
    assert "| `att/layer_1/width_1k/average_l0_30` | att | 1 | 1024 |  |  |" in text and "2 of 4 were not" in text
    assert "| lr | 7e-05 | 7e-05 | the paper |" in text and "| bandwidth | 0.01 | 0.001 | search |" in text
    assert "| epochs | 2 |  | set beforehand |" in text
    assert "## Training data\n\nNot stated by the authors." in text and "delta loss" not in text


def test_values_in_a_card_are_text(saes: list[Any], tmp_path: Path) -> None:
    hostile = "<script>x</script> | `a` [b](javascript:c)\n# d"
    about = About("mit", recipe={"lr": 7e-5, hostile: hostile, "a_b": [1, 2]}, notes=["one\n# two"])
    (out,) = export_suite(saes, tmp_path / "c", about, progress=False)
    text = (out / "README.md").read_text()
    assert "<script" not in text and not re.search(r"^# [d t]", text, re.M) and "- one\n  # two" in text
    rows = [line for line in text.splitlines() if "script>" in line]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 5  # one row of four cells
    assert "[b](" not in rows[0] and "| a_b | \\[1, 2\\] |" in text
    assert code("a``b`") == "``` a``b` ```" and code("a|b") == "`a\\|b`" and cell("_a_") == "\\_a\\_"


def test_circuit_tracer_files(tmp_path: Path) -> None:
    saes = [named("transcoder", layer, 40 + 50 * far, layer) for layer in range(2) for far in range(2)]
    (out,) = export_suite(saes, tmp_path / "t", ABOUT, circuit_tracer=True, progress=False)
    folder = out / "circuit_tracer" / "width_1k"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model_kind"] == "transcoder_set" and config["feature_input_hook"] == "ln2.hook_normalized"
    for layer in range(2):
        arrays = load_file(folder / f"layer_{layer}.safetensors")
        state = saes[2 * layer + 1].state_dict()  # L0 90, the nearer to 100
        assert np.array_equal(arrays["W_enc"], state["W_enc"].numpy().T)
        assert np.array_equal(arrays["W_dec"], state["W_dec"].numpy())
        assert np.array_equal(arrays["activation_function.threshold"], state["threshold"].numpy())
    with pytest.raises(GemmaScopeError, match=r"there is none in \[0\]"):
        export_suite(saes[2:], tmp_path / "gap", ABOUT, circuit_tracer=True, progress=False)
    write_transcoder_set(tmp_path / "w", collect(saes[:1]), "me/model")
    assert (tmp_path / "w" / "layer_0.safetensors").is_file()


def test_what_cannot_be_exported(saes: list[Any], trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="layout"):
        export_suite(saes, tmp_path / "a", ABOUT, layout="pickle")  # type: ignore[arg-type]
    with pytest.raises(GemmaScopeError, match="The model is not known"):
        export_suite(trained, tmp_path / "a", ABOUT, progress=False)
    with pytest.raises(GemmaScopeError, match="is inside the other"):
        export_suite(trained, trained / "out", ABOUT, model="tiny")
    with pytest.raises(GemmaScopeError, match="would both be in"):
        export_suite([saes[0], saes[0]], tmp_path / "a", ABOUT)
    with pytest.raises(GemmaScopeError, match="licence"):
        About(" ")
    export_suite(saes[:1], tmp_path / "a", ABOUT, progress=False)
    export_suite(saes[:1], tmp_path / "a", ABOUT, progress=False)  # again: the same files
    with pytest.raises(GemmaScopeError, match="of another export"):
        export_suite(saes[1:], tmp_path / "a", ABOUT, progress=False)
    wrong = pd.DataFrame([{"site": "mlp", "layer": 0, "d_sae": 1024, "l0": 3.0}])
    with pytest.raises(GemmaScopeError, match="site mlp, layer 0"):
        export_suite(saes, tmp_path / "b", ABOUT, metrics=wrong)
    assert not (tmp_path / "b").exists()
    del saes[0].cfg.metadata.l0
    with pytest.raises(GemmaScopeError, match="does not say its L0"):
        collect(saes)


def test_an_l0_that_rounds_to_zero(tmp_path: Path) -> None:
    (out,) = export_suite([named("res", 1, 0.25, 0)], tmp_path / "rare", ABOUT, progress=False)
    (row,) = read_release(out / "rare.yaml").rows
    assert row.l0 == 0.25 and row.path == "layer_1/width_1k/average_l0_0.250"
    with pytest.raises(GemmaScopeError, match=r"res SAE of layer 1 has an L0 of 0.0001. No latent of it fires"):
        export_suite([named("res", 1, 1e-4, 0)], tmp_path / "never", ABOUT, progress=False)
    dead = tmp_path / "dead" / "res" / "layer_1" / "width_1k" / "average_l0_0"
    save_sae(named("res", 1, 0.25, 0), dead)
    with pytest.raises(GemmaScopeError, match=r"average_l0_0 says that its SAE has an L0 of 0.*leave it out"):
        export_suite(tmp_path / "dead", tmp_path / "out", ABOUT, model="tiny", progress=False)
    dead.rename(dead.with_name("average_l0_0.4"))
    (out,) = export_suite(tmp_path / "dead", tmp_path / "out", ABOUT, model="tiny", progress=False)
    assert [row.l0 for row in read_release(out / "out.yaml").rows] == [0.4] and not check_release(
        out / "out.yaml"
    ).problems


@pytest.mark.parametrize("layout", ["gemma-scope", "sae-lens", "both"])
def test_an_export_can_be_exported_again(saes: list[Any], tmp_path: Path, layout: Any) -> None:
    """The registry file in the folder says the model and the sites, which the paths of one site do not."""
    (first,) = export_suite(saes[:2], tmp_path / "first", ABOUT, layout=layout, progress=False)
    (again,) = export_suite(first, tmp_path / "again", ABOUT, layout=layout, progress=False)
    names = {p.relative_to(first) for p in first.rglob("*") if p.suffix in (".npz", ".safetensors")}
    assert names and names == {p.relative_to(again) for p in again.rglob("*") if p.suffix in (".npz", ".safetensors")}
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    rows = [[(r.site, r.layer, r.l0, r.d_sae) for r in read_release(f / f"{f.name}.yaml").rows] for f in (first, again)]
    assert rows[0] == rows[1]


def test_a_folder_does_not_hide_the_release_of_its_name(
    saes: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_suite(saes[:1], "gemma-scope-bundled", ABOUT, name="other", progress=False)
    assert {item.model for item in collect("./gemma-scope-bundled")} == {"tiny"}
    assert {item.model for item in collect(Path("gemma-scope-bundled"))} == {"tiny"}
    bundled = next(name for name in releases() if "bundled" in name)
    Path("gemma-scope-bundled").rename(bundled)
    assert {item.model for item in collect(bundled)} == {"bundled"}


def test_sources_that_the_system_will_not_look_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for source in (tmp_path / ("c" * 300), tmp_path / "file" / "x"):
        with pytest.raises(GemmaScopeError):
            collect(source)
        with pytest.raises(GemmaScopeError):
            collect(str(source))
        with pytest.raises(GemmaScopeError):
            upload_suite(source, "owner/name")
        with pytest.raises(GemmaScopeError):
            load_folder(source)
