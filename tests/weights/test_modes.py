"""Loading gives the same ordinary tensors under every mode of torch, and no mode is taken for a damaged file."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.activations.buckets import Bucket
from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sites import Place
from gemma_scope_tl.weights import load
from gemma_scope_tl.weights.load import load_arrays
from tests.training.planted import PlantedSource, tiny_config

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _default_device(device: str) -> Generator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "device meta": lambda: torch.device("meta"),
    "default device meta": lambda: _default_device("meta"),
    "default float64": lambda: _default_dtype(torch.float64),
    "default bfloat16": lambda: _default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[Any]]:
    return MODES[request.param]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One SAE in four files; that in SAELens's layout subtracts b_dec, which loading folds by a matrix product."""
    root = tmp_path_factory.mktemp("saes")
    sae = gs.load_sae("bundled", "res", 2, width="1k")
    gs.save_sae(sae, root / "stored")
    gs.save_sae(sae, root / "mapped")
    (root / "mapped" / "params.npz").chmod(0o444)
    gs.save_sae(sae, root / "deflated", compress=True)
    gs.save_sae(sae, root / "sae-lens", format="sae-lens")
    cfg = root / "sae-lens" / "cfg.json"
    cfg.write_text(cfg.read_text().replace('"apply_b_dec_to_input": false', '"apply_b_dec_to_input": true'))
    assert "true" in cfg.read_text()
    return {path.name: path for path in root.iterdir()}


def _same(got: Any, wanted: Any) -> None:
    for name in NAMES:
        value, expected = getattr(got, name), getattr(wanted, name)
        assert value.device.type == "cpu" and value.dtype == expected.dtype and not value.is_inference(), name
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_folders(dtype: str, mode: Any, folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        wanted = JumpReLUSAE.from_folder(folder, dtype=dtype)
        with mode():
            got = JumpReLUSAE.from_folder(folder, dtype=dtype)
        _same(got, wanted)
        parameter = got.W_dec.requires_grad_()  # an inference tensor would refuse
        parameter.float().square().sum().backward()
        assert parameter.grad is not None, name


def test_releases_suites_latents_and_arrays(mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path))
    sae = gs.load_sae("bundled", "res", 2, width="1k")
    release, id_ = sae.row.release, sae.row.id
    wanted = gs.load_latents(release, id_, [5, 2])
    arrays = {name: getattr(sae, name).detach().numpy() for name in NAMES}
    with mode():
        loaded = gs.load_sae("bundled", "res", 2, width="1k")
        tensors = {name: torch.tensor(array) for name, array in arrays.items()} if mode is torch.inference_mode else {}
        made = [JumpReLUSAE.from_arrays(given) for given in (arrays, tensors) if given]
        suite = gs.load_suite("bundled", "res", [2], "1k").prefetch(progress=False)
        latents = [gs.load_latents(release, id_, [5, 2], cache_rows=rows) for rows in (False, True, True)]
        gs.save_sae(sae, tmp_path / "saved")
    for other in (loaded, *made, suite["res", 2], JumpReLUSAE.from_folder(tmp_path / "saved")):
        _same(other, sae)
    for other in latents:
        _same(other, wanted)


@pytest.mark.slow
def test_training(mode: Any, tmp_path: Path) -> None:
    """A whole run, whose tensors are made in one thread and changed in others; the same bits as without a mode."""
    for name in ("plain", "moded"):
        with mode() if name == "moded" else torch.no_grad():
            gs.train_suite(tiny_config(tmp_path / name, steps=8), source=PlantedSource, progress=False)
    files = {
        name: {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("params.npz")}
        for name in ("plain", "moded")
    }
    assert files["plain"] and files["plain"] == files["moded"]


def test_errors_that_are_not_the_files_are_left_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in a tensor while a sound file is read says nothing of the file."""
    for error in (RuntimeError("in a kernel"), ValueError("mine"), LookupError("mine"), AssertionError("no CUDA")):

        def broken(*_: Any, error: Exception = error) -> Any:
            def sink(*_: Any) -> None:
                raise error

            return sink

        monkeypatch.setattr(load, "copier", broken)
        with pytest.raises(type(error), match=str(error)) as caught:
            load_arrays(folders["stored"] / "params.npz", dtype=torch.bfloat16)
        assert not isinstance(caught.value, GemmaScopeError)


def test_no_memory_is_said_to_be_that(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folders["stored"] / "params.npz"
    real = torch.empty

    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(load.torch, "empty", full)
    with pytest.raises(WeightsError, match=r"does not fit: \[\d+.*\] in torch.* takes 0.00 GiB.*Free memory") as caught:
        load_arrays(path)
    assert "elete" not in str(caught.value) and "corrupt" not in str(caught.value)
    with pytest.raises(GemmaScopeError, match="A bucket of 4 rows"):
        Bucket(4, {Place("res", 0): 8}, torch.float32)
    monkeypatch.setattr(load.torch, "empty", real)
    with pytest.raises((RuntimeError, AssertionError)) as other:
        Bucket(4, {Place("res", 0): 8}, torch.float32, device=torch.device("cuda", 99))
    assert not isinstance(other.value, GemmaScopeError)


def test_a_disk_that_does_not_read(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is no reason to delete the file."""

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    for name in ("read_head", "inspect_npz"):
        assert callable(getattr(__import__("gemma_scope_tl.weights.npz", fromlist=["x"]), name))
    monkeypatch.setattr(load, "stream", broken)
    with pytest.raises(WeightsError, match="cannot be read .Input/output error.*may be sound") as caught:
        load_arrays(folders["stored"] / "params.npz")
    assert "elete" not in str(caught.value) and "corrupt" not in str(caught.value)


def test_arrays_in_odd_memory_are_no_other_dtype() -> None:
    """Reversed and read-only NumPy arrays are floats all the same."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"W_enc": rng.standard_normal((4, 8)), "W_dec": rng.standard_normal((8, 4))}
    arrays |= {"b_enc": np.zeros(8), "b_dec": np.zeros(4), "threshold": np.ones(8)}
    turned = {**arrays, "W_enc": np.ascontiguousarray(arrays["W_enc"][::-1])[::-1], "b_enc": np.zeros(16)[::-2]}
    turned["b_enc"].flags.writeable = False
    _same(JumpReLUSAE.from_arrays(turned), JumpReLUSAE.from_arrays(arrays))
    with pytest.raises(WeightsError, match="which is not a float"):
        JumpReLUSAE.from_arrays({**arrays, "b_enc": np.array(["x"] * 8)})


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta:7"])
def test_a_device_that_is_not_there_is_named_before_anything_is_read(device: str, folders: dict[str, Path]) -> None:
    sae = gs.load_sae("bundled", "res", 2, width="1k")
    arrays = {name: getattr(sae, name).detach().numpy() for name in NAMES}
    attempts: list[Callable[[], Any]] = [
        lambda: gs.load_sae("bundled", "res", 2, width="1k", device=device),
        lambda: gs.load_suite("bundled", "res", [2], "1k", device=device),
        lambda: gs.load_latents(sae.row.release, sae.row.id, [1], device=device),
        lambda: JumpReLUSAE.from_folder(folders["stored"], device=device),
        lambda: JumpReLUSAE.from_arrays(arrays, device=device),
    ]
    for attempt in attempts:
        with pytest.raises(GemmaScopeError, match=f"{device}.*Available: cpu"):
            attempt()
