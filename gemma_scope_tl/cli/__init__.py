"""The command line ``gemma-scope``: list and inspect SAEs, steer, attribute, evaluate, train, check files, demo."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from gemma_scope_tl.cli import catalogue, evals, graphs, interp, models, publish, studies, tools, train, verify
from gemma_scope_tl.cli.command import Root, add
from gemma_scope_tl.cli.failures import run
from gemma_scope_tl.cli.output import say
from gemma_scope_tl.cli.registry import registry_app

app = typer.Typer(
    cls=Root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Gemma Scope in TransformerLens and SAELens. Everything works offline with the bundled model.",
)
add(app, catalogue.list_command, "list")
add(app, catalogue.show)
add(app, models.Features, "features")
add(app, models.Steer, "steer")
add(app, models.TopTokens, "top-tokens")
add(app, models.Attribute, "attribute")
add(app, graphs.Graph, "graph")
add(app, evals.Evaluate, "eval")
add(app, interp.Explain, "explain")
add(app, interp.Neuronpedia, "neuronpedia")
add(app, train.train)
add(app, tools.demo)
add(app, publish.export)
add(app, publish.upload)
add(app, tools.doctor)
add(app, verify.Verify, "verify")
app.add_typer(studies.studies_app, name="study")
app.add_typer(registry_app, name="registry")


def _show_version(wanted: bool) -> None:
    if wanted:
        from gemma_scope_tl import __version__

        say(f"gemma-scope-tl {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="GEMMA_SCOPE_TL_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Options of all verbs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Errors become a line on standard error and an exit status.

    Args:
        arguments: command-line arguments; by default those of this process.
    """
    sys.exit(run(app, arguments))
