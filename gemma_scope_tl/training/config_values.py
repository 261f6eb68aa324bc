"""Single values of a configuration: numbers that are numbers, devices that can be, lists without doubles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def number(value: object) -> object:
    """YAML reads ``4e9`` as a word; here it is a number, and a whole one is an integer."""
    if isinstance(value, bool):
        raise ValueError(f"not a number: {value}")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"not a finite number: {value}")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def device_name(value: object) -> object:
    """A device by name; whether it is here is seen where the run is."""
    try:
        torch.device(str(value))
    except RuntimeError:
        raise ValueError(f"{value!r} is no device: write cpu, cuda or cuda:1") from None
    return value


def each_once(**lists: Sequence[object] | None) -> None:
    """Raise ValueError where a list has a value twice."""
    for name, values in lists.items():
        for value in values or ():
            if list(values or ()).count(value) > 1:
                raise ValueError(
                    f"{name} has {value:g} twice" if isinstance(value, float) else f"{name} has {value} twice"
                )
