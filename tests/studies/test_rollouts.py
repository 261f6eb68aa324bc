"""Rollouts of a tuned model, and the base SAEs on prompts and answers apart."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gemma_scope_tl.cli.studies import studies_app
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.suite import measure_suite
from gemma_scope_tl.sae.suite import load_suite
from gemma_scope_tl.studies import Rollouts, base_on_tuned, roll_out
from gemma_scope_tl.studies.rollouts import _ended, _framed
from tests.helpers import shared_model

TEXTS = ["And God said, Let there be light: and there was light. " * 3, "def main():\n    return 1\n" * 9, "short"]


@pytest.fixture(scope="module")
def model() -> Any:
    return shared_model("bundled", "bridge")


def test_answers_are_the_models_own(model: Any) -> None:
    found = roll_out(model, TEXTS, 12, 20, temperature=1e-4, progress=False)
    assert found.tokens.shape == (2, 1 + 12 + 20)  # the short text is left out
    assert found.prompt == 13
    assert (found.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    words = [model.tokenizer.encode(text, add_special_tokens=False)[:12] for text in TEXTS[:2]]
    assert found.tokens[:, 1:13].tolist() == words
    predicted = model(found.tokens, return_type="logits").argmax(-1)  # almost no temperature: the likeliest token
    assert torch.equal(predicted[:, 12:-1], found.tokens[:, 13:])


def test_sampling_is_repeatable_and_leaves_the_callers_state(model: Any) -> None:
    before = torch.get_rng_state()
    first, again, other = (roll_out(model, TEXTS, 8, 16, seed=seed, progress=False) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert torch.equal(torch.get_rng_state(), before)


class _Chat:
    bos_token, bos_token_id, eos_token_id, pad_token_id = "<bos>", 2, 1, 0
    chat_template = "given"

    def apply_chat_template(self, turns: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<bos>U{turns[0]['content']}M"

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [{"U": 50, "M": 60}[letter] for letter in text]

    def get_vocab(self) -> dict[str, int]:
        return {"<end_of_turn>": 7}


def test_chat_models_get_turns_and_stop_at_their_end() -> None:
    framed = _framed(_Chat(), torch.tensor([[10, 11], [12, 13]]))
    assert framed.tolist() == [[2, 50, 10, 11, 60], [2, 50, 12, 13, 60]]
    answered = torch.tensor([[2, 7, 20, 7, 21, 1], [2, 9, 1, 22, 7, 23], [2, 9, 20, 21, 22, 23]])
    assert _ended(answered, 2, _Chat()).tolist() == [[2, 7, 20, 7, 0, 0], [2, 9, 1, 0, 0, 0], [2, 9, 20, 21, 22, 23]]


def test_prompts_and_answers_are_measured_apart(model: Any) -> None:
    """Against the sums by position of one whole evaluation."""
    rollouts = roll_out(model, TEXTS, 10, 22, progress=False)
    suite = load_suite("bundled", sites="res", layers=[1, 3], width="1k")
    table = base_on_tuned(model, model, rollouts, suite, progress=False)
    assert table["part"].tolist() == ["prompt", "rollout"] * 4
    assert table["model"].tolist() == ["base"] * 4 + ["tuned"] * 4
    whole = measure_suite(model, suite, rollouts.tokens, progress=False, ablations=()).by_position()
    for (_, sae), rows in table[table["model"] == "tuned"].groupby(["layer", "id"]):
        here = whole[(whole["id"] == sae) & (whole["layer"] == rows["layer"].iloc[0])]
        for part, (start, stop) in rollouts.edges.items():
            row = rows[rows["part"] == part].iloc[0]
            inside = here[(here["position"] >= start) & (here["position"] < stop) & (here["tokens"] > 0)]
            assert row["tokens"] == inside["tokens"].sum()
            wanted = np.average(inside["l0"], weights=inside["tokens"])
            assert row["l0"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.slow
def test_transfer_with_rollouts_as_a_command() -> None:
    args = ["transfer", "layer_1/*", "--site", "res", "--canonical", "--tuned", "bundled", "--rows", "2"]
    more = ["--context", "32", "--rollouts", "12", "--prompt-tokens", "8", "--rescale", "--json"]
    result = CliRunner().invoke(studies_app, [*args, *more], catch_exceptions=False)
    rows = json.loads(result.stdout)
    assert {row["part"] for row in rows} == {"prompt", "rollout"}
    assert {row["saes"] for row in rows} == {"base", "base rescaled"}
    assert all(row["scale"] == pytest.approx(1.0) for row in rows)  # the same model: the same norms
    assert {row["tokens"] for row in rows if row["part"] == "prompt"} == {16}


def test_what_cannot_be_rolled_out(model: Any) -> None:
    with pytest.raises(GemmaScopeError, match="None of 1 prompts has 40 tokens"):
        roll_out(model, ["short"], 40, progress=False)
    with pytest.raises(GemmaScopeError, match="do not fit the model's context, 512"):
        roll_out(model, TEXTS, 8, 600, progress=False)
    with pytest.raises(GemmaScopeError, match="temperature must be a number above 0"):
        roll_out(model, TEXTS, 8, 8, temperature=0.0, progress=False)
    with pytest.raises(GemmaScopeError, match=r"ids \[rows, pos\]"):
        roll_out(model, torch.zeros(3), progress=False)
    assert Rollouts(torch.zeros(1, 9, dtype=torch.int64), 4).edges == {"prompt": (0, 4), "rollout": (4, 9)}
