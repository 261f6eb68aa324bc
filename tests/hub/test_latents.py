"""``load_latents`` from a Hub: few requests, few bytes, the same numbers as the whole file gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError, WeightsError
from gemma_scope_tl.registry import catalog
from tests.hub.repos import HubFile, Repo
from tests.hub.server import LocalHub
from tests.weights.test_fetch import FOLDER, row

D_IN, D_SAE, CHOSEN = 16, 5000, [7, 4999, 12]
ID = "owner/suite"


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"W_dec": (D_SAE, D_IN), "W_enc": (D_IN, D_SAE), "b_dec": D_IN, "b_enc": D_SAE, "threshold": D_SAE}
    return {name: np.abs(rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def repo(hub: LocalHub) -> Repo:
    return hub.repo(ID)


def publish(repo: Repo, tmp_path: Path, compress: bool = False, **changed: Any) -> None:
    path = tmp_path / "params.npz"
    (np.savez_compressed if compress else np.savez)(path, **{**arrays(), **changed})
    repo.commit({f"{FOLDER}/params.npz": HubFile(path.read_bytes(), lfs=True)})


def answer(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """The registry's answer: a row of this repository."""
    found = row(repo=ID, d_in=D_IN, d_sae=D_SAE, **fields)
    monkeypatch.setattr(catalog, "resolve", lambda release, sae_id: found)


def test_three_latents(hub: LocalHub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(repo, tmp_path)
    answer(monkeypatch)
    got = gs.load_latents("r", FOLDER, CHOSEN)
    for name, tensor in (("W_dec", got.W_dec), ("b_enc", got.b_enc), ("threshold", got.threshold)):
        np.testing.assert_array_equal(tensor.numpy(), arrays()[name][CHOSEN])
    assert (got.latents, got.site, got.layer, got.model_name) == (tuple(CHOSEN), "res", 0, "gemma-2-2b")
    assert got.W_enc is None
    with pytest.raises(SpliceError, match="without their encoder"):
        got.encode(torch.zeros(1, D_IN))
    with pytest.raises(UnknownNameError, match="7, 4999, 12"):
        got.position(8)
    # one HEAD; the archive's end; W_dec's header; then rows and entries, of which near ones come together
    assert len(hub.log) <= 3 + 3 * len(CHOSEN)
    assert hub.bytes_sent() < 100_000 < (tmp_path / "params.npz").stat().st_size
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.npz"))


def test_the_same_from_the_cache_with_the_encoder(
    hub: LocalHub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the file is here it is read here, without a request."""
    publish(repo, tmp_path)
    answer(monkeypatch)
    with pytest.raises(GemmaScopeError, match="not on this machine, and encoder columns"):
        gs.load_latents("r", FOLDER, CHOSEN, encoder=True)
    sae = gs.JumpReLUSAE.from_pretrained("r", FOLDER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.log)
    for cache_rows in (False, True):
        got = gs.load_latents("r", FOLDER, CHOSEN, cache_rows=cache_rows)
        assert got.W_enc is not None
        assert torch.equal(got.W_enc, sae.W_enc[:, CHOSEN])
        x = torch.randn(4, D_IN, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(got.encode(x), sae.encode(x)[:, CHOSEN], rtol=1e-5, atol=1e-5)
    assert len(hub.log) == before


def test_an_embedding_is_scaled_as_a_whole_one_is(
    hub: LocalHub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(repo, tmp_path)
    answer(monkeypatch, site="embedding", layer=None)
    got = gs.load_latents("r", FOLDER, CHOSEN)
    np.testing.assert_array_equal(got.W_dec.numpy(), arrays()["W_dec"][CHOSEN] * 4.0)  # sqrt(16)
    np.testing.assert_array_equal(got.b_enc.numpy(), arrays()["b_enc"][CHOSEN])


def test_bfloat16_keeps_the_thresholds(
    hub: LocalHub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(repo, tmp_path)
    answer(monkeypatch)
    got = gs.load_latents("r", FOLDER, 7, dtype="bf16")
    assert got.W_dec.dtype == got.b_enc.dtype == torch.bfloat16
    assert got.threshold.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "changed", "latents", "message"),
    [
        ({}, {}, [D_SAE], "has no latent 5000: it has 0..4999"),
        ({}, {"W_dec": np.full((D_SAE, D_IN), np.nan, np.float32)}, [3], "W_dec that are not finite"),
        ({}, {"threshold": np.full(D_SAE, -1, np.float32)}, [3], "negative thresholds"),
        ({}, {"W_dec": np.asfortranarray(arrays()["W_dec"])}, [3], "stores W_dec compressed or by columns"),
        ({"d_sae": 4096}, {}, [3], "d_sae 5000, should be 4096"),
    ],
)
def test_wrong_files(
    repo: Repo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    changed: dict[str, Any],
    latents: list[int],
    message: str,
) -> None:
    publish(repo, tmp_path, **changed)
    found = row(**{"repo": ID, "d_in": D_IN, "d_sae": D_SAE, **fields})
    monkeypatch.setattr(catalog, "resolve", lambda release, sae_id: found)
    with pytest.raises(WeightsError, match=message):
        gs.load_latents("r", FOLDER, latents)


def test_a_compressed_file_cannot_be_read_in_parts(repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(repo, tmp_path, compress=True)
    answer(monkeypatch)
    with pytest.raises(WeightsError, match=r"stores .*Load the whole SAE instead"):
        gs.load_latents("r", FOLDER, 3)


def test_bundled_latents_are_the_whole_sae_s() -> None:
    sae = gs.load_sae("bundled", "res", 2, "1k")
    got = gs.load_latents("bundled-res", "layer_2/width_1k/canonical", [5, 900])
    assert got.W_enc is not None
    assert torch.equal(got.W_dec, sae.W_dec[[5, 900]])
    assert torch.equal(got.W_enc, sae.W_enc[:, [5, 900]])
    name, hook = gs.steer(got, latent=900, scale=2.0)
    assert name == gs.steer(sae, latent=900, scale=2.0)[0]
    x = torch.randn(1, 3, 128)
    assert torch.equal(hook(x), gs.steer(sae, latent=900, scale=2.0)[1](x))
    with pytest.raises(GemmaScopeError, match="name at least one"):
        gs.load_latents("bundled-res", "layer_2/width_1k/canonical", [])


def test_sae_lens_layout_needs_the_file(repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"W_dec": torch.zeros(2, 2)}, tmp_path / "w")
    repo.commit({f"{FOLDER}/sae_weights.safetensors": HubFile((tmp_path / "w").read_bytes(), lfs=True)})
    answer(monkeypatch, format="sae-lens")
    with pytest.raises(GemmaScopeError, match="in SAELens's layout and not on this machine"):
        gs.load_latents("r", FOLDER, 3)


def test_force_download(hub: LocalHub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(repo, tmp_path)
    answer(monkeypatch)
    for force, gets in ((False, 1), (False, 1), (True, 2)):
        gs.JumpReLUSAE.from_pretrained("r", FOLDER, force_download=force)
        assert len(hub.requests("GET", "cdn")) == gets
