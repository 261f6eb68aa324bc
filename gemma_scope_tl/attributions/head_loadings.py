"""Head loadings: an edge divided into what each attention head carries, and what bypasses all heads.

An edge is the sum over all paths from the source to the target through the frozen pass: along the residual stream,
through skip connections, and through heads, possibly several one after the other. Every path is counted at the *last*
head that it passes. With ``z_lh(s)`` what arrives from source s at the output of head h of layer l along all paths, and
``d_lh`` the gradient of the target there along paths that pass no later head,

    loading_lh = sum_t d_lh[t] . z_lh(s)[t]
    weight     = bypass + sum_lh loading_lh

where ``bypass`` are the paths without any head. Both sides agree to rounding, since each path is counted once. A source
that is written to the heads' outputs, by an SAE at ``att``, lies behind the heads of its own layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_scope_tl.attributions.assembling import numbers
from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.attributions.carrying import added_by, carried
from gemma_scope_tl.attributions.making import prepared_again, readout_again
from gemma_scope_tl.attributions.placing import layer_stage
from gemma_scope_tl.attributions.tracing import direct_effects, targets_of
from gemma_scope_tl.errors import GemmaScopeError, unknown_name

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel

COLUMNS = ("source", "target", "layer", "head", "loading")


def head_loadings(
    model: GemmaModel, graph: AttributionGraph, coders: Any, edges: Iterable[tuple[str, str]]
) -> pd.DataFrame:
    """Divide edges of a graph among attention heads.

    Args:
        model, coders: those that the graph was made of.
        graph: from :func:`~gemma_scope_tl.attribution_graph`; its prompt is run again.
        edges: pairs of the node ids of a source and a target.

    Returns:
        For each edge a row with every head of the layers between, ``source, target, layer, head, loading``, and one row
        without layer and head for what bypasses all heads. The loadings of an edge add up to its weight.

    Raises:
        GemmaScopeError: for no edges.
        UnknownNameError: for a node that the pass does not have.
    """
    import pandas as pd

    pairs = [(str(source), str(target)) for source, target in edges]
    if not pairs:
        raise GemmaScopeError("No edges were given: give pairs of node ids, source and target.")
    ready = prepared_again(model, graph, coders)
    sources, known = ready.sources, numbers(ready.sources, ready.prompt)
    read = readout_again(ready, graph)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(False), torch.no_grad():
        for source in dict.fromkeys(source for source, _ in pairs):
            if source not in known:
                raise unknown_name("node", source, known)
            names = [target for one, target in pairs if one == source]
            targets = targets_of(sources, read, names, known)
            arriving = carried(sources, added_by(sources, known[source]))
            found: dict[int, Tensor] = {}

            def at_heads(layer: int, gradient: Tensor, arriving: Any = arriving, found: Any = found) -> None:
                here = arriving[layer_stage(layer) + 1][: gradient.shape[1]]
                apart = (gradient * here).unflatten(-1, (model.dims.n_heads, -1))
                found[layer] = apart.sum((1, 3))

            bypass = direct_effects(sources, targets, at_heads)[:, known[source]].tolist()
            for row, target in enumerate(names):
                edge = {"source": source, "target": target}
                rows.append(edge | {"loading": bypass[row]})
                for layer in sorted(found):
                    for head, loading in enumerate(found[layer][row].tolist()):
                        rows.append(edge | {"layer": layer, "head": head, "loading": loading})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"layer": "Int64", "head": "Int64"})
