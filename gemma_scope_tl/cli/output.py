"""Where the commands print: results on standard output, JSON if asked for; all else on standard error."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Generator, Mapping
from os import PathLike
from typing import Any, TextIO, cast

import typer
from rich.console import Console

_RESULTS: list[TextIO] = []
progress = Console(stderr=True)  # spinners and bars


@contextlib.contextmanager
def results_apart() -> Generator[None]:
    """Within the context only :func:`say` writes to standard output; what else is printed goes to standard error."""
    if _RESULTS:
        yield
        return
    _RESULTS.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        _RESULTS[0].flush()
    finally:
        _RESULTS.clear()


def results() -> TextIO:
    """The stream of results."""
    return _RESULTS[0] if _RESULTS else sys.stdout


def say(text: str) -> None:
    """Print a result."""
    typer.echo(text, file=results())


def say_json(value: Any) -> None:
    """Print plain data as JSON; numbers that JSON has not are null, and paths are strings."""
    say(json.dumps(_plain(value), indent=2, allow_nan=False))


def note(text: str) -> None:
    """Print a remark, not a result."""
    typer.secho(text, fg="yellow", err=True)


def complain(text: str) -> None:
    """Print what went wrong; where nobody can read it, that is no further error."""
    with contextlib.suppress(OSError):
        typer.secho(text, fg="red", err=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, PathLike):
        return str(cast("PathLike[str]", value))
    if hasattr(value, "item"):  # NumPy's numbers
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
