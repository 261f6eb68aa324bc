"""Crosscoders and cross-layer transcoders on a Hub: whole folders of one commit, and latents by ranges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError, WeightsError
from gemma_scope_tl.registry import catalog
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.sae.layered_latents import LayeredLatents
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.weights.fetch import fetch_layers
from tests.fuzz.seeds import safetensors
from tests.hub.repos import HubFile, Repo
from tests.hub.server import LocalHub
from tests.layered_files import KINDS, Arrays, Layered
from tests.sae.test_layered_loading import row_of

ID, PATH = "owner/suite", "clt/a"
WIDE = Layered("clt", tuple(range(6)), affine=True, all_layers=True, d=64, width=512)
CHOSEN = {3: [7, 500, 12], 0: [511], 5: [9]}


@pytest.fixture
def repo(hub: LocalHub) -> Repo:
    return hub.repo(ID)


def publish(repo: Repo, kind: Layered, arrays: list[Arrays] | None = None, config: bool = True) -> str:
    files: dict[str, Any] = {
        f"{PATH}/params_layer_{k}.safetensors": HubFile(safetensors(one), lfs=True)
        for k, one in enumerate(kind.arrays() if arrays is None else arrays)
    }
    if config:
        files[f"{PATH}/config.json"] = HubFile(json.dumps(kind.config).encode(), lfs=False)
    return repo.commit(files)


def answer(monkeypatch: pytest.MonkeyPatch, kind: Layered, **fields: Any) -> SAERow:
    total = kind.width * len(kind.layers)
    sizes = {"layers": kind.layers, "d_in": kind.d, "d_sae": total, "width": str(total), "affine": kind.affine}
    row = row_of(Path("/none"), "clt", **{"repo": ID, "sha256s": None, **sizes, **fields})
    monkeypatch.setattr(catalog, "resolve", lambda release, sae_id: row)
    return row


def check(got: LayeredLatents, arrays: list[Arrays]) -> None:
    for layer, indices in CHOSEN.items():
        assert np.array_equal(got.W_dec[layer].numpy(), arrays[layer]["w_dec"][indices, layer:])
        assert np.array_equal(got.b_enc[layer].numpy(), arrays[layer]["b_enc"][indices])
        assert np.array_equal(got.threshold[layer].numpy(), arrays[layer]["threshold"][indices])
    assert len(got) == 5 and (got.kind, got.layers, got.model_name) == ("clt", WIDE.layers, "small-gemma")
    assert list(got.written(3, 500)) == [3, 4, 5]
    assert np.array_equal(got.written(3, 500)[4].numpy(), arrays[3]["w_dec"][500, 4])


def test_latents_by_ranges(hub: LocalHub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of the whole files; of each row of a decoder only the planes from its own layer on are sent."""
    publish(repo, WIDE)
    row = answer(monkeypatch, WIDE)
    got = gs.load_latents("r", "x", CHOSEN)
    check(got, WIDE.arrays())
    assert got.row == row and got.W_enc is None
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    rows = sum(len(indices) * (6 - layer) * 64 * 4 for layer, indices in CHOSEN.items())
    # at least 512 bytes are asked for at a time: a header in two steps and 5 entries of two vectors; the last arrays in
    # a file may lie in its tail of 64 KiB, which is one request
    assert hub.bytes_sent() < rows + 3 * 2 * 512 + 10 * 512 + 3 * 65536
    with pytest.raises(SpliceError, match="without their encoder columns"):
        got.encode_at(3, torch.zeros(2, 64))
    with pytest.raises(GemmaScopeError, match="encoder columns are read from local files only"):
        gs.load_latents("r", "x", CHOSEN, encoder=True)
    with pytest.raises(GemmaScopeError, match="no copy by rows is kept"):
        gs.load_latents("r", "x", CHOSEN, cache_rows=True)


def test_latents_of_cached_and_local_files(repo: Repo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With encoder columns, and the activations of the whole coder."""
    publish(repo, WIDE)
    row = answer(monkeypatch, WIDE)
    coder, x = load_row(row), torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    WIDE.write(tmp_path / PATH)
    for _ in range(2):
        got = gs.load_latents("r", "x", CHOSEN)
        check(got, WIDE.arrays())
        for layer, indices in CHOSEN.items():
            # products of 64 float32 numbers in another order
            wanted = coder.encode_at(layer, x).to_dense()[:, indices]
            assert torch.allclose(got.encode_at(layer, x), wanted, rtol=0, atol=2e-6)
        half = gs.load_latents("r", "x", CHOSEN, encoder=False, dtype="bfloat16").to("cpu")
        assert half.W_enc is None and half.W_dec[0].dtype == torch.bfloat16 and half.threshold[0].dtype == torch.float32
        answer(monkeypatch, WIDE, repo=str(tmp_path))


@pytest.mark.parametrize(
    ("latents", "error", "message"),
    [
        (
            [1, 2],
            SpliceError,
            r"give its latents by layer, such as latents=\{0: \[3, 5\], 5: \[0\]\}",
        ),
        ({}, SpliceError, "No latents were given"),
        ({3: []}, SpliceError, "No latents were given"),
        ({3: [1, 1]}, SpliceError, "given twice"),
        ({"3": [1]}, SpliceError, "An integer was expected"),
        ({6: [1]}, UnknownNameError, "Unknown layer of mine/a '6'"),
        ({3: 512}, WeightsError, "has no latent 512: it has 0..511"),
        ({3: -1}, WeightsError, "has no latent -1"),
    ],
)
@pytest.mark.parametrize("local", [True, False])
def test_names_of_latents(
    latents: Any, error: type[Exception], message: str, local: bool, repo: Repo, monkeypatch: Any, tmp_path: Path
) -> None:
    publish(repo, WIDE)
    if local:
        WIDE.write(tmp_path / PATH)
    answer(monkeypatch, WIDE, **({"repo": str(tmp_path)} if local else {}))
    with pytest.raises(error, match=message):
        gs.load_latents("r", "x", latents)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("w_dec", np.full((512, 6, 64), np.nan, np.float32), "params_layer_3.* W_dec that are not finite"),
        ("threshold", np.zeros(512, np.float32), "thresholds that are 0"),
        ("w_dec", np.ones((512, 5, 64), np.float32), r"W_dec is \[512, 5, 64\], should be \[512, 6, 64\]"),
        ("w_enc", np.ones((63, 512), np.float32), "do not fit together"),
    ],
)
def test_wrong_files(name: str, value: np.ndarray, message: str, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = WIDE.arrays()
    arrays[3][name] = value
    publish(repo, WIDE, arrays)
    answer(monkeypatch, WIDE)
    with pytest.raises(WeightsError, match=message):
        gs.load_latents("r", "x", CHOSEN)
    with pytest.raises(WeightsError, match=r"params_layer_3.*lacks affine_skip_connection|should have none"):
        answer(monkeypatch, WIDE, affine=False)
        gs.load_latents("r", "x", CHOSEN)


@pytest.mark.parametrize("with_config", [True, False])
def test_whole_folders_of_one_commit(
    with_config: bool, hub: LocalHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push between two files does not mix commits; the files are in the cache afterwards, without a request."""
    kind = KINDS["clt-affine"]
    first = publish(repo, kind, config=with_config)
    row = answer(monkeypatch, kind, site="clt")
    newer = [{**one, "b_dec": one["b_dec"] + 1} for one in kind.arrays()]
    download = fetch_module_download()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", pushing(download, lambda: publish(repo, kind, newer)))
    paths = fetch_layers(row)
    assert {path.parents[2].name for path in paths} == {first}
    coder = load_row(row.model_copy(update={"revision": first}))
    for k, one in enumerate(kind.arrays()):
        assert np.array_equal(coder.b_dec[k].numpy(), one["b_dec"])
    before = len(hub.log)
    load_row(row.model_copy(update={"revision": first}))
    assert len(hub.log) == before and coder.l0 == (12 if with_config else None)


def fetch_module_download() -> Any:
    import huggingface_hub

    return huggingface_hub.hf_hub_download


def pushing(download: Any, push: Any) -> Any:
    """``hf_hub_download`` that pushes another version after the first file."""
    done: list[bool] = []

    def call(**kwargs: Any) -> Any:
        path = download(**kwargs)
        if not done:
            done.append(True)
            push()
        return path

    return call


def test_missing_files_on_the_hub(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS["clt"]
    publish(repo, kind, kind.arrays()[:3])
    answer(monkeypatch, kind)
    with pytest.raises(WeightsError, match=r"params_layer_3\.safetensors"):
        gs.JumpReLUSAE.from_pretrained("r", "x")
