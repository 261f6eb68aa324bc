"""The choice of one SAE among those of one site, layer and width: by L0, skip connection, seed and series."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gemma_scope_tl.counts import checked_flag, whole_number
from gemma_scope_tl.errors import GemmaScopeError, RegistryError, UnknownNameError, unknown_name
from gemma_scope_tl.registry.schema import LABELS, SERIES, SAERow

CANONICAL = "canonical"
CLOSEST = "closest:"


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
    """A layer or a seed as an int.

    Args:
        what: ``"layer"`` or ``"seed"``, for the message.
        number: the argument.
        least: the smallest number; None for any.

    Raises:
        UnknownNameError: for a smaller number, and for anything but an integer.
    """
    found = whole_number(number)
    if found is None or (least is not None and found < least):
        raise unknown_name(what, repr(number) if found is None else found, [f"a number from {least or 0}, such as 20"])
    return found


def _with_l0(rows: Sequence[SAERow], l0: float | str) -> list[SAERow]:
    if l0 == CANONICAL:
        confirmed = [row for row in rows if not row.unverified]
        return [row for row in rows if row.canonical] or (confirmed if len(confirmed) == 1 else [])
    if l0 in LABELS:
        return [row for row in rows if row.label == l0]
    target = _l0_number(l0)
    known = [(row, row.l0) for row in rows if row.l0 is not None]
    best = min(((abs(value - target), value) for _, value in known), default=None)
    closest = isinstance(l0, str) and l0.startswith(CLOSEST)
    wanted = target if not closest else best and best[1]
    return [row for row, value in known if value == wanted]


def _several(fitting: Sequence[SAERow], l0: float | str) -> RegistryError:
    if len({row.release for row in fitting}) > 1:
        names = ", ".join(f"{row.release} {row.id}" for row in fitting)
        return RegistryError(f"{len(fitting)} SAEs fit: {names}. Say which with release=.")
    names = ", ".join(row.id for row in fitting)
    text = f"{len(fitting)} SAEs of {fitting[0].release} have L0 {l0}: {names}."
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
    listed = ", ".join(words) or "none is known"
    if l0 == CANONICAL:
        how = "Take one by its number or label" if labels else "Take one"
        return f"{place} has no canonical SAE. L0s: {listed}. {how}, or l0='closest:100'."
    if l0 in LABELS:
        return f"{place} has no SAE with the label {l0!r}. L0s: {listed}."
    target = _l0_number(l0)
    near = f" l0='closest:{target:g}' takes {min(known, key=lambda v: (abs(v - target), v)):g}." if known else ""
    return f"{place} has no SAE with L0 {target:g}. L0s: {listed}.{near}"
