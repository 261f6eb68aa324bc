"""Damaged files in Gemma Scope 2's layout, and what a ``config.json`` is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.families import bare_name
from gemma_scope_tl.registry import catalog
from gemma_scope_tl.registry.schema import SAERow, read_release
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.weights.coder_config import CoderConfig
from gemma_scope_tl.weights.load import load_arrays
from tests.coder_files import KINDS, LAYER, WIDTH, Arrays, Coder, inputs
from tests.fuzz.seeds import safetensors


def set_value(name: str, value: float) -> Callable[[Arrays], None]:
    def spoil(arrays: Arrays) -> None:
        arrays[name].flat[5] = value

    return spoil


def transposed(arrays: Arrays) -> None:
    arrays["w_enc"] = np.ascontiguousarray(arrays["w_enc"].T)


def shorter(arrays: Arrays) -> None:
    arrays["affine_skip_connection"] = arrays["affine_skip_connection"][:-1]


def missing(arrays: Arrays) -> None:
    del arrays["b_dec"]


def unknown(arrays: Arrays) -> None:
    arrays["w_gate"] = arrays["w_enc"]


def both_skips(arrays: Arrays) -> None:
    arrays["W_skip"] = arrays["affine_skip_connection"]


def several_layers(arrays: Arrays) -> None:
    arrays["w_dec"] = np.ones((WIDTH, 4, 24), np.float32)


def without_skip(arrays: Arrays) -> None:
    del arrays["affine_skip_connection"]


def double(arrays: Arrays) -> None:
    arrays["b_enc"] = np.ones(2 * WIDTH, np.float32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (set_value("w_enc", np.nan), "values in W_enc that are not finite"),
        (set_value("affine_skip_connection", np.inf), "values in affine_skip_connection that are not finite"),
        (set_value("threshold", -1e-3), r"negative thresholds \(down to -0.001\)"),
        (transposed, "shapes that do not fit together"),
        (shorter, r"affine_skip_connection is \[23, 24\], should be \[24, 24\]"),
        (missing, "lacks b_dec"),
        (unknown, "unknown arrays w_gate"),
        (both_skips, "two arrays for the same parameter"),
        (several_layers, r"w_dec \[512, 4, 24\], so it is a layer of a crosscoder .*give the folder"),
        (without_skip, r"lacks affine_skip_connection \(the skip connection\) according to"),
        (double, r"b_enc is \[1024\], should be \[512\]"),
    ],
)
def test_spoilt_files(spoil: Callable[[Arrays], None], message: str, tmp_path: Path) -> None:
    folder, arrays = KINDS["affine"].write(tmp_path), KINDS["affine"].arrays()
    spoil(arrays)
    (folder / "params.safetensors").write_bytes(safetensors(arrays))
    with pytest.raises(WeightsError, match=message) as caught:
        JumpReLUSAE.from_folder(folder)
    assert str(folder) in str(caught.value)


def test_integers_are_refused(tmp_path: Path) -> None:
    folder = KINDS["res"].write(tmp_path)
    raw = (folder / "params.safetensors").read_bytes()
    (folder / "params.safetensors").write_bytes(raw.replace(b'"F32"', b'"I32"'))
    with pytest.raises(WeightsError, match="dtype torch.int32, not a float"):
        JumpReLUSAE.from_folder(folder)


@pytest.mark.parametrize("tenths", range(10))
def test_truncated_files(tenths: int, tmp_path: Path) -> None:
    file = KINDS["affine"].write(tmp_path) / "params.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * tenths // 10])
    with pytest.raises(WeightsError, match=r"params\.safetensors is (truncated|empty)"):
        JumpReLUSAE.from_folder(file.parent)


def test_every_file_is_mapped_where_nobody_writes_it(tmp_path: Path) -> None:
    """Writing to the parameters of a mapped file changes neither the file nor another map of it."""
    file = KINDS["affine"].write(tmp_path) / "params.safetensors"
    file.chmod(0o444)
    before = file.read_bytes()
    one, other = load_arrays(file), load_arrays(file)
    one["W_dec"].zero_()
    np.testing.assert_array_equal(other["W_dec"].numpy(), KINDS["affine"].arrays()["w_dec"])
    assert file.read_bytes() == before
    maps = Path("/proc/self/maps")
    if maps.is_file():
        lines = [line.split()[0] for line in maps.read_text().splitlines() if line.endswith(str(file.resolve()))]
        spans = [tuple(int(end, 16) for end in line.split("-")) for line in lines]
        assert any(low <= other["W_enc"].data_ptr() < high for low, high in spans)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"type": "clt"}, r"describes a cross-layer transcoder \(clt\), which spans several layers. It is loaded"),
        ({"type": "crosscoder"}, "describes a crosscoder, which spans several layers. It is loaded together"),
        ({"hf_hook_point_in": "model.layers.{5,9,12,15}.output"}, "describes a sae that spans several layers"),
        ({"hf_hook_point_in": "model.layers.{all}.output", "type": None}, "a coder that spans several layers"),
        ({"type": "lorsa"}, "has type 'lorsa', not one of sae, transcoder, clt, crosscoder"),
        ({"type": "transcoder"}, "is of type transcoder, but reads model.layers.13.output and writes"),
        ({"hf_hook_point_out": "model.layers.14.output"}, "is of type sae, but reads"),
        ({"hf_hook_point_in": None}, "names the tensor .* that is written but none read"),
        ({"architecture": "topk"}, "has architecture 'topk', not jump_relu"),
        ({"affine_connection": True}, "describes an SAE with an affine_connection"),
        ({"affine_connection": "no"}, "has affine_connection 'no', not true or false"),
        ({"width": 513}, "has d_sae 512, should be 513 according to .* or config.json"),
        ({"width": "16k"}, "has d_sae 512, should be 16384"),
        ({"width": 0}, "has width 0, which is not a number of latents"),
        ({"width": True}, "has width True, which is not a number of latents"),
        ({"width": "wide"}, "has width 'wide', which is not a number of latents"),
        ({"l0": 513, "width": 512}, "has l0 513, more than its width 512"),
        ({"l0": -1}, "has l0 -1, which is not a positive number"),
        ({"l0": float("nan")}, "has l0 nan, which is not a positive number"),
        ({"l0": 10**400}, "has l0 .* which is not a positive number"),
        ({"model_name": 3}, "has model_name 3, which is not a name"),
        ({"model_name": "x" * 300}, "has model_name 'xxx.*which is not a name"),
        ({"model_name": "a\u001b[2J"}, r"has model_name 'a\\x1b\[2J', which is not a name"),
        ({"family": "gemma9"}, "no model family 'gemma9'|model family 'gemma9'"),
        (
            {"hf_hook_point_in": "model.layers.13.mlp.output", "hf_hook_point_out": None},
            "names model.layers.13.mlp.output, where coders of Gemma 3 neither read nor write. In layer 0 they ",
        ),
    ],
)  # fmt: skip
def test_configs_that_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        JumpReLUSAE.from_folder(KINDS["res"].write(tmp_path, **changed))
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"l0": 1' + "0" * 5000 + "}", "[" * 100_000, "<html>"])
def test_texts_that_are_no_config(text: str, tmp_path: Path) -> None:
    folder = KINDS["res"].write(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json"):
        JumpReLUSAE.from_folder(folder)


def test_a_config_of_huge_size_is_not_read(tmp_path: Path) -> None:
    folder = KINDS["res"].write(tmp_path)
    (folder / "config.json").write_text(" " * (2 << 20) + "{}")
    with pytest.raises(WeightsError, match="too large for a configuration"):
        JumpReLUSAE.from_folder(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_a_layer_beside_the_config_of_an_sae(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind].write(tmp_path)
    (folder / "params.safetensors").rename(folder / "params_layer_0.safetensors")
    with pytest.raises(WeightsError, match=r"config\.json describes a (sae|transcoder) of a single layer"):
        JumpReLUSAE.from_folder(folder)


def test_keys_that_are_missing_or_unknown(tmp_path: Path) -> None:
    """The place needs only the hooks; an empty configuration says nothing."""
    made = KINDS["affine"]
    hooks = {key: value for key, value in made.config.items() if key.startswith("hf")}
    sae = JumpReLUSAE.from_folder(made.write(tmp_path, {**hooks, "new_key": [1, {"a": None}]}))
    assert (sae.site, sae.layer, sae.model_name) == ("transcoder", LAYER, None)
    assert sae.cfg.metadata.hook_name == f"blocks.{LAYER}.mlp.hook_in"
    assert JumpReLUSAE.from_folder(made.write(tmp_path, {})).site is None


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("google/gemma-3-270m-pt", "gemma-3-270m"),
        ("google/gemma-3-270m", "gemma-3-270m"),
        ("gemma-3-1b-pt", "gemma-3-1b"),
        ("google/gemma-v3-4b-it", "gemma-3-4b-it"),
        ("gemma-v3-270m-pt", "gemma-3-270m"),
        ("gemma-3-27b-it", "gemma-3-27b-it"),
        ("google/gemma-2-2b", "gemma-2-2b"),
        ("me/my-v3-model-pt", "my-v3-model-pt"),
        ("someone/gemma-3-1b-pt", "gemma-3-1b"),  # a copy of the model: its SAEs are those of the model
        ("google/gemma-2-2b-pt", "gemma-2-2b-pt"),  # no base model of Gemma 2 has the suffix
        ("gemma-v3-9b-pt", "gemma-v3-9b-pt"),  # no released size
    ],
)
def test_names_of_models_are_repaired(written: str, name: str, tmp_path: Path) -> None:
    assert bare_name(written) == bare_name(name) == name
    assert JumpReLUSAE.from_folder(KINDS["res"].write(tmp_path, model_name=written)).model_name == name


def test_what_the_user_says_is_compared(tmp_path: Path) -> None:
    folder = KINDS["res"].write(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"site": "mlp"}, "has site res, but site='mlp'"),
        ({"layer": 12}, "layer 13, but layer=12"),
    ]
    for given, message in cases:
        with pytest.raises(WeightsError, match=message):
            JumpReLUSAE.from_folder(folder, **given)
    tuned = JumpReLUSAE.from_folder(folder, "google/gemma-3-1b-it", "res", 13)  # base SAEs are used with tuned models
    assert tuned.model_name == "google/gemma-3-1b-it"


def rows_of(root: Path, **changed: Any) -> dict[str, SAERow]:
    """The rows of all kinds from a registry file, with changed fields in every row."""
    rows = [
        {
            "id": made.path,
            "site": made.site,
            "layer": LAYER,
            "width": "512",
            "d_sae": WIDTH,
            "d_in": made.d_in,
            "l0": 60.0,
            "path": made.path,
            "label": "medium",
            **({"affine": made.affine} if made.site == "transcoder" else {}),
            **changed,
        }
        for made in KINDS.values()
    ]
    head = {"release": "made-up", "repo": str(root), "model": "gemma-3-1b", "license": "mit", "description": "Made up"}
    file = root / "made-up.yaml"
    file.write_text(json.dumps({**head, "format": "gemma_scope_2", "saes": rows}))  # JSON is YAML
    return dict(zip(KINDS, read_release(file).rows, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_config", [True, False])
def test_by_a_registry_row(kind: str, with_config: bool, tmp_path: Path) -> None:
    """The row says everything; the configuration, if there is one, agrees."""
    made = KINDS[kind]
    folder, row = made.write(tmp_path), rows_of(tmp_path)[kind]
    if not with_config:
        (folder / "config.json").unlink()
    sae = JumpReLUSAE.from_row(row)
    assert (sae.site, sae.layer, sae.model_name, sae.row) == (made.site, LAYER, "gemma-3-1b", row)
    assert (sae.cfg.metadata.l0, sae.is_transcoder) == (60, made.site == "transcoder")
    x = inputs(made, 20)
    np.testing.assert_allclose(sae(torch.from_numpy(x)).detach(), Coder(made.arrays()).forward(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("res", {"model_name": "gemma-3-1b-it"}, "has model gemma-3-1b-it, should be gemma-3-1b according to the reg"),
        ("res", {"l0": 59}, "has l0 59, should be 60"),
        (
            "res",
            {"hf_hook_point_in": "model.layers.1.output", "hf_hook_point_out": None},
            "layer 1, should be res, lay",
        ),
        ("att", KINDS["res"].config, "has site res, layer 13, should be att, layer 13"),
        ("affine", {"affine_connection": False}, "has skip False, should be True"),
        ("transcoder", {"affine_connection": True}, "has skip True, should be False"),
        ("mlp", {"width": 1024}, "has d_sae 1024, should be 512"),
        ("mlp", {"type": "clt"}, "spans several layers"),
    ],
)
def test_a_config_that_contradicts_its_row(kind: str, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    KINDS[kind].write(tmp_path, **changed)
    with pytest.raises(WeightsError, match=message):
        JumpReLUSAE.from_row(rows_of(tmp_path)[kind])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"affine": False}, "skip True, should be False|has a skip connection, should have none"),
        ({"d_sae": 1024, "width": "1k"}, "has d_sae 512, should be 1024"),
        ({"d_in": 23}, "has d_in 24, should be 23"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_a_file_that_contradicts_its_row(
    changed: dict[str, Any], message: str, with_config: bool, tmp_path: Path
) -> None:
    folder = KINDS["affine"].write(tmp_path)
    if not with_config:
        (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=message):
        JumpReLUSAE.from_row(rows_of(tmp_path, **changed)["affine"])


@pytest.mark.parametrize("cache_rows", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_some_latents(kind: str, cache_rows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "resolve", lambda release, sae_id: rows_of(tmp_path)[kind])
    made, chosen = KINDS[kind], [7, WIDTH - 1, 12]
    made.write(tmp_path)
    got = gs.load_latents("made-up", made.path, chosen, cache_rows=cache_rows)
    arrays, coder = made.arrays(), Coder(made.arrays())
    assert got.W_enc is not None and got.b_dec is not None
    np.testing.assert_array_equal(got.W_dec.numpy(), arrays["w_dec"][chosen])
    np.testing.assert_array_equal(got.W_enc.numpy(), arrays["w_enc"][:, chosen])
    np.testing.assert_array_equal(got.threshold.numpy(), arrays["threshold"][chosen])
    np.testing.assert_array_equal(got.b_dec.numpy(), arrays["b_dec"])
    x = inputs(made, 20)
    np.testing.assert_allclose(got.encode(torch.from_numpy(x)), coder.encode(x)[:, chosen], rtol=0, atol=2e-5)
    made.write(tmp_path, l0=61)
    with pytest.raises(WeightsError, match="has l0 61, should be 60"):
        gs.load_latents("made-up", made.path, chosen)


def test_a_place_is_found_whatever_the_family(tmp_path: Path) -> None:
    """Of a model that nobody released, the hooks decide, and else the family that the file names."""
    sae = JumpReLUSAE.from_folder(KINDS["transcoder"].write(tmp_path, model_name="me/tiny"))
    assert (sae.site, sae.cfg.metadata.family) == ("transcoder", "gemma3")
    raw = {"hf_hook_point_in": "model.layers.3.output", "family": "gemma3"}
    found = CoderConfig.parse(raw, Path("config.json")).place()
    assert found is not None and (found[0].name, found[1].name, found[2]) == ("gemma3", "res", 3)


def test_an_embedding_has_no_units_here(tmp_path: Path) -> None:
    folder = KINDS["res"].write(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(GemmaScopeError, match="does not say in which units an embedding SAE is"):
        JumpReLUSAE.from_folder(folder, "gemma-2-2b", "embedding")
