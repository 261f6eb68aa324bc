"""The base classes of all verbs: deprecated option names, checks of numbers, the help's examples, and result output."""

from __future__ import annotations

import inspect
import math
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gemma_scope_tl.cli.output import note, results_apart

RENAMED: dict[str, dict[str, str]] = {
    "neuronpedia": {"--folder": "--out"},
    "check": {"--model-path": "--model"},
    "top-tokens": {"--k": "--top"},
}
"""Old names of options by verb, which are accepted with a warning that names the new option."""
_NARROW = 72
_EXAMPLES = re.compile(r"\n\s*Examples?:\n")
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"])+""")


@dataclass(kw_only=True)
class Command:
    """A verb that shares options with others: a dataclass whose fields are its options and whose docstring is its help.

    Typer reads the signature of the dataclass as it reads that of a function, and makes an object from the arguments.
    Classes that several verbs inherit from are keyword-only, so that a verb's own options come first in the help.

    Attributes:
        given: the names of the arguments that the command line has, as opposed to defaults.
    """

    given = tuple[str, ...]()  # without an annotation, so that it is no option

    def check(self) -> None:
        """Make the checks that need no expensive import."""

    def run(self) -> None:
        """Run the verb, and print the results."""
        raise NotImplementedError


class Verb(TyperCommand):
    """A command whose help keeps the layout of its examples, and whose standard output holds only results."""

    def __init__(self, name: str | None, *, help: str | None = None, **settings: Any) -> None:
        text, *examples = _EXAMPLES.split(inspect.cleandoc(help or ""), maxsplit=1)
        super().__init__(name, help=text, **settings)
        self.examples = [" ".join(part.split()) for part in examples[0].split("\n\n")] if examples else []

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept old names of options, and reject infinities and NaN."""
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
        """Run the verb; the output of libraries goes to standard error."""
        with results_apart():
            result = super().invoke(ctx)
            if not isinstance(result, Command):  # the verb is a function that has already run
                return result
            sources = ((name, ctx.get_parameter_source(name)) for name in ctx.params)
            result.given = tuple(
                name for name, source in sources if source is not None and source.name == "COMMANDLINE"
            )
            ctx.invoke(result.check)  # through the context: a wrong call then names the verb's --help
            return ctx.invoke(result.run)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, then the examples. In a narrow terminal there are no frames, which would cut long words."""
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
    """The whole command line: ``--debug`` shows tracebacks, and Ctrl-C is reported in one line."""

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
    """Make a function, or the class of a :class:`Command`, a verb of ``app``."""
    app.command(name, cls=Verb)(function)


def _indented(example: str, width: int) -> str:
    """An example; if it is too long for a line, with escaped line breaks before options."""
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
