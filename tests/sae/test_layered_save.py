"""Coders of several layers that are saved: equal to the bit when they are loaded, and files that stay whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sae.loading import load_folder
from tests.layered_files import KINDS, D, Layered


def same(one: LayeredCoder, other: LayeredCoder) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_saved_is_loaded_again(name: str, mapped: bool, tmp_path: Path) -> None:
    """The arrays are those of the first files, read by another library, with zeros for earlier layers."""
    kind = KINDS[name]
    first = kind.write(tmp_path / "first")
    for file in first.glob("*.safetensors"):
        file.chmod(0o444 if mapped else 0o644)
    coder = load_folder(first)
    second = gs.save_sae(coder, tmp_path / "second")
    again = load_folder(second)
    assert same(again, coder) and (again.kind, again.layers, again.l0) == (coder.kind, coder.layers, 12)
    assert (again.model_name, again.family) == (coder.model_name, coder.family)
    for k, arrays in enumerate(kind.arrays()):
        read = load_file(second / f"params_layer_{k}.safetensors")
        assert read.keys() == arrays.keys() and all(np.array_equal(read[n], arrays[n]) for n in arrays)
    for file in second.iterdir():  # a second time gives the same bytes
        assert (gs.save_sae(again, tmp_path / "third") / file.name).read_bytes() == file.read_bytes()


def test_the_configuration_is_googles(tmp_path: Path) -> None:
    """For a released model's CLT the layers are all, as there; a bfloat16 coder keeps its dtype."""
    kind = Layered("clt", tuple(range(18)), all_layers=True, d=8, width=4)
    first = kind.write(tmp_path / "first", model_name="google/gemma-3-270m-pt")
    coder = load_folder(first, dtype="bfloat16")
    said = json.loads((gs.save_sae(coder, tmp_path / "second") / "config.json").read_text())
    assert said == {**kind.config, "model_name": "google/gemma-3-270m"}
    assert same(load_folder(tmp_path / "second", dtype="bfloat16"), coder)
    assert load_folder(tmp_path / "second").W_enc[0].dtype == torch.float32
    crosscoder = KINDS["crosscoder"]
    coder = load_folder(crosscoder.write(tmp_path / "crosscoder"))
    with torch.no_grad():
        coder.W_enc[0][0, 0] += 1
    said = json.loads((gs.save_sae(coder, tmp_path / "changed") / "config.json").read_text())
    assert said == {key: value for key, value in crosscoder.config.items() if key != "l0"}


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    """Nothing is written, and files that exist stay as they are."""
    coder = load_folder(KINDS["clt"].write(tmp_path / "first"))
    folder = gs.save_sae(coder, tmp_path / "second")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changes: list[tuple[torch.Tensor, Any, float, str]] = [
        (coder.W_dec[2], (3, 1, 4), float("nan"), "layer 2 has values in W_dec that are not finite"),
        (coder.threshold[3], 2, 0.0, "layer 3 has thresholds that are 0"),
    ]
    for array, at, value, message in changes:
        with torch.no_grad():
            kept = array[at].clone()
            array[at] = value
        with pytest.raises(WeightsError, match=message):
            gs.save_sae(coder, folder)
        with torch.no_grad():
            array[at] = kept
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(GemmaScopeError, match="is saved with format='gemma_scope_2'"):
        gs.save_sae(coder, folder, "sae-lens")
    fewer = load_folder(KINDS["crosscoder"].write(tmp_path / "fewer"))
    with pytest.raises(GemmaScopeError, match=r"holds params_layer_3\.safetensors of another coder"):
        gs.save_sae(fewer, folder)
    W_enc, b_enc, threshold = ([torch.ones(*shape)] * 2 for shape in ((D, 3), (3,), (3,)))
    W_dec, b_dec = [torch.ones(3, 2, D), torch.ones(3, 1, D)], [torch.ones(D)] * 2
    unnamed = LayeredCoder("clt", (0, 1), W_enc, b_enc, threshold, W_dec, b_dec)
    with pytest.raises(GemmaScopeError, match="give family= when the coder is made"):
        gs.save_sae(unnamed, tmp_path / "unnamed")
