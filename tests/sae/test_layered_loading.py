"""Coders of several layers by row: what is loaded, what is checked, and what an object keeps when it is copied."""

from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.registry import catalog
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE, JumpReLUTranscoder
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sae.loading import load_folder, load_row
from tests.layered_files import KINDS, WIDTH, D


def row_of(root: Path, name: str, **changed: Any) -> SAERow:
    """The row of a kind whose folder is ``root / "clt/a"``, with the hashes of its files."""
    kind = KINDS[name]
    files = [root / "clt/a" / f"params_layer_{k}.safetensors" for k in range(len(kind.layers))]
    hashes = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file())
    total = WIDTH * len(kind.layers)
    fields: dict[str, Any] = {
        "id": "a",
        "site": kind.type,
        "layer": None,
        "layers": kind.layers,
        "width": str(total),
        "d_sae": total,
    }
    fields |= {"d_in": D, "l0": None, "label": "medium", "path": "clt/a", "release": "mine", "repo": str(root)}
    fields |= {"model": "someone/small-gemma" if kind.all_layers else "gemma-3-1b", "format": "gemma_scope_2"}
    fields |= {"family": "gemma3", "affine": kind.affine, "sha256s": hashes} | changed
    fields["model"] = fields["model"].rpartition("/")[2]
    defaults: dict[str, Any] = {name: field.get_default() for name, field in SAERow.model_fields.items()}
    return SAERow.model_construct(**(defaults | fields))


@pytest.mark.parametrize("name", KINDS)
def test_a_row_is_loaded_and_keeps_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS[name].write(tmp_path / "clt/a")
    row = row_of(tmp_path, name)
    monkeypatch.setattr(catalog, "resolve", lambda release, sae_id: row)
    monkeypatch.setattr(catalog, "find", lambda *_, **__: row)
    whole = load_folder(tmp_path / "clt/a")
    for coder in (
        load_row(row),
        JumpReLUSAE.from_pretrained("mine", "a"),
        gs.load_sae("m", KINDS[name].type, width=str(row.d_sae)),
    ):
        assert isinstance(coder, LayeredCoder) and (coder.row, coder.name, coder.l0) == (row, "mine/a", 12)
        assert (
            coder.family == "gemma3" and "mine/a" in repr(coder) and "\n" not in repr(coder) and len(repr(coder)) < 120
        )
        for key, value in whole.state_dict().items():
            assert torch.equal(coder.state_dict()[key], value)
    with pytest.raises(GemmaScopeError, match="has no configuration of SAELens"):
        JumpReLUSAE.from_pretrained_with_cfg_and_sparsity("mine", "a")
    with pytest.raises(GemmaScopeError, match="This is a LayeredCoder, not a JumpReLUTranscoder"):
        JumpReLUTranscoder.from_row(row)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sha256s": ("0" * 64,) * 4}, r"params_layer_0\.safetensors has sha256 .* should be 0000"),
        ({"layers": (0, 1, 2)}, r"lacks|has params_layer_3\.safetensors too"),
        ({"layers": (0, 1, 2, 4)}, "has the layers all, should be"),
        ({"d_sae": 65, "width": "65"}, "has d_sae 64, should be 65"),
        ({"d_in": D + 1}, f"d_in {D}, should be {D + 1}"),
        ({"affine": True}, "has skip False, should be True"),
        ({"l0": 13.0}, "has l0 12, should be 13"),
        ({"site": "crosscoder"}, "has type clt, should be crosscoder"),
        ({"model": "gemma-3-4b"}, "has model small-gemma, should be gemma-3-4b"),
        ({"path": "clt/b"}, "does not exist"),
    ],
)
def test_rows_that_contradict_the_files(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    KINDS["clt"].write(tmp_path / "clt/a")
    with pytest.raises(WeightsError, match=message):
        load_row(row_of(tmp_path, "clt", **changed))


def coder_of(folder: Path, mapped: bool, **given: Any) -> LayeredCoder:
    KINDS["clt-affine"].write(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o444 if mapped else 0o644)
    return load_folder(folder, **given)


@pytest.mark.parametrize("mapped", [True, False])
def test_copies(mapped: bool, tmp_path: Path) -> None:
    """Copies and pickles are equal, hold the causal planes alone, and know whether they were changed."""
    coder = coder_of(tmp_path, mapped)
    coder.row = KINDS  # any object stands for a row  # pyright: ignore
    coder.W_enc[1].requires_grad_(True)
    planes = sum(weight.numel() for weight in coder.W_dec)
    stored = sum(weight.untyped_storage().nbytes() for weight in coder.W_dec)
    assert stored == (4 * WIDTH * 4 * D * 4 if mapped else planes * 4)
    for other in (copy.deepcopy(coder), pickle.loads(pickle.dumps(coder))):
        assert sum(weight.untyped_storage().nbytes() for weight in other.W_dec) == planes * 4
        assert all(torch.equal(value, coder.state_dict()[name]) for name, value in other.state_dict().items())
        assert (other.layers, other.l0, other.kind, other.as_loaded) == (coder.layers, 12, "clt", True)
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in coder.parameters()]
        with torch.no_grad():
            other.W_dec[2][3, 1, 5] += 1
        assert not other.as_loaded and other.row is None and coder.as_loaded and coder.row is KINDS
        assert not copy.deepcopy(other).as_loaded and not pickle.loads(pickle.dumps(other)).as_loaded
    fresh = LayeredCoder(
        "clt",
        coder.layers,
        *([torch.zeros_like(one) for one in getattr(coder, name)] for name in ("W_enc", "b_enc", "threshold")),
        *([torch.zeros_like(one) for one in getattr(coder, name)] for name in ("W_dec", "b_dec", "W_skip")),
    )
    fresh.load_state_dict(coder.state_dict())
    assert all(torch.equal(value, coder.state_dict()[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(dtype: str, mapped: bool, tmp_path: Path) -> None:
    """Loading in a dtype, a second time from the stamp, and ``to`` give the same; only causal planes are converted."""
    whole, kind = coder_of(tmp_path, mapped), getattr(torch, dtype)
    for coder in (load_folder(tmp_path, dtype=dtype), load_folder(tmp_path, dtype=dtype), whole.to(kind)):
        assert coder.dtype == kind and coder.as_loaded
        assert {t.dtype for t in coder.threshold} == {torch.promote_types(torch.float32, kind)}
        assert sum(weight.untyped_storage().nbytes() for weight in coder.W_dec) == sum(
            weight.numel() * weight.itemsize for weight in coder.W_dec
        )
        for name, value in coder.state_dict().items():
            original = load_folder(tmp_path).state_dict()[name]
            assert torch.equal(value, original.to(value.dtype)), name


def test_meta_facts_of_folders_without_configuration(tmp_path: Path) -> None:
    """Kind and layers are given by the user; a CLT has all layers from 0 on."""
    needed: dict[str, dict[str, Any]] = {"crosscoder": {"layers": [2, 5, 7]}, "clt": {}}
    for name, given in needed.items():
        folder = KINDS[name].write(tmp_path / name, config={})
        with pytest.raises(GemmaScopeError, match="Give site='clt' or site='crosscoder'"):
            load_folder(folder)
        coder = load_folder(folder, "gemma3-mine", name, family="gemma3", **given)
        assert (coder.kind, coder.layers, coder.l0) == (name, KINDS[name].layers, None)
        assert coder.model_name == "gemma3-mine" and coder.name == f"{name} of gemma3-mine"
    with pytest.raises(GemmaScopeError, match=r"Give layers=, such as layers=\[5, 9"):
        load_folder(tmp_path / "crosscoder", site="crosscoder")
    with pytest.raises(GemmaScopeError, match="holds a coder of several layers: omit layer=3"):
        load_folder(tmp_path / "clt", site="clt", layer=3)
    with pytest.raises(GemmaScopeError, match="ascending from 0"):
        load_folder(tmp_path / "clt", site="clt", layers=[3, 1])
    with pytest.raises(WeightsError, match="should hold a coder of 3 layers, but has params_layer_3"):
        load_folder(tmp_path / "clt", site="clt", layers=[0, 1, 2], family="gemma3")
