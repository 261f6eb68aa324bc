"""Commands about the registry that load nothing: list and show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_scope_tl.cli import options
from gemma_scope_tl.cli.output import print_facts, print_rows
from gemma_scope_tl.sites import layers_text

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow


def list_command(
    pattern: Annotated[str | None, typer.Argument(help="Glob over release/id or id.")] = None,
    model: Annotated[str | None, typer.Option(help="gemma-2-2b, bundled, …")] = None,
    site: options.ListedSite = None,
    layer: options.OneLayer = None,
    width: options.OneWidth = None,
    release: options.OneRelease = None,
    label: options.Label = None,
    affine: options.Affine = None,
    sae_seed: options.SaeSeed = None,
    series: options.OneSeries = None,
    summary: Annotated[bool, typer.Option("--summary", help="Count SAEs per model, site and width.")] = False,
    as_json: options.Json = False,
) -> None:
    """List released SAEs.

    Examples:

        gemma-scope list --summary

        gemma-scope list '*layer_20/width_16k*' --model gemma-2-2b

        gemma-scope list --site att --layer 12 --json

        gemma-scope list --model gemma-3-1b --label medium

        gemma-scope list --site clt
    """
    from gemma_scope_tl.registry.listing import COLUMNS, select_rows
    from gemma_scope_tl.weights.seen import unverified_among

    conditions: dict[str, Any] = {"label": label or None, "affine": affine, "seed": sae_seed, "series": series}
    found = select_rows(model, site, layer, width, release, pattern, **conditions)
    shown = ("release", "id", "model", "site", "layer", "width", "l0", "canonical")
    columns = tuple(COLUMNS) if as_json else shown
    unverified = unverified_among(found)
    if unverified and not as_json:
        columns = (*columns, "unverified")
    rows = _summary(found, unverified) if summary else [_row(row, columns, unverified) for row in found]
    note = f", {len(unverified)} of them unverified" if unverified else ""
    print_rows(rows, f"{len(found):,} SAEs{note}", as_json)


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
    from gemma_scope_tl.sites import BACKENDS
    from gemma_scope_tl.weights.seen import is_unverified

    row = resolve(release, sae_id)
    site = row.model_family.site(row.base_site)
    facts: dict[str, Any] = row.model_dump(mode="json") | {"unverified": is_unverified(row)}
    for backend in BACKENDS:
        places = row.layers or (row.layer,)
        hooks = {"": [site.hook_name(layer, backend) for layer in places]}
        if site.is_transcoder:
            hooks["_out"] = [site.hook_name_out(layer, backend) for layer in places]
        for end, names in hooks.items():
            facts[f"hook_{backend}{end}"] = names[0] if row.layers is None else names
    if row.layers is not None:
        facts["files"] = list(row.weights_paths)
    facts["load"] = f'gemma_scope_tl.JumpReLUSAE.from_pretrained("{row.release}", "{row.id}")'
    if not as_json:
        facts = {name: _lines(value) for name, value in facts.items()}
    print_facts(facts, as_json)


def _lines(value: Any) -> Any:
    """A list as text: layers in short, and a line for each name."""
    if not isinstance(value, list):
        return value
    items: list[Any] = value
    return layers_text(items) if all(isinstance(one, int) for one in items) else "\n".join(items)


def _row(row: SAERow, columns: Sequence[str], unverified: set[tuple[str, str]]) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in columns}
    if row.layers is not None and "layers" not in columns:
        values["layer"] = layers_text(row.layers)
    return values | ({"unverified": (row.release, row.id) in unverified} if "unverified" in values else {})


def _summary(found: list[SAERow], unverified: set[tuple[str, str]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, int], list[SAERow]] = {}
    for row in found:
        groups.setdefault((row.model, row.site, row.d_sae), []).append(row)
    counted: list[dict[str, Any]] = []
    for (model, site, _), rows in sorted(groups.items()):
        l0s = [row.l0 for row in rows if row.l0 is not None]
        layers = {layer for row in rows for layer in row.layers or (row.layer,) if layer is not None}
        counts = {"SAEs": len(rows), "layers": len(layers)}
        bounds = {"l0_min": min(l0s, default=None), "l0_max": max(l0s, default=None)}
        marked = sum((row.release, row.id) in unverified for row in rows)
        extra = {"unverified": marked} if unverified else {}
        counted.append({"model": model, "site": site, "width": rows[0].width, **counts, **bounds, **extra})
    return counted
