"""Compare our attribution graphs with circuit-tracer's, on random models that both read.

    python -m scripts.tracer_parity               # all cases
    python -m scripts.tracer_parity transcoder    # some cases
    python -m scripts.tracer_parity --keep        # writes docs/circuit-tracer.json and the files that tests read

The environment of circuit-tracer is made in ``build/`` if it is missing.
The results of a case lie in ``build/tracer-parity/NAME``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
from typing import Any

from gemma_scope_tl.files import write_atomically
from scripts.tracer_parity.case import CASES, Case, fingerprint
from scripts.tracer_parity.compare import compare, read_tracer
from scripts.tracer_parity.environment import ROOT, install, run
from scripts.tracer_parity.ours import our_graph

WORK = ROOT / "build" / "tracer-parity"
FACTS = ROOT / "docs" / "circuit-tracer.json"
COMMITTED = ROOT / "tests" / "parity" / "circuit_tracer"
LARGEST = 100_000  # bytes of all committed graphs


def main(arguments: list[str]) -> int:
    """Run the chosen cases, print the comparison, and keep it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--keep", action="store_true", help="write the committed files; needs all cases")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"there is no case {unknown[0]}; there are {', '.join(CASES)}")
    if options.keep and options.cases:
        parser.error("--keep needs all cases")
    install()
    found = [measure(CASES[name]) for name in options.cases or CASES]
    if options.keep:
        keep(found)
    return 0


def measure(case: Case) -> dict[str, Any]:
    """Run circuit-tracer on a case, and compare its graph with ours."""
    tracer = read_tracer(run(case, WORK / case.name), case.layers)
    compared = compare(our_graph(case, "hooked_transformer"), tracer, case.skips)
    shown = [
        f"{case.name}: {compared['nodes']} shared nodes; only ours {compared['only_ours']}",
        f"    {compared['edges']:,} edges, the largest {compared['largest_edge']:.2f}; largest difference "
        f"{compared['largest_difference']:.1e} at {compared['worst']}",
        f"    from the embedding of BOS {compared['largest_difference_from_bos']:.1e}; left out there: "
        f"{compared['rest_of_a_logit']:.1%} of a logit",
        f"    pruned: {compared['pruned_nodes']} nodes, {compared['pruned_edges']:,} edges; the same: "
        f"{compared['pruned_equal']}",
    ]
    print("\n".join(shown), flush=True)
    return {"name": case.name, "kind": case.kind, "weights": fingerprint(case), **tracer.facts, **compared}


def keep(found: list[dict[str, Any]]) -> None:
    """Write the numbers, and the graphs of the small cases."""
    facts = {"made_by": "python -m scripts.tracer_parity --keep", "versions": found[0]["versions"]}
    rows = [{key: value for key, value in row.items() if key not in ("versions", "worst")} for row in found]
    write_atomically(FACTS, json.dumps({**facts, "cases": rows}, indent=1) + "\n")
    COMMITTED.mkdir(parents=True, exist_ok=True)
    for name in (name for name in CASES if name.startswith("small")):
        shutil.copyfile(WORK / name / "graph.npz", COMMITTED / f"{name}.npz")
    viewed = (WORK / "small" / "graph" / "case.json").read_bytes()
    (COMMITTED / "small.json.gz").write_bytes(gzip.compress(viewed, mtime=0))
    size = sum(path.stat().st_size for path in COMMITTED.iterdir())
    if size > LARGEST:
        raise SystemExit(f"The committed graphs have {size:,} bytes, at most {LARGEST:,} are wanted.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
