"""Which row of ``evaluate``'s table belongs to which SAE of a release."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.release.release_saes import Item

COLUMNS = {
    "l0": "L0",
    "fvu": "FVU",
    "delta_loss": "delta loss",
    "loss_recovered": "loss recovered",
    "kl": "KL",
    "dead": "dead latents",
}
"""The columns that a card shows, in this order, as far as the table has them."""
_NEEDED = ("site", "layer", "d_sae", "l0")
Row = dict[str, Any]
Key = tuple[str, int | None, int]


def match_metrics(items: Sequence[Item], frame: pd.DataFrame | None) -> list[Row | None]:
    """The measurements of each item, None for those that were not measured.

    A row belongs to the SAEs of its site, layer and width. Several there are told apart by release and id, and the
    others by their order in L0, which a measurement on other text keeps, and only where each was measured.

    Raises:
        GemmaScopeError: a column is missing, a row fits no SAE, or some of several SAEs were not measured.
    """
    found: list[Row | None] = [None] * len(items)
    if frame is None:
        return found
    rows, places = _rows(frame), _places(items)
    for key, here in rows.items():
        at = places.get(key, [])
        if len(here) != len(at):
            where = "site {}, layer {}, {} latents".format(*key)
            raise GemmaScopeError(f"The metrics have {len(here)} rows of {where}; the release has {len(at)} SAEs.")
        named, left = _by_name(items, at, here)
        others = sorted((index for index in at if index not in named), key=lambda index: items[index].l0)
        named |= dict(zip(others, sorted(left, key=lambda row: row["l0"]), strict=True))
        for index, row in named.items():
            found[index] = row
    return found


def with_l0(items: Sequence[Item], frame: pd.DataFrame | None) -> list[Item]:
    """The items, those whose L0 is not known (NaN) with the measured one.

    Raises:
        GemmaScopeError: it was not measured, or the measurement could be another SAE's too.
    """
    found, rows, places = list(items), {} if frame is None else _rows(frame), _places(items)
    for index in [index for index, item in enumerate(items) if math.isnan(item.l0)]:
        item = items[index]
        key = item.site, item.layer, item.d_sae
        at, here = places[key], rows.get(key, [])
        left = _by_name(items, at, here)[1]
        if len(left) != 1 or len(here) != len(at):
            where = f"The SAE at {item.site}, layer {item.layer}"
            why = "does not say its L0" if getattr(item.sae, "as_loaded", True) else "was changed after it was loaded"
            raise GemmaScopeError(
                f"{where} {why}: give metrics=, the table of evaluate on it, or set sae.cfg.metadata.l0 to the "
                "measured one, which tells several such SAEs of one place apart."
            )
        found[index] = replace(item, l0=float(left[0]["l0"]))
    return found


def _rows(frame: pd.DataFrame) -> dict[Key, list[Row]]:
    missing = [name for name in _NEEDED if name not in frame.columns]
    if missing:
        raise GemmaScopeError(f"The metrics lack {', '.join(missing)}: give the DataFrame that evaluate returned.")
    rows: defaultdict[Key, list[Row]] = defaultdict(list)
    for record in frame.to_dict("records"):
        row: Row = {str(name): value for name, value in record.items()}
        rows[str(row["site"]), _layer(row["layer"]), int(row["d_sae"])].append(row)
    return rows


def _places(items: Sequence[Item]) -> dict[Key, list[int]]:
    places: defaultdict[Key, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        places[item.site, item.layer, item.d_sae].append(index)
    return places


def _by_name(items: Sequence[Item], at: Sequence[int], here: Sequence[Row]) -> tuple[dict[int, Row], list[Row]]:
    """The rows with release and id of an item, by its index, and the rows that are left."""
    found: dict[int, Row] = {}
    left = list(here)
    for index in at:
        named = items[index].named
        mine = [row for row in left if named is not None and (row.get("release"), row.get("id")) == named]
        if len(mine) == 1:
            found[index] = mine[0]
            left.remove(mine[0])
    return found, left


def _layer(value: Any) -> int | None:
    """A cell of the column: None and, where pandas made the column one of floats, NaN are no layer."""
    return None if value is None or value != value else int(value)
