"""Which row of ``evaluate``'s table belongs to which SAE of a release."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.release.items import Item

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
"""The columns that a card shows, in this order, as far as the table has them."""
_NEEDED = ("site", "layer", "d_sae", "l0")
Row = dict[str, Any]
Key = tuple[str, int | None, int]


def match_metrics(items: Sequence[Item], frame: pd.DataFrame | None) -> list[Row | None]:
    """The measurements of each item, None for those that were not measured.

    A row belongs to the SAEs of its site, layer and width. Several there are told apart by their order in L0, which a
    measurement on other text keeps, and only where each was measured.

    Raises:
        GemmaScopeError: a column is missing, a row fits no SAE, or some of several SAEs were not measured.
    """
    if frame is None:
        return [None] * len(items)
    missing = [name for name in _NEEDED if name not in frame.columns]
    if missing:
        raise GemmaScopeError(f"The metrics lack {', '.join(missing)}: give the DataFrame that evaluate returned.")
    rows: defaultdict[Key, list[Row]] = defaultdict(list)
    for record in frame.to_dict("records"):
        row: Row = {str(name): value for name, value in record.items()}
        rows[str(row["site"]), _layer(row["layer"]), int(row["d_sae"])].append(row)
    places: defaultdict[Key, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        places[item.site, item.layer, item.d_sae].append(index)
    found: list[Row | None] = [None] * len(items)
    for key, here in rows.items():
        where = "site {}, layer {}, {} latents".format(*key)
        at = sorted(places[key], key=lambda index: items[index].l0)
        if len(here) != len(at):
            raise GemmaScopeError(f"The metrics have {len(here)} rows of {where}; the release has {len(at)} SAEs.")
        for index, row in zip(at, sorted(here, key=lambda row: row["l0"]), strict=True):
            found[index] = row
    return found


def _layer(value: Any) -> int | None:
    """A cell of the column: None and, where pandas made the column one of floats, NaN are no layer."""
    return None if value is None or value != value else int(value)
