"""The package's errors. Every message says what was given, what is valid and what to do.

All are children of :class:`GemmaScopeError`, and where a standard exception says the same thing, of that one too,
so that ``except ValueError`` and ``except FileNotFoundError`` keep working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GemmaScopeError(Exception):
    """Base of every error that this package raises on purpose."""


class UnknownNameError(GemmaScopeError, KeyError):
    """A release, id, site, hook, width or configuration key that does not exist."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0]) if self.args else ""


class RegistryError(GemmaScopeError, ValueError):
    """A registry file breaks the schema, or two files claim the same name."""


class WeightsError(GemmaScopeError, ValueError):
    """A weights file is missing an array, truncated, corrupt, of another shape, or not a weights file at all."""


class AdapterError(GemmaScopeError, ValueError):
    """A model cannot be loaded as a Gemma 2 with the Gemma Scope sites."""


class AdapterMismatch(GemmaScopeError, AssertionError):
    """The self-check on load found a site or a cached forward pass that differs from the plain model."""


class DeviceError(GemmaScopeError, RuntimeError):
    """A device that does not exist, or not on this machine."""


class SpliceError(GemmaScopeError, ValueError):
    """An SAE cannot be spliced: no such site, a site that is taken, or another model or width."""


def nearest(given: str, valid: Iterable[str], n: int = 5) -> list[str]:
    """The ``n`` names of ``valid`` most alike to ``given``, best first (never empty unless ``valid`` is)."""
    names = list(valid)
    return difflib.get_close_matches(given, names, n=n, cutoff=0.0)


class TrainingStateError(GemmaScopeError, ValueError):
    """A configuration, a checkpoint or a run's folder that cannot be used as it is."""


def unknown_name(kind: str, given: object, valid: Iterable[str], hint: str = "") -> UnknownNameError:
    """An :class:`UnknownNameError` that names the five nearest valid names.

    >>> print(unknown_name("site", "ress", ["res", "mlp", "att"]))
    Unknown site 'ress'. Nearest: res, mlp, att.
    """
    names = list(valid)
    listed = ", ".join(nearest(str(given), names)) or "none exist"
    text = f"Unknown {kind} {str(given)!r}. Nearest: {listed}."
    return UnknownNameError(f"{text} {hint}".rstrip())
