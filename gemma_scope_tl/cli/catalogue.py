"""Commands about the registry that load nothing: list and show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_scope_tl.cli import options
from gemma_scope_tl.cli.output import print_facts, print_rows

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow


def list_command(
    pattern: Annotated[str | None, typer.Argument(help="Glob over release/id or id.")] = None,
    model: Annotated[str | None, typer.Option(help="gemma-2-2b, bundled, …")] = None,
    site: options.OneSite = None,
    layer: options.OneLayer = None,
    width: options.OneWidth = None,
    release: options.OneRelease = None,
    summary: Annotated[bool, typer.Option("--summary", help="Count SAEs per model, site and width.")] = False,
    as_json: options.Json = False,
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
    print_rows(rows, f"{len(found):,} SAEs", as_json)


def show(
    release: Annotated[str, typer.Argument(help="Such as gemma-scope-2b-pt-res.")],
    sae_id: Annotated[str, typer.Argument(help="Such as layer_20/width_16k/canonical.")],
    as_json: options.Json = False,
) -> None:
    """Show one SAE: its place in the model, its file, and how to load it. Nothing is downloaded.

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
    print_facts(facts, as_json)


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
