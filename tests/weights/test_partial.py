"""Rows, columns and entries of a file, without the rest of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.weights.checks import Expected
from gemma_scope_tl.weights.npz import inspect_npz
from gemma_scope_tl.weights.partial import read_cached, read_local
from tests.hub.big_npz import write_sparse_npz

D_IN, D_SAE = 24, 300
CHOSEN = [7, 299, 0, 7]
EXPECTED = Expected(D_IN, D_SAE)


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shapes = {"W_dec": (D_SAE, D_IN), "W_enc": (D_IN, D_SAE), "b_dec": D_IN, "b_enc": D_SAE, "threshold": D_SAE}
    made = {name: rng.standard_normal(size=shape, dtype=np.float32) for name, shape in shapes.items()}
    return {**made, "threshold": np.abs(made["threshold"])}


@pytest.fixture(params=["stored", "deflated", "fortran", "safetensors", "bfloat16"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param in ("safetensors", "bfloat16"):
        to = torch.bfloat16 if request.param == "bfloat16" else torch.float32
        save_file({name: torch.from_numpy(a).to(to) for name, a in arrays().items()}, tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"
    values = {n: np.asfortranarray(a) for n, a in arrays().items()} if request.param == "fortran" else arrays()
    (np.savez_compressed if request.param == "deflated" else np.savez)(tmp_path / "params.npz", **values)
    return tmp_path / "params.npz"


@pytest.mark.parametrize("cached", [False, True])
def test_chosen_latents(file: Path, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gemma_scope_tl.weights.partial._BLOCK", 4 * D_IN * 7)  # several blocks, the last one short
    for _ in range(2):  # made, then found
        got = read_cached(file, CHOSEN, EXPECTED) if cached else read_local(file, CHOSEN, EXPECTED, encoder=True)
        assert set(got) == set(arrays())
        for name, tensor in got.items():
            axis = {"W_dec": 0, "W_enc": 1, "b_dec": None}.get(name, 0)
            whole = torch.from_numpy(arrays()[name]).to(tensor.dtype)
            wanted = whole if axis is None else whole.index_select(axis, torch.tensor(CHOSEN))
            assert torch.equal(tensor, wanted), name
    assert len(list((tmp_path / "cache").glob("rows/*.safetensors"))) == cached


def test_the_rows_belong_to_the_file_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "params.npz"
    for factor in (1, 2):
        np.savez(path, **{**arrays(), "W_enc": arrays()["W_enc"] * factor})
        got = read_cached(path, [3], EXPECTED)["W_enc"]
        np.testing.assert_array_equal(got[:, 0].numpy(), arrays()["W_enc"][:, 3] * factor)


def test_without_the_encoder(file: Path) -> None:
    assert set(read_local(file, [1], EXPECTED, encoder=False)) == {"W_dec", "b_enc", "threshold"}


@pytest.mark.parametrize("latent", [-1, D_SAE])
def test_latents_that_do_not_exist(file: Path, latent: int) -> None:
    with pytest.raises(WeightsError, match=f"has no latent {latent}: it has 0..299"):
        read_local(file, [latent], EXPECTED, encoder=False)


def test_values_that_are_read_are_checked(tmp_path: Path) -> None:
    values = arrays()
    values["W_dec"][7, 3] = np.nan
    values["threshold"][8] = -1
    np.savez(tmp_path / "params.npz", **values)
    assert len(read_local(tmp_path / "params.npz", [5, 6], EXPECTED, encoder=False)["W_dec"]) == 2
    with pytest.raises(WeightsError, match="W_dec that are not finite"):
        read_local(tmp_path / "params.npz", [7], EXPECTED, encoder=False)
    with pytest.raises(WeightsError, match="negative thresholds"):
        read_local(tmp_path / "params.npz", [8], EXPECTED, encoder=False)


def test_vectors_from_the_index_alone_lie_where_their_headers_say(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, **arrays())
    read = inspect_npz(path)
    lengths = {"b_dec": D_IN, "b_enc": D_SAE, "threshold": D_SAE}
    guessed = inspect_npz(path, list(lengths), lengths)
    assert guessed == {name: read[name] for name in lengths}


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_vectors_of_another_width_are_read_properly(tmp_path: Path, dtype: Any) -> None:
    """The index cannot be mistaken about the item size: such a vector's own header is read."""
    path = tmp_path / "params.npz"
    np.savez(path, **{name: a.astype(dtype) for name, a in arrays().items()})
    found = inspect_npz(path, ["b_enc"], {"b_enc": D_SAE})["b_enc"]
    assert found == inspect_npz(path)["b_enc"]
    assert found.dtype == getattr(torch, np.dtype(dtype).name)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: makes holes in files")
def test_a_row_of_a_file_of_19_gb(tmp_path: Path) -> None:
    """Members over 4 GB have their sizes in zip64 fields; only the pages of the row are read."""
    row = np.arange(2304, dtype=np.float32)
    write_sparse_npz(tmp_path / "params.npz", 2304, 1 << 20, {1 << 19: row, (1 << 20) - 1: -row})
    layouts = inspect_npz(tmp_path / "params.npz")
    assert layouts["W_dec"].nbytes == layouts["W_enc"].nbytes == 4 * 2304 << 20
    got = read_local(tmp_path / "params.npz", [(1 << 20) - 1, 1 << 19, 5], Expected(2304, 1 << 20), encoder=False)
    np.testing.assert_array_equal(got["W_dec"].numpy(), np.stack([-row, row, 0 * row]))
