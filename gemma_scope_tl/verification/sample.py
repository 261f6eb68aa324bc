"""A seeded sample of registry rows that is spread over sites, layers, widths and L0s."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry.listing import of_one_layer, select_rows
from gemma_scope_tl.registry.schema import SAERow

GIB = 1 << 30
CANDIDATES = 24
"""Rows among which the farthest from those chosen so far is taken. All rows would make the seed matter little."""
PARTNER_EVERY = 3
BFLOAT16_EVERY = 4


@dataclass(frozen=True)
class Chosen:
    """A row of the sample.

    Attributes:
        row: the registry row.
        bfloat16: whether the SAE is measured in bfloat16 too.
    """

    row: SAERow
    bfloat16: bool = False


def float32_bytes(row: SAERow) -> int:
    """The size of the SAE's arrays in float32, which is that of an uncompressed file."""
    d_out = row.d_out or row.d_in
    return 4 * (row.d_sae * (row.d_in + d_out + 2) + d_out)


def candidates(
    model: str,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    widths: Sequence[str | int] | None = None,
    releases: Sequence[str] | None = None,
    largest: float = 4.0,
) -> tuple[list[SAERow], int]:
    """The rows that may be sampled, and the number left out because a file would be larger than ``largest`` GiB.

    Raises:
        GemmaScopeError: no row fits.
    """
    selected = select_rows(model, sites or None, layers or None, widths or None, releases or None)
    found = of_one_layer(selected, "The verification")
    small = [row for row in found if float32_bytes(row) <= largest * GIB]
    if not small:
        larger = f" {len(found)} do, but all are larger than {largest:g} GiB." if found else ""
        raise GemmaScopeError(f"No SAE of {model} fits all conditions.{larger} `gemma-scope list` shows what exists.")
    return small, len(found) - len(small)


def draw(rows: Sequence[SAERow], number: int, seed: int = 0) -> list[Chosen]:
    """A sample of ``number`` rows, the same for the same rows, number and seed.

    The sites take turns. In its turn a site takes, among :data:`CANDIDATES` rows drawn at random, the one farthest from
    those it has: layer, width and L0 count alike, each by its rank. Every third one of a site is the partner of the one
    before it: the same place and width with the L0 farthest from it, so that SAEs can be compared of which nothing but
    the sparsity differs. Every fourth of the sample is measured in bfloat16 too.

    Raises:
        GemmaScopeError: the number is not positive.
    """
    number = checked_count(number, "sample")
    drawn = random.Random(seed)
    by_site: dict[str, list[SAERow]] = {}
    for row in rows:
        by_site.setdefault(row.site, []).append(row)
    taken: dict[str, list[SAERow]] = {site: [] for site in by_site}
    positions = {site: _positions(here) for site, here in by_site.items()}
    chosen: list[SAERow] = []
    while len(chosen) < min(number, len(rows)):
        for site, here in by_site.items():
            left = [row for row in here if row not in taken[site]]
            if left and len(chosen) < number:
                row = _next(left, taken[site], positions[site], drawn)
                taken[site].append(row)
                chosen.append(row)
    return [Chosen(row, index % BFLOAT16_EVERY == 1) for index, row in enumerate(chosen)]


def _next(
    left: list[SAERow], taken: list[SAERow], positions: dict[str, tuple[float, float, float]], drawn: random.Random
) -> SAERow:
    if len(taken) % PARTNER_EVERY == 1:
        last = taken[-1]
        partners = [row for row in left if (row.layer, row.width) == (last.layer, last.width) and row.l0 and last.l0]
        if partners:
            return max(partners, key=lambda row: (abs((row.l0 or 0) - (last.l0 or 0)), row.id))
    some = drawn.sample(left, min(CANDIDATES, len(left)))
    if not taken:
        return some[0]

    def nearest(row: SAERow) -> float:
        here = positions[row.id]
        return min(sum((a - b) ** 2 for a, b in zip(here, positions[one.id], strict=True)) for one in taken)

    return max(some, key=nearest)


def _positions(rows: Iterable[SAERow]) -> dict[str, tuple[float, float, float]]:
    """Layer, width and L0 of each row as ranks between 0 and 1."""
    listed = list(rows)
    layers = _ranks(row.layer or 0 for row in listed)
    widths = _ranks(row.d_sae for row in listed)
    l0s = _ranks(row.l0 or 0.0 for row in listed)
    return {row.id: (layers[row.layer or 0], widths[row.d_sae], l0s[row.l0 or 0.0]) for row in listed}


def _ranks(values: Iterable[float]) -> dict[float, float]:
    known = sorted(set(values))
    return {value: index / max(len(known) - 1, 1) for index, value in enumerate(known)}
