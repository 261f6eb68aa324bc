"""Error handling of the command line: one line on standard error and an exit status, without a traceback."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.main import get_command

from gemma_scope_tl.cli.output import complain
from gemma_scope_tl.errors import GemmaScopeError

_HELP = "`gemma-scope --debug …` shows where; `gemma-scope doctor` checks the installation."


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        app: the app with all verbs.
        arguments: command-line arguments; by default those of this process.

    Returns:
        The exit status: 0 for success, 1 for an error, 2 for a usage error, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # escape characters that the encoding lacks
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    command: Any = get_command(app)
    try:
        status = command(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except SystemExit as stop:  # typer's, when the reader of a pipe has closed it
        _forget_output()
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        _forget_output()
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except Exception as error:
        return _report(error)


def _report(error: Exception) -> int:
    """Print an error, and return the exit status."""
    status: Any = getattr(error, "exit_code", None)
    if status is not None and hasattr(error, "format_message"):  # a usage error
        _show_usage(error)
        return int(status)
    if isinstance(error, typer.Abort):
        complain("interrupted")
    else:
        complain(in_words(error))
    return 1


def in_words(error: BaseException) -> str:
    """The line that is printed for an error."""
    if isinstance(error, GemmaScopeError):
        return "error: " + re.sub(r"\n(?! )", " ", str(error).strip())  # keeps the indented lines of a list
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{error.strerror}."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "error: There is not enough memory. Use fewer rows, a smaller batch, a narrower SAE or --dtype bfloat16."
    lines = str(error).strip().splitlines()
    return f"error: {type(error).__name__}: {lines[0] if lines else 'no message'} {_HELP}"


def _show_usage(error: Any) -> None:
    """Print a usage error as one line; for a call without arguments, print the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    context = getattr(error, "ctx", None)
    text = " ".join(error.format_message().split()).rstrip(".")
    hint = f" See `{context.command_path} --help`." if context is not None else ""
    complain(f"error: {text}{'' if text.endswith('?') else '.'}{hint}")


def _forget_output() -> None:
    """Redirect standard output after its reader has closed it, so that Python's flush at exit does not fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # pyright: ignore[reportOptionalMemberAccess]
    except (OSError, ValueError, AttributeError):
        return
