"""Explanations and their scores, where the truth is known: latents that fire on one token each, a model that reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import balanced_accuracy_score
from typer.testing import CliRunner

from gemma_scope_tl.cli import app
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.interp import (
    ChatClient,
    Example,
    Examples,
    Sampling,
    detection_scores,
    explain,
    simulation_scores,
    top_examples,
)
from gemma_scope_tl.interp.explanations import marked, numbers, parsed
from gemma_scope_tl.viz.study_figures import scores_figure
from tests.interp.llm_server import Endpoint

SAMPLING = Sampling(top=4, quantiles=2, per_quantile=4, silent=8, window=16)


class Canned:
    """Gives the same answers whatever is asked."""

    def __init__(self, *answers: str) -> None:
        self.given = answers
        self.prompts: list[Any] = []

    def answers(self, prompts: Any) -> list[str]:
        self.prompts += prompts
        return [self.given[number % len(self.given)] for number in range(len(prompts))]


@pytest.fixture(scope="module")
def found(model: Any, planted: Any, tokens: torch.Tensor) -> Examples:
    """Examples of the planted latents."""
    return top_examples(model, planted[0], tokens, progress=False, sampling=SAMPLING)[0]


def test_the_right_explanation_scores_high(endpoint: Endpoint, found: Examples, planted: Any) -> None:
    client = ChatClient("m", endpoint.url)
    table = explain(client, found)
    assert dict(zip(table["latent"], table["explanation"], strict=True)) == planted[1]
    detected = detection_scores(client, found, planted[1])
    simulated = simulation_scores(client, found, planted[1])
    assert (detected["sensitivity"] == 1).all()
    assert (detected["detection"] > 0.9).all()  # the word may be part of a longer one in a silent text
    np.testing.assert_allclose(simulated["simulation"], 1, atol=0.02)
    for name, frame in (("detection", detected), ("simulation", simulated)):
        assert (frame[f"{name}_low"] <= frame[name] + 1e-12).all()
        assert (frame[name] <= frame[f"{name}_high"] + 1e-12).all()
        assert (frame[f"{name}_unread"] == 0).all()


def test_another_latents_explanation_scores_low(endpoint: Endpoint, found: Examples, planted: Any) -> None:
    words = planted[1]
    swapped = {0: words[1], 1: words[2], 2: words[0]}
    client = ChatClient("m", endpoint.url)
    assert (detection_scores(client, found, swapped)["detection"] < 0.75).all()
    assert (simulation_scores(client, found, swapped)["simulation"] < 0.2).all()


def test_scores_are_those_of_scikit_learn_and_scipy(found: Examples) -> None:
    generator = np.random.default_rng(0)
    given = [json.dumps(generator.integers(0, 2, 4).tolist()) for _ in range(4)]
    asked = Canned(*given)
    (row,) = detection_scores(asked, found, {1: "x"}, shown=4).to_dict("records")
    texts = {e.text: e.kind != "silent" for e in found.of(1, "quantile", "silent")}
    truth, said = [], []
    for prompt, answer in zip(asked.prompts, given, strict=True):
        shown = [eval(line.partition(": ")[2]) for line in prompt.user.splitlines()[1:]]
        truth += [texts[text] for text in shown]
        said += json.loads(answer)
    assert row["detection"] == pytest.approx(balanced_accuracy_score(truth, said))
    assert row["detection_examples"] == len(truth) == 16
    examples = found.of(1, "quantile", "silent")
    given = [json.dumps(generator.integers(0, 11, 16).tolist()) for _ in examples]
    (row,) = simulation_scores(Canned(*given), found, {1: "x"}).to_dict("records")
    predicted = np.concatenate([json.loads(answer) for answer in given])
    assert row["simulation"] == pytest.approx(pearsonr(predicted, np.concatenate([e.values for e in examples]))[0])


def test_unreadable_answers_are_counted_and_left_out(found: Examples) -> None:
    (row,) = detection_scores(Canned("I cannot", "[1, 1, 1, 1]"), found, {0: "x"}, shown=4).to_dict("records")
    assert (row["detection_examples"], row["detection_unread"]) == (8, 8)
    (row,) = simulation_scores(Canned("[1, 2]"), found, {0: "x"}).to_dict("records")
    assert row["simulation_unread"] == 16
    assert np.isnan(row["simulation"]) and not row["simulation_constant"]
    (row,) = simulation_scores(Canned(json.dumps([0] * 16)), found, {0: "x"}).to_dict("records")
    assert np.isnan(row["simulation"]) and row["simulation_constant"]
    (row,) = simulation_scores(Canned(json.dumps([0] * 15 + [1])), found, {0: "x"}).to_dict("records")
    assert not row["simulation_constant"]


@pytest.mark.parametrize(
    ("answer", "count", "wanted"),
    [
        ("[1, 0]", 2, [1, 0]),
        ("Excerpt [1] fits: [0, 1].", 2, [0, 1]),
        ("[true, false]", 2, [1, 0]),
        ("[1, 2]", 2, None),
        ("[1, -1]", 2, None),
        ("[NaN, 0]", 2, None),
        ("[[1, 0]]", 2, [1, 0]),
        ('["a", 0]', 2, None),
        ("[1, 0", 2, None),
        ("", 0, None),
    ],
)
def test_reading_numbers(answer: str, count: int, wanted: list[float] | None) -> None:
    assert numbers(answer, count, 1) == wanted


def test_marks_and_explanations() -> None:
    values = np.asarray([0, 5, 4, 1, 0, 9], np.float32)
    example = Example(0, "top", -1, 0, 0, ("a", " b", " c", " d", " e", " f"), values)
    assert marked(example) == "a<< b c>> d e<< f>>"
    assert parsed('Thinking… explanation: no.\nEXPLANATION:  "years\nafter in" ') == "years after in"
    assert parsed("just this") == "just this"


def test_the_figure(found: Examples) -> None:
    table = detection_scores(Canned("[1, 0, 1, 0, 1]", "[1]"), found, {0: "x", 1: "y", 2: "z"})
    assert len(scores_figure(table).axes) == 1
    with pytest.raises(GemmaScopeError, match="no score to draw"):
        scores_figure(table.assign(detection=np.nan))


def _run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_the_verb(endpoint: Endpoint, tmp_path: Path) -> None:
    out, figure, log = tmp_path / "t.csv", tmp_path / "f.png", tmp_path / "a.jsonl"
    args = ["explain", "--site", "res", "--layer", "2", "--width", "1k", "--canonical", "--rows", "16", "--context"]
    args += ["64", "--llm", "m", "--base-url", endpoint.url, "--count", "3", "--answers", str(log)]
    rows = json.loads(_run(*args, "--out", str(out), "--figure", str(figure), "--json"))
    table = pd.read_csv(out)
    assert len(rows) == len(table) == 3
    assert {"explanation", "detection", "detection_low", "simulation", "simulation_unread"} <= set(table.columns)
    assert figure.read_bytes().startswith(b"\x89PNG")
    asked = len(endpoint.bodies)
    assert "explanation" in _run(*args)
    assert len(endpoint.bodies) == asked > 0
    only = json.loads(_run(*args, "--method", "detection", "--latent", "3", "--json"))
    assert {row["latent"] for row in only} <= {3}
    assert not any("simulation" in row for row in only)


def test_the_verb_says_what_is_wrong() -> None:
    with pytest.raises(GemmaScopeError, match="--llm NAME"):
        _run("explain")
    with pytest.raises(UnknownNameError, match="Nearest: detection"):
        _run("explain", "--llm", "m", "--method", "detect")
