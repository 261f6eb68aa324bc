"""The package's exceptions. Every message says what was given, what is valid and what to do.

All classes derive from :class:`GemmaScopeError`. Each also derives from a standard exception where one has the same
meaning, so that ``except ValueError`` works too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GemmaScopeError(Exception):
    """Base of every error that this package raises on purpose."""


class UnknownNameError(GemmaScopeError, KeyError):
    """A release, id, site, hook, width or configuration key that does not exist."""

    def __str__(self) -> str:  # KeyError.__str__ returns the repr of the message
        return str(self.args[0]) if self.args else ""


class KeywordError(GemmaScopeError, TypeError):
    """Keyword arguments that contradict each other."""


class UnknownKeywordError(KeywordError):
    """A keyword argument that a function does not accept."""


class RegistryError(GemmaScopeError, ValueError):
    """A registry file breaks the schema, or two files claim the same name."""


class WeightsError(GemmaScopeError, ValueError):
    """A weights file lacks an array, has a wrong shape, is truncated or corrupt, or is another kind of file."""


class WriteError(GemmaScopeError, OSError):
    """A file cannot be written: the disk is full or read-only, the name is too long, or a permission is missing.

    ``errno`` has the value of the operating system's error, which is the ``__cause__``.
    """


class AdapterError(GemmaScopeError, ValueError):
    """A model cannot be loaded: its family is unknown, or it lacks sites of its family."""


class AdapterMismatch(GemmaScopeError, AssertionError):
    """The check after loading found a site or a cached forward pass that differs from the plain model."""


class DeviceError(GemmaScopeError, RuntimeError):
    """A device that does not exist on this machine, or tensors on different devices."""


class SpliceError(GemmaScopeError, ValueError):
    """An SAE cannot be spliced: its site is missing or already in use, or the SAE has another model or width."""


class SeveralLayersError(SpliceError, AttributeError):
    """A crosscoder or cross-layer transcoder was given to code that reads the configuration of an SAE of one layer.

    It is an ``AttributeError`` too, so that ``hasattr(coder, "cfg")`` is False.
    """


class TrainingStateError(GemmaScopeError, ValueError):
    """A configuration, a checkpoint or the folder of a run cannot be used."""


def nearest(given: str, valid: Iterable[str], n: int = 5) -> list[str]:
    """The ``n`` names of ``valid`` most similar to ``given``, best first. Empty only if ``valid`` is empty."""
    names = list(valid)
    return difflib.get_close_matches(given, names, n=n, cutoff=0.0)


def unknown_name(kind: str, given: object, valid: Iterable[str], hint: str = "") -> UnknownNameError:
    """Return an :class:`UnknownNameError` that names the five nearest valid names.

    >>> print(unknown_name("site", "ress", ["res", "mlp", "att"]))
    Unknown site 'ress'. Nearest: res, mlp, att.
    """
    names, told = list(valid), brief(given)
    listed = ", ".join(nearest(told, names)) or "none exist"
    text = f"Unknown {kind} {told!r}. Nearest: {listed}."
    return UnknownNameError(f"{text} {hint}".rstrip())


def known_name(kind: str, given: str, valid: Iterable[str]) -> str:
    """Return the valid name that ``given`` means; ``-`` and ``_`` are the same, as projects write either.

    Raises:
        UnknownNameError: there is none.

    >>> known_name("layout", "gemma-scope-2", ["gemma-scope", "gemma_scope_2"])
    'gemma_scope_2'
    """
    names = list(valid)
    for name in names:
        if str(given).replace("-", "_") == name.replace("-", "_"):
            return name
    raise unknown_name(kind, given, names)


def checked_text(kind: str, given: object, valid: Iterable[str]) -> str:
    """Return a name that a user gives. Whether it exists is not checked.

    Raises:
        UnknownNameError: for anything but text, with valid names.
    """
    if not isinstance(given, str):
        raise unknown_name(kind, given, valid, f"A name is text, not a value of type {type(given).__name__}.")
    return given


def brief(value: object, most: int = 100) -> str:
    """The text of a value in a message, cut after ``most`` characters.

    >>> brief("ress"), brief(10**6, most=4)
    ('ress', '1000...')
    """
    try:
        text = str(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def unknown_keyword(function: str, given: str, valid: Iterable[str]) -> UnknownKeywordError:
    """Return an :class:`UnknownKeywordError` (a ``TypeError``) that names the nearest valid keyword.

    >>> print(unknown_keyword("run_with_saes", "sae", ["saes", "chain"]))
    run_with_saes() takes no keyword 'sae': did you mean 'saes'?
    """
    close = nearest(given, valid, n=1)
    return UnknownKeywordError(
        f"{function}() takes no keyword {given!r}" + (f": did you mean {close[0]!r}?" if close else ".")
    )


def device_mismatch(what: str, its: object, given: object) -> DeviceError:
    """Return a :class:`DeviceError` that says how to move one tensor to the device of the other.

    >>> print(device_mismatch("res, layer 20", "cpu", "cuda:0"))
    res, layer 20 is on cpu, but the given tensor is on cuda:0: move one of them, for example with .to('cuda:0').
    """
    return DeviceError(
        f"{what} is on {its}, but the given tensor is on {given}: move one of them, for example with "
        f".to({str(given)!r})."
    )
