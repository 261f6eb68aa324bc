"""Matches the rows of ``evaluate``'s table with the SAEs of a release."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.release.release_saes import ReleaseSAE

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "l0": "L0",
    "fvu": "FVU",
    "delta_loss": "delta loss",
    "loss_recovered": "loss recovered",
    "kl": "KL",
    "dead": "dead latents",
}
"""The columns that a card shows, in this order; a table may lack some."""
_NEEDED = ("site", "layer", "d_sae", "l0")
Row = dict[str, Any]
Key = tuple[str, int | None, int]


def match_metrics(saes: Sequence[ReleaseSAE], frame: pd.DataFrame | None) -> list[Row | None]:
    """The row of each SAE; None for SAEs that were not measured.

    Rows and SAEs are matched by site, layer and width. Several SAEs of the same are distinguished by release and id;
    the remaining ones, if all were measured, by their order in L0, which is the same on other text.

    Raises:
        GemmaScopeError: a column is missing, a row fits no SAE, or only some of several equal SAEs were measured.
    """
    found: list[Row | None] = [None] * len(saes)
    if frame is None:
        return found
    rows, places = _rows(frame), _places(saes)
    for key, here in rows.items():
        at = places.get(key, [])
        if len(here) != len(at):
            where = "site {}, layer {}, {} latents".format(*key)
            raise GemmaScopeError(f"The metrics have {len(here)} rows of {where}; the release has {len(at)} SAEs.")
        named, left = _by_name(saes, at, here)
        others = sorted((index for index in at if index not in named), key=lambda index: saes[index].l0)
        named |= dict(zip(others, sorted(left, key=lambda row: row["l0"]), strict=True))
        for index, row in named.items():
            found[index] = row
    return found


def with_l0(saes: Sequence[ReleaseSAE], frame: pd.DataFrame | None) -> list[ReleaseSAE]:
    """The SAEs, with the measured L0 in place of an unknown one (NaN).

    Raises:
        GemmaScopeError: an L0 was not measured, or the measurement may be that of another SAE.
    """
    found, rows, places = list(saes), {} if frame is None else _rows(frame), _places(saes)
    for index in [index for index, sae in enumerate(saes) if math.isnan(sae.l0)]:
        sae = saes[index]
        key = sae.site, sae.layer, sae.d_sae
        at, here = places[key], rows.get(key, [])
        left = _by_name(saes, at, here)[1]
        if len(left) != 1 or len(here) != len(at):
            where = f"The SAE at {sae.site}, layer {sae.layer}"
            why = "does not say its L0" if getattr(sae.sae, "as_loaded", True) else "was changed after it was loaded"
            raise GemmaScopeError(
                f"{where} {why}: give metrics=, the table of evaluate on it, or set sae.cfg.metadata.l0 to the "
                "measured one, which tells several such SAEs of one place apart."
            )
        found[index] = replace(sae, l0=float(left[0]["l0"]))
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


def _places(saes: Sequence[ReleaseSAE]) -> dict[Key, list[int]]:
    places: defaultdict[Key, list[int]] = defaultdict(list)
    for index, sae in enumerate(saes):
        places[sae.site, sae.layer, sae.d_sae].append(index)
    return places


def _by_name(saes: Sequence[ReleaseSAE], at: Sequence[int], here: Sequence[Row]) -> tuple[dict[int, Row], list[Row]]:
    """The rows that name an SAE's release and id, by the index of the SAE, and the remaining rows."""
    found: dict[int, Row] = {}
    left = list(here)
    for index in at:
        named = saes[index].named
        mine = [row for row in left if named is not None and (row.get("release"), row.get("id")) == named]
        if len(mine) == 1:
            found[index] = mine[0]
            left.remove(mine[0])
    return found, left


def _layer(value: Any) -> int | None:
    """The layer in a cell; None for None and for NaN, by which pandas replaces None in a column of floats."""
    return None if value is None or value != value else int(value)
