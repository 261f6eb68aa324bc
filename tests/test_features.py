"""The feature table against encode, token by token."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.latents.table import features
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sites import BACKENDS, get_site
from tests.helpers import random_sae, shared_model

COLUMNS = ["sequence", "position", "token", "sae", "site", "layer", "latent", "activation"]


@pytest.fixture(scope="module")
def model() -> Any:
    return shared_model("grouped", "bridge")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_active_latent_is_listed_once(backend: str) -> None:
    model = shared_model("grouped", backend)
    places = (("att", 1), ("transcoder", 2), ("embedding", None), ("res", 3))
    saes = [random_sae(model.dims, site, layer) for site, layer in places]
    table = features(model, "hello", saes)
    tokens = model.to_tokens("hello")
    for i, sae in enumerate(saes):
        name = get_site(sae.site).hook_name(sae.layer, backend)  # pyright: ignore
        _, cache = model.run_with_cache(tokens, names_filter=name)
        acts = sae.encode(cache[name].reshape(1, 6, -1))[0]
        mine = table[table["sae"] == i]
        assert set(mine["site"]) == {sae.site}
        assert mine["layer"].isna().all() if sae.layer is None else (mine["layer"] == sae.layer).all()
        assert len(mine) == int((acts[1:] > 0).sum())
        assert not mine.duplicated(["position", "latent"]).any()
        for row in mine.itertuples():
            assert row.activation == pytest.approx(acts[row.position, row.latent].item(), rel=1e-6)
            assert row.token == "hello"[row.position - 1]
        assert mine["position"].is_monotonic_increasing
        for _, rows in mine.groupby("position"):
            assert rows["activation"].is_monotonic_decreasing
    assert table["position"].min() == 1  # BOS is position 0 and left out
    assert table.columns.tolist() == COLUMNS


def test_one_forward_pass_for_all(model: Any) -> None:
    saes = [random_sae(model.dims, "res", layer, seed=seed) for layer in (0, 1) for seed in (0, 1)]
    passes: list[int] = []
    handle = model.embedding_module().register_forward_hook(lambda *_: passes.append(1))
    table = features(model, ["hi", "hello"], saes)
    handle.remove()
    assert len(passes) == 1
    for i, sae in enumerate(saes):  # two SAEs of one place stay apart
        alone = features(model, ["hi", "hello"], sae).drop(columns="sae")
        together = table[table["sae"] == i].drop(columns="sae").reset_index(drop=True)
        pd.testing.assert_frame_equal(together, alone)


def test_padding_does_not_shift_positions(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    together = features(model, ["hi", "hello"], sae)
    alone = features(model, "hi", sae)
    first = together[together["sequence"] == 0].reset_index(drop=True)
    assert first[["position", "token", "latent"]].equals(alone[["position", "token", "latent"]])
    torch.testing.assert_close(
        torch.tensor(first["activation"]), torch.tensor(alone["activation"]), rtol=1e-4, atol=1e-5
    )


def test_top_min_activation_and_special_tokens(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    everything = features(model, "hello", sae)
    top = features(model, "hello", sae, top=3)
    wanted = everything.groupby("position").head(3).reset_index(drop=True)  # strongest first
    pd.testing.assert_frame_equal(top, wanted)
    assert (top.groupby("position").size() == 3).all()
    floor = float(everything["activation"].median())
    strong = everything[everything["activation"] >= floor].reset_index(drop=True)
    assert 0 < len(strong) < len(everything)
    pd.testing.assert_frame_equal(features(model, "hello", sae, min_activation=floor), strong)
    both = features(model, "hello", sae, top=3, min_activation=floor)
    pd.testing.assert_frame_equal(both, wanted[wanted["activation"] >= floor].reset_index(drop=True))
    pd.testing.assert_frame_equal(features(model, "hello", sae, top=10_000), everything)
    special = features(model, "hello", sae, exclude_special_tokens=False)
    assert special["position"].min() == 0
    assert set(special[special["position"] == 0]["token"]) == {"<bos>"}
    pd.testing.assert_frame_equal(special[special["position"] > 0].reset_index(drop=True), everything)


def test_loaded_latents_make_the_rows_of_their_sae(model: Any) -> None:
    sae, chosen = random_sae(model.dims, "res", 1), [200, 3, 17, 99, 54]
    some = Latents(
        tuple(chosen),
        sae.W_dec[chosen],
        sae.b_enc[chosen],
        sae.threshold[chosen],
        W_enc=sae.W_enc[:, chosen],
        site="res",
        layer=1,
    )
    whole = features(model, "hello", sae)
    wanted = whole[whole["latent"].isin(chosen)].reset_index(drop=True)
    assert len(wanted) > 5
    pd.testing.assert_frame_equal(features(model, "hello", some), wanted, rtol=1e-5)
    pd.testing.assert_frame_equal(
        features(model, "hello", [some, sae]).query("sae == 1")[COLUMNS[4:]].reset_index(drop=True), whole[COLUMNS[4:]]
    )


def test_errors(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    for wrong in ({"top": 0}, {"min_activation": -1.0}, {"min_activation": float("nan")}):
        with pytest.raises(GemmaScopeError, match="at least"):
            features(model, "hello", sae, **wrong)
    rows = Latents((0,), sae.W_dec[:1], sae.b_enc[:1], sae.threshold[:1], site="res", layer=1)
    with pytest.raises(SpliceError, match="encoder columns"):
        features(model, "hello", rows)
