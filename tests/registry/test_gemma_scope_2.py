"""The rows of Gemma Scope 2: counts, L0s by the formula, names, look-ups and their choices, and speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_scope_tl import load_suite
from gemma_scope_tl.errors import RegistryError, UnknownNameError
from gemma_scope_tl.registry import catalog, clear_cache, find, index, list_saes, load_release, read_release, resolve
from gemma_scope_tl.registry.index import INDEX_NAME, index_text
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.registry.locate import builtin_folder
from gemma_scope_tl.registry.schema import SAERow
from scripts.build_registry import derive_all, report, sae_lens_catalogue
from scripts.registry_files import gemma_scope_2

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "gemma-scope-2-"
LAYERS = {"270m": 18, "1b": 26, "4b": 34, "12b": 48, "27b": 62}
D = {"270m": (640, 1024), "1b": (1152, 1024), "4b": (2560, 2048), "12b": (3840, 4096), "27b": (5376, 4096)}
M = "gemma-3-1b"


@pytest.fixture(scope="module")
def catalogue() -> dict[str, Any]:
    """SAELens's catalogue of Gemma Scope 2, read by another reader of YAML than the build's."""
    import sae_lens

    text = (Path(str(sae_lens.__file__)).parent / "pretrained_saes.yaml").read_text()
    whole = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {name: entry for name, entry in whole.items() if name.startswith(PREFIX)}


@pytest.fixture(scope="module")
def rows() -> list[SAERow]:
    """All rows of Gemma Scope 2 with coders of one layer."""
    return [row for row in select_rows(pattern=f"{PREFIX}*") if row.layers is None]


def refused(*args: Any, error: type[Exception] = UnknownNameError, **kwargs: Any) -> str:
    """What the look-up's error says."""
    with pytest.raises(error) as caught:
        find(*args, **kwargs)
    return str(caught.value)


# --- the rows


def test_every_entry_of_sae_lens_is_a_row_with_its_l0_and_dashboard(
    catalogue: dict[str, Any], rows: list[SAERow]
) -> None:
    """The registry's L0s are the formula's, so that this compares the formula with every catalogued number."""
    confirmed = {(row.release, row.id): row for row in rows if not row.unverified}
    entries = {(name, sae["id"]): sae for name, entry in catalogue.items() for sae in entry["saes"]}
    assert len(entries) == 8784 and confirmed.keys() == entries.keys()
    for key, sae in entries.items():
        row = confirmed[key]
        assert (row.path, row.l0, row.neuronpedia) == (sae["path"], sae["l0"], sae.get("neuronpedia"))
        assert row.repo == catalogue[key[0]]["repo_id"] and row.format == "gemma_scope_2"
        assert row.model_family.hub_ids[row.model] == catalogue[key[0]]["model"]
    assert sum(row.neuronpedia is not None for row in confirmed.values()) == 222


def test_the_grid_is_complete_and_what_sae_lens_lacks_is_unverified(rows: list[SAERow]) -> None:
    assert len(rows) == 9504 and len({row.release for row in rows}) == 80
    counts = Counter(row.release.removeprefix(PREFIX) for row in rows)
    for size, layers in LAYERS.items():
        for tuned in ("pt", "it"):
            head = f"{size}-{tuned}-"
            assert [counts[f"{head}{kind}-all"] for kind in ("res", "mlp", "att", "transcoders")] == [
                *(4 * layers for _ in range(3)), 8 * layers
            ]  # fmt: skip
            few = [counts[f"{head}{kind}"] for kind in ("res", "mlp", "att", "transcoders")]
            assert few == [52, 48 if size == "1b" else 36, 36, 72]
    marked = Counter(row.release.removeprefix(PREFIX) for row in rows if row.unverified)
    assert marked == {
        "27b-pt-mlp": 36, "27b-pt-mlp-all": 248, "27b-pt-att": 36, "27b-pt-att-all": 248, "27b-pt-transcoders": 72,
        "270m-pt-transcoders": 70, "27b-pt-transcoders-all": 5, "27b-it-transcoders-all": 5,
    }  # fmt: skip
    assert sum(marked.values()) == 720
    for tuned in ("pt", "it"):
        release = f"{PREFIX}27b-{tuned}-transcoders-all"
        lacking = {row.id for row in rows if row.unverified and row.release == release}
        assert lacking == {
            f"layer_{layer}_width_16k_l0_{label}"
            for layer, label in ((4, "small"), (4, "big"), (5, "small"), (43, "small"), (43, "big"))
        }


def test_names_say_what_the_fields_say(rows: list[SAERow]) -> None:
    sites = {"res": "res", "mlp": "mlp", "att": "att", "transcoders": "transcoder"}
    folders = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out", "transcoder": "transcoder"}
    for row in rows:
        size, _, kind, *rest = row.release.removeprefix(PREFIX).split("-")
        assert row.series == ("all" if rest else "subset") and row.site == sites[kind]
        name = f"layer_{row.layer}_width_{row.width}_l0_{row.label}{'_affine' if row.affine else ''}"
        name += "" if row.seed is None else f"_seed_{row.seed}"
        assert row.path == f"{folders[row.site]}{'_all' if rest else ''}/{name}"
        assert row.d_in == D[size][row.site == "att"] and row.layer is not None and row.layer < LAYERS[size]
        assert row.weights_path == f"{row.path}/params.safetensors"
    assert {(row.site, row.width, row.label) for row in rows if row.seed} == {("res", "262k", "medium")}
    assert all((row.affine is not None) == (row.site == "transcoder") for row in rows)


def test_the_formula_in_whole_numbers_is_that_of_fractions() -> None:
    from fractions import Fraction
    from math import floor

    for (series, label), (low, high) in gemma_scope_2.TARGETS.items():
        for n in LAYERS.values():
            for layer in range(n):
                exact = floor(low + (high - low) * min(Fraction(1), Fraction(3 * layer, n)))
                assert gemma_scope_2.target_l0(series, label, layer, n) == exact


def test_a_formula_that_misses_and_unknown_entries_stop_the_build(
    catalogue: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts import build_registry

    spec = next(s for s in gemma_scope_2.SPECS if s.release == "gemma-scope-2-1b-pt-res")
    entry = catalogue[spec.release]
    first, *rest = entry["saes"]
    wrong = gemma_scope_2.derive(spec, {spec.release: entry | {"saes": [first | {"l0": first["l0"] + 1}, *rest]}})
    assert (wrong.equal, wrong.compared) == (51, 52) and "does not hold" in wrong.differences[0].reason
    monkeypatch.setattr(build_registry, "derive_all", lambda: [wrong])
    monkeypatch.setattr(build_registry, "differing", lambda *_: [])
    assert build_registry.main(["--check"]) == 1 and "the formula misses 1 L0s" in capsys.readouterr().out
    for change, text in (
        ({"repo_id": "other/repo"}, "is now of"),
        ({"saes": [first | {"path": "resid_post/layer_13_width_16k_l0_huge"}]}, "new kind"),
        ({"saes": [{"id": "layer_3_width_16k_l0_big", "path": "resid_post/layer_3_width_16k_l0_big"}]}, "grid"),
    ):
        with pytest.raises(RegistryError, match=text):
            gemma_scope_2.derive(spec, {spec.release: entry | change})
    with pytest.raises(RegistryError, match="new kind: gemma-scope-2-1b-pt-clt"):
        gemma_scope_2.derive_all({"gemma-scope-2-1b-pt-clt": {"conversion_func": "gemma_3"}})
    dropped = gemma_scope_2.derive(
        spec, {spec.release: entry | {"saes": [first | {"neuronpedia": "gemma-3-1b/12-gemmascope-2-res-16k"}, *rest]}}
    )
    assert any("dropped" in d.what for d in dropped.differences)


def test_the_check_prints_counts_and_hits(catalogue: dict[str, Any]) -> None:
    text = report(derive_all(sae_lens_catalogue()))
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert lines["gemma-scope-2-27b-it-transcoders-all"] == ["496", "0", "62", "5", "491", "of", "491"]
    assert lines["total"][0] == "12173" and lines["total"][-3:] == ["8784", "of", "8784"]


# --- look-ups


def test_look_ups_by_label_number_and_nearest() -> None:
    wanted = resolve("gemma-scope-2-1b-pt-res", "layer_13_width_65k_l0_medium")
    for model in (M, "google/gemma-3-1b", "gemma-3-1b-pt", "google/gemma-3-1b-pt"):
        for l0 in ("medium", 60, 60.0, "60", "closest:50"):
            assert find(model, "res", 13, "65k", l0) == wanted
    assert find("google/gemma-3-270m", "res", 9, l0="big") == find("gemma-3-270m-pt", "res", 9, l0="big")
    assert find("google/gemma-3-1b-it", "res", 13, "65k", "medium").model == "gemma-3-1b-it"
    for name in ("gemma-3-1b-it-pt", "gemma-2-2b-pt", "someone/gemma-3-1b"):
        assert "Unknown model" in refused(name, "res", 13)


def test_the_subset_is_taken_where_both_series_have_one() -> None:
    assert find(M, "res", 13, "16k", "small").release == "gemma-scope-2-1b-pt-res"
    assert find(M, "res", 13, "16k", "small", series="all").release == "gemma-scope-2-1b-pt-res-all"
    assert find(M, "res", 13, "16k", "small", release="gemma-scope-2-1b-pt-res-all").series == "all"
    assert find(M, "res", 12, "16k", "small").series == "all"
    assert [find(M, "res", 13, "16k", l0).series for l0 in (120, 150, "closest:119", "big")] == [
        "all", "subset", "all", "subset"
    ]  # fmt: skip
    text = refused(M, "res", 12, "16k", "small", series="subset")
    assert sorted(text.split("Nearest: ")[1].rstrip(".").split(", ")) == ["13", "17", "22", "7"]
    assert "Nearest: all, subset" in refused(M, "res", 12, series="al")
    assert "omit series=" in refused("gemma-2-2b", "res", 20, series="all")


def test_skip_connections_and_seeds_are_chosen() -> None:
    text = refused(M, "transcoder", 13, "16k", "small", error=RegistryError)
    assert "affine=True or affine=False" in text and "small_affine" in text
    assert find(M, "transcoder", 13, "16k", "small", affine=True).affine
    assert not find(M, "transcoder", 13, "16k", "small", affine=False).affine
    assert "affine=False" in refused(M, "res", 13, "16k", "small", affine=True)
    assert find(M, "res", 13, "262k", "medium").seed is None
    assert find(M, "res", 13, "262k", "medium", seed=1).id == "layer_13_width_262k_l0_medium_seed_1"
    assert "Nearest: 1." in refused(M, "res", 13, "262k", "medium", seed=2)
    assert "omit seed=" in refused(M, "res", 13, "16k", "medium", seed=1)


def test_one_l0_with_and_without_a_skip_connection_asks_for_the_kind() -> None:
    """The default L0 is the only one here, so that what is left to choose is the skip connection."""
    place: Any = ("bundled-gemma3", "transcoder", 2, "256")
    with pytest.raises(RegistryError, match=r"2 SAEs of .*: layer_2.*affine=True or affine=False"):
        find(*place)
    for affine in (True, False):
        assert find(*place, affine=affine) == find(*place, l0="small", affine=affine)
    with pytest.raises(UnknownNameError, match=r"no canonical SAE. L0s: 20 \(small\), 60 \(medium\)"):
        find("bundled-gemma3", "res", 2, "256")


def test_errors_name_what_exists() -> None:
    assert "20 (small), 60 (medium), 120 (big), 150 (big)" in refused(M, "res", 13)
    assert "l0='closest:61' takes 60" in refused(M, "res", 13, l0=61)
    assert "nearest first: 7, 13, 17, 22" in refused(M, "res", 3, "16k", "medium")
    assert "nearest first: 22, 17, 13, 7" in refused(M, "res", 25, "65k", "medium")
    assert "Nearest: medium" in refused(M, "res", 13, l0="mediun")
    assert "label 'medium'. L0s: 22, 38" in refused("gemma-2-2b", "res", 20, l0="medium")
    assert "Unknown site" in refused(M, "embedding", None)


def test_a_suite_is_of_one_series_where_one_has_all() -> None:
    def series(**kwargs: Any) -> tuple[int, set[str | None]]:
        rows = load_suite(M, "res", **kwargs).rows
        return len(rows), {row.series for row in rows.values()}

    assert series(width="16k", l0="small") == (26, {"all"})
    assert series(layers=[7, 13], l0="small") == (2, {"subset"})
    assert series(layers=[7, 12], l0="small") == (2, {"all"})
    assert series(width="262k", l0="medium") == (4, {"subset"})
    assert series(layers=[7, 13], l0="small", series="all") == (2, {"all"})
    assert series(layers=[13, 12], l0="closest:1000") == (2, {"all"})
    assert len(load_suite(M, "transcoder", l0="big", affine=True).rows) == 26


def test_lists_select_by_label_skip_seed_and_series() -> None:
    table = list_saes("gemma-3-1b-pt", site="transcoder", label=["small", "big"], affine=True, series="all")
    assert len(table) == 26 * 2 * 2 and set(table["label"]) == {"small", "big"} and table["affine"].all()
    assert len(list_saes(seed=1)) == 40 and set(list_saes(seed=1)["series"]) == {"subset"}
    assert set(list_saes("gemma-2-2b")["label"].isna()) == {True}
    for wrong in ({"label": "mid"}, {"series": "half"}, {"seed": "1"}):
        with pytest.raises(UnknownNameError):
            list_saes(**wrong)  # type: ignore[arg-type]


# --- the index and speed


def test_the_index_gives_the_rows_of_the_files() -> None:
    """Each file is parsed as YAML; the rows of the index must be equal, field by field, and of the same types."""
    for name in ("gemma-scope-2-1b-pt-transcoders", "gemma-scope-2-270m-pt-res", "gemma-scope-2b-pt-res"):
        path = builtin_folder() / f"{name}.yaml"
        entry = index.indexed(path)
        assert entry is not None
        parsed = read_release(path)
        assert entry.rows() == parsed.rows and catalog.rows_of(catalog.header_of(name)) == parsed.rows
        for ours, theirs in zip(entry.rows(), parsed.rows, strict=True):
            assert ours.model_dump_json() == theirs.model_dump_json() and hash(ours) == hash(theirs)
            assert ours.model_copy(update={"layer": 3}).layer == 3 != ours.layer or ours.layer == 3


def test_a_changed_file_is_parsed_in_place_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "gemma-scope-2-270m-pt-res"
    text = (builtin_folder() / f"{name}.yaml").read_text()
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    (tmp_path / INDEX_NAME).write_text(index_text([(text, load_release(name))]))
    assert index.indexed(path) is not None
    path.write_text(text.replace("gemma-3-270m\n", "gemma-3-1b\n"))
    assert index.indexed(path) is None and catalog.read_header(path).model == M
    path.write_text(text)
    for broken in ("", "{}\n", "not JSON\n", json.dumps({"columns": []}) + "\n"):
        clear_cache()
        (tmp_path / INDEX_NAME).write_text(broken)
        assert index.indexed(path) is None and catalog.read_header(path).model == "gemma-3-270m"


def test_look_ups_and_lists_are_fast() -> None:
    """In processor time, with every cache cold; ten times what was measured, for slow and busy machines."""

    def seconds(call: Any) -> float:
        clear_cache()
        begun = time.process_time()
        call()
        return time.process_time() - begun

    assert min(seconds(lambda: find(M, "res", 13, "65k", "medium")) for _ in range(3)) < 0.25  # 0.02 measured
    assert min(seconds(select_rows) for _ in range(3)) < 1.0  # 0.1 measured
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = (
        "import sys, resource; from gemma_scope_tl.cli import app; app(['list'], standalone_mode=False);"
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr);"
        "print([m for m in ('torch', 'pandas') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    used, heavy = done.stderr.splitlines()[-2:]
    counted = f"{len(select_rows()):,} SAEs, 959 of them unverified"
    assert float(used) < 3.0 and heavy == "[]" and counted in done.stdout  # 0.5 measured
