"""The plan in docs/clusters.md is the script's, and its formulas give the figures of the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma_scope_tl.model.sizes import ModelSizes
from gemma_scope_tl.registry import list_saes
from gemma_scope_tl.sites import ModelDims
from scripts import plan_cluster
from scripts.plan_measured import measured
from scripts.plan_tables import with_tables

PLAN: dict[str, Any] = json.loads(plan_cluster.PLAN.read_text(encoding="utf-8"))


def test_the_page_is_made_from_the_plan_and_the_plan_by_the_script() -> None:
    page = plan_cluster.PAGE.read_text(encoding="utf-8")
    assert with_tables(page, PLAN) == page
    assert json.loads(json.dumps(plan_cluster.plan())) == PLAN


def test_the_whole_release_is_made_of_confirmed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's FLOP count what it released. A row of which only the name is known may not exist: it adds nothing."""
    rows = list_saes()
    one = rows[rows["model"] == "gemma-2-9b"].iloc[[0]]
    before = plan_cluster.paper_checks()
    for unverified in (True, False):
        more = pd.concat([rows, one.assign(unverified=unverified)], ignore_index=True)
        monkeypatch.setattr(plan_cluster, "list_saes", lambda more=more: more)
        assert (plan_cluster.paper_checks() == before) is unverified


def test_a_changed_number_shows_in_the_page() -> None:
    page = plan_cluster.PAGE.read_text(encoding="utf-8")
    changed = json.loads(json.dumps(PLAN))
    changed["stores"][0]["fp32"] = 2.0**40 * 77.7
    assert "77.7 TiB" in with_tables(page, changed)
    with pytest.raises(ValueError, match="stores"):
        with_tables(page.replace("<!-- stores: start -->", ""), PLAN)


def test_the_whole_gpus_and_nodes_suffice_and_no_fewer_would() -> None:
    days, per_node = PLAN["hardware"]["days"], PLAN["hardware"]["gpus_per_node"]
    for row in PLAN["cluster"]:
        assert row["gpus"] * days * 24 >= row["gpu_hours"] > (row["gpus"] - 1) * days * 24
        assert row["nodes"] * per_node >= row["gpus"] > (row["nodes"] - 1) * per_node


def test_the_formulas_give_what_the_paper_says() -> None:
    """Section 3.3 of the paper rounds ("about", "more than"), so do the bounds here."""
    checks = {check["said"]: check["ours"] for check in PLAN["paper"]}
    assert checks["about 100 TiB"] == pytest.approx(100, rel=0.1)
    assert checks["about 17 PiB"] == pytest.approx(17, rel=0.1)
    assert checks["45 ms"] == pytest.approx(45, rel=0.05)
    assert 1.0 < checks["more than 1 GiB/s"] < 1.5
    assert 0.2 < checks["more than 20%"] < 0.25


@pytest.mark.parametrize("model", [plan_cluster.GEMMA_2B, plan_cluster.GEMMA_9B], ids=["2b", "9b"])
def test_flops_of_a_pass_are_two_a_weight_of_hugging_faces_model(model: ModelSizes) -> None:
    """At context 0 no scores are left; of Hugging Face's blocks only the norms' gains are in no product."""
    config = Gemma2Config(
        num_hidden_layers=model.dims.n_layers,
        hidden_size=model.dims.d_model,
        num_attention_heads=model.dims.n_heads,
        head_dim=model.dims.d_head,
        num_key_value_heads=model.kv_heads,
        intermediate_size=model.d_ff,
        vocab_size=16,
    )
    with torch.device("meta"):
        blocks = Gemma2ForCausalLM(config).model.layers
    weights = sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim == 2)
    assert model.flops_per_token(model.dims.n_layers, context=0) == 2 * weights


def test_flops_of_a_pass_are_those_that_torch_counts() -> None:
    """Torch's counter sees the whole square of scores, of which half is masked; we count that half."""
    from torch.utils.flop_counter import FlopCounterMode

    context = 32
    dims = ModelDims(n_layers=2, d_model=48, n_heads=4, d_head=16)
    model = ModelSizes(dims, kv_heads=2, d_ff=80, d_vocab=16)
    config = Gemma2Config(
        num_hidden_layers=2,
        hidden_size=48,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        intermediate_size=80,
        vocab_size=16,
        attn_implementation="eager",
    )
    blocks = Gemma2ForCausalLM(config).model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        blocks(torch.ones(1, context, dtype=torch.long))
    whole_square = model.flops_per_token(2, context=2 * context)
    assert counter.get_total_flops() == context * whole_square


def test_without_results_the_plan_says_what_it_assumes(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert found.products == 5.0
    assert found.products_source.startswith("assumed")
    assert found.store_read is None


def test_with_results_the_plan_uses_the_least_favourable(tmp_path: Path) -> None:
    steps = [{"what": f"batch {n}", "encoder_products": p} for n, p in ((4096, 1.5), (4096, 2.5), (2048, 3.5))]
    gpu = {"machine": {"device": "G1"}, "steps": steps, "harvest": [{"ratio": 0.75}]}
    (tmp_path / "gpu.json").write_text(json.dumps(gpu))
    (tmp_path / "store.json").write_text(json.dumps({"rows": [{"read_bytes_per_s": 3e9}, {"read_bytes_per_s": 2e9}]}))
    found = measured(tmp_path)
    assert (found.products, found.store_read, found.store_write) == (2.5, 2e9, None)
    assert "G1" in found.products_source and found.harvest == 0.75


def test_faster_hardware_takes_fewer_hours() -> None:
    slow = plan_cluster.Hardware()
    fast = plan_cluster.Hardware(fp32_flops=2 * slow.fp32_flops, gpu_memory_bandwidth=2 * slow.gpu_memory_bandwidth)
    hours = [plan_cluster.total_hours(plan_cluster.training(hardware, 5.0), "fp32") for hardware in (slow, fast)]
    assert hours[0] == pytest.approx(2 * hours[1])
