"""Nodes of an attribution graph as the records of graph files, and back.

circuit-tracer's viewer and Neuronpedia know four types of nodes: transcoder latents, transcoder errors, embeddings and
logits. They draw other types too, but compute their scores from these four alone. So latents of every coder get the
type of a transcoder's latents, errors of every coder the type of a transcoder's errors, and biases a type of their own.

A ``feature`` number is ``pair(layer, index)``, with Cantor's pairing ``pair(x, y) = (x + y)(x + y + 1)/2 + y``. The
viewers tell latents of a layer apart by it. ``index`` is the latent, plus ``10**7`` for each site of the graph that
comes before the coder's: a transcoder's latents keep their own numbers, under which viewers find their dashboards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_scope_tl.errors import GemmaScopeError, brief

if TYPE_CHECKING:
    import pandas as pd

LATENT, ERROR, EMBEDDING, LOGIT, BIAS = (
    "cross layer transcoder",
    "mlp reconstruction error",
    "embedding",
    "logit",
    "bias",
)
"""The types of nodes in graph files."""
_FIRST = ("transcoder", "clt", "crosscoder", "mlp", "att", "res")
_STRIDE = 10**7  # more than the latents of any layer


def pair(layer: int, index: int) -> int:
    """Cantor's pairing of two numbers from 0."""
    return (layer + index) * (layer + index + 1) // 2 + index


def unpair(number: int) -> tuple[int, int]:
    """The two numbers whose :func:`pair` is ``number``.

    >>> unpair(pair(25, 16383))
    (25, 16383)
    """
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return diagonal - index, index


def cumulative_influence(influence: np.ndarray) -> list[float | None]:
    """For each node the share of all influence that it and all more influential nodes have; None for NaN.

    Viewers show the nodes whose share is at most a threshold.
    """
    known = np.flatnonzero(np.isfinite(influence))
    order = known[np.argsort(-influence[known], kind="stable")]
    shares = np.cumsum(influence[order]) / max(float(influence[order].sum()), 1e-300)
    found: list[float | None] = [None] * len(influence)
    for row, share in zip(order.tolist(), shares.tolist(), strict=True):
        found[row] = min(share, 1.0)
    return found


def plain_values(column: pd.Series) -> list[Any]:
    """The values of a column as Python's own, None where they are missing or NaN."""
    return column.astype(object).where(column.notna(), None).tolist()


def node_records(nodes: pd.DataFrame, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """A record for each node, in the order of the table."""
    layers = nodes["layer"].dropna()
    top = int(layers.max()) + 1 if len(layers) else 0
    sites = _order_of_sites(nodes)
    shares = cumulative_influence(nodes["influence"].to_numpy(dtype=float))
    likeliest = nodes.loc[nodes["kind"] == "logit", "probability"]
    target = str(nodes.at[likeliest.fillna(-1.0).idxmax(), "node_id"]) if len(likeliest) else ""
    records: list[dict[str, Any]] = []
    columns = {str(name): plain_values(nodes[name]) for name in nodes}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row, share in zip(rows, shares, strict=True):
        record = _record(row, tokens, sites, top) | {"is_target_logit": row["node_id"] == target, "influence": share}
        records.append(record)
    return records


def _order_of_sites(nodes: pd.DataFrame) -> dict[str, int]:
    found = [str(site) for site in nodes["site"].dropna().unique()]
    return {site: n for n, site in enumerate(sorted(found, key=lambda s: (s not in _FIRST, *_rank(s))))}


def _rank(site: str) -> tuple[int, str]:
    return (_FIRST.index(site) if site in _FIRST else 0, site)


def _record(row: Mapping[Any, Any], tokens: Sequence[str], sites: Mapping[str, int], top: int) -> dict[str, Any]:
    position = row["position"] or 0  # biases are sums over positions
    layer, token, label = row["layer"], row["token_id"], row["label"] or ""
    number = sites.get(row["site"], 0)
    written = "E" if layer is None else str(layer)
    match row["kind"]:
        case "latent":
            kind, feature = LATENT, pair(layer or 0, number * _STRIDE + (row["latent"] or 0))
        case "error":
            kind, feature = ERROR, -1 - number
            label = label or f'Err: {row["site"]} "{tokens[position]}"'
        case "bias":
            kind, feature = BIAS, -1001 - number
            label = label or f"Bias: {row['site']}"
        case "embedding":
            kind, feature, written = EMBEDDING, position, "E"
            label = f'Emb: "{tokens[position]}"'
        case _:
            kind, feature, written = LOGIT, token or 0, str(top)
            label = _logit_label(label, row["probability"])
    return {
        "node_id": row["node_id"],
        "feature": feature,
        "layer": written,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": row["probability"] or 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{row['node_id']}-0",
        "clerp": label,
        "influence": None,
        "activation": row["activation"],
    }


def _logit_label(token: str, probability: float | None) -> str:
    """The viewers read the probability out of this text, and fail where a logit has another."""
    return token if "(p=" in token else f'Output "{token}" (p={probability or 0.0:.3f})'


def as_read(record: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the fields that another program's file had; a latent's label that was changed since stays."""
    joined = {**record, **held}
    if record["feature_type"] == LATENT and record["clerp"] != (held.get("clerp") or ""):
        joined["clerp"] = record["clerp"]
    return joined


def row_of(record: Mapping[str, Any], schema: int) -> dict[str, Any]:
    """The row of ``nodes`` for a record that another program wrote, apart from its influence.

    Sites and coders are not in such files: ``site`` is missing, and ``coder`` is the record's type.
    """
    kind, feature, layer = str(record["feature_type"]), record.get("feature"), _layer(record)
    row: dict[str, Any] = {
        "node_id": record["node_id"],
        "position": record["ctx_idx"],
        "label": record.get("clerp") or "",
        "activation": record.get("activation"),
        "coder": None,
        "site": None,
        "layer": layer,
    }
    if kind == EMBEDDING:
        return row | {"kind": "embedding", "layer": None, "token_id": _token_in(record["node_id"])}
    if kind == LOGIT:
        token = feature if isinstance(feature, int) and feature >= 0 else None
        probability = record.get("token_prob")
        return row | {"kind": "logit", "layer": None, "token_id": token, "probability": probability}
    if "error" in kind:
        return row | {"kind": "error", "coder": kind}
    if kind == BIAS:
        return row | {"kind": "bias", "coder": kind}
    return row | {"kind": "latent", "coder": kind, "latent": _latent(record, layer, schema)}


def _layer(record: Mapping[str, Any]) -> int | None:
    given = record["layer"]
    if isinstance(given, str) and given.startswith("E"):
        return None
    try:
        layer = int(given)
    except (TypeError, ValueError):
        layer = -1
    if not 0 <= layer < 10**6:
        raise GemmaScopeError(f"Node {record['node_id']!r} has the layer {brief(given)!r}, which is no layer.")
    return layer


def _latent(record: Mapping[str, Any], layer: int | None, schema: int) -> int | None:
    """The index of a latent: of the pairing, if it agrees with the layer, else of the node's id."""
    feature = record.get("feature")
    if schema >= 1 and isinstance(feature, int) and feature >= 0:
        found, index = unpair(feature)
        if found == layer:
            return index
    parts = str(record["node_id"]).split("_")
    if len(parts) == 3 and parts[0] == str(layer) and parts[1].isdecimal() and len(parts[1]) < 16:
        return int(parts[1])
    return None


def _token_in(node_id: str) -> int | None:
    parts = node_id.split("_")
    return (
        int(parts[1]) if len(parts) == 3 and parts[0] == "E" and parts[1].isdecimal() and len(parts[1]) < 10 else None
    )
