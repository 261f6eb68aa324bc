"""``gemma-scope``: list and show SAEs, see features, steer text, attribute, evaluate, train, check files, demo."""

from __future__ import annotations

import json
import sys

import typer
from rich.markup import escape
from rich.table import Table

from gemma_scope_tl.cli import catalogue, demo, evals, interp, models, publish, studies, train
from gemma_scope_tl.cli.output import Json, console, progress
from gemma_scope_tl.cli.registry import registry_app
from gemma_scope_tl.errors import GemmaScopeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Gemma Scope in TransformerLens and SAELens. Everything works offline with the bundled model.",
)
app.command("list")(catalogue.list_command)
app.command()(catalogue.show)
app.command()(models.features)
app.command()(models.steer)
app.command("top-tokens")(models.top_tokens_command)
app.command()(models.attribute)
app.command("eval")(evals.eval_command)
app.command("explain")(interp.explain_command)
app.command("neuronpedia")(interp.neuronpedia_command)
app.command()(train.train)
app.command()(demo.demo)
app.command()(publish.export)
app.command()(publish.upload)
app.add_typer(studies.studies_app, name="study")
app.add_typer(registry_app, name="registry")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check the installation, and say what to do: versions and known defects, devices, the Hub, disk, registry, and the
    bundled model against plain Hugging Face.

    Example:

        gemma-scope doctor
    """
    from dataclasses import asdict

    from gemma_scope_tl.diagnose import diagnose

    with progress.status("checking"):
        found = diagnose()
    if as_json:
        typer.echo(json.dumps({**found.facts, "advice": [asdict(one) for one in found.advice]}, indent=2))
    else:
        table = Table(show_header=False, box=None)
        for name, value in found.facts.items():
            table.add_row(f"[bold]{name}[/]", escape(value))
        console.print(table)
        for one in found.advice:
            mark = "[red]problem:[/]" if one.serious else "[yellow]note:[/]"
            console.print(f"{mark} {escape(one.what)}\n  do: {escape(one.do)}")
        console.print("[green]all checks passed[/]" if found.healthy else "[red]a check failed[/]")
    if not found.healthy:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: the package's own errors become one line on stderr and exit status 1."""
    try:
        app()
    except GemmaScopeError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
