"""A fine-tuned SAE is not the one that was loaded: no table, file or page says of it what was measured on that one."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry import read_release

IDS = torch.arange(3, 67).reshape(2, 32)


@pytest.fixture(scope="module")
def model() -> Any:
    return gs.load_model("bundled")


@pytest.fixture
def sae() -> Any:
    return gs.load_sae("bundled", "res", 2, width="1k")


def adam(sae: Any) -> None:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    sae(torch.randn(64, sae.cfg.d_in) * 8).square().sum().backward()
    optimizer.step()


def write_through_data(sae: Any) -> None:
    with torch.no_grad():
        sae.W_dec.data.mul_(2)


def one_bias(sae: Any) -> None:
    with torch.no_grad():
        sae.threshold.data[17] += 1e-3


def new_parameter(sae: Any) -> None:
    sae.W_enc = torch.nn.Parameter(sae.W_enc.detach().clone())


def own_weights_again(sae: Any) -> None:
    sae.load_state_dict({name: 2 * value for name, value in sae.state_dict().items()})


CHANGES = [adam, write_through_data, one_bias, new_parameter, own_weights_again]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_in_the_sae_and_in_its_copies(sae: Any, change: Any) -> None:
    tuned = copy.deepcopy(sae)
    assert tuned.as_loaded and tuned.row is not None
    change(tuned)
    for one in (tuned, copy.deepcopy(tuned), copy.copy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert not one.as_loaded and one.row is None
        assert not one.to(torch.bfloat16).as_loaded
    assert sae.as_loaded and sae.row is not None


def test_moving_copying_and_freezing_change_nothing(sae: Any) -> None:
    with torch.inference_mode():
        sae.to(torch.float16)
    for one in (sae, sae.to("cpu"), sae.double(), copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert one.requires_grad_(False).as_loaded and one.row is not None
        one(torch.randn(4, sae.cfg.d_in))
        assert one.as_loaded


def test_tables_pages_and_files_do_not_name_the_original(model: Any, sae: Any, tmp_path: Path) -> None:
    tuned = copy.deepcopy(sae)
    adam(tuned)
    table = gs.evaluate(model, [sae, tuned], IDS, progress=False, resamples=20)
    assert table["id"][0] == sae.row.id and table[["release", "id"]].isna().all(axis=1).tolist() == [False, True]
    for save in (lambda one, to: gs.save_sae(one, to, format="sae-lens"), lambda one, to: one.save_model(to)):
        for one, l0 in ((sae, sae.row.l0), (tuned, None)):
            save(one, tmp_path / "saved")
            metadata = json.loads((tmp_path / "saved" / "cfg.json").read_text())["metadata"]
            assert metadata.get("l0") == l0 and ("release" in metadata) == ("id" in metadata) == (l0 is not None)
            again = gs.JumpReLUSAE.from_folder(tmp_path / "saved")
            assert (again.site, again.layer, again.model_name) == ("res", 2, sae.model_name)
    with pytest.raises(GemmaScopeError, match="changed after it was loaded: give metrics="):
        gs.export_suite(tuned, tmp_path / "none", gs.About("mit"), progress=False)
    assert not (tmp_path / "none").exists()


def test_the_l0_of_an_export_is_the_measured_one(model: Any, sae: Any, tmp_path: Path) -> None:
    tuned = copy.deepcopy(sae)
    adam(tuned)
    about = gs.About("mit")
    metrics = gs.evaluate(model, [tuned], IDS, progress=False, resamples=20)
    metrics["l0"] = 21.1
    (out,) = gs.export_suite(tuned, tmp_path / "tuned", about, metrics=metrics, progress=False)
    (row,) = read_release(out / "tuned.yaml").rows
    assert (row.l0, row.path) == (21, "layer_2/width_1k/average_l0_21")
    # beside its original, whose measured L0 may be above the tuned one's: told apart by name
    both = gs.evaluate(model, [tuned, sae], IDS, progress=False, resamples=20)
    both["l0"], both["fvu"] = [15.2, 21.7], [0.125, 0.25]
    (out,) = gs.export_suite([sae, tuned], tmp_path / "both", about, metrics=both, progress=False)
    assert sorted(row.l0 for row in read_release(out / "both.yaml").rows) == [15, sae.row.l0]
    card = (out / "README.md").read_text()
    assert "| 15.2 | 0.125 |" in card and "average_l0_15`" in card
    # two of one place: nothing tells whose row is whose, until they say so
    other = copy.deepcopy(tuned)
    two = gs.evaluate(model, [tuned, other], IDS, progress=False, resamples=20)
    with pytest.raises(GemmaScopeError, match=r"set sae\.cfg\.metadata\.l0"):
        gs.export_suite([tuned, other], tmp_path / "two", about, metrics=two, progress=False)
    tuned.cfg.metadata.l0, other.cfg.metadata.l0 = 20.0, 30.0
    (out,) = gs.export_suite([tuned, other], tmp_path / "two", about, progress=False)
    assert [row.l0 for row in read_release(out / "two.yaml").rows] == [20, 30]


def test_about_is_checked(sae: Any, tmp_path: Path) -> None:
    for wrong in ("mit", None, {"license": "mit"}):
        with pytest.raises(GemmaScopeError, match=r"gs\.About\('mit'\)"):
            gs.export_suite(sae, tmp_path / "out", wrong, progress=False)  # type: ignore[arg-type]
    for wrong in (None, 5):
        with pytest.raises(GemmaScopeError, match="licence"):
            gs.About(wrong)  # type: ignore[arg-type]
