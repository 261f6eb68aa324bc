"""Rows known by name only: loading one warns once, and a check that sees the file ends that."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from gemma_scope_tl.contributing.check import check_release
from gemma_scope_tl.registry import clear_cache, read_release, resolve
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.save import save_sae
from gemma_scope_tl.sites import ModelDims
from gemma_scope_tl.weights import seen
from gemma_scope_tl.weights.seen import UnverifiedSAEWarning, is_unverified, mark_seen, unverified_among
from tests.helpers import random_sae
from tests.hub.conftest import hub  # noqa: F401
from tests.hub.server import LocalHub

DIMS = ModelDims(n_layers=2, d_model=16, n_heads=2, d_head=8)
ID = "layer_1/width_64/average_l0_5"


@pytest.fixture(autouse=True)
def own_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path / "record"))
    monkeypatch.setattr(seen, "_warned", set())


@pytest.fixture
def file(tmp_path: Path, hub: LocalHub) -> Path:  # noqa: F811
    """A registry file with one unverified row, whose repository has the SAE's file."""
    save_sae(random_sae(DIMS, "res", 1, d_sae=64), tmp_path / "saes" / ID)
    hub.repo("me/saes").commit_folder(tmp_path / "saes")
    head = "release: mine\nrepo: me/saes\nmodel: tiny\nlicense: MIT\ndescription: d\nsaes:\n"
    row = f"{{id: {ID}, site: res, layer: 1, width: '64', d_sae: 64, d_in: 16, l0: 5, path: {ID}, unverified: true}}"
    (tmp_path / "mine.yaml").write_text(f"{head}  - {row}\n")
    return tmp_path / "mine.yaml"


def row_of(file: Path) -> SAERow:
    return read_release(file).rows[0]


def warned(row: SAERow) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        JumpReLUSAE.from_row(row)
    return [str(one.message) for one in found if one.category is UnverifiedSAEWarning]


def test_loading_warns_once(file: Path) -> None:
    (text,) = warned(row_of(file))
    assert "mine/layer_1" in text and "registry check" in text and "verify tiny" in text
    assert warned(row_of(file)) == []


def test_a_remote_check_that_finds_the_file_ends_it(file: Path) -> None:
    row = row_of(file)
    check_release(file)  # without --remote nothing is asked
    assert is_unverified(row) and unverified_among([row]) == {("mine", ID)}
    assert check_release(file, remote=True).problems == []
    assert not is_unverified(row) and unverified_among([row]) == set()
    assert warned(row) == [] and mark_seen([row]) == 0


@pytest.mark.parametrize("fault", ["missing", "other shape"])
def test_a_remote_check_that_does_not_find_it_leaves_it(file: Path, hub: LocalHub, fault: str) -> None:  # noqa: F811
    if fault == "missing":
        hub.repos["models", "me/saes"].commit({f"{ID}/params.npz": None})
    else:
        file.write_text(file.read_text().replace("d_in: 16", "d_in: 32"))
    assert len(check_release(file, remote=True).problems) == 1
    assert is_unverified(row_of(file))


def test_other_rows_are_never_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "_seen", lambda: pytest.fail("the record was read"))
    row = resolve("gemma-scope-2b-pt-res", "layer_20/width_16k/canonical")
    assert not is_unverified(row) and unverified_among([row]) == set()


def test_a_damaged_record_is_an_empty_one(file: Path, tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / seen.SEEN_NAME).write_text("{nonsense")
    assert is_unverified(row_of(file)) and mark_seen([row_of(file)]) == 1 and not is_unverified(row_of(file))
    clear_cache()
