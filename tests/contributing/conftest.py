"""A made-up release of random SAEs for the bundled model, whose names tell their true L0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.registry import clear_cache, locate
from gemma_scope_tl.registry.locate import BUNDLED_MODEL, HELD_OUT_TEXT
from gemma_scope_tl.sae.save import save_sae
from gemma_scope_tl.sites import ModelDims, get_site
from tests.helpers import random_sae, shared_model

PLACES = (("res", 2, 30), ("res", 2, 90), ("att", 1, 30), ("embedding", None, 20))
WIDTH = 1024


def folder_name(site: str, layer: int | None, l0: int) -> str:
    """Gemma Scope's folder name, below one for the site."""
    head = "embedding" if layer is None else f"{site}/layer_{layer}"
    return f"{head}/width_1k/average_l0_{l0}"


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The release in both layouts: ``{"gemma-scope": folder, "sae-lens": folder}``.

    The thresholds are set so that on held-out text the L0 is that of the name: all are the quantile of the
    pre-activations at ``1 - L0 / width``, in NumPy.
    """
    model: Any = shared_model("bundled", "bridge")
    texts = [json.loads(line)["text"] for line in HELD_OUT_TEXT.read_text().splitlines()[:40:4]]
    tokens = model.tokenizer(texts, return_tensors="pt", truncation=True, max_length=96, padding=True)["input_ids"]
    dims = ModelDims.from_config(json.loads((BUNDLED_MODEL / "config.json").read_text()))
    ordinary = torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids), invert=True)
    root = tmp_path_factory.mktemp("made-up")
    places = {"gemma-scope": root / "my-saes", "sae-lens": root / "lens-saes"}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for number, (site, layer, l0) in enumerate(PLACES):
        sae = random_sae(dims, site, layer, d_sae=WIDTH, seed=number)
        x = cache[get_site(site).hook_name(layer, "bridge")]
        x = (x.flatten(-2) if x.ndim == 4 else x)[ordinary].numpy()
        pre = x @ sae.W_enc.numpy() + sae.b_enc.numpy()
        sae.threshold.fill_(float(max(np.quantile(pre, 1 - l0 / WIDTH), 0)))
        save_sae(sae, places["gemma-scope"] / folder_name(site, layer, l0))
        save_sae(sae, places["sae-lens"] / f"sae_{number}", format="sae-lens")
    return places


@pytest.fixture(autouse=True)
def clean_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No registered files before and after, and no user's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
    monkeypatch.delenv(locate.EXTRA_FOLDERS_VARIABLE, raising=False)
    monkeypatch.setattr(locate, "_registered", {})
    yield
    clear_cache()
