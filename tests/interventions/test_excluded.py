"""``exclude_special_tokens`` means the same in every function that has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.interventions import ablate, clamp, scale, steer
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.model.splicing import splice
from gemma_scope_tl.sites import BACKENDS
from gemma_scope_tl.text.tokens import excluded_ids
from tests.helpers import random_gemma, random_sae, shared_model

NAME = "blocks.1.hook_resid_post"
EDITS = {
    "steer": lambda sae, **where: steer(sae, 3, 5.0, **where),
    "clamp": lambda sae, **where: clamp(sae, list(range(256)), 5.0, **where),
    "scale": lambda sae, **where: scale(sae, list(range(256)), 5.0, **where),
    "ablate": lambda sae, **where: ablate(sae, list(range(256)), **where),
}
IDS: dict[str, Any] = {
    "list": lambda: [7, 9],
    "generator": lambda: (i for i in (7, 9, 7)),
    "numpy": lambda: np.array([9, 7]),
    "torch": lambda: torch.tensor([7, 9]),
    "series": lambda: pd.Series([7, 9]),
    "scalars": lambda: [np.int64(7), torch.tensor(9)],
}
TOKENS = torch.tensor([[2, 7, 8, 9, 1, 20, 7]])


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("grouped", request.param)


def left_alone(model: Any, how: str, exclude: Any) -> list[int]:
    """Columns of the site that are the model's own to the bit."""
    sae = random_sae(model.dims, "res", 1)
    with torch.no_grad():
        clean = model.run_with_cache(TOKENS, names_filter=NAME)[1][NAME]
        if how == "splice":
            block = splice(model, sae, exclude_special_tokens=exclude)
        else:
            block = model.hooks([EDITS[how](sae, exclude_special_tokens=exclude)])
        with block:
            got = model.run_with_cache(TOKENS, names_filter=NAME)[1][NAME]
    return (got == clean).all(-1)[0].nonzero().flatten().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["splice", *EDITS])
def test_ids_are_left_alone_and_nothing_else(model: Any, how: str) -> None:
    for given in IDS.values():
        assert left_alone(model, how, given()) == [1, 3, 6]
    assert left_alone(model, how, np.bool_(True)) == left_alone(model, how, True) == [0, 4]
    assert left_alone(model, how, False) == left_alone(model, how, []) == left_alone(model, how, torch.tensor([])) == []


@pytest.mark.parametrize(
    "wrong", [2, None, "pad", [1.0], [True, False], torch.tensor([True]), [-1], [[1]], b"a"], ids=str
)
def test_what_is_no_choice_of_tokens_raises(model: Any, wrong: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    with pytest.raises(SpliceError, match="exclude_special_tokens takes"):
        model.add_sae(sae, exclude_special_tokens=wrong)
    assert not model.acts_to_saes
    for edit in EDITS.values():
        with pytest.raises(SpliceError, match="exclude_special_tokens takes"):
            edit(sae, exclude_special_tokens=wrong)


def test_ids_that_cannot_be_seen_raise(model: Any) -> None:
    pair = steer(random_sae(model.dims, "res", 1), 3, 5.0, exclude_special_tokens=[7])
    with pytest.raises(SpliceError, match="token ids of a pass are unknown"):
        pair[1](torch.zeros(1, 7, 64))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["splice", *EDITS])
def test_without_a_tokenizer_the_special_ids_must_be_given(how: str) -> None:
    model = load_model(hf_model=random_gemma())
    with pytest.raises(SpliceError, match="no tokenizer"):
        left_alone(model, how, True)
    assert left_alone(model, how, [7, 9]) == [1, 3, 6]


def test_ids_are_sorted_and_unique() -> None:
    assert excluded_ids(None, [9, 7, 9]) == (7, 9)
    assert excluded_ids(None, True) == ()
