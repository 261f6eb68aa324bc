"""What all verbs share: old names of options, finite numbers, examples letter by letter, results apart."""

from __future__ import annotations

import inspect
import math
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import Any, Protocol, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from gemma_scope_tl.cli.output import note, results_apart

RENAMED: dict[str, dict[str, str]] = {
    "neuronpedia": {"--folder": "--out"},
    "check": {"--model-path": "--model"},
    "top-tokens": {"--k": "--top"},
}
"""Old names of options by verb; they are accepted with a word about the new one."""
_NARROW = 72
_EXAMPLES = re.compile(r"\n\s*Examples?:\n")
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"])+""")


class Shared(Protocol):
    """Options that several verbs share: a dataclass whose fields are options."""

    def check(self) -> None:
        """Raise what can be raised before anything heavy is imported."""


class Verb(TyperCommand):
    """A command whose help shows its examples letter by letter, and whose standard output holds nothing but results."""

    def __init__(self, name: str | None, *, help: str | None = None, **settings: Any) -> None:
        text, *examples = _EXAMPLES.split(inspect.cleandoc(help or ""), maxsplit=1)
        super().__init__(name, help=text, **settings)
        self.examples = [" ".join(part.split()) for part in examples[0].split("\n\n")] if examples else []

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept old names, and refuse numbers that are none."""
        rest = super().parse_args(ctx, list(self._new_names(args)))
        for param in self.get_params(ctx):
            value = ctx.params.get(param.name)
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    hint = f"'{param.opts[0]}'"
                    raise typer.BadParameter(f"{number} is not a finite number.", ctx=ctx, param_hint=hint)
        return rest

    def _new_names(self, args: list[str]) -> Iterator[str]:
        renamed = RENAMED.get(self.name or "", {})
        for number, word in enumerate(args):
            old, equals, value = word.partition("=")
            if old in renamed and "--" not in args[:number]:
                note(f"DeprecationWarning: {old} is called {renamed[old]} now; the old name will go.")
                yield f"{renamed[old]}{equals}{value}"
            else:
                yield word

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; what libraries print goes to standard error."""
        with results_apart():
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help, then the examples. In a narrow terminal it is plain, since frames would cut long words."""
        width = shutil.get_terminal_size().columns - 3
        mode, self.rich_markup_mode = self.rich_markup_mode, self.rich_markup_mode if width > _NARROW else None
        try:
            super().format_help(ctx, formatter)
        finally:
            self.rich_markup_mode = mode
        if self.examples:
            lines = "\n".join(_indented(example, width) for example in self.examples)
            formatter.write(f"\n Example{'s' if len(self.examples) > 1 else ''}:\n{lines}\n")


class Root(TyperGroup):
    """The whole command line: with ``--debug`` errors show where they happened; Ctrl-C is a line."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.params.get("debug") and not hasattr(error, "exit_code"):
                traceback.print_exc()
            raise


def add(app: typer.Typer, function: Callable[..., Any], name: str | None = None) -> None:
    """Make a function a verb of ``app``."""
    app.command(name, cls=Verb)(function)


def verb(function: Callable[..., Any], kind: type[Shared]) -> Callable[..., None]:
    """A command with a function's own options and those of ``kind``, of which it gets one as its first argument.

    An option of the function that has the name of a shared one takes its place.
    """
    hints = {**get_type_hints(kind, include_extras=True), **get_type_hints(function, include_extras=True)}
    own = list(inspect.signature(function).parameters.values())[1:]
    shared = {field.name: field.default for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    for parameter in own:
        shared.pop(parameter.name, None)

    def command(**given: Any) -> None:
        choice = kind(**{key: given.pop(key) for key in shared})
        choice.check()
        function(choice, **given)

    only, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    defaults = {**{parameter.name: parameter.default for parameter in own}, **shared}
    parameters = [
        inspect.Parameter(key, only, default=empty if value is MISSING else value, annotation=hints[key])
        for key, value in defaults.items()
    ]
    setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010
    command.__annotations__ = {key: hints[key] for key in defaults}
    command.__doc__ = function.__doc__
    return command


def _indented(example: str, width: int) -> str:
    """An example, broken before options where it is too long for a line; the shell reads it as one line."""
    lines, parts = [""], list[str]()
    for word in _WORD.findall(example):
        if parts and not word.startswith("--"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) + 3 > width - 3:
            lines.append("")
        lines[-1] += f" {part}" if lines[-1] else part
    return "\n   " + " \\\n       ".join(lines)
