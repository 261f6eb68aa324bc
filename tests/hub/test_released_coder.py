"""A row of Gemma Scope 2's registry from the Hub: the files of its repository, checked against the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import WeightsError
from tests.fuzz.seeds import safetensors
from tests.hub.server import LocalHub

PATH = "resid_post/layer_5_width_16k_l0_medium"
D, WIDTH = 640, 16384


def _arrays() -> dict[str, np.ndarray]:
    made = {"w_enc": np.zeros((D, WIDTH), np.float32), "w_dec": np.zeros((WIDTH, D), np.float32)}
    made |= {"b_enc": np.zeros(WIDTH, np.float32), "b_dec": np.zeros(D, np.float32)}
    made["w_enc"][7, 12], made["w_dec"][12, 9] = 2.0, 3.0
    return made | {"threshold": np.ones(WIDTH, np.float32)}


def _config(**changed: Any) -> dict[str, Any]:
    said = {"hf_hook_point_in": "model.layers.5.output", "hf_hook_point_out": "model.layers.5.output", "width": WIDTH}
    said |= {
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": 55,
    }  # floor(30 + 30 * min(1, 3 * 5 / 18))
    return {**said, "affine_connection": False, "type": "sae", **changed}


def test_a_name_leads_to_its_files(hub: LocalHub, tmp_path: Path) -> None:
    """By label, number and name with ``-pt``: the same two files, downloaded once; then without any request."""
    repo = hub.repo("google/gemma-scope-2-270m-pt")
    config = json.dumps(_config()).encode()
    repo.commit({f"{PATH}/params.safetensors": safetensors(_arrays()), f"{PATH}/config.json": config})
    row = gs.registry.find("gemma-3-270m", "res", 5, "16k", "medium")
    assert (row.repo, row.path, row.l0) == (repo.id, PATH, 55)
    sae = gs.load_sae("gemma-3-270m", "res", 5, "16k", l0="medium")
    assert (sae.site, sae.layer, sae.model_name, sae.cfg.metadata.hook_name) == (
        "res",
        5,
        "gemma-3-270m",
        "blocks.5.hook_resid_post",
    )
    x = torch.zeros(1, D)
    x[0, 7] = 4.0
    assert sae(x)[0, 9].item() == 24.0 and sae(x).count_nonzero() == 1
    asked = [one for one in hub.log if "resolve" in str(one)]
    assert not [one for one in asked if PATH not in str(one)]
    again = gs.load_sae("google/gemma-3-270m-pt", "res", 5, "16k", l0=row.l0)
    assert torch.equal(again.W_enc, sae.W_enc)


def test_another_coder_in_its_place_is_refused(hub: LocalHub) -> None:
    repo = hub.repo("google/gemma-scope-2-270m-pt")
    config = json.dumps(_config(hf_hook_point_in="model.layers.9.output", hf_hook_point_out="model.layers.9.output"))
    repo.commit({f"{PATH}/params.safetensors": safetensors(_arrays()), f"{PATH}/config.json": config.encode()})
    with pytest.raises(WeightsError, match="layer 9, should be res, layer 5"):
        gs.load_sae("gemma-3-270m", "res", 5, "16k", l0="medium")
