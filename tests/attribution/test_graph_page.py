"""The page of an attribution graph as a file: what is in it, what it says it leaves out, and that texts stay texts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.viz.graph_notes import LatentNote, Plane
from gemma_scope_tl.viz.graph_page import write_graph_page
from tests.attribution.example_graph import HOSTILE, random_graph, small_graph


def _page(graph: AttributionGraph, folder: Path, **options: Any) -> tuple[str, dict[str, Any]]:
    text = write_graph_page(graph, folder / "sub" / "page.html", **options).read_text(encoding="utf-8")
    block = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert block
    return text, json.loads(block[1])


def test_texts_are_data_and_never_markup(tmp_path: Path) -> None:
    note = LatentNote(label=HOSTILE[0], planes=[Plane(0, [(HOSTILE[1], 1.0)], [(HOSTILE[2], -1.0)])])
    notes = {("transcoder-release/layer_0", 0, 5): note}
    text, data = _page(small_graph(), tmp_path, notes=notes, title=HOSTILE[0])
    assert data["tokens"][2] == HOSTILE[0] and data["notes"][0]["label"] == HOSTILE[0] and data["title"] == HOSTILE[0]
    assert text.count("<script") == 2 and text.count("</script") == 2
    assert "<img" not in text
    assert "<title>&lt;/script&gt;" in text
    assert not re.search(r'(src|href)="(?!#)', text)  # nothing from elsewhere


def test_the_policy_lets_only_the_pages_own_script_and_style_run(tmp_path: Path) -> None:
    text, _ = _page(small_graph(), tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and policy[1].startswith("default-src 'none'; ") and "unsafe" not in policy[1]
    for kind, tag in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        body = re.search(tag, text, re.DOTALL)
        assert body
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]


def test_everything_of_a_small_graph_is_on_its_page(tmp_path: Path) -> None:
    graph = small_graph()
    _, data = _page(graph, tmp_path)
    names = [name for name in graph.nodes["node_id"] if name != "bias_mlp_1"]
    assert data["nodes"]["id"] == names and data["left_out"] == []
    constants = dict(zip(names, data["nodes"]["constants"], strict=True))
    assert constants.pop("clt_2_9_3") == 0.1 and not any(constants.values())
    found = {
        (data["nodes"]["id"][s], data["nodes"]["id"][t]): w
        for s, t, w in zip(*(data["edges"][name] for name in ("source", "target", "weight")), strict=True)
    }
    edges = graph.edges().query("source != 'bias_mlp_1'")
    # Weights on the page have six digits.
    wanted = dict(zip(zip(edges["source"], edges["target"], strict=True), edges["weight"], strict=True))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert data["supernodes"] == [[HOSTILE[1], "transcoder_0_5_1", "clt_1_5_2"]]


def test_what_is_left_out_is_the_least_and_is_said(tmp_path: Path) -> None:
    graph = random_graph(60, 6, 4, 400)
    _, data = _page(graph, tmp_path, max_nodes=40, max_edges=90)
    ids = data["nodes"]["id"]
    influence = graph.influence().to_numpy()
    kinds = graph.nodes["kind"].to_numpy(dtype=object)
    always = graph.nodes["node_id"][np.isin(kinds, ("embedding", "logit"))].tolist()
    assert len(ids) == 40 and set(always) <= set(ids) and len(data["edges"]["weight"]) == 90
    kept = graph.nodes["node_id"].isin(ids).to_numpy()
    others = ~np.isin(kinds, ("embedding", "logit"))
    assert influence[kept & others].min() >= influence[~kept & others & (kinds != "bias")].max()
    nodes, edges = data["left_out"]
    biases = kinds == "bias"
    count, every = int((~biases).sum()), int((graph.weights.toarray()[:, ~biases] != 0).sum())
    assert nodes.startswith(f"Not on this page: {count - 40} of {count} nodes")
    assert edges.startswith(f"Not on this page: {every - 90} of {every} edges")
    # Totals are of all edges but those of biases, those that are left out too.
    totals = np.abs(graph.weights.toarray())[:, ~biases].sum(axis=1)
    np.testing.assert_allclose(data["totals"], totals[kept], rtol=1e-5)


def test_latents_of_several_layers_are_told_apart_and_labels_that_repeat_are_left_out(tmp_path: Path) -> None:
    graph = small_graph()
    nodes = graph.nodes.copy()
    nodes.loc[nodes["site"] == "clt", "coder"] = "one"
    for label in ("transcoder 0 #5", "clt 0 #5"):
        nodes.loc[nodes["node_id"] == "transcoder_0_5_1", "label"] = label
        _, data = _page(replace(graph, nodes=nodes), tmp_path)
        assert [data["coders"][n] for n in data["layered"]] == ["one"]
        at = data["nodes"]["id"].index("transcoder_0_5_1")
        assert data["nodes"]["label"][at] is None


@pytest.mark.parametrize(
    "options", [{"max_nodes": 0}, {"max_edges": True}, {"node_threshold": 1.2}, {"edge_threshold": float("nan")}]
)
def test_wrong_numbers(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(GemmaScopeError):
        write_graph_page(small_graph(), tmp_path / "a.html", **options)
    assert not (tmp_path / "a.html").exists()
