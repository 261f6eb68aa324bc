"""The tables of docs/clusters.md, made from docs/clusters.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts import page_tables

TIB, PIB, GB = 2.0**40, 2.0**50, 1e9


def with_tables(page: str, plan: dict[str, Any]) -> str:
    """``page`` with new tables made from ``plan``; errors are those of :mod:`scripts.page_tables`."""
    return page_tables.with_tables(page, {name: make(plan) for name, make in TABLES.items()})


def _assumptions(plan: dict[str, Any]) -> str:
    hardware, found = plan["hardware"], plan["measured"]
    rows = [
        ["GPU", hardware["gpu"], "assumed"],
        [
            "dense bfloat16 / TF32 / float32",
            " / ".join(f"{hardware[k] / 1e12:.0f}" for k in ("bf16_flops", "tf32_flops", "fp32_flops")) + " TFLOP/s",
            "data sheet, assumed",
        ],
        ["share of that which large products reach", f"{hardware['share_of_peak']:.0%}", "assumed"],
        [
            "GPU memory, its bandwidth",
            f"{hardware['gpu_memory'] / GB:.0f} GB, {hardware['gpu_memory_bandwidth'] / 1e12:.2f} TB/s",
            "data sheet, assumed",
        ],
        ["GPUs a node", str(hardware["gpus_per_node"]), "assumed"],
        [
            "a node writes / reads its NVMe disks",
            f"{hardware['node_write'] / GB:.0f} / {hardware['node_read'] / GB:.0f} GB/s",
            "assumed",
        ],
        ["a node's network", f"{hardware['node_network'] / GB:.0f} GB/s", "assumed"],
        ["a training step, in encoder products", f"{found['products']:.2f}", found["products_source"]],
        ["a harvest's share of the model's own speed", _share(found["harvest"]), found["harvest_source"]],
        ["our store reads / writes, one process", _speeds(found), found["store_source"]],
    ]
    return page_tables.table(["input", "value", "source"], rows)


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"


def _speeds(found: dict[str, Any]) -> str:
    speeds = [found["store_read"], found["store_write"]]
    return " / ".join("?" if speed is None else f"{speed / GB:.2f}" for speed in speeds) + " GB/s"


def _stores(plan: dict[str, Any]) -> str:
    layers = plan["model"]["layers"]
    rows = [
        [s["site"], f"{s['d']:,}", f"{s['fp32'] / TIB:.1f} TiB", f"{s['bf16'] / TIB:.1f} TiB"] for s in plan["stores"]
    ]
    layer = [sum(s[kind] for s in plan["stores"]) for kind in ("fp32", "bf16")]
    rows.append(["one layer, all three", "", *(f"{size / TIB:.0f} TiB" for size in layer)])
    rows.append([f"all {plan['model']['places']} places", "", *(f"{layers * size / PIB:.2f} PiB" for size in layer)])
    return page_tables.table(["8 billion activations of", "d", "float32", "bfloat16"], rows)


def _training(plan: dict[str, Any]) -> str:
    rows = [
        [
            f"{r['site']}, {r['d_sae'] // 1000}k",
            f"{r['steps']:,}",
            *(f"{1e3 * r[p]['step_s']:,.0f} ms" for p in ("fp32", "tf32")),
            *(f"{r[p]['gpu_hours']:,.0f}" for p in ("fp32", "tf32")),
            f"{r['tf32']['read_bytes_per_s'] / 2**20:,.0f} MiB/s",
            f"{r['gpu_memory'] / GB:.0f} GB",
            str(r["gpus"]),
            f"{r['checkpoint'] / GB:.0f} GB",
        ]
        for r in plan["training"]
    ]
    head = [
        "job: six SAEs",
        "steps",
        "step, float32",
        "step, TF32",
        "GPU hours, float32",
        "GPU hours, TF32",
        "reads, TF32",
        "GPU memory",
        "GPUs at least",
        "checkpoint",
    ]
    return page_tables.table(head, rows)


def _harvest(plan: dict[str, Any]) -> str:
    found, hardware = plan["harvest"], plan["hardware"]
    rows = [
        [
            w["places"],
            f"{w['bytes_per_s_per_gpu'] / GB:.2f} GB/s",
            f"{w['node_bytes_per_s'] / GB:.1f} GB/s",
            f"{min(1.0, hardware['node_write'] / w['node_bytes_per_s']):.0%}",
        ]
        for w in found["written"]
    ]
    head = ["written from a pass", "a GPU writes", "a node writes", "of its speed, if disks are the limit"]
    lead = (
        f"A pass through all layers takes {found['flops_per_token'] / 1e9:.1f} GFLOP a token, in bfloat16 "
        f"{found['tokens_per_s_per_gpu']:,.0f} tokens a second and GPU, {found['gpu_hours']:,.0f} GPU hours for 8e9."
    )
    return f"{lead}\n\n{page_tables.table(head, rows)}"


def _sharing(plan: dict[str, Any]) -> str:
    rows = [
        [s["what"], str(s["jobs"]), f"{s['bytes'] / TIB:,.0f} TiB", f"{s['node_hours']:,.1f}"] for s in plan["sharing"]
    ]
    return page_tables.table(["trainers of one residual place", "jobs", "read", "hours at a node's disk speed"], rows)


def _choices(plan: dict[str, Any]) -> str:
    rows = [
        [
            c["what"],
            f"{c['bytes'] / PIB:.2f} PiB" if c["bytes"] else "none",
            f"{c['passes']:.1f}",
            f"{c['gpu_hours']:,.0f}",
            f"{c['share_of_training']:.1%}",
            f"{c['write_node_hours']:,.0f}",
        ]
        for c in plan["choices"]
    ]
    head = [
        "choice",
        "kept at a time",
        "full passes",
        "GPU hours for them",
        "of training (TF32)",
        "node hours to write it all",
    ]
    return page_tables.table(head, rows)


def _cluster(plan: dict[str, Any]) -> str:
    rows = [
        [
            c["precision"],
            f"{c['gpu_hours']:,.0f}",
            f"{c['gpus']:,}",
            f"{c['nodes']:,}",
            f"{c['read_bytes_per_s'] / GB:,.0f} GB/s",
            f"{c['read_bytes_per_s_per_node'] / GB:.1f} GB/s",
        ]
        for c in plan["cluster"]
    ]
    head = [
        f"all places in {plan['hardware']['days']:.0f} days",
        "GPU hours",
        "GPUs",
        "nodes",
        "read, all",
        "read, a node",
    ]
    return page_tables.table(head, rows)


def _paper(plan: dict[str, Any]) -> str:
    rows = [
        [c["what"], f"{c['ours']:.3g} {c['unit']}".strip(), c["said"], f"{c['ours'] / c['paper']:.2f}"]
        for c in plan["paper"]
    ]
    return page_tables.table(["", "formula", "paper", "ratio"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "assumptions": _assumptions,
    "stores": _stores,
    "training": _training,
    "harvest": _harvest,
    "sharing": _sharing,
    "choices": _choices,
    "cluster": _cluster,
    "paper": _paper,
}
