"""The orderings of delta loss and FVU that the paper's figures show, checked between the SAEs of a sample.

Only what the paper says is checked: at an equal L0 the residual stream has a larger delta loss than the MLP and the
attention outputs (section 4.1, "residual worst"); transcoders have a larger one than MLP SAEs (appendix B); at one
place and width a larger L0 gives a smaller delta loss and FVU (the curves of section 4.1 fall); and at one place and
L0 a wider SAE is at least as good (section 4.3). The paper does not order MLP and attention.

A delta loss measures harm only where the model needs the tensor. If setting it to zero does not raise the loss, as may
happen in an untrained model, a splice that loses more of it can raise the loss less: such an SAE is in no comparison of
delta losses, and the pairs that this leaves out are counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_scope_tl.verification.diagnosis import Fault

WORSE_THAN = (("res", "mlp"), ("res", "att"), ("transcoder", "mlp"))
"""The first site has the larger delta loss at an equal L0."""
EQUAL_L0 = 1.5
"""L0s within this factor are compared across sites."""
SAME_L0 = 1.1
"""L0s within this factor are compared across widths."""
FEWEST = 2
"""Pairs that must contradict the order of two sites before it is a fault: layers differ, so one pair says little."""


@dataclass(frozen=True)
class Ordering:
    """The comparison of all pairs of one kind.

    Attributes:
        name: the expectation.
        pairs: number of pairs in the sample.
        agree: pairs that agree beyond their intervals.
        against: pairs that contradict it beyond their intervals, each as a sentence.
        needed: number of contradictions that make a fault.
        left_out: pairs that are not compared, because setting a tensor to zero does not raise the loss.
    """

    name: str
    pairs: int
    agree: int
    against: tuple[str, ...]
    needed: int = 1
    left_out: int = 0

    @property
    def fault(self) -> Fault | None:
        """The fault, if the pairs contradict the expectation."""
        if len(self.against) < self.needed or (self.needed > 1 and len(self.against) <= self.agree):
            return None
        return Fault("ordering", f"{self.name} is contradicted by {len(self.against)} of {self.pairs} pairs: "
                     f"{self.against[0]}.")  # fmt: skip


def orderings(measured: Sequence[Mapping[str, Any]]) -> list[Ordering]:
    """Compare the SAEs of a sample.

    Args:
        measured: for each SAE ``name``, ``site``, ``layer``, ``width``, ``d_sae``, ``row_l0`` and its measurements
            (``verification/measure.py``).
    """
    found: list[Ordering] = []
    for metric, name in (("delta_loss", "delta loss"), ("fvu", "FVU")):
        pairs = [(a, b) for a, b in _sorted_pairs(measured, "row_l0") if _alike(a, b, "site", "layer", "width")]
        found.append(_compare(f"At one place and width, a larger L0 has no larger {name}", pairs, metric))
    wider = [
        (narrow, wide)
        for narrow, wide in _sorted_pairs(measured, "d_sae")
        if _alike(narrow, wide, "site", "layer") and _close(narrow, wide, SAME_L0)
    ]
    found.append(_compare("At one place and L0, a wider SAE has no larger FVU", wider, "fvu"))
    for worse, better in WORSE_THAN:
        pairs = [
            (a, b)
            for a, b in itertools.product(_of(measured, worse), _of(measured, better))
            if _close(a, b, EQUAL_L0) and (worse == "res" or a["layer"] == b["layer"])
        ]
        name = f"At an equal L0, {worse} has a larger delta loss than {better}"
        found.append(_compare(name, pairs, "delta_loss", needed=FEWEST))
    return found


def _compare(
    name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], metric: str, needed: int = 1
) -> Ordering:
    """The first of each pair should have the larger value; values whose intervals overlap decide nothing."""
    agree = left_out = 0
    against: list[str] = []
    for larger, smaller in pairs:
        if metric == "delta_loss" and not (_needed(larger) and _needed(smaller)):
            left_out += 1
            continue
        if larger[f"{metric}_low"] > smaller[f"{metric}_high"]:
            agree += 1
        elif larger[f"{metric}_high"] < smaller[f"{metric}_low"]:
            values = f"{larger[metric]:.3g} and {smaller[metric]:.3g}"
            against.append(f"{larger['name']} and {smaller['name']} have {values}")
    return Ordering(name, len(pairs) - left_out, agree, tuple(against), needed, left_out)


def _needed(one: Mapping[str, Any]) -> bool:
    """Whether the model's loss rises when the tensor is zero."""
    return one["loss_zero_ablated"] > one["loss_clean"]


def _sorted_pairs(
    measured: Sequence[Mapping[str, Any]], key: str
) -> Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pairs with different values of ``key``, the one with the smaller value first."""
    known = sorted((one for one in measured if one[key]), key=lambda one: one[key])
    return ((a, b) for a, b in itertools.combinations(known, 2) if a[key] < b[key])


def _alike(a: Mapping[str, Any], b: Mapping[str, Any], *keys: str) -> bool:
    return all(a[key] == b[key] for key in keys)


def _close(a: Mapping[str, Any], b: Mapping[str, Any], factor: float) -> bool:
    return a["l0"] > 0 and b["l0"] > 0 and abs(math.log(a["l0"] / b["l0"])) <= math.log(factor)


def _of(measured: Sequence[Mapping[str, Any]], site: str) -> list[Mapping[str, Any]]:
    return [one for one in measured if one["site"] == site]
