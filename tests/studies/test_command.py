"""``gemma-scope study``: each verb writes its table and its figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from gemma_scope_tl.cli.studies import studies_app
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from tests.helpers import random_gemma

SMALL = ("layer_1/*", "--site", "res", "--canonical", "--rows", "2", "--context", "32")


def _run(*args: str) -> str:
    result = CliRunner().invoke(studies_app, list(args), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A perturbed copy of the bundled model, with its tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tuned")
    model = random_gemma("bundled")
    for parameter in model.parameters():
        parameter.data.mul_(1.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED_MODEL).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "more", "columns"),
    [
        ("fidelity", (), ("width", "fvu_best")),
        ("position", (), ("start", "stop", "squared_error")),
        ("frequency", ("--bins", "5"), ("low", "high", "latents", "dead")),
        ("domains", ("--subset", "maths", "--subset", "code"), ("domain", "delta_loss")),
        ("precision", (), ("dtype", "fvu_change")),
        ("uniformity", ("--sampled", "2"), ("uniformity", "uniformity_low")),
        (
            "probes",
            ("--concept", "domain: code", "--k", "1", "--k", "3"),
            ("concept", "features", "auroc_low", "best_latent"),
        ),
    ],
)
def test_every_verb(verb: str, more: tuple[str, ...], columns: tuple[str, ...], tmp_path: Path) -> None:
    out, figure = tmp_path / "t.csv", tmp_path / "f.png"
    rows = json.loads(_run(verb, *SMALL, *more, "--out", str(out), "--figure", str(figure), "--json"))
    written = pd.read_csv(out)
    assert len(rows) == len(written) > 0
    assert set(columns) <= set(written.columns)
    assert set(written["site"]) == {"res"}
    assert set(written["layer"]) == {1}
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "res" in _run(verb, *SMALL, *more)


@pytest.mark.slow
def test_transfer_to_a_folder(tuned: Path) -> None:
    rows = json.loads(_run("transfer", *SMALL, "--tuned", str(tuned), "--rescale", "--json"))
    pairs = {(row["model"], row["saes"]) for row in rows}
    assert pairs == {("base", "base"), ("tuned", "base"), ("tuned", "base rescaled")}
    with_own = json.loads(_run("transfer", *SMALL, "--tuned", str(tuned), "--tuned-sae-model", "bundled", "--json"))
    assert {row["saes"] for row in with_own} == {"base", "tuned"}


def test_help_names_all_verbs_and_options() -> None:
    text = _run("--help")
    for verb in ("fidelity", "position", "frequency", "domains", "precision", "transfer", "uniformity", "probes"):
        assert verb in text
    shown = _run("domains", "--help")
    assert all(option in shown for option in ("--pile", "--rows", "--figure", "gemma-scope study domains"))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("--out", "t.xlsx"), r"Unknown table format '\.xlsx'"),
        (("--figure", "t.svg"), r"Unknown figure format '\.svg'"),
        (("--subset", "math"), "Unknown domain 'math'. Nearest: maths"),
        (("--label", "kind"), "Unknown column"),
        (("--pile", "--subset", "maths"), "Unknown subset of the Pile"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    args: tuple[str, ...], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("gemma_scope_tl.model.loading.load_model", refuse)
    with pytest.raises(UnknownNameError, match=match):
        _run("domains", *args)


def test_no_sae_fits() -> None:
    with pytest.raises(GemmaScopeError, match="No SAE fits"):
        _run("fidelity", "nothing/*")


@pytest.mark.slow
def test_frequency_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("frequency", *SMALL, "--bins", "5", "--json", "--resume", str(tmp_path))
    first = _run(*args)
    assert list(tmp_path.glob("*.safetensors"))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass was made")

    monkeypatch.setattr("gemma_scope_tl.studies.firing.read_batches", refuse)
    assert _run(*args) == first
    with pytest.raises(AssertionError, match="a pass was made"):
        _run(*args, "--context", "16")


def test_probes_keep_nothing(tmp_path: Path) -> None:
    with pytest.raises(GemmaScopeError, match="omit --resume"):
        _run("probes", *SMALL, "--resume", str(tmp_path))


@pytest.mark.parametrize(("given", "wanted"), [((), "test"), (("--split", "train"), "train")])
def test_the_split_of_the_pile_is_the_one_asked_for(
    given: tuple[str, ...], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def pile(names: Any, source: str, column: str, split: str) -> Any:
        seen.append(split)
        raise GemmaScopeError("enough")

    monkeypatch.setattr("gemma_scope_tl.studies.domains.pile_texts", pile)
    with pytest.raises(GemmaScopeError, match="enough"):
        _run("domains", *SMALL, "--pile", *given)
    assert seen == [wanted]
