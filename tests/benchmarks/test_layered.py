"""The benchmarks of coders over several layers: both sides are given the same, and the files are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import layered_splice
from benchmarks.layered_coders import (
    QUICK,
    layer_files,
    loaded_coder,
    mapped_coder,
    prepare,
    prepared,
    random_coder,
    sparse_file,
    threshold_of,
)
from benchmarks.layered_training import QUICK_CASES, Shape, check
from benchmarks.pages import NOT_MEASURED, Results, page_tables
from benchmarks.saelens_loader import load_clt_layer_with_sae_lens
from gemma_scope_tl.training.recipe import Recipe


def test_a_sparse_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    small = {"w_enc": np.ones((3, 5), np.float32), "b_dec": np.arange(3, dtype=np.float32)}
    file, shape = tmp_path / "a.safetensors", (700, 64, 32)
    at = sparse_file(file, small, "w_dec", shape)
    rows = np.memmap(file, np.float32, "r+", at, shape)
    rows[4, 2] = 7.0
    rows.flush()
    found = load_file(file)
    assert {name: tuple(array.shape) for name, array in found.items()} == {
        "w_enc": (3, 5),
        "b_dec": (3,),
        "w_dec": shape,
    }
    assert torch.equal(found["b_dec"], torch.arange(3.0)) and bool((found["w_enc"] == 1).all())
    assert float(found["w_dec"].sum()) == 7.0 * 32 and bool((found["w_dec"][4, 2] == 7).all())
    assert file.stat().st_blocks * 512 < file.stat().st_size / 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the CLT of a quick run."""
    made = tmp_path_factory.mktemp("clt") / "layered"
    prepare(made, QUICK)
    return made


def test_the_clt_on_disk_has_rows_for_the_latents_that_fire(folder: Path) -> None:
    """And this package, safetensors and SAELens read the same encoder from it."""
    noted = prepared(folder)
    before = [file.stat().st_mtime_ns for file in layer_files(folder, QUICK.model.layers)]
    prepare(folder, QUICK)  # finds them
    assert [file.stat().st_mtime_ns for file in layer_files(folder, QUICK.model.layers)] == before
    ours, mapped = loaded_coder(folder), mapped_coder(folder, QUICK)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), mapped.parameters(), strict=True))
    written = [int((plane[:, 0].abs().sum(1) > 0).sum()) for plane in mapped.W_dec]
    assert sum(written) == noted["distinct"]
    stock = load_clt_layer_with_sae_lens(folder, "clt/width_262k_l0_medium/params_layer_2")
    assert torch.equal(stock.W_enc, mapped.W_enc[2])
    torch.testing.assert_close(stock.W_dec, mapped.W_dec[2].sum(1))


def test_as_many_latents_fire_as_asked_for() -> None:
    """Of 4,096 tokens the mean is known to a hundredth of it; encoders are random themselves."""
    coder, stacked = random_coder("clt", (0, 1, 2), 48, 256, 24, [1.0, 1.0, 1.0])
    x = torch.randn(4_096, 48, generator=torch.Generator().manual_seed(5))
    acts = coder.encode([torch.nn.functional.normalize(x, dim=1) * 48**0.5] * 3)
    assert 21 < sum(float((one != 0).sum(1).float().mean()) for one in acts) < 27
    assert all(torch.equal(whole[:, j:], coder.W_dec[j]) and not whole[:, :j].any() for j, whole in enumerate(stacked))
    assert threshold_of(16, 32) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", ["clt", "crosscoder"])
def test_plain_hooks_are_the_splice(name: str, tmp_path: Path) -> None:
    found = layered_splice.measure(layered_splice.QUICK_CASES[name], tmp_path, 1)
    assert found["difference"] is not None and found["difference"] < 1e-4
    assert set(found["found"]) == {"ours", "floor", "plain"} and found["l0"] > 0


@pytest.mark.parametrize("shape", QUICK_CASES, ids=lambda shape: f"{shape.kind}-{shape.l0}")
def test_both_trainers_take_the_same_steps(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """``check`` itself compares losses, L0s and parameters; here, that it sees another loss."""
    l0, errors = check(shape)
    assert l0 > 1 and errors["error_difference"] < 1e-5
    if shape.l0 is None:
        monkeypatch.setattr(Recipe, "l0_coefficient_at", lambda self, step: -1.0)  # of the peer alone
        with pytest.raises(AssertionError):
            check(shape)


def test_a_group_without_results_says_so() -> None:
    results = Results()
    results.rows = {}
    assert set(page_tables(results).values()) == {NOT_MEASURED}
