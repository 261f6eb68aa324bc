"""The inputs of the plan from benchmarks/results, with assumptions for those that were not measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DENSE_PRODUCTS = 5.0  # a dense step: encode, decode, and the gradients of latents, decoder and encoder


@dataclass(frozen=True)
class Measured:
    """Inputs that were measured here, or not.

    Attributes:
        products: time of a step in encoder products (``batch x d x d_sae``, float32).
        products_source: the file and row, or the assumption.
        harvest: speed of a forward pass that reads all sites, as a share of that of the model's own pass.
        harvest_source: the file.
        store_read, store_write: bytes per second of a store on the benchmark's disk; None if they were not measured.
        store_source: the file.
    """

    products: float = DENSE_PRODUCTS
    products_source: str = "assumed: a dense step is five products of the encoder's size"
    harvest: float | None = None
    harvest_source: str = "not measured"
    store_read: float | None = None
    store_write: float | None = None
    store_source: str = "not measured"


def measured(results: Path) -> Measured:
    """The measurements in gpu.json and store.json of the folder ``results``.

    A training step's encoder products at the paper's batch, once few latents are active, as they are for most of a run:
    the largest (the least favourable shape measured);
    ``ratio`` of a harvest; ``read_bytes_per_s`` and ``write_bytes_per_s`` of a store, the least.
    """
    gpu = json.loads((results / "gpu.json").read_text(encoding="utf-8")) if (results / "gpu.json").exists() else {}
    products = [_products(row) for row in gpu.get("steps", []) if "batch 4096" in row["what"] and not row.get("start")]
    reads = [row["read_bytes_per_s"] for row in _rows(results / "store.json", "read_bytes_per_s")]
    writes = [row["write_bytes_per_s"] for row in _rows(results / "store.json", "write_bytes_per_s")]
    found = Measured()
    if products:
        where = f"measured on an {gpu['machine']['device']}, benchmarks/results/gpu.json"
        shares = {"harvest": min(row["ratio"] for row in gpu["harvest"]), "harvest_source": where}
        found = replace(found, products=max(products), products_source=f"{where}, float32", **shares)
    if reads or writes:
        speeds = {"store_read": min(reads, default=None), "store_write": min(writes, default=None)}
        found = replace(found, **speeds, store_source="benchmarks/results/store.json")
    return found


def _products(row: dict[str, Any]) -> float:
    """The encoder products of a step under the present name or the earlier one."""
    return row["ours_products"] if "ours_products" in row else row["encoder_products"]


def _rows(path: Path, key: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row.get(key) is not None]
