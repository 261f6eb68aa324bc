"""A small suite to be published: random SAEs, and one of those that are bundled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gemma_scope_tl.release.release_saes import About

import gemma_scope_tl as gs
from gemma_scope_tl.release.export import export_suite
from gemma_scope_tl.sites import ModelDims
from tests.helpers import random_sae
from tests.hub.conftest import hub, token, waits  # noqa: F401  # pyright: ignore[reportUnusedImport]

DIMS = ModelDims(50, 64, 4, 16)
PLACES = (("res", 42, 30), ("res", 42, 90), ("att", 41, 30), ("embedding", None, 20), ("mlp", 43, 0.25))


@pytest.fixture
def suite() -> list[Any]:
    """SAEs that say their model and L0; the last one is bundled."""
    saes: list[Any] = []
    for seed, (site, layer, l0) in enumerate(PLACES):
        sae = random_sae(DIMS, site, layer, d_sae=1024, seed=seed)
        sae.cfg.metadata.model_name, sae.cfg.metadata.l0 = "bundled", l0
        saes.append(sae)
    return [*saes, gs.load_sae("bundled", site="res", layer=0, width="1k")]


@pytest.fixture
def folder(suite: list[Any], tmp_path: Path) -> Path:
    """The suite exported in both layouts."""
    about = About("mit", base_model="me/model")
    (out,) = export_suite(suite, tmp_path / "tiny-scope", about, layout="both", model="bundled", progress=False)
    return out
