"""Width labels: the ``16k`` in ``layer_20/width_16k`` and the number of latents that it means.

Gemma Scope's widths are powers of two, written with their leading decimal digits: 65,536 is ``65k`` and not ``64k``.
Any other number of latents is written out.
"""

from __future__ import annotations

from gemma_scope_tl.counts import whole_number
from gemma_scope_tl.errors import RegistryError, UnknownNameError, brief

DEFAULT_WIDTH = "16k"
"""The default width, which every Gemma Scope model has at every layer."""
_UNITS = {"k": 1_000, "m": 1_000_000}
_LARGEST = 2**40


def width_label(d_sae: int) -> str:
    """The label of a width of ``d_sae`` latents.

    Raises:
        RegistryError: when ``d_sae`` is not positive.

    >>> [width_label(n) for n in (512, 1024, 16384, 65536, 2**20, 24576)]
    ['512', '1k', '16k', '65k', '1m', '24576']
    """
    if d_sae < 1:
        raise RegistryError(f"A width is a positive number of latents, not {brief(d_sae)}.")
    if d_sae & (d_sae - 1) or d_sae < 1024 or d_sae > _LARGEST:
        return str(d_sae)
    return f"{d_sae // 1_000}k" if d_sae < 1_000_000 else f"{d_sae // 1_000_000}m"


def label_of(width: str | int | None) -> str:
    """The label of a width that a user gives: a label, a number of latents of any integer type, or None for 16k.

    >>> [label_of(width) for width in ("65k", 1024, "1024", None)]
    ['65k', '1k', '1k', '16k']
    """
    if width is None:
        return DEFAULT_WIDTH
    if isinstance(width, str):
        return width_label(int(width)) if width.isascii() and width.isdecimal() and int(width) else width
    number = whole_number(width)
    if number is None:
        raise UnknownNameError(f"A width is a label such as '16k', or a number of latents, not {brief(repr(width))}.")
    return width_label(number)


def parse_width(label: str) -> int:
    """The number of latents of a width label.

    Raises:
        RegistryError: for anything but a positive number or the leading digits of a power of two with ``k`` or ``m``.

    >>> [parse_width(label) for label in ("512", "4k", "16k", "131k", "1m")]
    [512, 4096, 16384, 131072, 1048576]
    """
    digits, unit = (label[:-1], label[-1]) if label[-1:] in _UNITS else (label, "")
    if not (digits.isascii() and digits.isdecimal() and not digits.startswith("0")) or len(digits) > 13:
        raise RegistryError(f"{label!r} is not a width: write '16k', '1m' or a number of latents.")
    if not unit:
        return int(digits)
    smallest = int(digits) * _UNITS[unit]
    d_sae = 1 << (smallest - 1).bit_length()  # the first power of two that is not below
    if width_label(d_sae) != label:
        raise RegistryError(
            f"{label!r} is not the label of a power of two: write the number of latents, such as '24576'."
        )
    return d_sae
