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


# -- numbers in any form: the same tensor as the list, in its order ----------------------------------------------------

FILTERED = pd.Series([9, 9, 3, 1, 4], index=[4, 3, 2, 1, 0])[lambda one: one < 9]  # labels are not rows
INTEGERS: dict[str, Any] = {
    "tuple": (3, 1, 4),
    "iterator": lambda: iter([3, 1, 4]),
    "dict keys": {3: "", 1: "", 4: ""}.keys(),
    "NumPy": np.array([3, 1, 4]),
    "unsigned": np.array([3, 1, 4], np.uint16),
    "objects": np.array([3, 1, 4], object),
    "torch": torch.tensor([3, 1, 4]),
    "list of both": [np.int32(3), torch.tensor(1), 4],
    "filtered Series": FILTERED,
    "nullable Series": FILTERED.astype("Int64"),
    "Index": pd.Index([3, 1, 4]),
}
FLOATS: dict[str, Any] = {
    **INTEGERS,
    "floats": FILTERED.astype(float),
    "nullable floats": FILTERED.astype("Float64"),
    "float32": np.array([3, 1, 4], np.float32),
    "bfloat16": torch.tensor([3, 1, 4], dtype=torch.bfloat16),
}


def made(given: Any) -> Any:
    return given() if callable(given) and not isinstance(given, torch.Tensor) else given


@pytest.mark.parametrize("name", INTEGERS)
def test_positions_of_any_library(model: Any, sae: Any, name: str) -> None:
    with torch.no_grad():
        wanted = model.run_with_hooks("abcdefgh", fwd_hooks=[gs.steer(sae, 5, 9.0, positions=[3, 1, 4])])
        edit = gs.steer(sae, 5, 9.0, positions=made(INTEGERS[name]))
        for _ in range(2):  # an iterator serves every pass
            assert torch.equal(model.run_with_hooks("abcdefgh", fwd_hooks=[edit]), wanted)
        spliced = model.run_with_saes("abcdefgh", saes=sae, positions=[3, 1, 4])
        with gs.splice(model, sae, positions=made(INTEGERS[name])):
            for _ in range(2):
                assert torch.equal(model("abcdefgh"), spliced)


def test_masks_of_any_library(model: Any, sae: Any) -> None:
    chosen, ids = [False, True, True, False, True], torch.tensor([[2, 5, 6, 7, 8]])
    labelled = pd.Series(chosen, index=[9, 8, 7, 6, 5])
    with torch.no_grad():
        wanted = model.run_with_hooks(ids, fwd_hooks=[gs.steer(sae, 5, 9.0, positions=[1, 2, 4])])
        for mask in (chosen, np.array(chosen), labelled, labelled.astype("boolean"), torch.tensor([chosen])):
            assert torch.equal(model.run_with_hooks(ids, fwd_hooks=[gs.steer(sae, 5, 9.0, positions=mask)]), wanted)
        text = pd.Series([0, 1, 1, 1, 1], index=[9, 8, 7, 6, 5])
        assert torch.equal(model(ids, attention_mask=text), model(ids, attention_mask=text.tolist()))


@pytest.mark.parametrize("name", FLOATS)
def test_values_of_any_library(model: Any, sae: Any, name: str) -> None:
    """One number for each latent, in the order of the rows."""
    latents, numbers = [5, 6, 7], [3.0, 1.0, 4.0]
    edits = (gs.steer, gs.clamp, gs.scale)
    with torch.no_grad():
        for edit in edits:
            wanted = model.run_with_hooks("abc", fwd_hooks=[edit(sae, latents, numbers)])
            got = model.run_with_hooks("abc", fwd_hooks=[edit(sae, latents, made(FLOATS[name]))])
            assert torch.equal(got, wanted), edit.__name__


def test_a_mean_norm_of_any_library(model: Any, sae: Any) -> None:
    def steered(mean_norm: Any) -> torch.Tensor:
        edit = gs.steer(sae, [5, 6], 0.5, unit="mean_norm", mean_norm=mean_norm)
        return model.run_with_hooks("abc", fwd_hooks=[edit])

    with torch.no_grad():
        wanted = steered(3.0)
        for one in (3, np.float32(3), np.int64(3), np.array(3.0), torch.tensor(3.0), pd.Series([3.0], index=[7])):
            assert torch.equal(steered(one), wanted)
    for none in (True, "3", [1.0, 2.0], np.array([1.0, 2.0]), 3j, float("nan"), torch.tensor(True)):
        with pytest.raises(gs.GemmaScopeError, match="mean_norm"):
            steered(none)


def test_numbers_without_order_or_meaning_are_refused(sae: Any) -> None:
    gap = pd.Series([3, None, 4], dtype="Int64")
    for none in ({3, 1, 4}, "314", b"314", {3: 1}, gap, ["a"], np.array(["a"]), pd.Series([1j])):
        with pytest.raises(gs.GemmaScopeError):
            gs.steer(sae, 5, 9.0, positions=none)
        with pytest.raises(gs.GemmaScopeError):
            gs.steer(sae, [5, 6, 7], none)


def test_metrics_of_any_library(model: Any, sae: Any) -> None:
    """Ids and words, one for all sequences or one for each."""
    from gemma_scope_tl.attributions.targets import logit, logit_difference

    texts = ["abc", "defg"]
    ids = [model.to_single_token(word) for word in "xy"]

    def attributed(metric: Any) -> list[float]:
        return gs.attribute(model, texts, sae, metric)["attribution"].tolist()

    two, one = attributed(ids), attributed(ids[0])
    labelled = pd.Series(ids, index=[1, 0])
    words = pd.Series(list("xy"), index=[1, 0])
    for several in (np.array(ids), torch.tensor(ids), labelled, labelled.astype("Int64"), pd.Index(ids), iter(ids)):
        assert attributed(several) == two
    for several in (list("xy"), np.array(list("xy")), words, words.astype(object), iter("xy")):
        assert attributed(several) == two
    for single in ("x", np.array("x"), np.str_("x"), np.array(ids[0]), torch.tensor(ids[0]), [ids[0]], ["x"]):
        assert attributed(single) == one
    assert attributed(logit(words)) == two
    assert attributed(logit_difference(words, labelled[::-1])) == attributed(logit_difference(ids, ids[::-1]))
    for none in (None, {"a": 1}, {5, 6}, b"x", 5.0, np.array([5.0, 6.0]), True):
        with pytest.raises(gs.GemmaScopeError):
            attributed(none)


def test_stop_tokens_of_any_library(model: Any) -> None:
    options = {"max_new_tokens": 9, "do_sample": False, "return_type": "tokens"}
    stop = model.generate("abc", stop_at_eos=False, **options)[0, 6].item()
    wanted = model.generate("abc", eos_token_id=stop, **options)
    for one in (np.int64(stop), torch.tensor(stop), [stop], np.array([stop]), pd.Series([stop], index=[4]), {stop}):
        assert torch.equal(model.generate("abc", eos_token_id=one, **options), wanted)


# -- sizes and places of the registry ----------------------------------------------------------------------------------


def test_places_of_any_library() -> None:
    def keys(**given: Any) -> list[Any]:
        return [*gs.load_suite("bundled", **{"sites": "res", "width": "1k", **given})]

    for layer in (2, np.int64(2), np.array(2), torch.tensor(2), 2.0, pd.Series([2.0, None]).iloc[0]):
        assert keys(layers=layer) == [("res", 2)] and type(keys(layers=layer)[0][1]) is int
        assert gs.load_sae("bundled", "res", layer, width="1k").layer == 2
    columns = (pd.Series([1, 3], index=[5, 4]), pd.Series([1, 3], dtype="Int64"), pd.Series([1.0, 3.0]))
    for several in ([1, 3], (1, 3), iter([1, 3]), range(1, 4, 2), np.array([1, 3]), torch.tensor([1, 3]), *columns):
        assert keys(layers=several) == [("res", 1), ("res", 3)]
    assert keys(layers=None) == keys(layers="all") == keys()
    assert keys(sites=pd.Series(["res", "mlp"], index=[3, 2]), layers=1) == [("res", 1), ("mlp", 1)]
    for none in (True, "2", "two", 2.5, [None, 2.5], np.array([True]), float("nan"), b"2"):
        with pytest.raises(gs.GemmaScopeError):
            keys(layers=none)
        with pytest.raises(gs.GemmaScopeError):
            gs.load_sae("bundled", "res", none, width="1k")


def test_widths_of_any_library() -> None:
    for width in ("1k", "1024", 1024, np.int64(1024), np.array(1024), torch.tensor(1024)):
        assert gs.load_sae("bundled", "res", 2, width=width).cfg.d_sae == 1024
        assert [*gs.load_suite("bundled", "res", 2, width=width)] == [("res", 2)]
        assert len(gs.list_saes(model="bundled", width=width)) == len(gs.list_saes(model="bundled", width="1k"))
    for none in (1024.0, True, "1024 latents", [1024], np.array([1024, 256]), 0):
        with pytest.raises(gs.GemmaScopeError):
            gs.load_sae("bundled", "res", 2, width=none)


def test_a_part_of_a_suite() -> None:
    suite = gs.load_suite("bundled", ("res", "mlp"), width="1k")
    for layer in (1, [1], np.int64(1), np.array([1]), torch.tensor(1), pd.Series([1], index=[6]), iter([1])):
        assert [*suite.select("res", layer)] == [("res", 1)]
    assert [*suite.select(["res", "mlp"], 1)] == [("res", 1), ("mlp", 1)]
    assert [*suite.select(layers="all")] == [*suite.select()] == [*suite]
    assert suite["res", 1] is suite["res", np.int64(1)] is suite["res", torch.tensor(1)]
    for none in ("one", 1.5, [99], True):
        with pytest.raises(gs.GemmaScopeError):
            suite.select("res", none)
