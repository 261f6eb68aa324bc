"""Both layouts into one checked set of tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.weights.checks import Expected, value_range
from gemma_scope_tl.weights.load import canonical_arrays, load_arrays

D_IN, D_SAE = 6, 10
Arrays = dict[str, Any]


def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": D_SAE, "b_dec": D_IN, "threshold": D_SAE}
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {**made, "threshold": np.abs(made["threshold"])}


def write(path: Path, values: Arrays) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: torch.from_numpy(np.array(a, order="C")) for name, a in values.items()}, path)
    else:
        np.savez(path, **values)
    return path


@pytest.fixture(params=["params.npz", "sae_weights.safetensors"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def test_reads_either_layout(path: Path) -> None:
    read = load_arrays(write(path, arrays()), Expected(d_in=D_IN, d_sae=D_SAE, transcoder=False))
    for name, array in arrays().items():
        np.testing.assert_array_equal(read[name].numpy(), array)


def test_keys_in_any_case(path: Path) -> None:
    read = load_arrays(write(path, {name.lower(): a for name, a in arrays().items()}))
    assert set(read) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}


def test_fortran_order_equals_c_order(tmp_path: Path) -> None:
    fortran = {name: np.asfortranarray(a) for name, a in arrays().items()}
    read = load_arrays(write(tmp_path / "params.npz", fortran))
    for name, array in arrays().items():
        assert read[name].is_contiguous()
        np.testing.assert_array_equal(read[name].numpy(), array)


def test_deflated_equals_stored(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "deflated.npz", **arrays())
    stored, deflated = load_arrays(write(tmp_path / "stored.npz", arrays())), load_arrays(tmp_path / "deflated.npz")
    assert all(torch.equal(stored[name], deflated[name]) for name in stored)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc")
def test_tensors_share_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "params.npz", arrays()).resolve()
    file.chmod(0o444)
    tensor = load_arrays(file)["W_enc"]
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    spans = [tuple(int(end, 16) for end in line.split("-")) for line in lines]
    assert any(low <= tensor.data_ptr() < high for low, high in spans)


def nan(a: Arrays) -> None:
    a["W_enc"][2, 3] = np.nan


def infinite(a: Arrays) -> None:
    a["b_dec"][0] = -np.inf


def negative(a: Arrays) -> None:
    a["threshold"][4] = -1e-3


def missing(a: Arrays) -> None:
    del a["b_enc"], a["threshold"]


def extra(a: Arrays) -> None:
    a["evil"] = np.ones(3, np.float32)


def twice(a: Arrays) -> None:
    a["w_enc"] = a["W_enc"]


def transposed(a: Arrays) -> None:
    a["W_enc"] = np.ascontiguousarray(a["W_enc"].T)


def short(a: Arrays) -> None:
    a["threshold"] = a["threshold"][:-1]


def flat(a: Arrays) -> None:
    a["W_dec"] = a["W_dec"].reshape(-1)


def integer(a: Arrays) -> None:
    a["b_enc"] = a["b_enc"].astype(np.int32)


def scaled(a: Arrays) -> None:
    a["scaling_factor"] = np.full(D_SAE, 2, np.float32)


def two_thresholds(a: Arrays) -> None:
    a["log_threshold"] = a["threshold"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan, "values in W_enc that are not finite"),
        (infinite, "values in b_dec that are not finite"),
        (negative, r"negative thresholds \(down to -0.001\)"),
        (missing, "lacks b_enc, threshold"),
        (extra, "unknown arrays evil"),
        (twice, "has W_enc twice"),
        (transposed, "shapes that do not fit together"),
        (short, r"threshold is \[9\], should be \[10\]"),
        (flat, "W_dec of shape .* not a matrix"),
        (integer, "b_enc of dtype .*int32, not a float"),
        (scaled, "scaling_factor other than 1"),
        (two_thresholds, "two arrays for the same parameter"),
    ],
)
def test_spoilt_files(path: Path, spoil: Callable[[Arrays], None], message: str) -> None:
    values = arrays()
    spoil(values)
    with pytest.raises(WeightsError, match=message) as caught:
        load_arrays(write(path, values))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (Expected(d_in=7), "d_in 6, should be 7 according to the registry"),
        (Expected(d_sae=11, said_by="the model"), "d_sae 10, should be 11 according to the model"),
    ],
)
def test_sizes_that_others_expect(path: Path, expected: Expected, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_arrays(write(path, arrays()), expected)


def test_another_output_width_is_only_for_transcoders(path: Path) -> None:
    values = {**arrays(), "W_dec": np.ones((D_SAE, 4), np.float32), "b_dec": np.ones(4, np.float32)}
    assert load_arrays(write(path, values))["W_dec"].shape == (D_SAE, 4)
    with pytest.raises(WeightsError, match=r"W_dec is \[10, 4\], should be \[10, 6\]"):
        load_arrays(path, Expected(transcoder=False))


def test_skip_connection_under_both_names(path: Path) -> None:
    skip = np.arange(36, dtype=np.float32).reshape(6, 6)
    as_release = load_arrays(write(path, {**arrays(), "affine_skip_connection": skip}))
    as_sae_lens = load_arrays(write(path, {**arrays(), "W_skip": np.ascontiguousarray(skip.T)}))
    assert torch.equal(as_release["W_skip"], as_sae_lens["W_skip"])
    np.testing.assert_array_equal(as_release["W_skip"].numpy(), skip.T)


def test_scaling_factor_of_ones_is_dropped(path: Path) -> None:
    assert "scaling_factor" not in load_arrays(write(path, {**arrays(), "scaling_factor": np.ones(D_SAE, np.float32)}))


def test_log_threshold_becomes_threshold() -> None:
    values = arrays()
    log = np.log(values.pop("threshold"))
    read = canonical_arrays({**values, "log_threshold": log}, "x")
    np.testing.assert_array_equal(read["threshold"].numpy(), torch.from_numpy(log).exp().numpy())


def test_shapes_are_judged_before_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("gemma_scope_tl.weights.load.stream", refuse)
    with pytest.raises(WeightsError, match="d_in 6, should be 7"):
        load_arrays(write(tmp_path / "params.npz", arrays()), Expected(d_in=7))


@pytest.mark.parametrize("tenths", range(10))
def test_truncated_safetensors(tmp_path: Path, tenths: int) -> None:
    file = write(tmp_path / "sae_weights.safetensors", arrays())
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * tenths // 10])
    with pytest.raises(WeightsError, match=r"truncated|empty"):
        load_arrays(file)


@pytest.mark.parametrize("content", [b"<html></html>", b"\x80\x04K\x01.", b"\xff" * 64, b"version https://git-lfs x"])
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "sae_weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"sae_weights\.safetensors is .*download it again"):
        load_arrays(file)


@pytest.mark.parametrize("pad", range(0, 256, 8))
def test_no_header_length_is_taken_for_another_kind_of_file(tmp_path: Path, pad: int) -> None:
    """safetensors begin with a length, whose bytes may be those that a pickle begins with."""
    file = tmp_path / "sae_weights.safetensors"
    save_file({name: torch.from_numpy(a) for name, a in arrays().items()}, file, {"pad": "x" * pad})
    assert len(load_arrays(file)) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_value_range(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 5, 24).reshape(4, 6).to(dtype)
    assert value_range(x) == value_range(x.T) == (-3.0, 5.0)
    x[1, 1] = float("nan")
    assert np.isnan(value_range(x)).all()
