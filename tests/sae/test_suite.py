"""A suite: which SAEs, loaded when, held how long."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, RegistryError, UnknownNameError
from gemma_scope_tl.sae.suite import SAESuite
from tests.helpers import shared_model


def test_the_bundled_suite_is_what_load_sae_loads() -> None:
    suite = gs.load_suite("bundled", sites=["res", "att"], layers=[1, 3], width="1k")
    assert list(suite) == [("res", 1), ("res", 3), ("att", 1), ("att", 3)]
    assert suite.loaded == ()
    sae = suite["att", 3]
    assert suite.loaded == (("att", 3),)
    assert suite["att", 3] is sae
    alone = gs.load_sae("bundled", "att", 3, "1k")
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), alone.parameters(), strict=True))
    assert suite.nbytes == sum(p.numel() * p.itemsize for p in sae.parameters())


def test_all_layers_and_sites_of_2b_without_loading_any() -> None:
    suite = gs.load_suite("gemma-2-2b")
    assert len(suite) == 78
    assert suite.rows["res", 20].l0 == 71
    assert suite.rows == {key: gs.registry.find("gemma-2-2b", *key, "16k") for key in suite}
    assert list(gs.load_suite("gemma-2-2b", "embedding", width="4k", l0="closest:20")) == [("embedding", None)]
    frame = suite.to_frame()
    assert frame.loc[frame["layer"] == 3, "site"].tolist() == ["res", "mlp", "att"]


def test_the_text_of_a_suite_is_short() -> None:
    suite = gs.load_suite("gemma-2-2b")
    first = [f"{suite.rows['res', layer].release}/{suite.rows['res', layer].id}" for layer in (0, 1, 2)]
    assert repr(suite) == (
        "SAESuite(gemma-2-2b: 78 SAEs, 0 loaded; res in layers 0-25; mlp in layers 0-25; att in layers 0-25; "
        f"{', '.join(first)}, and 75 more)"
    )
    few = gs.load_suite("bundled", sites=["res", "att"], layers=[1, 3], width="1k").select("res")
    _ = few["res", 3]
    assert repr(few).startswith("SAESuite(bundled: 2 SAEs, 1 loaded; res in layers 1, 3; bundled-res/")
    assert "more" not in repr(few)
    assert "; embedding; " in repr(gs.load_suite("gemma-2-2b", "embedding", width="4k", l0=6))


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "gemma-3"},
        {"sites": "ress"},
        {"layers": [99]},
        {"layers": "some"},
        {"width": "17k"},
        {"l0": 12345},
        {"sites": "embedding", "width": "4k"},  # has no canonical row
    ],
)
def test_what_does_not_exist_raises_before_anything_is_loaded(wrong: dict[str, Any]) -> None:
    with pytest.raises((UnknownNameError, RegistryError)):
        gs.load_suite(**{"model": "gemma-2-2b", **wrong})


def fake(memory: int | None = None, seconds: float = 0.0) -> tuple[SAESuite, list[int]]:
    """A suite whose SAEs are linear maps of 400 bytes, and the layers loaded so far."""
    loaded: list[int] = []

    def load(row: Any) -> torch.nn.Module:
        time.sleep(seconds)
        if row == 13:
            raise GemmaScopeError("no such file")
        loaded.append(row)
        return torch.nn.Linear(10, 10, bias=False)

    return SAESuite({("res", layer): layer for layer in range(6)}, load, memory), loaded  # type: ignore[dict-item]


def test_beyond_the_memory_the_longest_unused_goes() -> None:
    suite, loaded = fake(memory=900)
    _ = suite["res", 0], suite["res", 1], suite["res", 0], suite["res", 2]
    assert suite.loaded == (("res", 0), ("res", 2))
    assert suite.nbytes == 800
    _ = suite["res", 1]
    assert loaded == [0, 1, 2, 1]
    suite.drop()
    assert suite.loaded == ()


def test_one_is_held_however_large() -> None:
    suite, _ = fake(memory=1)
    sae = suite["res", 4]
    assert suite["res", 4] is sae


def test_threads_that_ask_at_once_load_once() -> None:
    suite, loaded = fake(seconds=0.05)
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(suite["res", 2])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [2]
    assert len({id(sae) for sae in got}) == 1


def test_prefetch_loads_all_and_reports_every_failure() -> None:
    suite, loaded = fake()
    assert suite.prefetch(workers=3, progress=False) is suite
    assert sorted(loaded) == list(range(6))
    suite.rows = {**suite.rows, ("res", 13): 13}  # type: ignore[dict-item]
    suite.drop()
    with pytest.raises(GemmaScopeError, match=r"1 of 7 SAEs could not be loaded:\n\('res', 13\): no such file"):
        suite.prefetch(progress=False)
    assert len(suite.loaded) == 6
    with pytest.raises(GemmaScopeError, match="no such file"):  # a failure is not remembered as a result
        suite["res", 13]


def test_select_and_unknown_keys() -> None:
    suite, _ = fake()
    sae = suite["res", 3]
    part = suite.select("res", layers=[3, 4])
    assert list(part) == [("res", 3), ("res", 4)]
    assert part["res", 3] is sae
    with pytest.raises(UnknownNameError, match="No SAE of this suite"):
        suite.select("mlp")
    with pytest.raises(UnknownNameError, match=r"Unknown SAE of this suite"):
        suite["mlp", 3]
    with pytest.raises(GemmaScopeError, match="workers must be 1 or more"):
        suite.prefetch(workers=0)


def test_a_suite_is_what_splice_takes() -> None:
    model = shared_model("bundled", "bridge")
    suite = gs.load_suite("bundled", layers=[2], width="1k")
    tokens = model.to_tokens("In the beginning")
    with gs.splice(model, suite.values()):
        spliced = model(tokens)
    assert torch.equal(spliced, model.run_with_saes(tokens, saes=list(suite.values())))
