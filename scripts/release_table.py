"""The table of released SAEs in docs/how-to/load.md, made from the registry."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.sites import LAYERED_SITES, SITES
from scripts.page_tables import table

KINDS = (*SITES, *LAYERED_SITES)
HEAD = ("model", "series", *KINDS, "SAEs", "unverified")
SERIES_LAST = {None: 0, "subset": 1, "all": 2}


def tables() -> dict[str, str]:
    """The table by its marker."""
    rows = [row for row in select_rows() if not row.repo.startswith(("bundled", "/"))]
    rows.sort(key=_key)
    groups = (list(group) for _, group in groupby(rows, key=_key))
    return {"releases": table(HEAD, [_line(group) for group in groups])}


def _key(row: SAERow) -> tuple[str, int, str, int]:
    """Families, sizes, base and tuned models, and series."""
    family, model = row.model_family, row.model
    base = family.base_name(model)
    return family.name, list(family.sizes).index(base), model, SERIES_LAST[row.series]


def _line(rows: list[SAERow]) -> list[str]:
    """The number of SAEs at each site, with the number of layers, and of coders of several layers."""
    cells = [_cell(row for row in rows if row.site == site) for site in KINDS]
    marked = sum(row.unverified for row in rows)
    return [rows[0].model, rows[0].series or "", *cells, f"{len(rows):,}", f"{marked:,}" if marked else ""]


def _cell(rows: Iterable[SAERow]) -> str:
    found = list(rows)
    layers = len({row.layer for row in found})
    one = layers == 1 and found[0].layer is None
    return "" if not found else str(len(found)) if one else f"{len(found)} in {layers} layers"
