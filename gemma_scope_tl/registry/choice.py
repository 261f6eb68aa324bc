"""The choice of one SAE among those of one site, layer and width: by L0, skip connection, seed and series."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

from gemma_scope_tl.counts import checked_flag, whole_number
from gemma_scope_tl.errors import GemmaScopeError, RegistryError, UnknownNameError, unknown_name
from gemma_scope_tl.registry.schema import LABELS, SERIES, SAERow

T = TypeVar("T")
CANONICAL = "canonical"
CLOSEST = "closest:"
NEARBY = 2.0
"""``closest:`` takes a confirmed SAE before an unverified one if its L0 is within this factor of the wanted one."""


def pick(
    rows: Sequence[SAERow], l0: float | str, affine: bool | None = None, seed: int | None = None, hint: str = ""
) -> SAERow:
    """The row with this L0 among those of one site, layer and width.

    Args:
        rows: the rows of one site, layer and width.
        l0, affine, seed: as for ``find``.
        hint: what to add to the message when none has the L0.

    Raises:
        UnknownNameError: when none fits; names what exists.
        RegistryError: when several fit; names them and what chooses one.
    """
    rows = _of_kind(rows, checked_affine(affine), seed)
    fitting = _with_l0(rows, l0)
    if not fitting:
        raise UnknownNameError(f"{_no_such_l0(rows, l0)} {hint}".rstrip())
    for series in SERIES:
        if any(row.series == series for row in fitting):
            fitting = [row for row in fitting if row.series in (series, None)]
            break
    if len(fitting) > 1:
        raise _several(fitting, l0)
    return fitting[0]


def _of_kind(rows: Sequence[SAERow], affine: bool | None, seed: int | None) -> list[SAERow]:
    """The rows with or without a skip connection, and with this seed."""
    kept = [row for row in rows if affine in (None, bool(row.affine))]
    if not kept:
        which = "with a skip connection (affine)" if affine else "without a skip connection: all are affine"
        raise UnknownNameError(f"{place_of(rows[0])} has no coder {which}. Omit affine=, or give affine={not affine}.")
    if seed is None:
        return [row for row in kept if row.seed is None] or kept
    found = [row for row in kept if row.seed == seed]
    if not found:
        seeds = sorted({row.seed for row in kept if row.seed is not None})
        hint = "" if seeds else "No further run is released here: omit seed=."
        raise unknown_name(f"seed of {place_of(rows[0])}", seed, map(str, seeds), hint)
    return found


def checked_affine(affine: object) -> bool | None:
    """True, False or None.

    Raises:
        UnknownNameError: for anything else.
    """
    try:
        return checked_flag(affine, "affine", unset=True)
    except GemmaScopeError:
        raise unknown_name("affine", affine, ["True", "False", "None"]) from None


def checked_number(what: str, number: object, least: int | None = 0) -> int:
    """A layer or a seed as an int, from any library's integer, or from a whole float of a column that has gaps.

    Args:
        what: ``"layer"`` or ``"seed"``, for the message.
        number: the argument.
        least: the smallest number; None for any.

    Raises:
        UnknownNameError: for a smaller number, and for anything else.
    """
    found = whole_number(int(number) if isinstance(number, float) and number.is_integer() else number)
    if found is None or (least is not None and found < least):
        raise unknown_name(what, repr(number) if found is None else found, [f"a number from {least or 0}, such as 20"])
    return found


def _with_l0(rows: Sequence[SAERow], l0: float | str) -> list[SAERow]:
    if l0 == CANONICAL:
        confirmed = [row for row in rows if not row.unverified]
        l0s = {(row.l0, row.series, row.label if row.l0 is None else None) for row in confirmed}
        only_l0 = len(l0s) == 1  # the rest differ by skip connection or seed
        return [row for row in rows if row.canonical] or (confirmed if only_l0 else [])
    if l0 in LABELS:
        return [row for row in rows if row.label == l0]
    target = _l0_number(l0)
    if not (isinstance(l0, str) and l0.startswith(CLOSEST)):
        return [row for row in rows if row.l0 == target]
    return _closest(rows, target)


def _closest(rows: Sequence[SAERow], target: float) -> list[SAERow]:
    """The rows with the L0 nearest to ``target``: of the confirmed rows if one is nearby, otherwise of all.

    An unverified file may not exist, so a slightly nearer L0 is not worth one; an SAE of a tenth of the wanted L0 is no
    substitute.
    """
    known = [(row, row.l0) for row in rows if row.l0 is not None]
    nearby = [
        (row, value) for row, value in known if not row.unverified and target / NEARBY <= value <= target * NEARBY
    ]
    among = nearby or known
    best = min(((abs(value - target), value) for _, value in among), default=None)
    return [row for row, value in among if best is not None and value == best[1]]


def _several(fitting: Sequence[SAERow], l0: float | str) -> RegistryError:
    if len({row.release for row in fitting}) > 1:
        names = ", ".join(f"{row.release} {row.id}" for row in fitting)
        return RegistryError(f"{len(fitting)} SAEs fit: {names}. Say which with release=.")
    names = ", ".join(row.id for row in fitting)
    have = "may be meant by 'canonical'" if l0 == CANONICAL else f"have L0 {l0}"
    text = f"{len(fitting)} SAEs of {fitting[0].release} {have}: {names}."
    if {row.affine for row in fitting} == {True, False}:
        return RegistryError(f"{text} Say whether with a skip connection: affine=True or affine=False.")
    if len({row.seed for row in fitting}) == len(fitting):
        return RegistryError(f"{text} Say which with seed=.")
    return RegistryError(f"{text} Name one by its id.")


def _l0_number(l0: float | str) -> float:
    try:
        value = float(l0.removeprefix(CLOSEST) if isinstance(l0, str) else l0)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if isinstance(l0, (bool, bytes)) or not (math.isfinite(value) and value > 0):
        known = [CANONICAL, *LABELS, f"{CLOSEST}100", "100"]
        raise unknown_name("l0", l0, known, "Or any other positive number.")
    return value


def place_of(row: SAERow) -> str:
    """The site, layer and width of a row in a sentence, with its release if that is divided by place."""
    if row.label is None:
        return f"{row.release} {row.id.rpartition('/')[0]}"
    return f"{row.model} at {row.site}{'' if row.layer is None else f' layer {row.layer}'} with width {row.width}"


def _no_such_l0(rows: Sequence[SAERow], l0: float | str) -> str:
    place = place_of(rows[0])
    labels = {row.l0: row.label for row in rows if row.l0 is not None and row.label is not None}
    known = sorted({row.l0 for row in rows if row.l0 is not None})
    words = (f"{value:g} ({labels[value]})" if value in labels else f"{value:g}" for value in known)
    unsaid = [label for label in LABELS if any(row.label == label and row.l0 is None for row in rows)]
    listed = ", ".join([*words, *(f"an unknown number ({label})" for label in unsaid)]) or "none is known"
    if l0 == CANONICAL:
        if unsaid and not known:
            return f"{place} has no canonical coder. L0s: {listed}. Take one by its label: l0={unsaid[0]!r}."
        how = "Take one by its number or label" if labels else "Take one"
        return f"{place} has no canonical SAE. L0s: {listed}. {how}, or l0='closest:100'."
    if l0 in LABELS:
        return f"{place} has no SAE with the label {l0!r}. L0s: {listed}."
    target = _l0_number(l0)
    closest = _closest(rows, target)
    near = f" l0='closest:{target:g}' takes {closest[0].l0:g}." if closest else ""
    return f"{place} has no SAE with L0 {target:g}. L0s: {listed}.{near}"


def several(value: T | Iterable[T]) -> list[T]:
    """One value or several, as a list; text is one, and so is an array without dimensions."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        return [cast("T", value)]
    return list(cast("Iterable[T]", value))
