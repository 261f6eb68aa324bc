"""Which calls of an SAE take dense products, by their sizes: the limits follow from measured times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.sparse import gpu_crossovers, gpu_times
from gemma_scope_tl.sae import routes


def test_small_calls_are_dense() -> None:
    """Sizes at which a CPU was measured: few multiply-adds, and gradients of few tokens."""
    w_dec, b_dec = torch.empty(16_384, 2304, device="meta"), torch.empty(2304, device="meta")
    faster: Callable[..., bool] = lambda n, d_sae, d_out, tracked=False: routes.dense_is_faster(  # noqa: E731
        torch.empty(n, 1), torch.float32, d_sae, d_out, tracked
    )
    assert faster(64, 1024, 128)
    assert not faster(16, 4096, 256)
    assert not faster(1, *w_dec.shape)
    assert faster(16, *w_dec.shape, tracked=True)
    assert not faster(64, *w_dec.shape, tracked=True)
    assert not routes.decoded_sparsely(torch.empty(512, 16_384, device="meta"), w_dec, b_dec), "no values to look at"


def test_the_gpu_choice_follows_the_committed_times() -> None:
    """Every measured shape takes the faster way, and the limits are where the measured lines cross."""
    rows = json.loads((Path(__file__).parents[2] / "benchmarks/results/gpu.json").read_text())["splice"]
    found = gpu_crossovers(rows)
    assert found.keys() == routes.GPU_SPARSE_FROM.keys()
    for size, limit in found.items():
        assert limit == pytest.approx(routes.GPU_SPARSE_FROM[size], rel=0.05), size
    for row in rows:
        multiply_adds, dtype, sparse, dense = gpu_times(row)
        assert routes.gpu_prefers_dense(dtype, multiply_adds) == (dense < sparse), row["what"]


def test_a_gpu_never_holds_many_latents_and_knows_its_products() -> None:
    def faster(tokens: int, dtype: torch.dtype, d_sae: int = 16_384, d_out: int = 2304) -> bool:
        x: Any = SimpleNamespace(shape=(tokens, d_sae), numel=lambda: tokens * d_sae, is_cuda=True)
        return routes.dense_is_faster(x, dtype, d_sae, d_out, tracked=False)

    assert faster(512, torch.bfloat16)
    assert not faster(512, torch.float32)
    assert not faster(8192, torch.bfloat16)
    assert faster(8192, torch.bfloat16, d_out=64)
    assert not faster(8193, torch.bfloat16, d_out=64), "latents of more than 256 MiB"
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert faster(512, torch.float32)
        assert not faster(512, torch.float64)
    finally:
        matmul.fp32_precision = before
