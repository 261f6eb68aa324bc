"""Files of coders that span several layers: their values, and damaged ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.sae.loading import load_folder
from gemma_scope_tl.weights import load
from tests.layered_files import KINDS, WIDTH, Arrays, D, outputs


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_the_equations(name: str, mapped: bool, tmp_path: Path) -> None:
    kind = KINDS[name]
    kind.write(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.chmod(0o444 if mapped else 0o644)
    coder = load_folder(tmp_path)
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal((5, kind.d)).astype(np.float32) for _ in kind.layers]
    found = coder([torch.from_numpy(x) for x in inputs])
    for y, wanted in zip(found, outputs(kind.arrays(), inputs), strict=True):
        # sums of at most 64 float32 products and 24 terms of the skip connection
        assert torch.allclose(y.double(), torch.from_numpy(wanted), rtol=0, atol=5e-6)
    assert (coder.kind, coder.layers, coder.l0) == (kind.type, kind.layers, 12)
    rows = kind.width * len(kind.layers) * kind.d
    for k, plane in enumerate(coder.W_dec):
        assert plane.shape == (kind.width, len(kind.layers) - k, kind.d)
        # a mapped file is not copied: the view steps over the planes of earlier layers
        assert plane.stride(0) * kind.width == (rows if mapped else plane.numel())


def spoilt(name: str, where: Any, value: float) -> Callable[[list[Arrays]], None]:
    def spoil(arrays: list[Arrays]) -> None:
        arrays[2][name][where] = value

    return spoil


def without(layer: int, name: str) -> Callable[[list[Arrays]], None]:
    def spoil(arrays: list[Arrays]) -> None:
        del arrays[layer][name]

    return spoil


def replaced(layer: int, name: str, shape: tuple[int, ...]) -> Callable[[list[Arrays]], None]:
    return lambda arrays: arrays[layer].update({name: np.ones(shape, np.float32)})


def swapped(arrays: list[Arrays]) -> None:
    arrays[0], arrays[1] = arrays[1], arrays[0]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoilt("w_dec", (3, 0, 7), 1e-30), r"params_layer_2.* write layers before their own: w_dec\[:, :2\] is not"),
        (spoilt("w_dec", (WIDTH - 1, 1, D - 1), -1.0), r"w_dec\[:, :2\] is not zero"),
        (spoilt("w_dec", (0, 0, 0), np.nan), r"w_dec\[:, :2\] is not zero"),
        (spoilt("w_dec", (5, 3, 1), np.nan), "params_layer_2.* values in W_dec that are not finite"),
        (spoilt("w_enc", (5, 3), np.inf), "values in W_enc that are not finite"),
        (spoilt("threshold", 4, -1.0), "negative thresholds"),
        (spoilt("threshold", 4, 0.0), "params_layer_2.* thresholds that are 0"),
        (spoilt("affine_skip_connection", (4, 4), np.nan), "affine_skip_connection that are not finite"),
        (without(3, "b_dec"), r"params_layer_3\.safetensors lacks b_dec"),
        (without(3, "affine_skip_connection"), "params_layer_3.*lacks affine_skip_connection"),
        (replaced(1, "log_threshold", (WIDTH,)), "two arrays for the same parameter"),
        (replaced(1, "scaling_factor", (WIDTH,)), "has scaling_factor, which no layer of such a coder has"),
        (replaced(1, "w_dec", (WIDTH, D)), r"W_dec is \[16, 24\], should be \[16, 4, 24\]"),
        (replaced(1, "w_dec", (WIDTH, 5, D)), r"W_dec is \[16, 5, 24\], should be \[16, 4, 24\].*there are 4 layers"),
        (replaced(1, "w_enc", (D, WIDTH, 1)), "which is not a matrix"),
        (replaced(1, "b_dec", (D + 1,)), r"b_dec is \[25\], should be \[24\]"),
        (swapped, r"params_layer_1.*w_dec\[:, :1\] is not zero"),
    ],
)
def test_spoilt_files(spoil: Callable[[list[Arrays]], None], message: str, mapped: bool, tmp_path: Path) -> None:
    """Each is refused at every load, as no stamp is written for a file that failed."""
    arrays = KINDS["clt-affine"].arrays()
    spoil(arrays)
    KINDS["clt-affine"].write(tmp_path, arrays)
    for file in tmp_path.glob("*.safetensors"):
        file.chmod(0o444 if mapped else 0o644)
    time.sleep(0.11)  # stamps are written for files that are not new
    for _ in range(2):
        with pytest.raises(WeightsError, match=message):
            load_folder(tmp_path)


def test_files_of_other_layers_have_other_sizes(tmp_path: Path) -> None:
    arrays = KINDS["clt"].arrays()
    arrays[1] = replace(KINDS["clt"], d=D + 2).arrays()[1]
    KINDS["clt"].write(tmp_path, arrays)
    with pytest.raises(WeightsError, match=r"params_layer_1\.safetensors reads 26 and writes 26 values, but"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "params_layer_0.safetensors").write_bytes(b""), r"layer_0\.safetensors is empty"),
        (lambda folder: (folder / "params_layer_0.safetensors").unlink(), r"lacks params_layer_0\.safetensors and has"),
        (lambda folder: (folder / "params_layer_2.safetensors").unlink(), r"lacks params_layer_2\.safetensors"),
        (
            lambda folder: (folder / "params_layer_3.safetensors").rename(folder / "params_layer_03.safetensors"),
            r"has params_layer_03\.safetensors too",
        ),
        (
            lambda folder: (folder / "params_layer_4.safetensors").write_bytes(
                (folder / "params_layer_3.safetensors").read_bytes()
            ),
            "W_dec is .16, 4, 24., should be .16, 5, 24.",
        ),
        (
            lambda folder: (folder / "params_layer_1.safetensors").write_bytes(
                (folder / "params_layer_1.safetensors").read_bytes()[:-5]
            ),
            r"params_layer_1\.safetensors is truncated",
        ),
        (lambda folder: [path.unlink() for path in folder.glob("*.safetensors")], "has neither"),
    ],
)
def test_missing_and_surplus_files(change: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    change(KINDS["clt"].write(tmp_path))
    with pytest.raises(WeightsError, match=message):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("clt", {"type": "crosscoder"}, "is of type crosscoder, but reads"),
        ("clt", {"type": "transcoder"}, "is of type transcoder, but reads"),
        ("clt", {"width": 63}, "holds 64 latents in 4 layers, should be 63 according to .*config.json"),
        ("clt", {"affine_connection": True}, "lacks affine_skip_connection"),
        ("clt-affine", {"affine_connection": False}, "has a skip connection, should have none"),
        ("clt", {"model_name": "google/gemma-3-1b-pt"}, "should hold a coder of 26 layers"),
        ("clt", {"model_name": "google/gemma-2-2b"}, "which coders of several layers of Gemma 2 neither"),
        ("crosscoder", {"hf_hook_point_in": "model.layers.{2,5}.output"}, "names .* neither read nor write"),
        ("crosscoder", {"hf_hook_point_in": "model.layers.{7,5,2}.output"}, "neither read nor write"),
        ("crosscoder", {"hf_hook_point_in": "model.layers.5.output", "hf_hook_point_out": None}, "neither read nor"),
        ("crosscoder", {"l0": 1e6}, "has l0 1e.06, more than its width 48"),
        ("crosscoder", {"architecture": "topk"}, "has architecture 'topk', not jump_relu"),
        ("crosscoder", {"type": "sae", "hf_hook_point_in": "model.layers.5.output"}, "single layer|neither read"),
    ],
)
def test_configurations_that_contradict(name: str, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        load_folder(KINDS[name].write(tmp_path, **changed))


def test_planes_of_earlier_layers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second load of a mapped file reads the vectors alone, and of a copied one the causal planes, by the stamp."""
    folder = KINDS["clt"].write(tmp_path)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o444)
    time.sleep(0.11)
    load_folder(folder)
    streamed: list[str] = []
    stream = load.stream

    def noted(path: Path, layouts: Any, sinks: Any, *rest: Any) -> None:
        streamed.extend(f"{path.stem[-1]} {name}" for name in sinks if sinks[name])
        stream(path, layouts, sinks, *rest)

    monkeypatch.setattr(load, "stream", noted)
    load_folder(folder)
    assert sorted({name.split()[1] for name in streamed}) == ["b_dec", "b_enc", "threshold"]
    streamed.clear()
    half = load_folder(folder, dtype="bfloat16")
    assert sorted(name for name in streamed if "W_dec" in name) == ["0 W_dec"]  # a file without earlier planes
    assert torch.equal(half.W_dec[2], load_folder(folder).W_dec[2].bfloat16())


def test_a_model_is_compared_with_the_files(tmp_path: Path) -> None:
    from transformers import Gemma3TextConfig

    def config(d: int = D, layers: int = 8) -> Any:
        return Gemma3TextConfig(hidden_size=d, num_hidden_layers=layers, num_attention_heads=2, head_dim=8)

    folder = KINDS["crosscoder"].write(tmp_path, model_name=None)
    assert load_folder(folder, config()).layers == (2, 5, 7)
    with pytest.raises(WeightsError, match="d_in 24, should be 32; .* according to the model"):
        load_folder(folder, config(32))
    with pytest.raises(WeightsError, match="layer 7"):
        load_folder(folder, config(layers=7))
    with pytest.raises(WeightsError, match="should hold a coder of 8 layers"):
        load_folder(KINDS["clt"].write(tmp_path / "clt", model_name=None), config())
