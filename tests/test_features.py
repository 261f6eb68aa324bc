"""The feature table against encode, token by token."""

from __future__ import annotations

import pytest
import torch

from gemma_scope_tl.feature_table import features
from gemma_scope_tl.sites import BACKENDS, get_site
from tests.helpers import hooked, random_gemma, random_sae


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_active_latent_is_listed_once(backend: str) -> None:
    model = hooked(random_gemma(), backend)
    saes = [random_sae(model.dims, site, layer) for site, layer in (("att", 1), ("transcoder", 2), ("embedding", None))]
    table = features(model, "hello", saes)
    tokens = model.to_tokens("hello")
    for sae in saes:
        name = get_site(sae.site).hook_name(sae.layer, backend)  # pyright: ignore
        _, cache = model.run_with_cache(tokens, names_filter=name)
        acts = sae.encode(cache[name].reshape(1, 6, -1))[0]
        mine = table[table["site"] == sae.site]
        assert len(mine) == int((acts[1:] > 0).sum())
        for row in mine.itertuples():
            assert row.activation == pytest.approx(acts[row.position, row.latent].item(), rel=1e-6)
            assert row.token == "hello"[row.position - 1]
        for _, rows in mine.groupby("position"):
            assert rows["activation"].is_monotonic_decreasing
    assert table["position"].min() == 1  # BOS is position 0 and left out
    assert table.columns.tolist() == ["sequence", "position", "token", "site", "layer", "latent", "activation"]


def test_padding_does_not_shift_positions() -> None:
    model = hooked(random_gemma(), "bridge")
    sae = random_sae(model.dims, "res", 1)
    together = features(model, ["hi", "hello"], sae)
    alone = features(model, "hi", sae)
    first = together[together["sequence"] == 0].reset_index(drop=True)
    assert first[["position", "token", "latent"]].equals(alone[["position", "token", "latent"]])
    torch.testing.assert_close(
        torch.tensor(first["activation"]), torch.tensor(alone["activation"]), rtol=1e-4, atol=1e-5
    )


def test_top_and_special_tokens() -> None:
    model = hooked(random_gemma(), "bridge")
    sae = random_sae(model.dims, "res", 1)
    top = features(model, "hello", sae, top=3)
    assert (top.groupby("position").size() == 3).all()
    everything = features(model, "hello", sae, exclude_special_tokens=False)
    assert everything["position"].min() == 0
    assert set(everything[everything["position"] == 0]["token"]) == {"<bos>"}
