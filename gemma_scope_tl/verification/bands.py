"""What is expected of an SAE's measurements, with the reason of each bound, and the faults outside of them.

The paper prints no table of numbers, so the bounds are wide and come from its axes and from measurements of others:

- **L0**: a row's L0 is the mean on the paper's own pretraining data. SAEBench's measurements of 2B residual SAEs on
  OpenWebText, with labels from 22 to 279, agree with the labels to about 10 % apart from one row with outlying tokens.
  Other text moves L0 by tens of percent, and a wrong tensor by much more, so the bound is a factor of two.
- **FVU**: the paper's curves lie between 0.1 and 0.8 (figures of section 4.1). Above 0.9 an SAE is hardly better than
  the mean of the activations. A transcoder predicts another tensor, and late ones of L0 5 are very sparse: 0.97. The
  embedding SAEs were not trained on all tokens: 1.
- **delta loss**: splicing an SAE must not harm the model more than removing the tensor altogether, beyond the 95 %
  intervals of the loss recovered and of the delta loss.
- **bfloat16**: the paper finds that it changes next to nothing (section 4.7).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.verification.diagnosis import Fault

L0_FACTOR = 2.0
L0_FACTORS = {"embedding": 3.0}
FVU_BOUND = 0.9
FVU_BOUNDS = {"transcoder": 0.97, "embedding": 1.0}
BFLOAT16_FVU = 0.02
BFLOAT16_L0 = 0.05


def bounds() -> dict[str, Any]:
    """All bounds, for the report."""
    return {
        "l0_factor": {"default": L0_FACTOR, **L0_FACTORS},
        "fvu": {"default": FVU_BOUND, **FVU_BOUNDS},
        "bfloat16": {"fvu": BFLOAT16_FVU, "l0": BFLOAT16_L0},
    }


@dataclass(frozen=True)
class Verdict:
    """What the bands say about one SAE.

    Attributes:
        faults: measurements outside of their band.
        notes: what could not be decided, and why.
    """

    faults: tuple[Fault, ...]
    notes: tuple[str, ...]


def judge(
    row: SAERow,
    measured: Mapping[str, float],
    bfloat16: Mapping[str, float] | None,
    others: Sequence[SAERow] = (),
) -> Verdict:
    """Compare the measurements of an SAE with the bands.

    Args:
        row: its registry row.
        measured: its measurements (``verification/measure.py``).
        bfloat16: those of the same SAE in bfloat16, if they were made.
        others: the other rows of its place and width, one of which may be the one in the file.
    """
    faults: list[Fault] = []
    notes: list[str] = []
    faults += _l0(row, measured, others)
    bound = FVU_BOUNDS.get(row.site, FVU_BOUND)
    if not measured["fvu"] <= bound:
        text = f"{row.id}: FVU is {_number(measured, 'fvu')}, and at most {bound:g} is expected at site {row.site!r}."
        faults.append(Fault("fvu", text))
    faults += _loss(row, measured, notes)
    if bfloat16 is not None:
        faults += _precision(row, measured, bfloat16)
    return Verdict(tuple(faults), tuple(notes))


def _l0(row: SAERow, measured: Mapping[str, float], others: Sequence[SAERow]) -> Iterable[Fault]:
    factor = L0_FACTORS.get(row.site, L0_FACTOR)
    if row.l0 is None or _within(measured["l0"], row.l0, factor):
        return
    text = f"{row.id}: L0 is {_number(measured, 'l0')}, but its row says {row.l0:g} (a factor of {factor:g} is allowed)"
    fitting = [one for one in others if one.l0 and one.id != row.id and _within(measured["l0"], one.l0, 1.25)]
    if fitting:
        near = min(fitting, key=lambda one: abs(math.log(measured["l0"] / float(one.l0 or 1))))
        yield Fault("label", f"{text}. It is the L0 of {near.id}: the two files may be swapped.")
    else:
        yield Fault("l0", f"{text}.")


def _loss(row: SAERow, measured: Mapping[str, float], notes: list[str]) -> Iterable[Fault]:
    harm, removal = measured["delta_loss"], measured["loss_zero_ablated"] - measured["loss_clean"]
    if not math.isfinite(harm):
        yield Fault("loss", f"{row.id}: the loss with the SAE spliced in is {harm}.")
        return
    if removal <= 0:
        notes.append(f"setting the tensor to zero does not raise the loss ({removal:+.3g} nats)")
        return
    high = measured["loss_recovered_high"]
    if math.isfinite(high) and high < 0 and measured["delta_loss_low"] > removal:
        text = f"{row.id}: splicing it raises the loss by {_number(measured, 'delta_loss')} nats, and removing the "
        yield Fault("loss", f"{text}tensor by {removal:.3g}.")
    elif measured["loss_recovered"] < 0:
        notes.append("splicing harms as much as removing the tensor, within the interval")


def _precision(row: SAERow, measured: Mapping[str, float], bfloat16: Mapping[str, float]) -> Iterable[Fault]:
    moved = abs(bfloat16["fvu"] - measured["fvu"])
    ratio = bfloat16["l0"] / measured["l0"] if measured["l0"] else math.inf
    if not (moved <= BFLOAT16_FVU * max(1.0, measured["fvu"]) and abs(ratio - 1) <= BFLOAT16_L0):
        text = f"{row.id}: in bfloat16 FVU is {bfloat16['fvu']:.4g} and L0 {bfloat16['l0']:.4g}, in float32"
        yield Fault("precision", f"{text} {measured['fvu']:.4g} and {measured['l0']:.4g}.")


def _within(value: float, wanted: float, factor: float) -> bool:
    return wanted / factor <= value <= wanted * factor


def _number(measured: Mapping[str, float], name: str) -> str:
    return f"{measured[name]:.3g} ({measured[name + '_low']:.3g} to {measured[name + '_high']:.3g})"
