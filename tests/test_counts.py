"""Numbers, layers and switches that users give: what is accepted, and that True is never the number 1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.counts import checked_count, checked_flag, checked_layer, checked_real, checked_top, whole_number
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError, brief, checked_text, unknown_name

NO_NUMBERS: list[Any] = [
    True,
    np.True_,
    torch.tensor(True),
    1.0,
    np.float32(1),
    "1",
    b"1",
    None,
    [1],
    torch.tensor([1]),
]


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)])
def test_integers_of_all_libraries(value: Any) -> None:
    for found in (whole_number(value), checked_count(value, "n"), checked_layer(value), checked_top(value)):
        assert type(found) is int and found == 3
    assert checked_real(value, "n") == 3.0


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_integer(value: Any) -> None:
    assert whole_number(value) is None
    with pytest.raises(GemmaScopeError, match="batch_size must be an integer, 1 or more"):
        checked_count(value, "batch_size")
    if value is not None:
        with pytest.raises(SpliceError, match="layer is an integer from 0"):
            checked_layer(value)
        with pytest.raises(GemmaScopeError, match="top must be 1 or more, or None"):
            checked_top(value)


def test_bounds() -> None:
    assert checked_count(0, "n", least=0) == 0 and checked_count(2**80, "seed", most=None) == 2**80
    for value, least, match in (
        (0, 1, "1 or more"),
        (-1, 0, "0 or more"),
        (2**63, 1, "or less"),
        (10**5000, 1, "less"),
    ):
        with pytest.raises(GemmaScopeError, match=match):
            checked_count(value, "n", least)
    with pytest.raises(SpliceError, match="not -1"):
        checked_layer(-1)
    assert checked_layer(None) is None and checked_top(None) is None


def test_real_numbers() -> None:
    assert checked_real(0, "x", least=0) == 0.0 and checked_real(torch.tensor(0.5), "x") == 0.5
    for value in (True, "1", None, math.nan, 10**400, [1.0], torch.tensor([1.0]), -1e-9, np.False_):
        with pytest.raises(GemmaScopeError, match="x must be a number of at least 0"):
            checked_real(value, "x", least=0)
    with pytest.raises(GemmaScopeError, match="a number above 0"):
        checked_real(0.0, "x", above=0)


def test_switches() -> None:
    assert checked_flag(np.True_, "on") is True and checked_flag(False, "on") is False
    assert checked_flag(None, "on", unset=True) is None
    for value in ("no", 0, 1, None, torch.tensor(True), [True]):
        with pytest.raises(SpliceError, match="on must be True or False, not"):
            checked_flag(value, "on", error=SpliceError)


def test_messages_stay_short() -> None:
    """Also for integers whose text Python refuses to write."""
    assert len(str(unknown_name("layer", 10**4000, ["1"]))) < 200
    assert brief(10**5000) == "a very large int"
    with pytest.raises(UnknownNameError, match="Unknown site 'None'. Nearest: res. A name is text"):
        checked_text("site", None, ["res"])
