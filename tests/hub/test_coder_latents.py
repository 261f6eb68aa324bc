"""Gemma Scope 2's files on a Hub: single latents by ranges, whole files with their configuration of the same commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.registry import catalog
from gemma_scope_tl.weights.fetch import fetch
from tests.coder_files import KINDS, LAYER, WIDTH
from tests.fuzz.seeds import safetensors
from tests.hub.repos import HubFile, Repo
from tests.hub.server import LocalHub
from tests.weights.test_fetch import row

CHOSEN, ID = [7, WIDTH - 1, 12], "owner/suite"


@pytest.fixture
def repo(hub: LocalHub) -> Repo:
    return hub.repo(ID)


def publish(repo: Repo, kind: str, config: dict[str, Any] | None = None, **changed: np.ndarray) -> None:
    made = KINDS[kind]
    files: dict[str, Any] = {
        f"{made.path}/params.safetensors": HubFile(safetensors({**made.arrays(), **changed}), lfs=True)
    }
    if config is not None:
        files[f"{made.path}/config.json"] = HubFile(json.dumps(config).encode(), lfs=False)
    repo.commit(files)


def answer(monkeypatch: pytest.MonkeyPatch, kind: str, **fields: Any) -> Any:
    """The registry's answer: the row of a kind in this repository."""
    made = KINDS[kind]
    sizes = {"d_in": made.d_in, "d_sae": WIDTH, "width": "512", "model": "gemma-3-1b", "l0": 60.0}
    place = {"site": made.site, "layer": LAYER, "id": made.path, "path": made.path, "format": "gemma_scope_2"}
    skip = made.affine if made.site == "transcoder" else None
    found = row(**{"repo": ID, "affine": skip, **sizes, **place, **fields})
    monkeypatch.setattr(catalog, "resolve", lambda release, sae_id: found)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_three_latents(kind: str, hub: LocalHub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of the whole file, in a few requests, and without downloading it."""
    publish(repo, kind)
    answer(monkeypatch, kind)
    got, arrays = gs.load_latents("r", "x", CHOSEN), KINDS[kind].arrays()
    for name, tensor in (("w_dec", got.W_dec), ("b_enc", got.b_enc), ("threshold", got.threshold)):
        np.testing.assert_array_equal(tensor.numpy(), arrays[name][CHOSEN])
    assert (got.site, got.layer, got.model_name, got.W_enc) == (KINDS[kind].site, LAYER, "gemma-3-1b", None)
    assert len(hub.log) <= 3 + 3 * len(CHOSEN)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    with pytest.raises(GemmaScopeError, match="encoder columns are read from local files only"):
        gs.load_latents("r", "x", CHOSEN, encoder=True)


@pytest.mark.parametrize(
    ("fields", "changed", "latents", "message"),
    [
        ({}, {}, [WIDTH], "has no latent 512: it has 0..511"),
        ({}, {"w_dec": np.full((WIDTH, 24), np.nan, np.float32)}, [3], "W_dec that are not finite"),
        ({}, {"threshold": np.full(WIDTH, -1, np.float32)}, [3], "negative thresholds"),
        ({}, {"w_enc": np.ones((23, WIDTH), np.float32)}, [3], "has d_in 23, should be 24|do not fit together"),
        ({}, {"w_dec": np.ones((WIDTH, 4, 24), np.float32)}, [3], "a layer of a crosscoder"),
        ({}, {"w_gate": np.ones(3, np.float32)}, [3], "unknown arrays w_gate"),
        ({"affine": False}, {}, [3], "has a skip connection, should have none"),
        ({"d_sae": 1024}, {}, [3], "d_sae 512, should be 1024"),
    ],
)
def test_wrong_files(
    repo: Repo,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    changed: dict[str, Any],
    latents: list[int],
    message: str,
) -> None:
    publish(repo, "affine", **changed)
    answer(monkeypatch, "affine", **fields)
    with pytest.raises(WeightsError, match=message):
        gs.load_latents("r", "x", latents)


@pytest.mark.parametrize("with_config", [True, False])
def test_whole_files(with_config: bool, hub: LocalHub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration comes with the weights, if there is one; from the cache neither is asked for offline."""
    publish(repo, "affine", KINDS["affine"].config if with_config else None)
    answer(monkeypatch, "affine")
    sae = gs.JumpReLUSAE.from_pretrained("r", "x")
    file = fetch(sae.row)
    assert file.with_name("config.json").is_file() == with_config
    asked = [entry for entry in hub.log if "config.json" in str(entry)]
    assert asked
    gs.JumpReLUSAE.from_pretrained("r", "x")
    assert [entry for entry in hub.log if "config.json" in str(entry)] == asked  # what is known is not asked again
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.log)
    gs.JumpReLUSAE.from_pretrained("r", "x")
    got = gs.load_latents("r", "x", CHOSEN)
    assert got.W_enc is not None and len(hub.log) == before


def test_a_config_on_the_hub_is_compared(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(repo, "res", {**KINDS["res"].config, "l0": 30})
    answer(monkeypatch, "res")
    with pytest.raises(WeightsError, match=r"config\.json has l0 30, should be 60"):
        gs.JumpReLUSAE.from_pretrained("r", "x")


def test_a_new_commit_brings_its_own_config(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(repo, "res", {**KINDS["res"].config, "l0": 30})
    found = answer(monkeypatch, "res")
    fetch(found)
    publish(repo, "res", KINDS["res"].config, b_dec=np.zeros(24, np.float32))
    assert not gs.JumpReLUSAE.from_pretrained("r", "x").b_dec.any()
