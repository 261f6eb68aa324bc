"""Bounds of a visitor's request, checked before the model runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gemma_scope_tl.errors import GemmaScopeError


@dataclass(frozen=True)
class Limits:
    """Bounds of a request.

    Attributes:
        characters, tokens: maximum length of a text, BOS included.
        new_tokens: maximum number of generated tokens.
        strength: maximum strength of steering in either direction, in norms of the activation.
        spliced: maximum number of SAEs that are spliced at once.
        temperature: maximum temperature of sampling.
    """

    characters: int = 4000
    tokens: int = 256
    new_tokens: int = 100
    strength: float = 2.0
    spliced: int = 32
    temperature: float = 2.0

    def text(self, text: object) -> str:
        """Check that the text is neither empty nor too long, and return it.

        Raises:
            GemmaScopeError: the text is empty, too long or invalid.
        """
        if not isinstance(text, str) or not text.strip():
            raise GemmaScopeError("Type some text first.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise GemmaScopeError("The text holds an incomplete character: copy it again, or type it.")
        if len(text) > self.characters:
            raise GemmaScopeError(
                f"The text has {len(text):,} characters; {self.characters:,} are allowed. Shorten it."
            )
        return text

    def token_count(self, count: int) -> None:
        """Raise :class:`GemmaScopeError` for more tokens than are allowed."""
        if count > self.tokens:
            raise GemmaScopeError(f"The text has {count:,} tokens; {self.tokens:,} are allowed. Shorten it.")


def whole_number(name: str, given: Any, low: int, high: int) -> int:
    """Check that the value of a form's field is a whole number within bounds, and return it.

    Raises:
        GemmaScopeError: the value is not such a number.
    """
    value = number(name, given, low, high)
    if value != int(value):
        raise GemmaScopeError(f"{name} is a whole number; given: {given}.")
    return int(value)


def number(name: str, given: Any, low: float, high: float) -> float:
    """Check that the value of a form's field is a number within bounds, and return it.

    Raises:
        GemmaScopeError: the value is not such a number.
    """
    try:
        value = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not low <= value <= high:
        raise GemmaScopeError(f"{name} is a number from {low:g} to {high:g}; given: {given}.")
    return value
