"""The resources for training Gemma Scope's SAEs on all of Gemma 2 9B, for docs/clusters.json and docs/clusters.md.

    python -m scripts.plan_cluster

The formulas use three kinds of numbers, which the page distinguishes: the sizes of Gemma 2 and of Table 1, measurements
of this package from benchmarks/results, and assumptions about the hardware (:class:`Hardware`), which are not measured.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.model.sizes import ModelSizes, sizes_of
from gemma_scope_tl.registry import list_saes
from gemma_scope_tl.sites import get_site
from scripts.plan_measured import measured
from scripts.plan_tables import with_tables

ROOT = Path(__file__).resolve().parent.parent
PLAN, PAGE = ROOT / "docs" / "clusters.json", ROOT / "docs" / "clusters.md"
HOUR, DAY, GB, MIB, TIB, PIB = 3600.0, 86400.0, 1e9, 2.0**20, 2.0**40, 2.0**50
FLOAT32 = 4


@dataclass(frozen=True)
class Hardware:
    """Assumptions. FLOP/s are those of the data sheet for dense products; bandwidths are in bytes per second."""

    gpu: str = "H100 SXM"
    bf16_flops: float = 989e12
    tf32_flops: float = 494e12
    fp32_flops: float = 67e12
    share_of_peak: float = 0.5
    gpu_memory: float = 80e9
    gpu_memory_bandwidth: float = 3.35e12
    gpus_per_node: int = 8
    node_write: float = 8e9
    node_read: float = 20e9
    node_network: float = 50e9
    days: float = 30.0


GEMMA_9B, GEMMA_2B = sizes_of("gemma-2-9b"), sizes_of("gemma-2-2b")
SITES = ("res", "mlp", "att")
BATCH, CONTEXT = 4096, 1024
L0S = 6  # SAEs of one place and width; the release has 3 to 8, mostly 6
TOKENS = {2**12: 4e9, 2**14: 4e9, 2**15: 8e9, 2**16: 8e9, 2**17: 8e9, 2**18: 8e9, 2**19: 8e9, 2**20: 16e9}
WIDTHS = (2**14, 2**17)
ROWS = TOKENS[2**17]  # a store that serves both widths


def width(model: ModelSizes, site: str) -> int:
    """``d`` of a site."""
    return get_site(site).d_in(model.dims)


def store_bytes(model: ModelSizes, site: str, rows: float, itemsize: int = FLOAT32) -> float:
    """Bytes of a store with ``rows`` activations of one place."""
    return rows * width(model, site) * itemsize


def step_seconds(d: int, d_sae: int, saes: int, flops: float, hardware: Hardware, products: float) -> float:
    """One step of ``saes`` SAEs from one batch, and Adam's traffic (read p, g, v; write p, v).

    The encoder's product runs at ``flops``; the other work of a step, in units of this product, at float32's FLOP/s.
    """
    size = 2.0 * BATCH * d * d_sae / hardware.share_of_peak
    compute = size / flops + (products - 1.0) * size / hardware.fp32_flops
    adam = 5.0 * FLOAT32 * 2.0 * d * d_sae / hardware.gpu_memory_bandwidth
    return saes * (compute + adam)


def training_memory(d: int, d_sae: int, saes: int) -> float:
    """Bytes on the GPU: weights, gradients and Adam's second moments of all, one batch and one SAE's activations."""
    return FLOAT32 * (saes * 3.0 * 2.0 * d * d_sae + BATCH * d + 3.0 * BATCH * d_sae)


def training(hardware: Hardware, products: float) -> list[dict[str, Any]]:
    """A row for each site and width: one job with its six SAEs."""
    rows: list[dict[str, Any]] = []
    for site in SITES:
        d = width(GEMMA_9B, site)
        for d_sae in WIDTHS:
            steps = TOKENS[d_sae] / BATCH
            row: dict[str, Any] = {"site": site, "d_sae": d_sae, "steps": round(steps), "saes": L0S}
            for name, flops in (("fp32", hardware.fp32_flops), ("tf32", hardware.tf32_flops)):
                seconds = step_seconds(d, d_sae, L0S, flops, hardware, products)
                row[name] = {
                    "step_s": seconds,
                    "gpu_hours": steps * seconds / HOUR,
                    "read_bytes_per_s": BATCH * d * FLOAT32 / seconds,
                }
            row["gpu_memory"] = training_memory(d, d_sae, L0S)
            row["gpus"] = math.ceil(row["gpu_memory"] / hardware.gpu_memory)
            row["checkpoint"] = FLOAT32 * L0S * 2.0 * 2.0 * d * d_sae
            rows.append(row)
    return rows


def total_hours(rows: list[dict[str, Any]], precision: str) -> float:
    """GPU hours of all jobs of all layers."""
    return GEMMA_9B.dims.n_layers * sum(row[precision]["gpu_hours"] for row in rows)


def harvest(hardware: Hardware, share: float) -> dict[str, Any]:
    """One forward pass over all tokens, in bfloat16, through all layers, and the bytes that it writes."""
    layers = GEMMA_9B.dims.n_layers
    per_token = GEMMA_9B.flops_per_token(layers, CONTEXT)
    tokens_per_s = hardware.bf16_flops * hardware.share_of_peak * share / per_token
    layer = FLOAT32 * sum(width(GEMMA_9B, site) for site in SITES)
    return {
        "flops_per_token": per_token,
        "tokens_per_s_per_gpu": tokens_per_s,
        "gpu_hours": ROWS / tokens_per_s / HOUR,
        "written": [
            {
                "places": places,
                "bytes_per_s_per_gpu": tokens_per_s * size,
                "node_bytes_per_s": size * tokens_per_s * hardware.gpus_per_node,
            }
            for places, size in (
                ("one place", FLOAT32 * GEMMA_9B.dims.d_model),
                ("one layer", layer),
                ("all", layers * layer),
            )
        ],
    }


def choices(hardware: Hardware, pass_hours: float, training_hours: float) -> list[dict[str, Any]]:
    """Storing and streaming: the bytes kept, the number of passes of the model, and their cost relative to training.

    A pass for some layers stops after the last of them, so a pass for a single layer costs half a full one on average.
    """
    layers, node = GEMMA_9B.dims.n_layers, hardware.gpus_per_node
    everything = layers * sum(store_bytes(GEMMA_9B, site, ROWS) for site in SITES)
    half = (layers + 1) / 2 / layers
    places = layers * len(SITES)
    jobs = places * len(WIDTHS)  # the widths are trained on different numbers of tokens
    tokens = sum(TOKENS[d_sae] for d_sae in WIDTHS) / len(WIDTHS) / ROWS  # of a job, in passes
    rows = [
        ("store all places, train from it", everything, everything, 1.0),
        ("store a layer at a time, train, delete", everything / layers, everything, layers * half),
        (f"stream, {node} places of neighbouring layers share a model", 0.0, 0.0, jobs * tokens * half / node),
        ("stream, each place and width has its own model", 0.0, 0.0, jobs * tokens * half),
    ]
    return [
        {
            "what": what,
            "bytes": size,
            "passes": passes,
            "gpu_hours": passes * pass_hours,
            "share_of_training": passes * pass_hours / training_hours,
            "write_node_hours": written / hardware.node_write / HOUR,
        }
        for what, size, written, passes in rows
    ]


def sharing(hardware: Hardware) -> list[dict[str, Any]]:
    """The bytes read from a store of one place (res), by the division of its SAEs into jobs."""
    size = store_bytes(GEMMA_9B, "res", 1.0)
    both = sum(TOKENS[d_sae] for d_sae in WIDTHS)
    return [
        {"jobs": jobs, "what": what, "bytes": rows * size, "node_hours": rows * size / hardware.node_read / HOUR}
        for jobs, what, rows in (
            (len(WIDTHS), "a job a width, its six SAEs from one batch", both),
            (len(WIDTHS) * L0S, "a job an SAE", both * L0S),
        )
    ]


def cluster(hardware: Hardware, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The whole GPUs and nodes, and the bandwidth, that finish the training in ``hardware.days``."""
    read = GEMMA_9B.dims.n_layers * sum(
        sum(TOKENS[d_sae] for d_sae in WIDTHS) * FLOAT32 * width(GEMMA_9B, site) for site in SITES
    )
    found: list[dict[str, Any]] = []
    for precision in ("fp32", "tf32"):
        hours = total_hours(rows, precision)
        gpus = math.ceil(hours * HOUR / (hardware.days * DAY))
        speed = read / (hardware.days * DAY)
        nodes = math.ceil(gpus / hardware.gpus_per_node)
        found.append(
            {
                "precision": precision,
                "gpu_hours": hours,
                "gpus": gpus,
                "nodes": nodes,
                "read_bytes_per_s": speed,
                "read_bytes_per_s_per_node": speed / nodes,
            }
        )
    return found


def paper_checks() -> list[dict[str, Any]]:
    """The same formulas for the cases in which the paper states the resources."""
    places = [(model, site) for model in (GEMMA_2B, GEMMA_9B) for site in SITES]
    stored = sum(model.dims.n_layers * store_bytes(model, site, 8e9) for model, site in places)
    released = list_saes()
    # The paper's release is that of Gemma 2. Files that are only known by name may not exist.
    released = released[released["model"].str.startswith("gemma-2-") & ~released["unverified"]]
    sizes = zip(released["d_in"].tolist(), released["d_sae"].tolist(), strict=True)
    flops = sum(12.0 * d_in * d_sae * TOKENS[d_sae] for d_in, d_sae in sizes)
    step = 12.0 * BATCH * GEMMA_9B.dims.d_model * 2**17
    return [
        {
            "what": "8B activations of one site and layer of 9B (d 3,584), float32",
            "unit": "TiB",
            "ours": store_bytes(GEMMA_9B, "res", 8e9) / TIB,
            "paper": 100.0,
            "said": "about 100 TiB",
        },
        {
            "what": "all sites and layers of 2B and 9B, 8B activations each",
            "unit": "PiB",
            "ours": stored / PIB,
            "paper": 17.0,
            "said": "about 17 PiB",
        },
        {
            "what": "a batch of a 131K SAE of 9B, 12 d m FLOP a row, at 50.8% of 8 TPUv3 (123 TFLOP/s each, assumed)",
            "unit": "ms",
            "ours": 1e3 * step / (0.508 * 8 * 123e12),
            "paper": 45.0,
            "said": "45 ms",
        },
        {
            "what": "activations read by that SAE, a batch in 45 ms",
            "unit": "GiB/s",
            "ours": BATCH * GEMMA_9B.dims.d_model * FLOAT32 / 0.045 / 2**30,
            "paper": 1.0,
            "said": "more than 1 GiB/s",
        },
        {
            "what": "FLOP of the whole release (the registry's confirmed rows), in GPT-3s of 3.14e23",
            "unit": "",
            "ours": flops / 3.14e23,
            "paper": 0.2,
            "said": "more than 20%",
        },
    ]


def plan(results: Path = ROOT / "benchmarks" / "results") -> dict[str, Any]:
    """The content of docs/clusters.json."""
    hardware, found = Hardware(), measured(results)
    rows = training(hardware, found.products)
    pass_ = harvest(hardware, found.harvest or 1.0)
    return {
        "hardware": asdict(hardware),
        "measured": asdict(found),
        "model": {
            "name": "gemma-2-9b",
            "layers": GEMMA_9B.dims.n_layers,
            "places": GEMMA_9B.dims.n_layers * len(SITES),
        },
        "stores": [
            {
                "site": site,
                "d": width(GEMMA_9B, site),
                "fp32": store_bytes(GEMMA_9B, site, ROWS),
                "bf16": store_bytes(GEMMA_9B, site, ROWS, 2),
            }
            for site in SITES
        ],
        "training": rows,
        "harvest": pass_,
        "sharing": sharing(hardware),
        "choices": choices(hardware, pass_["gpu_hours"], total_hours(rows, "tf32")),
        "cluster": cluster(hardware, rows),
        "paper": paper_checks(),
    }


def main() -> None:
    """Write the plan, and the page's tables."""
    made = json.loads(json.dumps(plan()))
    write_atomically(PLAN, json.dumps(made, indent=2) + "\n")
    write_atomically(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), made))
    print(f"wrote {PLAN.relative_to(ROOT)} and the tables of {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
