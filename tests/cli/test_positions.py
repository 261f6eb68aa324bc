"""``--positions``: what it accepts, and that verbs pass it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

import gemma_scope_tl as gs
from gemma_scope_tl.cli import app, checks
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model import loading
from tests.cli.test_help import _once

TEXT = "In the beginning God created the heaven and the"
ONE = ("--layer", "2", "--width", "1k")
SEVERAL = (*ONE, "--site", "res", "--canonical", "--rows", "1", "--context", "16")


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "load_model", _once)
    monkeypatch.chdir(tmp_path)


def _read(*words: str) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("4:", slice(4, None)),
        ("2:9", slice(2, 9)),
        (":-1", slice(None, -1)),
        ("-3:", slice(-3, None)),
        ("-1", -1),
        ("0", 0),
        ("0,3,5", [0, 3, 5]),
        ("1,-1", [1, -1]),
        (None, None),
    ],
)
def test_forms(given: str | None, wanted: Any) -> None:
    assert checks.positions(given) == wanted


@pytest.mark.parametrize("given", ["", ":", "1:2:3", "4-", "1, 2", "1,", "1.5", "four", "²", "slice(4)", "9" * 30])
def test_anything_else_is_an_error(given: str) -> None:
    with pytest.raises(GemmaScopeError, match="names no positions: write 4:"):
        checks.positions(given)
    with pytest.raises(GemmaScopeError, match="names no positions"):  # before anything is loaded
        CliRunner().invoke(app, ["features", TEXT, "--positions", given], catch_exceptions=False)


def test_features_and_attributions() -> None:
    model, sae = _once("bundled"), gs.load_sae("bundled", "res", 2, "1k")
    table = pd.DataFrame(_read("features", TEXT, *ONE, "--positions", "4:"))
    wanted = gs.features(model, TEXT, sae, top=5, positions=slice(4, None))
    assert table["latent"].tolist() == wanted["latent"].tolist()
    assert table["position"].min() == 4
    last = pd.DataFrame(_read("attribute", TEXT, "--target", " earth", *ONE, "--positions", "-1"))
    found = last[last["kind"] == "latent"]
    assert set(found["position"]) == {last["position"].max()} and len(found)


def test_steering_at_positions() -> None:
    words = ("steer", TEXT, "--latent", "12", *ONE, "--tokens", "4")
    plain = _read(*words, "--clamp", "80", "--positions", "0")  # BOS, which is never edited
    assert plain["steered"] == plain["plain"]
    last = _read(*words, "--clamp", "80", "--positions", "-1")
    assert last["steered"] != last["plain"]
    norm = _read(*words, "--scale", "3", "--unit", "mean_norm", "--positions", "4:")
    assert norm["steered"] != norm["plain"]


@pytest.mark.parametrize(
    "verb",
    [
        ("eval",),
        ("study", "fidelity"),
        ("study", "position"),
        ("study", "frequency", "--bins", "2"),
        ("study", "uniformity", "--sampled", "2"),
        ("study", "precision", "--dtype", "float32"),
        ("study", "transfer", "--tuned", "bundled"),
    ],
    ids=" ".join,
)
def test_verbs_that_measure(verb: tuple[str, ...]) -> None:
    whole, some = (pd.DataFrame(_read(*verb, *SEVERAL, *more)) for more in ((), ("--positions", "4:")))
    if "tokens" in whole:
        assert some["tokens"].sum() < whole["tokens"].sum()
    if verb == ("study", "position"):
        assert whole["start"].min() == 1 and some["start"].min() == 4
    assert not some.equals(whole)
