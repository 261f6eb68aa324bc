"""The committed registry is what the build script derives from SAELens's catalogue, and says where they differ."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemma_scope_tl.errors import RegistryError
from gemma_scope_tl.registry import load_release, resolve

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_registry.py"
COUNTS = {
    "2b-pt-res": 316,
    "2b-pt-mlp": 260,
    "2b-pt-att": 260,
    "2b-pt-transcoders": 153,
    "9b-pt-res": 536,
    "9b-pt-mlp": 492,
    "9b-pt-att": 492,
    "9b-it-res": 30,
    "27b-pt-res": 18,
}
FEW_LAYERS = {"gemma-scope-9b-it-res": [9, 20, 31], "gemma-scope-27b-pt-res": [10, 22, 34]}
D_IN = {("2b", False): 2304, ("2b", True): 2048, ("9b", False): 3584, ("9b", True): 4096, ("27b", False): 4608}
NEAR_DUPLICATES = {
    "16k": {(2, 141, 142), (4, 124, 125), (13, 83, 84), (14, 83, 84), (23, 74, 75)},
    "65k": {(13, 74, 75), (18, 116, 117), (21, 111, 112), (22, 116, 117), (23, 123, 124)},
}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """The build script as a module."""
    spec = importlib.util.spec_from_file_location("build_registry", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def catalogue(build: ModuleType) -> dict[str, Any]:
    """SAELens's catalogue."""
    return build.sae_lens_catalogue()


@pytest.fixture(scope="module")
def derived(build: ModuleType, catalogue: dict[str, Any]) -> list[Any]:
    """Every release, derived again."""
    return build.derive_all(catalogue)


def test_the_committed_files_are_as_derived(build: ModuleType, derived: list[Any]) -> None:
    wanted = build.texts(derived)
    schema = json.loads(wanted.pop("schema.json"))
    assert len(wanted) == 9 + 80 + 14 + 1 and build.differing(build.FOLDER, wanted) == []
    assert json.loads((build.FOLDER / "schema.json").read_text()) == schema


@pytest.mark.parametrize(("repo", "count"), COUNTS.items())
def test_counts_per_repository(repo: str, count: int) -> None:
    file = load_release(f"gemma-scope-{repo}")
    assert file.repo == f"google/gemma-scope-{repo}" and len(file.saes) == count


def test_every_name_of_sae_lens_resolves_to_the_same_files(catalogue: dict[str, Any]) -> None:
    ours = {
        name: entry
        for name, entry in catalogue.items()
        if name.startswith("gemma-scope-") and not name.startswith("gemma-scope-2-")
    }
    assert len(ours) == 17
    for name, entry in ours.items():
        for sae in entry["saes"]:
            row = resolve(name, sae["id"])
            assert (row.repo, row.path) == (entry["repo_id"], sae["path"])
            assert row.path.endswith(f"/average_l0_{row.l0:g}") and f"/width_{row.width}/" in row.path
            if sae["id"].endswith("/canonical"):
                assert row.canonical and row.neuronpedia == sae["neuronpedia"]


def test_layers_and_widths_cover_the_models(build: ModuleType) -> None:
    for spec in build.SPECS:
        rows = load_release(spec.release).rows
        layers = {row.layer for row in rows if row.layer is not None}
        assert sorted(layers) == FEW_LAYERS.get(spec.release, list(range(26 if "-2b-" in spec.release else 42)))
        assert {row.d_in for row in rows} == {D_IN[spec.release.split("-")[2], spec.site == "att"]}


def test_known_oddities_are_corrected_and_noted(derived: list[Any]) -> None:
    differences = {(d.release, d.what) for one in derived for d in one.differences}
    said = "\n".join(f"{release}: {what}" for release, what in differences)
    for expected in (
        "model of gemma-scope-9b-it-res: gemma-2-9b -> gemma-2-9b-it",
        "l0 of layer_20/width_524k/canonical: 78 -> 48",
        "layer_27/width_16k: L0s [64, 136] are as near to 100; canonical is 136",
        "layer_23/width_131k: L0s [66, 134] are as near to 100; canonical is 66",
        "neuronpedia id of layer_2/width_16k/average_l0_8 dropped: gemma-2-9b/20-gemmascope-res-131k__l0-10",
        "layer_12/width_131k: none of 6 is canonical",
        "l0 of 4 rows added",
        "127 rows added, unverified",
        "26 Neuronpedia ids carry a warning",
    ):
        assert expected in said
    assert load_release("gemma-scope-9b-it-res").model == "gemma-2-9b-it"
    assert resolve("gemma-scope-9b-pt-res-canonical", "layer_20/width_524k/canonical").l0 == 48
    doubtful = resolve("gemma-scope-2b-pt-res", "layer_21/width_16k/average_l0_70").note
    assert doubtful and "doubts" in doubtful


def test_unregistered_transcoders_are_marked(build: ModuleType, catalogue: dict[str, Any]) -> None:
    """148 files are known by name in 21 layers; 21 of them are among SAELens's 26, one a layer."""
    rows = load_release("gemma-scope-2b-pt-transcoders").rows
    listed = {sae["path"] for sae in catalogue["gemma-scope-2b-pt-transcoders"]["saes"]}
    known = {f"layer_{layer}/width_16k/average_l0_{l0}" for layer, l0s in build.TRANSCODER_L0S.items() for l0 in l0s}
    assert (len(listed), len(known), len(listed & known)) == (26, 148, 21)
    assert {row.path for row in rows} == listed | known
    assert {row.path for row in rows if row.unverified} == known - listed
    others = [row for name in COUNTS for row in load_release(f"gemma-scope-{name}").rows if "transcoders" not in name]
    assert not any(row.unverified or row.neuronpedia_warning for row in others)


def test_dashboards_of_the_wrong_tensor_carry_a_warning() -> None:
    rows = load_release("gemma-scope-2b-pt-transcoders").rows
    linked = [row for row in rows if row.neuronpedia]
    assert len(linked) == 26 and all("residual stream" in str(row.neuronpedia_warning) for row in linked)
    assert not any(row.neuronpedia_warning for row in rows if not row.neuronpedia)


def test_near_duplicates_are_exactly_the_known_ones() -> None:
    noted = [row for name in COUNTS for row in load_release(f"gemma-scope-{name}").rows if row.note]
    found = {(row.release, row.id) for row in noted if "near-duplicate" in str(row.note)}
    assert found == {
        ("gemma-scope-2b-pt-res", f"layer_{layer}/width_{width}/average_l0_{l0}")
        for width, triples in NEAR_DUPLICATES.items()
        for layer, *l0s in triples
        for l0 in l0s
    }


def test_canonical_is_nearest_to_an_l0_of_100() -> None:
    for name in COUNTS:
        rows = load_release(f"gemma-scope-{name}").rows
        for row in rows:
            if row.canonical and row.l0:
                place = (row.site, row.layer, row.width)
                others = [o.l0 for o in rows if (o.site, o.layer, o.width) == place and o.l0]
                assert abs(row.l0 - 100) == min(abs(l0 - 100) for l0 in others)


def test_neuronpedia_ids_are_those_of_the_row() -> None:
    for name in COUNTS:
        for row in load_release(f"gemma-scope-{name}").rows:
            if row.neuronpedia:
                source = f"{row.model}/{row.layer}-gemmascope-{row.site}-{row.width}"
                assert row.neuronpedia in (source, f"{source}__l0-{row.l0:g}")


def test_check_compares_and_writing_repairs(
    build: ModuleType,
    derived: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "derive_all", lambda: derived)
    folder = ["--folder", str(tmp_path / "yaml")]
    assert build.main(["--check", *folder]) == 1
    assert build.main(folder) == 0 and build.main(["--check", *folder]) == 0
    assert "total" in capsys.readouterr().out
    path = tmp_path / "yaml" / "gemma-scope-2b-pt-res.yaml"
    path.write_text(path.read_text().replace("l0: 71", "l0: 72"))
    assert build.main(["--check", *folder]) == 1
    assert capsys.readouterr().out.rstrip().endswith("not as derived: gemma-scope-2b-pt-res.yaml")


def test_what_it_does_not_know_stops_the_build(build: ModuleType) -> None:
    spec = build.SPECS[0]
    sae = {"id": "layer_0/width_16k/new", "path": "layer_0/width_16k/new"}
    entry = {"model": spec.model, "repo_id": spec.repo, "saes": [sae]}
    with pytest.raises(RegistryError, match="new kind"):
        build.derive(spec, {spec.release: entry})
    with pytest.raises(RegistryError, match="now reads"):
        build.derive(spec, {spec.release: {**entry, "repo_id": "other/repo"}})
