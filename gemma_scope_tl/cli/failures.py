"""What went wrong as one line on standard error and an exit status, never a traceback."""

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
        app: its verbs.
        arguments: by default those of this process.

    Returns:
        The exit status: 0; 1 where something failed; 2 for a wrong call; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal or pipe that cannot show a letter is no reason to fail
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    command: Any = get_command(app)
    try:
        status = command(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except SystemExit as stop:  # of a pipe whose reader has gone
        _forget_output()
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        _forget_output()
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except Exception as error:
        return _told(error)


def _told(error: Exception) -> int:
    """Say what went wrong. Returns the exit status."""
    status: Any = getattr(error, "exit_code", None)
    if status is not None and hasattr(error, "format_message"):  # a wrong call
        _show_usage(error)
        return int(status)
    if isinstance(error, typer.Abort):
        complain("interrupted")
    else:
        complain(in_words(error))
    return 1


def in_words(error: BaseException) -> str:
    """What an error says to people."""
    if isinstance(error, GemmaScopeError):
        return "error: " + re.sub(r"\n(?! )", " ", str(error).strip())  # items of a list are indented, and stay lines
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{error.strerror}."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            "error: There is not enough memory. Take fewer rows, a smaller batch, a narrower SAE or --dtype bfloat16."
        )
    lines = str(error).strip().splitlines()
    return f"error: {type(error).__name__}: {lines[0] if lines else 'no message'} {_HELP}"


def _show_usage(error: Any) -> None:
    """A wrong call as one line; a call without any words as the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    context = getattr(error, "ctx", None)
    text = " ".join(error.format_message().split()).rstrip(".")
    hint = f" See `{context.command_path} --help`." if context is not None else ""
    complain(f"error: {text}{'' if text.endswith('?') else '.'}{hint}")


def _forget_output() -> None:
    """Let Python flush its output into nothing when it ends, where nobody reads it."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # pyright: ignore[reportOptionalMemberAccess]
    except (OSError, ValueError, AttributeError):
        return
