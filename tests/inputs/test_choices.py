"""Latents and SAEs in whatever holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.latents.logit_lens import top_tokens
from gemma_scope_tl.sae.arguments import as_indices
from gemma_scope_tl.sae.choices import as_saes
from gemma_scope_tl.sae.latents import Latents
from tests.helpers import random_sae, shared_model

ONE = [
    5,
    np.int64(5),
    np.uint8(5),
    torch.tensor(5),
    np.array(5),
    pd.Series([5]).iloc[0],
    pd.array([5], dtype="Int64")[0],
]
SEVERAL = [
    [5, 7],
    (5, 7),
    iter([5, 7]),
    np.array([5, 7]),
    torch.tensor([5, 7]),
    pd.Series([5, 7]),
    pd.Series([5, 7], dtype="Int64"),
    [np.int32(5), torch.tensor(7)],
    range(5, 9, 2),
    {5: "a", 7: "b"}.keys(),
]
NONE = [
    True,
    2.0,
    "5",
    None,
    [5.0],
    [True],
    torch.tensor(True),
    torch.tensor(2.0),
    np.array([2.0]),
    np.bool_(True),
    b"5",
]
NONE += [torch.tensor([[5]]), pd.Series([5, None]), {5: 1}, ["5"], torch.tensor([1j])]


@pytest.fixture(scope="module")
def model() -> Any:
    return shared_model("narrow-heads", "bridge")


@pytest.fixture(scope="module")
def sae(model: Any) -> Any:
    return random_sae(model.dims, "res", 0)


def test_indices() -> None:
    assert all(as_indices(one) == [5] and type(as_indices(one)[0]) is int for one in ONE)
    assert all(as_indices(several) == [5, 7] for several in SEVERAL)
    for none in NONE:
        with pytest.raises(gs.GemmaScopeError):
            as_indices(none)


def uses(model: Any, sae: Any) -> dict[str, Any]:
    """Every function that takes latents, as a number to compare."""
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))

    def edited(made: Any) -> torch.Tensor:
        return model.run_with_hooks("abc", fwd_hooks=[made])

    return {
        "steer": lambda latent: edited(gs.steer(sae, latent, 2.0)),
        "clamp": lambda latent: edited(gs.clamp(sae, latent, 2.0)),
        "scale": lambda latent: edited(gs.scale(sae, latent, 2.0)),
        "ablate": lambda latent: edited(gs.ablate(sae, latent)),
        "encode": lambda latent: sae.encode(x, latents=latent),
        "top_tokens": lambda latent: torch.tensor(top_tokens(model, sae, latent)["logit"].to_numpy()),
    }


@pytest.mark.parametrize("name", ["steer", "clamp", "scale", "ablate", "encode", "top_tokens"])
def test_latents_of_any_library(model: Any, sae: Any, name: str) -> None:
    use = uses(model, sae)[name]
    wanted = use(5)
    for one in ONE[1:]:
        assert torch.equal(use(one), wanted)
    for none in (True, 2.0, "5", torch.tensor(True)):
        with pytest.raises(gs.GemmaScopeError):
            use(none)


def test_a_latent_of_our_own_table(model: Any, sae: Any) -> None:
    table = gs.features(model, "abc", sae)
    latent = table.latent.iloc[0]
    assert gs.feature_page(model, sae, latent, ["some text " * 40], context=32).facts.latent == int(latent)
    assert gs.steer(sae, latent, 5.0)


def test_latents_that_are_loaded() -> None:
    row = gs.load_sae("bundled", "res", 2, width="1k").row
    for one in ONE:
        assert gs.load_latents(row.release, row.id, one).latents == (5,)
    with pytest.raises(gs.GemmaScopeError):
        gs.load_latents(row.release, row.id, 2.5)


def test_saes(model: Any, sae: Any) -> None:
    other = random_sae(model.dims, "mlp", 1)
    some = Latents((3,), torch.zeros(1, 64), torch.zeros(1), torch.zeros(1))
    assert as_saes(sae) == [sae] and as_saes(some) == [some]
    for several in (
        [sae, other],
        (sae, other),
        iter([sae, other]),
        {"a": sae, "b": other},
        {"a": sae, "b": other}.values(),
    ):
        assert as_saes(several) == [sae, other]
    assert as_saes((), empty=True) == []
    for none in ([], (), {}, None, "res", b"res", [None], [sae, "res"], model, 5, torch.zeros(2), (sae, {}, None)):
        with pytest.raises(gs.GemmaScopeError):
            as_saes(none)
    with pytest.raises(gs.GemmaScopeError, match="whole SAE"):
        as_saes(some, whole=True)


def test_every_function_takes_saes_alike(model: Any, sae: Any) -> None:
    other = random_sae(model.dims, "mlp", 1)
    ids = model.to_tokens(["abcdef", "ghijkl"])

    def ways() -> list[Any]:
        return [[sae, other], (sae, other), iter([sae, other]), {"x": sae, "y": other}]

    functions = {
        "features": lambda saes: gs.features(model, ids, saes)["activation"].sum(),
        "attribute": lambda saes: gs.attribute(model, ids, saes, 5)["attribution"].abs().sum(),
        "circuit": lambda saes: gs.circuit(model, ids[:1], saes, 5).nodes["attribution"].abs().sum(),
        "splice": lambda saes: float(model.run_with_saes(ids, saes=saes).sum()),
        "evaluate": lambda saes: gs.evaluate(model, saes, ids, progress=False)["fvu"].sum(),
    }
    for name, function in functions.items():
        found = [float(function(saes)) for saes in ways()]
        assert found == [found[0]] * len(found), name
        for none in (None, "res", [None], 5, [sae, {}]):
            with pytest.raises(gs.GemmaScopeError):
                function(none)
