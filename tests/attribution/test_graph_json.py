"""Files of attribution graphs: what viewers need is there, nothing is lost on the way back, and no bytes do harm."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.attributions.graph_json import LISTING, OWN, read_graph, write_graph
from gemma_scope_tl.attributions.graph_records import pair, unpair
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.viz.graph_page import write_graph_page
from tests.attribution.example_graph import random_graph, small_graph

SCHEMA = json.loads((Path(__file__).parent / "graph_schema.json").read_text(encoding="utf-8"))


def _equal(a: AttributionGraph, b: AttributionGraph) -> None:
    pd.testing.assert_frame_equal(a.nodes, b.nodes)
    pd.testing.assert_frame_equal(a.checks, b.checks)
    assert a.weights.dtype == b.weights.dtype and (a.weights != b.weights).nnz == 0
    for name in ("model", "text", "token_ids", "tokens", "settings", "supernodes"):
        assert getattr(a, name) == getattr(b, name)


def _written(graph: AttributionGraph, path: Path, **options: Any) -> dict[str, Any]:
    return json.loads(write_graph(graph, path, **options).read_text(encoding="utf-8"))


def _of_others() -> dict[str, Any]:
    """A file as circuit-tracer writes it, made by hand: two latents, an error, two tokens, a logit, unknown fields."""

    def node(node_id: str, feature: int, layer: str, at: int, kind: str, **more: Any) -> dict[str, Any]:
        fixed = {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "clerp": ""}
        about = {"node_id": node_id, "feature": feature, "layer": layer, "ctx_idx": at, "feature_type": kind}
        return {**about, **fixed, "jsNodeId": node_id, "influence": 0.5, "activation": None, **more}

    logit = {"token_prob": 0.5, "is_target_logit": True, "clerp": 'Output " fish" (p=0.500)', "influence": None}
    return {
        "metadata": {
            "slug": "made",
            "scan": "gemma-2-2b",
            "transcoder_list": [],
            "prompt_tokens": ["<bos>", " cat"],
            "prompt": "<bos> cat",
            "node_threshold": 0.6,
            "schema_version": 1,
            "info": {"creator_name": "someone", "unheard": [1, None]},
        },
        "qParams": {
            "pinnedIds": ["1_7_1"],
            "supernodes": [["a", "0_3_1"], ["a", "1_7_1"]],
            "linkType": "both",
            "clickedId": "1_7_1",
            "sg_pos": "1 2",
            "clerps": "[]",
        },
        "nodes": [
            node("0_3_1", pair(0, 3), "0", 1, "cross layer transcoder", activation=2.5, vis_link="x"),
            node("1_7_1", pair(1, 7), "1", 1, "cross layer transcoder", activation=1.0, clerp="a label"),
            node("0_1_1", -1, "1", 1, "mlp reconstruction error"),
            node("E_2_0", 0, "E", 0, "embedding"),
            node("E_9_1", 1, "E", 1, "embedding"),
            node("27_77_1", 77, "27", 1, "logit", **logit),
        ],
        "links": [
            {"source": "E_9_1", "target": "0_3_1", "weight": 1.5},
            {"source": "0_3_1", "target": "1_7_1", "weight": -0.1},
            {"source": "0_1_1", "target": "27_77_1", "weight": 2.0},
            {"source": "1_7_1", "target": "27_77_1", "weight": 0.25},
        ],
        "unheard": {"of": "this"},
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_there_and_back(dtype: str, tmp_path: Path) -> None:
    graph = small_graph()
    graph = replace(graph, weights=graph.weights.astype(dtype))
    path = tmp_path / "a.json"
    _equal(read_graph(write_graph(graph, path)), graph)
    _equal(read_graph(write_graph(read_graph(path), path)), graph)


def test_what_viewers_need(tmp_path: Path) -> None:
    content = _written(small_graph(), tmp_path / "a.json", source_set="transcoder-16k")
    own = content.pop(OWN)
    jsonschema.validate(content, SCHEMA)
    assert content["metadata"]["slug"] == "a" and own["format"] == 1
    nodes = {node["node_id"]: node for node in content["nodes"]}
    # The viewers merge nodes of one layer, feature and position.
    merged = {(node["layer"], node["feature"], node["ctx_idx"]) for node in nodes.values()}
    assert len(merged) == len(nodes)
    assert unpair(nodes["transcoder_0_5_1"]["feature"]) == (0, 5)
    assert nodes["clt_1_5_2"]["feature"] != nodes["res_1_5_2"]["feature"]
    assert [n["is_target_logit"] for n in content["nodes"]].count(True) == 1 and nodes["logit_40_3"]["is_target_logit"]
    assert all(link["source"] in nodes and link["target"] in nodes for link in content["links"])
    assert content["metadata"]["feature_details"] == {"neuronpedia_source_set": "transcoder-16k"}


def test_influence_is_the_share_of_the_more_influential_nodes(tmp_path: Path) -> None:
    graph = random_graph(40, 5, 3, 200)
    graph = replace(graph, nodes=graph.nodes.assign(influence=graph.influence()))
    written = {node["node_id"]: node["influence"] for node in _written(graph, tmp_path / "a.json")["nodes"]}
    values = graph.nodes["influence"].to_numpy()
    for name, value in zip(graph.nodes["node_id"], values, strict=True):
        # The definition, summed over all nodes that are at least as influential; ties may stop before it.
        upper = values[values >= value].sum() / values.sum()
        assert values[values > value].sum() / values.sum() - 1e-12 <= written[name] <= upper + 1e-12
    assert _written(graph, tmp_path / "b.json")["metadata"]["node_threshold"] == 0.8
    assert _written(graph.pruned(), tmp_path / "c.json")["metadata"]["node_threshold"] == 1.0


def test_files_of_others_are_read_and_written_back(tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    content = _of_others()
    path.write_text(json.dumps(content))
    graph = read_graph(path)
    latent, second, error, _, word, logit = graph.nodes.to_dict("records")
    assert (latent["kind"], latent["layer"], latent["latent"], latent["activation"]) == ("latent", 0, 3, 2.5)
    assert (second["label"], second["coder"], second["site"] is None or second["site"] != second["site"]) == (
        ("a label", "cross layer transcoder", True)
    )
    assert (error["kind"], error["layer"]) == ("error", 1) and (word["kind"], word["token_id"]) == ("embedding", 9)
    assert (logit["kind"], logit["token_id"], logit["probability"]) == ("logit", 77, 0.5)
    assert graph.token_ids == (2, 9) and graph.model == "gemma-2-2b" and len(graph.checks) == 0
    assert graph.supernodes == (("a", ("0_3_1",)), ("a (2)", ("1_7_1",)))
    # By hand: the logit's inputs are 2.0 and 0.25, so the latent before it has 0.5 * 0.25 / 2.25 of the influence.
    np.testing.assert_allclose(graph.nodes["influence"][1], 0.5 / 9, rtol=1e-12)
    again = _written(graph, path)
    again.pop(OWN)
    content["qParams"]["supernodes"][1][0] = "a (2)"
    assert again.pop("links") and again == {k: v for k, v in content.items() if k != "links"}
    _equal(read_graph(path), graph)
    graph.nodes.loc[1, "label"] = "another label"
    assert _written(graph, path)["nodes"][1]["clerp"] == "another label"


def test_what_a_viewer_changed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = _written(small_graph(), path)
    content["qParams"]["supernodes"] = [["new", "E_10_0"]]
    content["qParams"]["pinnedIds"] = ["E_10_0"]
    gone = "error_mlp_0_3"
    content["nodes"] = [node for node in content["nodes"] if node["node_id"] != gone]
    content["links"] = [link for link in content["links"] if gone not in (link["source"], link["target"])]
    next(node for node in content["nodes"] if node["node_id"] == "clt_1_5_2")["clerp"] = "cats"
    path.write_text(json.dumps(content))
    graph = read_graph(path)
    assert graph.supernodes == (("new", ("E_10_0",)),) and graph.settings["qParams"] == {"pinnedIds": ["E_10_0"]}
    assert gone not in set(graph.nodes["node_id"]) and graph.nodes["label"][graph.number_of("clt_1_5_2")] == "cats"
    assert _written(graph, path)["qParams"]["pinnedIds"] == ["E_10_0"]


def test_the_menu_of_the_viewer(tmp_path: Path) -> None:
    graph = small_graph()
    for name in ("a", "b", "a"):
        write_graph(graph, tmp_path / f"{name}.json", listed=True)
    menu = json.loads((tmp_path / LISTING).read_text(encoding="utf-8"))
    assert [one["slug"] for one in menu["graphs"]] == ["b", "a"]
    with pytest.raises(GemmaScopeError, match=r"looks for c\.json"):
        write_graph(graph, tmp_path / "d.json", slug="c", listed=True)
    (tmp_path / LISTING).write_text('{"graphs": [')
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(GemmaScopeError, match="not whole JSON"):
        write_graph(graph, tmp_path / "a.json", listed=True)
    assert (tmp_path / "a.json").read_bytes() == before and (tmp_path / LISTING).read_text() == '{"graphs": ['


@pytest.mark.parametrize("of_others", [True, False])
def test_truncated_files(of_others: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    whole = json.dumps(_of_others()) if of_others else write_graph(small_graph(), path).read_text(encoding="utf-8")
    for end in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_text(whole[:end], encoding="utf-8")
        with pytest.raises(GemmaScopeError, match=r"a\.json is no attribution graph"):
            read_graph(path)


def _broken(change: Any) -> dict[str, Any]:
    content = _of_others()
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("nodes"), "it has no nodes"),
        (lambda c: c["metadata"].pop("prompt_tokens"), "no metadata.prompt_tokens"),
        (lambda c: c["metadata"].update(prompt_tokens=["a", 3]), "holds '3'|holds 3"),
        (lambda c: c["links"].append({"source": "E_9_1", "target": "nowhere", "weight": 1}), r"links\[4\]\.target"),
        (lambda c: c["links"].append(dict(c["links"][0])), "twice"),
        (lambda c: c["links"][0].update(weight="1"), r"links\[0\]\.weight"),
        (lambda c: c["links"][0].update(weight=10**400), r"links\[0\]\.weight"),
        (lambda c: c["links"][0].update(weight=True), r"links\[0\]\.weight"),
        (lambda c: c["links"][0].update(weight=float("nan")), "NaN is no number"),
        (lambda c: c["links"].append({"source": "27_77_1", "target": "E_9_1", "weight": 1}), "lead to 'embedding'"),
        (lambda c: c["links"].append({"source": "1_7_1", "target": "0_3_1", "weight": 1}), "circle"),
        (lambda c: c["nodes"].append(dict(c["nodes"][0])), "twice"),
        (lambda c: c["nodes"][0].update(ctx_idx=2), "has 2 prompt_tokens"),
        (lambda c: c["nodes"][0].update(ctx_idx=-1), "has 2 prompt_tokens"),
        (lambda c: c["nodes"][0].update(layer="x"), "is no layer"),
        (lambda c: c["nodes"][0].update(layer=[]), r"nodes\[0\]\.layer"),
        (lambda c: c["nodes"][0].update(feature=1 << 70), r"nodes\[0\]\.feature"),
        (lambda c: c["nodes"][0].update(activation=float("inf")), "Infinity is no number"),
        (lambda c: c["nodes"].insert(0, None), r"nodes\[0\] is no object"),
        (lambda c: c["qParams"].update(supernodes=[["a", "gone"]]), "'gone'"),
        (lambda c: c["qParams"].update(supernodes="a"), "list of lists"),
        (lambda c: c.update({OWN: {"format": 99}}), "another version"),
        (lambda c: c.update({OWN: {"format": 1}}), OWN),
    ],
)
def test_wrong_files_are_refused_with_their_place(change: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(_broken(change)))
    with pytest.raises(GemmaScopeError, match=said) as raised:
        read_graph(path)
    assert "wrong.json" in str(raised.value)


_NOT_UNICODE = b'{"metadata": {"prompt_tokens": ["\\ud800"]}, "nodes": [], "links": []}'
_TOO_LARGE = b'{"metadata": {"prompt_tokens": [], "seen": 1e999}, "nodes": [], "links": []}'


@pytest.mark.parametrize(
    "content", [b"", b"[]", _NOT_UNICODE, _TOO_LARGE, b"\xff\xfe", b"[" * 100_000, b'{"metadata": 3}']
)
def test_other_bytes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(GemmaScopeError, match="is no attribution graph"):
        read_graph(tmp_path / "a.json")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@pytest.mark.fuzz
@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(own=st.booleans(), path=st.lists(st.integers(0, 30), min_size=1, max_size=5), value=_VALUES)
def test_any_value_anywhere_is_read_or_refused(
    own: bool, path: list[int], value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A value of a file is replaced; the file is read, or the error is the package's own."""
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    content: Any = _written(small_graph(), file) if own else _of_others()
    at: Any = content
    for step in path:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = keys[step % len(keys)]
        if not isinstance(at[key], (dict, list)) or step == path[-1]:
            at[key] = value
            break
        at = at[key]
    file.write_text(json.dumps(content))
    with suppress(GemmaScopeError):
        read_graph(file)


def test_settings_that_json_lacks_become_text_and_nan_is_refused(tmp_path: Path) -> None:
    graph = replace(small_graph(), settings={"positions": slice(4, None), "n": np.int64(3), "pair": (1, 2)})
    found = read_graph(write_graph(graph, tmp_path / "a.json")).settings
    assert found == {"positions": "slice(4, None, None)", "n": 3, "pair": [1, 2]}
    with pytest.raises(GemmaScopeError, match="cannot hold"):
        write_graph(replace(graph, settings={"x": float("nan")}), tmp_path / "b.json")
    with pytest.raises(GemmaScopeError, match="between 0 and 1"):
        write_graph(graph, tmp_path / "b.json", node_threshold=1.5)
    assert not (tmp_path / "b.json").exists()


@given(layer=st.integers(0, 200), index=st.integers(0, 10**8))
def test_cantor(layer: int, index: int) -> None:
    assert unpair(pair(layer, index)) == (layer, index)


def test_text_that_is_not_unicode_is_not_written(tmp_path: Path) -> None:
    graph = replace(small_graph(), tokens=("a", "b", "\ud800", "d"))
    for write in (write_graph, write_graph_page):
        with pytest.raises(GemmaScopeError, match="surrogate"):
            write(graph, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())
