"""Read a graph's JSON as circuit-tracer's viewer does. Runs in the environment of circuit-tracer alone.

    build/circuit-tracer-venv/bin/python scripts/tracer_parity/viewer.py GRAPH.json

Prints how many nodes of each type and how many links its own classes read, and which of its rules the file breaks.
"""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from circuit_tracer.frontend.graph_models import Model


def main(path: Path) -> int:
    """Read the file, and print what was read as JSON."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = Model(**data)
    ids = {node.node_id for node in model.nodes}
    links = [(link["source"], link["target"]) for link in model.links]
    broken = [f"a link of an unknown node: {link}" for link in links if not set(link) <= ids]
    if len(ids) < len(model.nodes):
        broken.append("node ids are not unique")
    places = len(model.metadata.prompt_tokens)
    broken += [f"{node.node_id} is at no token" for node in model.nodes if not 0 <= node.ctx_idx < places]
    members = [one for group in model.qParams.supernodes for one in group[1:]]
    broken += [f"{one} in a supernode is no node" for one in members if one not in ids]
    kinds = Counter(node.feature_type for node in model.nodes)
    print(json.dumps({"nodes": kinds, "links": len(model.links), "broken": broken}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
