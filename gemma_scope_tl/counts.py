"""Checks of numbers and switches that users give: integers, counts, layers, real numbers, and True or False.

Every function takes numbers of Python, NumPy and torch, and none takes a bool for a number: ``True`` is 1 to Python, so
``layer=True`` or ``batch_size=True`` would silently mean another call than the one that was intended.
"""

from __future__ import annotations

import math
from operator import index
from typing import Any

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, brief

LARGEST = 2**63 - 1
"""The largest number that tensors and arrays of integers hold."""


def whole_number(value: Any) -> int | None:
    """An integer of Python, NumPy or torch (also 0-d) as an int; None for anything else, bools and floats included.

    >>> whole_number(3), whole_number(True), whole_number(3.0)
    (3, None, None)
    """
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or getattr(value, "ndim", 0):
        return None
    try:
        return index(value)
    except (TypeError, ValueError, RuntimeError):  # a meta tensor has no value
        return None


def checked_count(value: Any, name: str, least: int = 1, most: int | None = LARGEST) -> int:
    """An integer between ``least`` and ``most`` (None for no bound, as for seeds) as an int.

    Args:
        value: the argument.
        name: its name, for the message.
        least, most: the bounds, which are valid themselves.

    Raises:
        GemmaScopeError: for a number outside the bounds, and for anything but an integer.

    >>> checked_count(2, "batch_size")
    2
    """
    number = whole_number(value)
    if number is None:
        raise GemmaScopeError(f"{name} must be an integer, {least} or more, not {brief(value)} ({_kind(value)}).")
    if number < least:
        raise GemmaScopeError(f"{name} must be {least} or more, not {brief(number)}.")
    if most is not None and number > most:
        raise GemmaScopeError(f"{name} must be {most} or less, not {brief(number)}.")
    return number


def checked_top(value: Any, name: str = "top", what: str = "latents") -> int | None:
    """:func:`checked_count` of how many to keep, where None keeps all."""
    if value is None:
        return None
    number = whole_number(value)
    if number is None or not 1 <= number <= LARGEST:
        raise GemmaScopeError(f"{name} must be 1 or more, or None for all {what}, not {brief(value)}.")
    return number


def checked_real(value: Any, name: str, least: float = -math.inf, above: float = -math.inf) -> float:
    """A real number of at least ``least``, and greater than ``above``, as a float.

    Raises:
        GemmaScopeError: for another number, NaN, and anything but one number (also for text and bools).
    """
    number = math.nan
    if not isinstance(value, (bool, str, bytes)) and "bool" not in str(getattr(value, "dtype", "")):
        try:
            number = math.nan if getattr(value, "ndim", 0) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
    if not (number >= least and number > above):
        wanted = f"a number above {above:g}" if above > -math.inf else f"a number of at least {least:g}"
        raise GemmaScopeError(f"{name} must be {wanted}, not {brief(value)} ({_kind(value)}).")
    return number


def checked_flag(value: Any, name: str, unset: bool = False, error: type[GemmaScopeError] = GemmaScopeError) -> Any:
    """True or False (of NumPy too) as a bool.

    Args:
        value: the argument. Any text is true to Python, ``"no"`` included, so only bools are accepted.
        name: its name, for the message.
        unset: whether to accept None, and return it.
        error: the class of the error.
    """
    if value is None and unset:
        return None
    if isinstance(value, bool):
        return value
    if (
        type(value).__module__ == "numpy"
        and str(getattr(value, "dtype", "")) == "bool"
        and not getattr(value, "ndim", 1)
    ):
        return bool(value)
    valid = "True, False or None" if unset else "True or False"
    raise error(f"{name} must be {valid}, not {brief(value)} ({_kind(value)}).")


def checked_layer(layer: Any, site: str | None = None) -> int | None:
    """A layer as an int, or None.

    Args:
        layer: the argument.
        site: the site that the layer belongs to, for the message.

    Raises:
        SpliceError: for anything but None or an integer from 0.

    >>> checked_layer(20), checked_layer(None)
    (20, None)
    """
    if layer is None:
        return None
    number = whole_number(layer)
    if number is None or number < 0:
        of = "" if site is None else f"Site {site!r}: "
        raise SpliceError(f"{of}a layer is an integer from 0, not {brief(layer)} ({_kind(layer)}).")
    return number


def _kind(value: object) -> str:
    return type(value).__name__
