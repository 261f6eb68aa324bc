"""Numbers of the pages about attribution graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.page_numbers import Number

TRACER, INTERVENTIONS = "docs/circuit-tracer.json", "docs/interventions.json"
_KINDS = ("transcoder", "skip", "clt")


def _case(name: str, column: str) -> Callable[[Any], Any]:
    def value(facts: Any) -> Any:
        (row,) = [row for row in facts["cases"] if row["name"] == name]
        found = row[column]
        return ("no", "yes")[found] if isinstance(found, bool) else found

    return value


GRAPH_NUMBERS: dict[str, Number] = {
    "tracer.version": Number(TRACER, lambda facts: facts["versions"]["circuit-tracer"]),
    "interventions.frozen": Number(
        INTERVENTIONS, lambda facts: max(row["frozen_error"] for row in facts["results"]), "{:.0e}"
    ),
    "tracer.skip.bos": Number(TRACER, _case("skip", "largest_difference_from_bos"), "{:.2f}"),
    **{
        f"tracer.{kind}.{name}": Number(TRACER, _case(kind, column), form)
        for kind in _KINDS
        for name, column, form in (
            ("nodes", "nodes", "{:,}"),
            ("edges", "edges", "{:,}"),
            ("largest", "largest_edge", "{:.2f}"),
            ("difference", "largest_difference", "{:.1e}"),
            ("pruned_nodes", "pruned_nodes", "{:,}"),
            ("pruned_edges", "pruned_edges", "{:,}"),
            ("equal", "pruned_equal", "{}"),
            ("rest", "rest_of_a_logit", "{:.1%}"),
        )
    },
}
"""The comparison with circuit-tracer, and interventions."""
