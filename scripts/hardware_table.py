"""Memory, disk and time of each model and width, computed from shapes, for docs/hardware.json and docs/hardware.md.

Nothing is loaded or measured. Run: python -m scripts.hardware_table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.model.sizes import family_and_sizes, sizes_of
from gemma_scope_tl.registry import list_saes
from gemma_scope_tl.registry.widths import parse_width
from gemma_scope_tl.training import plan as costs
from gemma_scope_tl.training.plan import plan_suite
from scripts import page_tables
from scripts.plan_cluster import TOKENS, Hardware

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "docs" / "hardware.json", ROOT / "docs" / "hardware.md"
WIDTHS = {
    **dict.fromkeys(("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"), ("16k", "65k", "131k", "1m")),
    **dict.fromkeys(
        ("gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b"), ("16k", "65k", "262k", "1m")
    ),
}
"""Widths of released SAEs of each model."""
CONTEXT, BATCH, BUCKET = 1024, 4096, 1 << 20
CARDS = (8, 16, 24, 40, 80)  # GB
RESERVE = 2e9  # bytes for activations, logits of a vocabulary of a quarter of a million, and CUDA
GB, GIB, TIB = 1e9, 2.0**30, 2.0**40


def models() -> list[dict[str, Any]]:
    """Parameters, bytes and FLOP of each model."""
    rows: list[dict[str, Any]] = []
    for name in WIDTHS:
        sizes = sizes_of(name)
        rows.append(
            {
                "model": name,
                "layers": sizes.dims.n_layers,
                "parameters": sizes.parameters,
                "bytes_float32": 4 * sizes.parameters,
                "bytes_bfloat16": 2 * sizes.parameters,
                "flops_per_token": sizes.flops_per_token(sizes.dims.n_layers, CONTEXT),
            }
        )
    return rows


def saes() -> list[dict[str, Any]]:
    """Bytes of an SAE of each model, site and width, and the cost of encoding a token relative to the model's pass."""
    rows: list[dict[str, Any]] = []
    for name in WIDTHS:
        family, sizes = family_and_sizes(name)
        whole = sizes.flops_per_token(sizes.dims.n_layers, CONTEXT)
        for site in ("res", "att"):
            d = family.site(site).d_in(sizes.dims)
            for width in WIDTHS[name]:
                d_sae = parse_width(width)
                rows.append(
                    {
                        "model": name,
                        "site": site,
                        "d_in": d,
                        "width": width,
                        "bytes_float32": costs.released_bytes(d, d, d_sae),
                        "bytes_bfloat16": costs.released_bytes(d, d, d_sae) // 2,
                        "row_bytes": 4 * d,
                        "share_of_forward": 2.0 * d * d_sae / whole,
                    }
                )
    return rows


def layered() -> list[dict[str, Any]]:
    """Bytes of crosscoders and cross-layer transcoders of released base models, and of what one latent writes.

    A file has planes for all layers; those of layers before a latent's own are zeros, and are not held.
    """
    rows: list[dict[str, Any]] = []
    for site in ("clt", "crosscoder"):
        for name in WIDTHS:
            table = list_saes(model=name, site=site).drop_duplicates("width").sort_values("d_sae")
            for width, latents, layers in zip(table["width"], table["d_sae"], table["layers"], strict=True):
                d, count, skip = sizes_of(name).dims.d_model, len(layers), site == "clt"
                # encoder, bias and threshold of each latent; bias and skip connection of each layer
                beside = 4 * ((d + 2) * latents + count * (d + skip * d * d))
                planes = 4 * d * latents // count  # of one layer's latents in one layer
                rows.append(
                    {
                        "model": name,
                        "site": site,
                        "layers": count,
                        "width": width,
                        "encoder_bytes": beside,
                        "file_bytes": beside + planes * count * count,
                        "held_bytes": beside + planes * count * (count + 1) // 2,
                        "row_bytes": 4 * d * count,
                    }
                )
    return rows


def fits() -> list[dict[str, Any]]:
    """The widest res SAE of :data:`WIDTHS` beside the model on each card; None where the model does not fit."""
    rows: list[dict[str, Any]] = []
    for name in WIDTHS:
        sizes = sizes_of(name)
        for dtype, item in (("bfloat16", 2), ("float32", 4)):
            row: dict[str, Any] = {"model": name, "dtype": dtype}
            for card in CARDS:
                left = card * GB - RESERVE - item * sizes.parameters
                d = sizes.dims.d_model
                inside = [w for w in WIDTHS[name] if item * costs.parameters(d, d, parse_width(w)) <= left]
                row[str(card)] = inside[-1] if inside else ("model only" if left >= 0 else None)
            rows.append(row)
    return rows


def training() -> list[dict[str, Any]]:
    """One res SAE of each model and width with the paper's batch and tokens, as ``plan_suite`` plans it."""
    hardware = Hardware()
    flops = hardware.fp32_flops * hardware.share_of_peak
    rows: list[dict[str, Any]] = []
    for name in WIDTHS:
        for width in WIDTHS[name]:
            config = {
                "output": "hardware-table",
                "model": {"name": name, "dtype": "bfloat16"},
                "data": {"dataset": "any", "context": CONTEXT},
                "source": {"dtype": "bfloat16", "bucket_rows": BUCKET},
                "recipe": {"preset": "paper"},
                "grid": [{"sites": ["res"], "layers": [12], "widths": [width], "lambdas": [6e-4]}],
                "tokens": int(TOKENS[parse_width(width)]),
            }
            job = plan_suite(config, memory=1e15, device_flops=flops).jobs.iloc[0]
            rows.append(
                {
                    "model": name,
                    "width": width,
                    "tokens": int(job["tokens"]),
                    "state_and_step": int(job["memory"] - job["bucket"]),
                    "bucket": int(job["bucket"]),
                    "checkpoint": int(job["checkpoint"]),
                    "store_bfloat16": int(job["store"]),
                    "hours": float(job["seconds"]) / 3600,
                }
            )
    return rows


def buffers() -> list[dict[str, Any]]:
    """Shuffle buffers for all places of a model at once, in bfloat16, and those of SAELens's runner."""
    rows: list[dict[str, Any]] = []
    for name in WIDTHS:
        family, sizes = family_and_sizes(name)
        dims = sizes.dims
        for sites in (("res",), ("res", "mlp", "att")):
            widths = [family.site(site).d_in(dims) for site in sites] * dims.n_layers
            rows.append(
                {
                    "model": name,
                    "sites": ", ".join(sites),
                    "places": len(widths),
                    "rows_in_16_gib": costs.largest_bucket(widths, 2, BATCH, 16 * GIB),
                    "bucket": costs.bucket_bytes(widths, BUCKET, 2),
                    "sae_lens": costs.sae_lens_bytes(widths, BUCKET, BATCH, 2),
                }
            )
    return rows


def numbers() -> dict[str, Any]:
    """The content of the JSON file."""
    hardware = Hardware()
    assumed = {
        "context": CONTEXT,
        "batch": BATCH,
        "bucket_rows": BUCKET,
        "reserve_bytes": RESERVE,
        "gpu": hardware.gpu,
        "float32_flops": hardware.fp32_flops,
        "share_of_peak": hardware.share_of_peak,
    }
    tables = {
        "models": models(),
        "saes": saes(),
        "layered": layered(),
        "fits": fits(),
        "buffers": buffers(),
        "training": training(),
    }
    return {"assumed": assumed, **tables}


def with_tables(page: str, data: dict[str, Any]) -> str:
    """``page`` with new tables made from ``data``; errors are those of :mod:`scripts.page_tables`."""
    return page_tables.with_tables(page, {name: make(data) for name, make in TABLES.items()})


def _models(data: dict[str, Any]) -> str:
    rows = [
        [
            f"`{r['model']}`",
            str(r["layers"]),
            f"{r['parameters'] / 1e9:.2f} billion",
            f"{r['bytes_bfloat16'] / GB:.1f} GB",
            f"{r['bytes_float32'] / GB:.1f} GB",
            f"{r['flops_per_token'] / 1e9:.1f} GFLOP",
        ]
        for r in data["models"]
    ]
    return page_tables.table(["model", "layers", "parameters", "bfloat16", "float32", "a token's forward pass"], rows)


def _saes(data: dict[str, Any]) -> str:
    rows = [
        [
            f"`{r['model']}` {r['site']}",
            r["width"],
            str(r["d_in"]),
            _size(r["bytes_float32"]),
            _size(r["bytes_bfloat16"]),
            f"{r['row_bytes'] / 1000:.0f} kB",
            f"{r['share_of_forward']:.1%}",
        ]
        for r in data["saes"]
    ]
    head = ["SAE", "width", "d_in", "float32", "bfloat16", "one decoder row", "encoder, of the model's pass"]
    return page_tables.table(head, rows)


def _layered(data: dict[str, Any]) -> str:
    rows = [
        [
            f"`{r['model']}` {r['site']}",
            r["width"],
            str(r["layers"]),
            _size(r["file_bytes"]),
            _size(r["held_bytes"]),
            _size(r["held_bytes"] / 2),
            _size(r["encoder_bytes"]),
            f"{r['row_bytes'] / 1000:.0f} kB",
        ]
        for r in data["layered"]
    ]
    head = [
        "coder",
        "width",
        "layers",
        "files",
        "float32",
        "bfloat16",
        "without decoder",
        "rows of one latent, at most",
    ]
    return page_tables.table(head, rows)


def _fits(data: dict[str, Any]) -> str:
    rows = [[f"`{r['model']}` {r['dtype']}", *(r[str(card)] or "–" for card in CARDS)] for r in data["fits"]]
    return page_tables.table(["model and SAE", *(f"{card} GB" for card in CARDS)], rows)


def _buffers(data: dict[str, Any]) -> str:
    rows = [
        [
            f"`{r['model']}` {r['sites']}",
            str(r["places"]),
            f"{r['rows_in_16_gib']:,}",
            f"{r['bucket'] / GIB:,.0f} GiB",
            f"{r['sae_lens'] / GIB:,.0f} GiB",
        ]
        for r in data["buffers"]
    ]
    head = ["model and sites", "places", "rows in 16 GiB", "2^20 rows", "SAELens, 2^20 rows"]
    return page_tables.table(head, rows)


def _training(data: dict[str, Any]) -> str:
    rows = [
        [
            f"`{r['model']}`",
            r["width"],
            f"{r['tokens'] / 1e9:.0f} billion",
            f"{r['state_and_step'] / GIB:.1f} GiB",
            f"{r['bucket'] / GIB:.1f} GiB",
            f"{r['checkpoint'] / GIB:.1f} GiB",
            f"{r['store_bfloat16'] / TIB:.1f} TiB",
            f"{r['hours']:,.0f} h",
        ]
        for r in data["training"]
    ]
    head = ["model", "width", "activations", "SAE, Adam, a step", "bucket", "checkpoint", "store, bfloat16", "steps"]
    return page_tables.table(head, rows)


def _size(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count < GB else f"{count / GB:.1f} GB"


TABLES = {
    "models": _models,
    "saes": _saes,
    "layered": _layered,
    "fits": _fits,
    "buffers": _buffers,
    "training": _training,
}


def main() -> None:
    """Write the file and the page."""
    data = json.loads(json.dumps(numbers()))
    write_atomically(DATA, json.dumps(data, indent=1) + "\n")
    write_atomically(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), data))
    print(f"{DATA.name} and {PAGE.name} written")


if __name__ == "__main__":
    main()
