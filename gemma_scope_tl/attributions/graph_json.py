"""Attribution graphs as files in the JSON that circuit-tracer's viewer and Neuronpedia open.

A file has ``metadata`` (``slug, scan, prompt_tokens, prompt, node_threshold, schema_version`` and more), ``qParams``
(the view: ``pinnedIds, supernodes, linkType, clickedId, sg_pos``), ``nodes`` and ``links``. The format is that of
circuit-tracer's ``frontend/graph_models.py`` and of Neuronpedia's ``api/graph/graph-schema.json``. What it cannot
express, such as sites and checks, stands beside these under a key that the viewers leave alone.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_scope_tl.attributions.attribution_graph import CHECKS, COLUMNS, AttributionGraph
from gemma_scope_tl.attributions.graph_records import as_read, node_records, plain_values, row_of
from gemma_scope_tl.errors import GemmaScopeError, brief
from gemma_scope_tl.files import checked_path, replace_files

if TYPE_CHECKING:
    import pandas as pd

OWN = "gemma_scope_tl"
"""The key of a file, beside those of the viewers, with what only this package reads."""
LISTING = "graph-metadata.json"
"""The file beside graphs from which circuit-tracer's viewer makes its menu."""
_FORMAT = 1
_TYPES = ("str", "string", "object", "Int64", "int64", "float64", "float32", "boolean", "bool")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_VIEW: dict[str, Any] = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}


def write_graph(
    graph: AttributionGraph,
    path: str | PathLike[str],
    *,
    slug: str | None = None,
    scan: str | None = None,
    listed: bool = False,
    node_threshold: float | None = None,
    source_set: str | None = None,
) -> Path:
    """Write a graph as JSON for circuit-tracer's viewer, Neuronpedia and :func:`read_graph`, completely or not at all.

    All nodes and edges are written; :meth:`AttributionGraph.pruned` makes the graph smaller. Neuronpedia takes files
    of up to 100 MiB. Its scores of replacement and completeness know no biases, and are wrong for a graph with them; a
    pruned graph has none.

    Args:
        graph: the graph. Tuples in its ``settings`` become lists, and values that JSON lacks become text.
        path: the file, ``<slug>.json``.
        slug: the graph's name in viewers, by default the file's name without its suffix.
        scan: what viewers call the model; Neuronpedia expects its own id of the model. By default that of the graph.
        listed: also enter the graph into ``graph-metadata.json`` in the same folder, the menu of circuit-tracer's
            viewer. The file's name must then be the slug.
        node_threshold: the share of influence whose nodes viewers show at first. By default 0.8, and all nodes of a
            graph that was pruned.
        source_set: Neuronpedia's name of the set of latents, such as ``gemmascope-transcoder-16k``.

    Raises:
        GemmaScopeError: for NaN in the settings, a threshold outside 0..1, or ``listed`` with another slug.
        WriteError: when a file cannot be written.
    """
    target = checked_path(path)
    slug = target.stem if slug is None else slug
    if listed and target.name != f"{slug}.json":
        raise GemmaScopeError(f"The viewer looks for {slug}.json, not {target.name}: name the file as the slug.")
    if node_threshold is None:
        node_threshold = 1.0 if "node_threshold" in graph.settings else 0.8
    if not 0 <= node_threshold <= 1:
        raise GemmaScopeError(f"node_threshold is a share between 0 and 1; given: {brief(node_threshold)}.")
    metadata = _metadata(graph, slug, scan, node_threshold, source_set)
    text = _encoded(_content(graph, metadata))
    files = {target.name: lambda place: place.write_text(text, encoding="utf-8")}
    if listed:
        menu = _encoded({"graphs": [*_listed_beside(target, slug), metadata]}, indent=2)
        files[LISTING] = lambda place: place.write_text(menu, encoding="utf-8")
    replace_files(target.parent, files)
    return target


def read_graph(path: str | PathLike[str]) -> AttributionGraph:
    """Read a graph that :func:`write_graph`, circuit-tracer or Neuronpedia wrote.

    A graph of :func:`write_graph` is read back as it was, with the supernodes, labels and view that a viewer saved.
    For other files, sites are missing, ``coder`` is the type of the node, ``influence`` is computed from the links,
    and ids of tokens that the file does not tell are -1. The fields that have no place in a graph are kept in
    ``settings["imported"]``, and :func:`write_graph` writes them back.

    Raises:
        GemmaScopeError: the file is no graph: truncated, of another form, with links to unknown nodes, with numbers
            that are not finite. The message names the file and the place.
        FileNotFoundError: there is no such file.
    """
    file = checked_path(path)
    try:
        return _graph(_parsed(file))
    except GemmaScopeError as error:
        raise GemmaScopeError(f"{file} is no attribution graph: {error}") from error


def _metadata(
    graph: AttributionGraph, slug: str, scan: str | None, threshold: float, source_set: str | None
) -> dict[str, Any]:
    from gemma_scope_tl import __version__

    imported = graph.settings.get("imported", {}).get("metadata")
    if imported:
        changed = {"slug": slug, **({} if scan is None else {"scan": scan})}
        return {**imported, **changed}
    details = {} if source_set is None else {"feature_details": {"neuronpedia_source_set": source_set}}
    return {
        "slug": slug,
        "scan": graph.model if scan is None else scan,
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.text,
        "node_threshold": threshold,
        "schema_version": 1,
        **details,
        "info": {
            "generator": {"name": OWN, "version": __version__},
            "source_urls": [],
            "create_time_ms": int(time.time() * 1000),
        },
    }


def _content(graph: AttributionGraph, metadata: dict[str, Any]) -> dict[str, Any]:
    settings = dict(graph.settings)
    imported = settings.pop("imported", {})
    view = settings.pop("qParams", {})
    records = node_records(graph.nodes, graph.tokens)
    held: Mapping[str, Any] = imported.get("nodes", {})
    records = [as_read(record, held.get(record["node_id"], {})) for record in records]
    own = {
        "format": _FORMAT,
        "imported": bool(imported),
        "model": graph.model,
        "text": graph.text,
        "token_ids": list(graph.token_ids),
        "dtype": str(graph.weights.dtype),
        "nodes": _table(graph.nodes),
        "checks": _table(graph.checks),
        "settings": settings,
    }
    supernodes = [[name, *members] for name, members in graph.supernodes]
    return {
        **imported.get("file", {}),
        "metadata": metadata,
        "qParams": {**_VIEW, **view, "supernodes": supernodes},
        "nodes": records,
        "links": _links(graph),
        OWN: own,
    }


def _links(graph: AttributionGraph) -> list[dict[str, Any]]:
    pairs = graph.weights.tocoo()
    ids = [str(one) for one in graph.nodes["node_id"]]
    # Nine digits hold a float32 exactly, seventeen a float64.
    digits = 9 if graph.weights.dtype == np.float32 else 17
    return [
        {"source": ids[source], "target": ids[target], "weight": float(f"{weight:.{digits}g}")}
        for target, source, weight in zip(pairs.row.tolist(), pairs.col.tolist(), pairs.data.tolist(), strict=True)
        if weight
    ]


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    columns = {str(name): plain_values(frame[name]) for name in frame}
    types = {str(name): str(kind) if str(kind) in _TYPES else "object" for name, kind in frame.dtypes.items()}
    return {"types": types, "columns": columns}


def _encoded(content: Any, indent: int | None = None) -> str:
    try:
        text = json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=False, default=_refused)
        text.encode()  # raises for a surrogate without its other half
        return text
    except ValueError as error:
        raise GemmaScopeError(f"The graph has a value that JSON cannot hold: {error}.") from error


def _refused(value: Any) -> Any:
    if hasattr(value, "item"):  # a number of NumPy's
        return value.item()
    return str(value)


def _listed_beside(target: Path, slug: str) -> list[Any]:
    """The graphs of the menu beside a file, without that of this name."""
    menu = target.parent / LISTING
    if not menu.exists():
        return []
    listed = _parsed(menu).get("graphs")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise GemmaScopeError(f"{menu} is no list of graphs: move it away. Nothing was written.")
    return [one for one in listed if one.get("slug") != slug]


def _parsed(file: Path) -> dict[str, Any]:
    try:
        text = file.read_bytes().decode("utf-8")
        content = json.loads(text, parse_constant=_no_constant, parse_float=_finite_float)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()  # raises for one without its other half
    except (ValueError, RecursionError) as error:
        raise GemmaScopeError(f"it is not whole JSON in UTF-8 ({brief(error)})") from error
    if not isinstance(content, dict):
        raise GemmaScopeError("it holds no object")
    return content


def _finite_float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{brief(text)} is too large a number")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _graph(content: dict[str, Any]) -> AttributionGraph:
    metadata = _typed(content, "metadata", dict)
    tokens = _strings(_typed(metadata, "prompt_tokens", list, "metadata."), "metadata.prompt_tokens")
    records = [_checked_record(one, n, len(tokens)) for n, one in enumerate(_typed(content, "nodes", list))]
    own = content.get(OWN)
    if own is not None and (not isinstance(own, dict) or own.get("format") != _FORMAT):
        raise GemmaScopeError(f"its part {OWN!r} is of another version")
    schema = metadata.get("schema_version")
    nodes = _nodes(records, own or {}, schema if isinstance(schema, int) else 0)
    weights = _weights(_typed(content, "links", list), nodes, str((own or {}).get("dtype", "float64")))
    view = _typed(content, "qParams", dict) if "qParams" in content else {}
    kept = {name: value for name, value in view.items() if name != "supernodes" and value != _VIEW.get(name)}
    settings = dict(_typed(own, "settings", dict, OWN + ".")) if own else {}
    if kept:
        settings["qParams"] = kept
    if not own or own.get("imported"):
        known = ("metadata", "qParams", "nodes", "links", OWN)
        rest = {name: value for name, value in content.items() if name not in known}
        held = {record["node_id"]: record for record in records}
        settings["imported"] = {"metadata": metadata, "nodes": held, "file": rest}
    graph = AttributionGraph(
        model=str(own["model"]) if own else str(metadata.get("scan", "")),
        text=str(own["text"]) if own else str(metadata.get("prompt", "".join(tokens))),
        token_ids=_token_ids(own, nodes, len(tokens)),
        tokens=tuple(tokens),
        nodes=nodes,
        weights=weights,
        checks=_frame(own["checks"]) if own else _no_checks(),
        settings=settings,
        supernodes=_supernodes(view.get("supernodes") or []),
    )
    if not own:
        nodes["influence"] = graph.influence()
    return graph


def _typed(content: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    if name not in content:
        raise GemmaScopeError(f"it has no {where}{name}")
    if not isinstance(content[name], kind):
        raise GemmaScopeError(f"its {where}{name} is a {type(content[name]).__name__}, not a {kind.__name__}")
    return content[name]


def _strings(given: Sequence[Any], where: str) -> list[str]:
    if stray := [one for one in given if not isinstance(one, str)]:
        raise GemmaScopeError(f"its {where} holds {brief(stray[0])!r}, which is no text")
    return list(given)


def _checked_record(record: Any, number: int, tokens: int) -> dict[str, Any]:
    """A node of a file, with a name, a type, a layer, a position of the prompt, and numbers where numbers belong."""
    where = f"nodes[{number}]"
    if not isinstance(record, dict):
        raise GemmaScopeError(f"its {where} is no object")
    for name, kinds in (("node_id", str), ("feature_type", str), ("layer", (str, int)), ("ctx_idx", int)):
        if not isinstance(record.get(name), kinds) or isinstance(record[name], bool):
            raise GemmaScopeError(f"its {where}.{name} is {brief(record.get(name))!r}")
    if not 0 <= record["ctx_idx"] < tokens:
        raise GemmaScopeError(f"its {where}.ctx_idx is {brief(record['ctx_idx'])}, but it has {tokens} prompt_tokens")
    for name in ("activation", "influence", "token_prob"):
        if record.get(name) is not None:
            _finite(record[name], f"{where}.{name}")
    feature = record.get("feature")
    if feature is not None and (not isinstance(feature, int) or isinstance(feature, bool) or abs(feature) >= 1 << 63):
        raise GemmaScopeError(f"its {where}.feature is {brief(feature)!r}")
    if not isinstance(record.get("clerp", ""), (str, type(None))):
        raise GemmaScopeError(f"its {where}.clerp is no text")
    return record


def _finite(value: Any, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
    raise GemmaScopeError(f"its {where} is {brief(value)!r}, which is no finite number")


def _nodes(records: Sequence[dict[str, Any]], own: Mapping[str, Any], schema: int) -> pd.DataFrame:
    """The table of nodes. What a viewer changed in a record (its label, or that it is there) goes before our part."""
    import pandas as pd

    if not own:
        rows = [dict.fromkeys(COLUMNS) | row_of(record, schema) for record in records]
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict(COLUMNS))
    frame = _frame(_typed(own, "nodes", dict, OWN + "."))
    if missing := [name for name in COLUMNS if name not in frame]:
        raise GemmaScopeError(f"its {OWN}.nodes lacks the columns {missing}")
    at = {one: n for n, one in enumerate(frame["node_id"])}
    if lost := frame["node_id"][frame["position"].isna() & (frame["kind"] != "bias")].tolist():
        raise GemmaScopeError(f"its node {lost[0]!r} has no position")
    if stray := [record["node_id"] for record in records if record["node_id"] not in at]:
        raise GemmaScopeError(f"its node {stray[0]!r} is not in {OWN}.nodes")
    frame = frame.iloc[[at[record["node_id"]] for record in records]].reset_index(drop=True)
    told = pd.Series([record.get("clerp") or "" for record in records], dtype="str")
    edited = (frame["kind"] == "latent") & (told != frame["label"].fillna(""))
    return frame.assign(label=frame["label"].mask(edited, told))


def _frame(table: Any) -> pd.DataFrame:
    import pandas as pd

    try:
        columns, types = table["columns"], table["types"]
        if strange := [types[name] for name in columns if types[name] not in _TYPES]:
            raise ValueError(f"a column of type {brief(strange[0])!r}")
        return pd.DataFrame({name: pd.Series(values, dtype=types[name]) for name, values in columns.items()})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise GemmaScopeError(f"a table in its part {OWN!r} cannot be read ({brief(error)})") from error


def _weights(links: Sequence[Any], nodes: pd.DataFrame, dtype: str) -> Any:
    from scipy.sparse import csr_array

    at = {one: n for n, one in enumerate(nodes["node_id"])}
    found: dict[tuple[int, int], float] = {}
    for n, link in enumerate(links):
        if not isinstance(link, dict):
            raise GemmaScopeError(f"its links[{n}] is no object")
        ends: list[int] = []
        for name in ("target", "source"):
            end = link.get(name)
            if not isinstance(end, str) or end not in at:
                raise GemmaScopeError(f"its links[{n}].{name} is {brief(end)!r}, which is none of its nodes")
            ends.append(at[end])
        if (ends[0], ends[1]) in found:
            raise GemmaScopeError(f"its links have {link['source']!r} to {link['target']!r} twice")
        found[ends[0], ends[1]] = _finite(link.get("weight"), f"links[{n}].weight")
    if dtype not in ("float32", "float64"):
        raise GemmaScopeError(f"its weights are of the type {brief(dtype)!r}, not float32 or float64")
    pairs = np.array(list(found), dtype=np.int64).reshape(-1, 2)
    values = np.array(list(found.values()), dtype=dtype)
    matrix = csr_array((values, (pairs[:, 0], pairs[:, 1])), shape=(len(nodes), len(nodes)))
    matrix.sort_indices()
    return matrix


def _token_ids(own: Mapping[str, Any] | None, nodes: pd.DataFrame, tokens: int) -> tuple[int, ...]:
    if own:
        given = _typed(own, "token_ids", list, OWN + ".")
        if not all(isinstance(one, int) for one in given):
            raise GemmaScopeError(f"its {OWN}.token_ids are no integers")
        return tuple(given)
    found = dict.fromkeys(range(tokens), -1)
    embeddings = nodes[(nodes["kind"] == "embedding") & nodes["token_id"].notna()]
    found.update(zip(embeddings["position"].astype(int), embeddings["token_id"].astype(int), strict=True))
    return tuple(found.values())


def _no_checks() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({name: pd.Series(dtype="str" if name == "node_id" else "float64") for name in CHECKS})


def _supernodes(given: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The groups of a view. Viewers name groups alike; the second ``a`` becomes ``a (2)`` here."""
    if not isinstance(given, list) or not all(isinstance(one, list) and one for one in given):
        raise GemmaScopeError("its qParams.supernodes is no list of lists")
    found: dict[str, tuple[str, ...]] = {}
    for one in given:
        name, *members = _strings(one, "qParams.supernodes")
        free = next(new for n in range(1, len(given) + 2) if (new := name if n == 1 else f"{name} ({n})") not in found)
        if members:
            found[free] = tuple(dict.fromkeys(members))
    return tuple(found.items())
