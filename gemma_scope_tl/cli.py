"""``gemma-scope``: list and show SAEs, see features, steer text, check the installation."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gemma_scope_tl.cli_registry import registry_app
from gemma_scope_tl.errors import GemmaScopeError

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.registry.schema import SAERow

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Gemma Scope in TransformerLens and SAELens. Everything works offline with the bundled model.",
)
app.add_typer(registry_app, name="registry")
console = Console()
_FRAMED_ROWS = 100
progress = Console(stderr=True)  # standard output holds nothing but the answer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
ModelName = Annotated[str, typer.Option(help="bundled, gemma-2-2b, gemma-2-9b-it, a Hugging Face id or a folder.")]
SaeModel = Annotated[str | None, typer.Option(help="The registry's model; by default that of --model.")]
Backend = Annotated[str, typer.Option(help="bridge or hooked_transformer.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; by default CUDA where there is one.")]
SiteOption = Annotated[str, typer.Option(help="res, mlp, att, embedding or transcoder.")]
LayerOption = Annotated[int, typer.Option(help="Layer, from 0.")]
WidthOption = Annotated[str | None, typer.Option(help="16k, 65k, …; by default the narrowest.")]
L0Option = Annotated[str, typer.Option(help="canonical, a number that exists, or closest:50.")]


@app.command("list")
def list_command(
    pattern: Annotated[str | None, typer.Argument(help="Glob over release/id or id.")] = None,
    model: Annotated[str | None, typer.Option(help="gemma-2-2b, bundled, …")] = None,
    site: Annotated[str | None, typer.Option(help="res, mlp, att, embedding or transcoder.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer, from 0.")] = None,
    width: Annotated[str | None, typer.Option(help="16k, 65k, 1m, …")] = None,
    release: Annotated[str | None, typer.Option(help="Release, such as gemma-scope-2b-pt-res.")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Count SAEs per model, site and width.")] = False,
    as_json: Json = False,
) -> None:
    """List released SAEs.

    Examples:

        gemma-scope list --summary

        gemma-scope list '*layer_20/width_16k*' --model gemma-2-2b

        gemma-scope list --site att --layer 12 --json
    """
    from gemma_scope_tl.registry.listing import COLUMNS, select_rows

    found = select_rows(model=model, site=site, layer=layer, width=width, release=release, pattern=pattern)
    shown = ("release", "id", "model", "site", "layer", "width", "l0", "canonical")
    columns = tuple(COLUMNS) if as_json else shown
    rows = _summary(found) if summary else [{name: getattr(row, name) for name in columns} for row in found]
    _print_rows(rows, f"{len(found):,} SAEs", as_json)


@app.command()
def show(release: str, sae_id: str, as_json: Json = False) -> None:
    """Show one SAE: where it lives, where its file is, how to load it. Nothing is downloaded.

    Examples:

        gemma-scope show gemma-scope-2b-pt-res layer_20/width_16k/canonical

        gemma-scope show bundled-res layer_2/width_1k/canonical --json
    """
    from gemma_scope_tl.registry import resolve
    from gemma_scope_tl.sites import BACKENDS, get_site

    row = resolve(release, sae_id)
    site = get_site(row.site)
    facts: dict[str, Any] = row.model_dump()
    for backend in BACKENDS:
        facts[f"hook_{backend}"] = site.hook_name(row.layer, backend)
        if site.is_transcoder:
            facts[f"hook_{backend}_out"] = site.hook_name_out(row.layer, backend)
    facts["load"] = f'gemma_scope_tl.JumpReLUSAE.from_pretrained("{row.release}", "{row.id}")'
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/]", "-" if value is None else str(value), style=None)
    console.print(table)


@app.command()
def features(
    text: str,
    model: ModelName = "bundled",
    sae_model: SaeModel = None,
    site: SiteOption = "res",
    layer: LayerOption = 2,
    width: WidthOption = None,
    l0: L0Option = "canonical",
    top: Annotated[int, typer.Option(min=1, help="Strongest latents per token.")] = 5,
    backend: Backend = "bridge",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show which latents fire on which token.

    Examples:

        gemma-scope features "In the beginning God created the heaven and the earth."

        gemma-scope features "The Golden Gate Bridge" --model gemma-2-2b --layer 20 --width 16k --json
    """
    from gemma_scope_tl.feature_table import features as feature_table

    loaded, sae = _load(model, sae_model, site, layer, width, l0, backend, device)
    table = feature_table(loaded, text, sae, top=top)
    if as_json:
        _print_frame(table, "", True)
        return
    shown = Table("position", "token", "latent: activation")
    for position, rows in table.groupby("position", sort=True):
        latents = "  ".join(f"[bold]{row.latent}[/]: {row.activation:.2f}" for row in rows.itertuples())
        shown.add_row(str(position), repr(rows["token"].iloc[0]), latents)
    console.print(shown)


@app.command()
def steer(
    text: str,
    latent: Annotated[int, typer.Option(help="Index of the latent.")],
    scale: Annotated[float, typer.Option(help="Length added along the decoder row, in activation units.")],
    model: ModelName = "bundled",
    sae_model: SaeModel = None,
    site: SiteOption = "res",
    layer: LayerOption = 2,
    width: WidthOption = None,
    l0: L0Option = "canonical",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    backend: Backend = "bridge",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Continue a text with and without steering a latent.

    Examples:

        gemma-scope steer "The king" --latent 12 --scale 8

        gemma-scope steer "I went to" --model gemma-2-2b --layer 20 --latent 3124 --scale 154 --temperature 0.8
    """
    from gemma_scope_tl import interventions

    loaded, sae = _load(model, sae_model, site, layer, width, l0, backend, device)
    hook = interventions.steer(sae, latent, scale)
    plain = _continue(loaded, text, tokens, temperature, seed)
    with loaded.hooks([hook]):
        steered = _continue(loaded, text, tokens, temperature, seed)
    if as_json:
        typer.echo(json.dumps({"text": text, "plain": plain, "steered": steered, "latent": latent, "scale": scale}))
        return
    shown = Table("plain", f"latent {latent}, scale {scale:g}", show_lines=True)
    shown.add_row(plain, steered)
    console.print(shown)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check the installation: versions, devices, registry, and the bundled model against plain Hugging Face.

    Example:

        gemma-scope doctor
    """
    from gemma_scope_tl.diagnose import diagnose

    with progress.status("checking"):
        facts, healthy = diagnose()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        table = Table(show_header=False, box=None)
        for name, value in facts.items():
            table.add_row(f"[bold]{name}[/]", str(value))
        console.print(table)
        console.print("[green]all checks passed[/]" if healthy else "[red]a check failed[/]")
    if not healthy:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: the package's own errors become one line on stderr and exit status 1."""
    try:
        app()
    except GemmaScopeError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)


def _load(
    model: str,
    sae_model: str | None,
    site: str,
    layer: int,
    width: str | None,
    l0: str,
    backend: str,
    device: str | None,
) -> tuple[Any, Any]:
    from gemma_scope_tl.registry.listing import select_rows

    registry_model = sae_model or model.split("/")[-1]
    number = None if site == "embedding" else layer
    if width is None:
        rows = select_rows(model=registry_model, site=site, layer=number)
        width = min(rows, key=lambda row: row.d_sae).width if rows else "16k"
    chosen: Any = float(l0) if l0.replace(".", "", 1).isdigit() else l0
    from gemma_scope_tl.adapters.loading import load_model
    from gemma_scope_tl.sae.jumprelu import load_sae

    with progress.status("loading"):
        sae = load_sae(registry_model, site, number, width, chosen)
        loaded = load_model(model, backend=backend, device=device)
        return loaded, sae.to(loaded.cfg.device)


def _continue(model: Any, text: str, tokens: int, temperature: float, seed: int) -> str:
    import torch

    torch.manual_seed(seed)
    prompt = model.to_tokens(text)
    sampled = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(prompt, max_new_tokens=tokens, return_type="tokens", **sampled)
    return model.tokenizer.decode(out[0, 1:])


def _summary(found: list[SAERow]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, int], list[SAERow]] = {}
    for row in found:
        groups.setdefault((row.model, row.site, row.d_sae), []).append(row)
    counted: list[dict[str, Any]] = []
    for (model, site, _), rows in sorted(groups.items()):
        l0s = [row.l0 for row in rows if row.l0 is not None]
        counts = {"SAEs": len(rows), "layers": len({row.layer for row in rows if row.layer is not None})}
        bounds = {"l0_min": min(l0s, default=None), "l0_max": max(l0s, default=None)}
        counted.append({"model": model, "site": site, "width": rows[0].width, **counts, **bounds})
    return counted


def _print_frame(frame: pd.DataFrame, title: str, as_json: bool) -> None:
    if as_json:
        typer.echo(frame.to_json(orient="records", indent=2))
    else:
        _print_rows(frame.to_dict("records"), title, as_json)  # pyright: ignore[reportArgumentType]


def _print_rows(rows: list[dict[str, Any]], title: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    cells = [list(rows[0]) if rows else [], *([_cell(value) for value in row.values()] for row in rows)]
    if not console.is_terminal or len(rows) > _FRAMED_ROWS:  # whole lines for pipes; frames of long tables take seconds
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        typer.echo("\n".join([*lines, title]))
        return
    table = Table(*cells[0], title=title)
    for line in cells[1:]:
        table.add_row(*line)
    console.print(table)


def _cell(value: Any) -> str:
    if value is True:
        return "✓"
    if value is False or value is None or str(value) in ("<NA>", "nan"):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)
