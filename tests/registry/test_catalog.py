"""Finding SAEs: by SAELens's names, by place and L0, as a table; and what the errors say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from gemma_scope_tl.errors import RegistryError, UnknownNameError
from gemma_scope_tl.registry import SAERow, find, list_saes, load_release, releases, resolve
from gemma_scope_tl.registry.catalog import natural_key
from gemma_scope_tl.registry.listing import COLUMNS
from gemma_scope_tl.registry.locate import EXTRA_FOLDERS_VARIABLE, builtin_folder

RES_2B = "gemma-scope-2b-pt-res"
ROW = "{{id: {id}, site: {site}, layer: {layer}, width: 1k, d_sae: 1024, d_in: 64, l0: {l0}, path: {id}{more}}}"
ROOT = Path(__file__).resolve().parents[2]


def add_release(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[str], name: str = "mine", model: str = "tiny"
) -> Path:
    """A release of one's own, in a folder that the environment variable names."""
    folder.mkdir(exist_ok=True)
    head = f"release: {name}\nrepo: bundled\nmodel: {model}\nlicense: MIT\ndescription: d\nsaes:\n"
    path = folder / f"{name}.yaml"
    path.write_text(head + "".join(f"  - {row}\n" for row in rows))
    monkeypatch.setenv(EXTRA_FOLDERS_VARIABLE, str(folder))
    return path


def one_row(id: str = "a", site: str = "res", layer: str = "0", l0: str = "50", more: str = "") -> str:
    """A row's YAML."""
    return ROW.format(id=id, site=site, layer=layer, l0=l0, more=more)


def message(call: object, *args: object, **kwargs: object) -> str:
    """What an UnknownNameError says."""
    assert callable(call)
    with pytest.raises(UnknownNameError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# --- by SAELens's names


def test_resolve_accepts_both_releases_and_both_ids() -> None:
    row = resolve(RES_2B, "layer_20/width_16k/average_l0_71")
    assert row == resolve(RES_2B, "layer_20/width_16k/canonical")
    assert row == resolve(f"{RES_2B}-canonical", "layer_20/width_16k/canonical")
    assert (row.repo, row.path) == ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    assert (row.d_in, row.d_sae, row.l0, row.canonical) == (2304, 16384, 71.0, True)
    assert row.neuronpedia == "gemma-2-2b/20-gemmascope-res-16k"


def test_embedding_and_transcoder_rows() -> None:
    row = resolve(RES_2B, "embedding/width_4k/average_l0_44")
    assert (row.site, row.layer, row.d_sae, row.l0) == ("embedding", None, 4096, 44.0)
    assert resolve("gemma-scope-2b-pt-transcoders", "layer_15/width_16k/average_l0_8").site == "transcoder"


def test_unknown_ids_name_the_five_nearest_of_that_place() -> None:
    text = message(resolve, RES_2B, "layer_20/width_16k/average_l0_70")
    named = text.split("Nearest: ")[1].rstrip(".").split(", ")
    assert len(named) == 5 and named[0] == "layer_20/width_16k/average_l0_71"
    assert all(name.startswith("layer_20/width_16k/") for name in named)
    assert "canonical" in message(resolve, RES_2B, "layer_12/width_131k/canonical").split("Nearest")[1]


def test_unknown_releases_name_the_five_nearest() -> None:
    text = message(resolve, "gemma-scope-2b-res", "layer_20/width_16k/canonical")
    assert text.split("Nearest: ")[1].startswith(RES_2B) and text.count("gemma-scope-") == 6


def test_releases_are_in_natural_order() -> None:
    names = [name for name in releases() if name.startswith("gemma-scope-")]
    first = [name for name in names if not name.startswith("gemma-scope-2-")]
    assert first[0] == "gemma-scope-2b-pt-att" and first[-1] == "gemma-scope-27b-pt-res" and len(first) == 9
    assert names[0] == "gemma-scope-2-1b-it-att" and len(names) == 9 + 80 + 14
    assert len([name for name in releases(canonical=True) if name.startswith("gemma-scope-")]) == 17 + 80 + 14
    assert load_release(f"{RES_2B}-canonical") is load_release(RES_2B)


# --- by place


def test_find_by_l0() -> None:
    assert find("gemma-2-2b", "res", 20, "16k").l0 == 71
    assert find("google/gemma-2-2b", "res", 20, 16384, 71) == find("gemma-2-2b", "res", 20, "16k", "71")
    assert find("gemma-2-2b", "res", 20, "16k", "closest:50").l0 == 38
    assert find("gemma-2-2b", "embedding", None, "4k", 6).layer is None
    assert find("gemma-2-9b", "att", 20, "131k").d_in == 4096
    assert find("gemma-2-9b-it", "res", 20, "16k").release == "gemma-scope-9b-it-res"


def test_closest_takes_the_sparser_of_two_as_close() -> None:
    assert find("gemma-2-9b", "att", 27, "16k", "canonical").l0 == 136
    assert find("gemma-2-9b", "att", 27, "16k", "closest:100").l0 == 64


def test_closest_takes_a_confirmed_sae_if_one_is_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The L0s are those of the listing of Gemma Scope's transcoders, and exact."""
    found = {layer: find("gemma-2-2b", "transcoder", layer, "16k", "closest:100") for layer in (8, 12, 16, 20)}
    assert {layer: (row.l0, row.unverified) for layer, row in found.items()} == {
        8: (52, False),  # 92 is unverified
        12: (111, True),  # 6 is confirmed, and no substitute
        16: (10, False),
        20: (11, False),
    }
    assert "l0='closest:93' takes 52" in message(find, "gemma-2-2b", "transcoder", 8, "16k", 93)
    unverified = ", unverified: true"
    rows = [one_row("c", l0="50"), one_row("u", l0="99", more=unverified), one_row("d", l0="400", more=unverified)]
    add_release(tmp_path, monkeypatch, rows)
    wanted = {"closest:100": "c", "closest:101": "u", "closest:25": "c", "closest:300": "d", "closest:24": "c"}
    assert {l0: find("tiny", "res", 0, "1k", l0).id for l0 in wanted} == wanted


def test_a_wrong_l0_names_those_that_exist_and_the_closest() -> None:
    text = message(find, "gemma-2-2b", "res", 20, "16k", 70)
    assert "22, 38, 71, 139, 294" in text and "l0='closest:70' takes 71" in text
    assert "closest:100" in message(find, "gemma-2-2b", "embedding", None, "4k")
    for wrong in ("near:70", "closest:", "closest:nan", -1, 0, True, float("inf"), None):
        assert "canonical" in message(find, "gemma-2-2b", "res", 20, "16k", wrong)


def test_the_only_confirmed_sae_of_a_place_needs_no_l0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("gemma-2-2b", "transcoder", 20).l0 == 11  # the only row
    assert find("gemma-2-2b", "transcoder", 5).l0 == 87  # 153 and 272 are unverified
    assert find("gemma-2-2b", "transcoder", 5, l0=153).unverified
    assert "6, 21, 44, 111" in message(find, "gemma-2-2b", "embedding", None, "4k")
    rows = [one_row("one"), one_row("two", l0="60"), *(one_row(i, layer="1", more=", unverified: true") for i in "ab")]
    add_release(tmp_path, monkeypatch, rows)
    assert "no canonical SAE. L0s: 50, 60" in message(find, "tiny", "res", 0, "1k")  # two are confirmed
    assert "no canonical SAE" in message(find, "tiny", "res", 1, "1k")  # none is


def test_each_part_of_a_place_is_checked() -> None:
    assert "25, 24, 23, 22, 21" in message(find, "gemma-2-2b", "res", 26, "16k")
    assert "16k, 65k" in message(find, "gemma-2-2b", "res", 3, "1m")
    assert "Nearest: res" in message(find, "gemma-2-2b", "ress", 3, "16k")
    assert "layer=None" in message(find, "gemma-2-2b", "embedding", 0, "4k", 6)
    assert "layer" in message(find, "gemma-2-2b", "res", None, "16k")
    assert "gemma-2-2b" in message(find, "gemma-2-4b", "res", 3, "16k")
    text = message(find, "gemma-2-2b", "res", 3, "16k", release="gemma-scope-9b-pt-res")
    assert "release of gemma-2-2b" in text and RES_2B in text


def test_instruction_tuned_models_never_fall_back_silently() -> None:
    text = message(find, "gemma-2-2b-it", "res", 20, "16k")
    assert "model='gemma-2-2b'" in text and RES_2B in text
    assert "model='gemma-2-9b'" in message(find, "google/gemma-2-9b-it", "mlp", 20, "16k")
    assert "gemma-scope-9b-pt-res" in message(find, "gemma-2-9b-it", "res", 21, "16k")
    assert "model='gemma-2-27b'" in message(list_saes, model="gemma-2-27b-it")


# --- as a table


def test_the_table_has_a_row_per_sae_in_natural_order() -> None:
    table = list_saes(release=RES_2B)
    assert len(table) == 316 and list(table.columns) == list(COLUMNS)
    assert table["layer"].iloc[:4].isna().all() and table["site"].iloc[0] == "embedding"
    layers = [int(layer) for layer in table["layer"].iloc[4:]]
    assert layers == sorted(layers) and layers[-1] == 25
    assert not table.duplicated(["release", "id"]).any()
    assert (table["canonical_id"].notna() == table["canonical"]).all()
    assert sorted(["layer_10/a", "layer_2/a"], key=natural_key) == ["layer_2/a", "layer_10/a"]


def test_conditions_combine_and_take_several_values() -> None:
    table = list_saes("gemma-2-2b", site=("res", "att"), layer=[2, 3], width=["16k", 65536])
    assert set(table["site"]) == {"res", "att"} and set(table["layer"]) == {2, 3} and len(table) == 41
    assert len(list_saes(model=["gemma-2-9b-it", "gemma-2-27b"])) == 48
    assert len(list_saes(model="gemma-2-2b", site="att", layer=range(26))) == 260
    assert list_saes(release=f"{RES_2B}-canonical")["canonical"].all()
    assert len(list_saes(release=f"{RES_2B}-canonical")) == 58


def test_globs_match_ids_release_ids_and_canonical_names() -> None:
    assert set(list_saes(pattern="*layer_2/width_16k/canonical")["layer"]) == {2}
    assert len(list_saes(pattern="layer_20/width_16k/*", release=RES_2B)) == 5
    assert list_saes(pattern=f"{RES_2B}/layer_20/width_16k/average_l0_71")["l0"].tolist() == [71.0]
    assert len(list_saes(pattern=f"{RES_2B}-canonical/*")) == 58
    assert len(list_saes(pattern="nothing")) == 0


def test_an_empty_table_keeps_its_columns_and_dtypes() -> None:
    empty, full = list_saes(model="gemma-2-9b-it", width="1m"), list_saes(release="gemma-scope-27b-pt-res")
    assert len(empty) == 0 and empty.dtypes.to_dict() == full.dtypes.to_dict()
    assert {name: str(dtype) for name, dtype in full.dtypes.items()} == COLUMNS
    assert isinstance(full.index, pd.RangeIndex) and isinstance(empty.index, pd.RangeIndex)


def test_unknown_names_in_a_condition_raise() -> None:
    assert "16k" in message(list_saes, width="17k", release="gemma-scope-27b-pt-res")
    assert "Nearest: res" in message(list_saes, site=["res", "ress"])
    assert RES_2B in message(list_saes, release="gemma-scope-2b")
    assert "gemma-2-2b" in message(list_saes, model="gemma")
    assert "number" in message(list_saes, layer="20")


# --- folders


def test_the_environment_adds_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_release(tmp_path / "x", monkeypatch, [one_row(), one_row("e", "embedding", "null", "null")])
    assert "mine" in releases() and resolve("mine", "a").repo == "bundled"
    assert find("tiny", "res", 0, "1k", "closest:9").id == "a"
    assert list_saes(model="tiny")["l0"].isna().tolist() == [True, False]
    assert "none is known" in message(find, "tiny", "embedding", None, "1k", 3)
    assert "none is known" in message(find, "tiny", "embedding", None, "1k", "closest:3")
    monkeypatch.setenv(EXTRA_FOLDERS_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(RegistryError, match="not a folder"):
        releases()


def test_a_file_that_is_laid_out_otherwise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = add_release(tmp_path / "x", monkeypatch, [one_row()])
    path.write_text(f"saes: [{one_row()}]\nmodel: tiny\nrelease: mine\nrepo: bundled\nlicense: MIT\ndescription: d\n")
    assert resolve("mine", "a").model == "tiny"


def test_two_files_cannot_claim_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_release(tmp_path / "x", monkeypatch, [one_row()], name=RES_2B)
    with pytest.raises(RegistryError, match=f"Two registry files claim '{RES_2B}'"):
        releases()
    monkeypatch.setenv(EXTRA_FOLDERS_VARIABLE, "")
    add_release(tmp_path / "y", monkeypatch, [one_row()], name=f"{RES_2B}-canonical")
    with pytest.raises(RegistryError, match="Two registry files claim"):
        resolve(RES_2B, "layer_0/width_16k/canonical")


def test_two_saes_that_fit_are_an_error_until_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_release(tmp_path / "x", monkeypatch, [one_row(more=", canonical: true"), one_row("b", l0="60")])
    add_release(tmp_path / "x", monkeypatch, [one_row(more=", canonical: true"), one_row("b")], name="yours")
    with pytest.raises(RegistryError, match="release="):
        find("tiny", "res", 0, "1k", "canonical")
    assert find("tiny", "res", 0, "1k", "canonical", release="yours").release == "yours"
    with pytest.raises(RegistryError, match="by its id"):
        find("tiny", "res", 0, "1k", 50, release="yours")
    assert "site of yours" in message(find, "tiny", "mlp", 0, "1k", release="yours")


def test_the_built_in_folder_of_a_wheel_and_of_a_source_tree(tmp_path: Path) -> None:
    package = tmp_path / "gemma_scope_tl"
    package.mkdir()
    with pytest.raises(RegistryError, match="Install the package again"):
        builtin_folder(package)
    (tmp_path / "pretrained_yaml").mkdir()
    assert builtin_folder(package) == tmp_path / "pretrained_yaml"
    (package / "pretrained_yaml").mkdir()
    assert builtin_folder(package) == package / "pretrained_yaml"


def test_import_and_look_up_are_light() -> None:
    code = (
        "import sys, gemma_scope_tl.registry as r; r.resolve('gemma-scope-2b-pt-res', 'layer_20/width_16k/canonical');"
        "print([m for m in ('torch', 'pandas', 'numpy', 'sae_lens', 'transformers', 'transformer_lens')"
        " if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"


def test_rows_can_be_hashed_and_compared() -> None:
    row = resolve(RES_2B, "layer_20/width_16k/canonical")
    assert isinstance(row, SAERow) and hash(row) == hash(SAERow.model_validate(row.model_dump()))
