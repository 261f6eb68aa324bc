"""``gemma-scope graph``: its files agree with the library, and with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.graph_json import LISTING
from gemma_scope_tl.cli import app, graphs
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model import loading
from tests.attribution.example_graph import random_graph
from tests.cli.test_help import _once

TEXT = "God said unto them"
MEDIUM = "layer_1_width_256_l0_medium"


def _run(*args: str) -> Any:
    result = CliRunner().invoke(app, ["graph", *args], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_page_file_and_table_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_model", _once)
    page, file, table = (tmp_path / name for name in ("a.html", "a.json", "a.csv"))
    shares = ["--node-threshold", "0.7", "--edge-threshold", "0.9", "--notes", "6", "--examples", "1"]
    files = ["--out", str(page), "--save", str(file), "--listed", "--table", str(table)]
    facts = json.loads(_run(TEXT, "--model", "bundled-gemma3", *shares, *files, "--json"))
    model = _once("bundled-gemma3", backend="bridge", device=None, dtype="float32")
    coders = [gs.load_sae("bundled-gemma3", "transcoder", layer, "256", affine=True) for layer in range(6)]
    graph = gs.attribution_graph(model, TEXT, coders)
    wanted = graph.pruned(0.7, 0.9)
    found = gs.read_graph(file)
    assert found.nodes["node_id"].tolist() == wanted.nodes["node_id"].tolist()
    assert abs(found.weights - wanted.weights).max() < 1e-5  # float32 sums in another order
    assert (facts["nodes"], facts["nodes kept"], facts["edges kept"]) == (len(graph), len(wanted), wanted.weights.nnz)
    assert [one["token"] for one in facts["logits"]] == wanted.nodes["label"][wanted.nodes["kind"] == "logit"].tolist()
    edges = pd.read_csv(table)
    assert len(edges) == wanted.weights.nnz and set(edges) == {"source", "target", "weight", "influence"}
    assert json.loads((tmp_path / LISTING).read_text())["graphs"][0]["slug"] == "a"
    text = page.read_text(encoding="utf-8")
    assert '"promoted":[["' in text and text.count('"peak":') == 6 and '"node":0.7' in text


def test_a_file_is_read_in_place_of_a_text(tmp_path: Path) -> None:
    graph = random_graph(30, 5, 3, 150)
    path, page = gs.write_graph(graph, tmp_path / "a.json"), tmp_path / "a.html"
    facts = json.loads(_run("--read", str(path), "--out", str(page), "--json", "--top", "3"))
    assert facts["nodes"] == len(graph) and facts["edges kept"] == graph.pruned().weights.nnz
    assert len(facts["latents"]) == 3 and page.is_file()
    path.write_text(path.read_text()[:500])
    page.unlink()
    result = CliRunner().invoke(app, ["graph", "--read", str(path), "--out", str(page)])
    assert isinstance(result.exception, GemmaScopeError) and "no attribution graph" in str(result.exception)
    assert not page.exists()


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, [f"layer_{n}/width_512/average_l0_{l0}" for n, l0 in enumerate((15, 16, 16, 16))]),
        ({"model": "bundled-gemma3"}, [f"layer_{n}_width_256_l0_small_affine" for n in range(6)]),
        ({"model": "bundled-gemma3", "affine": False, "layer": [3]}, ["layer_3_width_256_l0_small"]),
        (
            {"model": "bundled-gemma3", "site": ["res"], "sae_label": ["medium"], "layer": [1]},
            ["layer_1_width_256_l0_medium"],
        ),
        ({"model": "gemma-2-2b", "layer": [5]}, ["layer_5/width_16k/average_l0_87"]),
        ({"model": "gemma-3-1b", "site": ["clt"]}, ["width_262k_l0_medium_affine"]),
        ({"model": "gemma-3-1b", "site": ["crosscoder"]}, ["layer_7_13_17_22_width_65k_l0_medium"]),
        ({"model": "gemma-3-1b-pt", "layer": [7]}, ["transcoder_all/layer_7_width_16k_l0_small_affine"]),
    ],
)
def test_which_coders_are_taken(options: dict[str, Any], ids: list[str]) -> None:
    found = [row.id for row in graphs.Graph("text", **options).rows()]
    assert [one.split("/")[-1] for one in found] == [one.split("/")[-1] for one in ids]


def test_of_several_sites_each_layer_has_one(tmp_path: Path) -> None:
    rows = graphs.Graph("text", model="bundled-gemma3", site=["att", "transcoder"]).rows()
    assert [(row.site, row.layer) for row in rows] == [(s, n) for s in ("att", "transcoder") for n in range(6)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--read", "{}", "--model", "bundled"], "leave out --model"),
        (["--read", "{}", "--site", "res", "--max-nodes", "3"], "leave out --site, --max-nodes"),
        (["--read", "{}", "--target", " the"], "leave out --target"),
        (["--read", "{}", "--out", "a.html", "--notes", "3"], "leave out --notes"),
        ([TEXT, "--examples", "3"], "--examples is for the page"),
        ([TEXT, "--out", "a.html", "--notes", "0", "--examples", "3"], "--notes 0"),
        ([TEXT, "--target", " the", "--logits", "3"], "give one"),
    ],
)
def test_no_option_is_without_effect(options: list[str], said: str, tmp_path: Path) -> None:
    path = gs.write_graph(random_graph(5, 3, 2, 20), tmp_path / "a.json")
    words = ["graph", *(one.format(path) for one in options)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert result.exit_code == 2 and said in result.output, result.output
