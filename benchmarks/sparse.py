"""The sparse JumpReLU and calls of an SAE, against the bare encoder product and SAELens's JumpReLUSAE.

``python -m benchmarks.sparse`` writes the rows; ``python -m benchmarks.sparse calls`` prints those of calls;
``python -m benchmarks.sparse crossover`` prints the time of each sum, sparse and dense, by density: the table in
``gemma_scope_tl/sae/sparse_ops.py``, from which the constants there follow.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from torch import Tensor

from benchmarks.timing import main, paired
from gemma_scope_tl.sae import jumprelu
from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.sae.sparse import SparseActs, reconstruct

TOKENS, D_IN, D_SAE = SIZES = 512, 2304, 16384
QUICK_SIZES = 32, 48, 256
RUNS, QUICK_RUNS = 9, 1
THRESHOLD = 2.63  # standard deviations of a pre-activation: 70 of 16384 latents are above
BOS_SCALE = 5.15  # puts 5,000 latents of the first token above
STOCK = "SAELens JumpReLUSAE"
NAMES: tuple[str, ...] = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
CHECKED = 64  # tokens whose outputs are compared with float64


def case(dtype: torch.dtype = torch.float32, sizes: tuple[int, int, int] = SIZES) -> tuple[Tensor, list[Any]]:
    """An input whose first token is like BOS, and W_enc, b_enc, threshold, W_dec, b_dec."""
    tokens, d_in, d_sae = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d_in, generator=generator)
    x[0] *= BOS_SCALE
    w_enc = torch.randn(d_in, d_sae, generator=generator) / d_in**0.5
    w_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    weights = [w_enc, torch.zeros(d_sae), torch.full((d_sae,), THRESHOLD), w_dec, torch.zeros(d_in)]
    return x.to(dtype), [w if i == 2 else w.to(dtype) for i, w in enumerate(weights)]


def stock_sae(weights: list[Tensor]) -> JumpReLUSAE:
    """SAELens's own class with the same weights, frozen."""
    dtype = str(weights[0].dtype).removeprefix("torch.")
    d_in, d_sae = weights[0].shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, dtype=dtype, apply_b_dec_to_input=False))
    for name, value in zip(("W_enc", "b_enc", "threshold", "W_dec", "b_dec"), weights, strict=True):
        getattr(sae, name).data = value
    return sae.requires_grad_(False)


def our_sae(weights: list[Tensor]) -> jumprelu.JumpReLUSAE:
    """This package's class with the same weights, frozen."""
    made = jumprelu.JumpReLUSAE.from_arrays(dict(zip(NAMES, weights, strict=True)), dtype=weights[0].dtype)
    return made.requires_grad_(False)


def _exact(x: Tensor, weights: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Latents and output of the first tokens by the formula, in NumPy and float64."""
    rows, w_enc, b_enc, theta, w_dec, b_dec = (t.double().numpy() for t in (x[:CHECKED], *weights))
    pre = rows @ w_enc + b_enc
    acts = np.where(pre <= theta, 0.0, pre)
    return acts, acts @ w_dec + b_dec


@torch.no_grad()
def calls(runs: int = RUNS, sizes: tuple[int, int, int] = SIZES) -> list[dict[str, Any]]:
    """``sae(x)`` and ``sae.decode(acts)`` of dense ``acts``, without gradients, in float32.

    The errors are the greatest differences from the formula in float64, for each side. SAELens's SAE is frozen and has
    no error term, which is its fastest setting.
    """
    x, weights = case(sizes=sizes)
    ours, stock = our_sae(weights), stock_sae(weights)
    acts = ours.encode(x)
    exact_acts, exact = _exact(x, weights)
    shown = acts[:CHECKED].double().numpy() @ weights[3].double().numpy()
    on = bool(((acts[:CHECKED].numpy() != 0) == (exact_acts != 0)).all())
    rows: list[dict[str, Any]] = []
    shape = f" ({sizes[0]} tokens, {sizes[1]} x {sizes[2]}, L0 {float((acts != 0).sum(1).float().mean()):.0f})"
    for what, mine, theirs, expected in (
        ("sae(x)", lambda: ours(x), lambda: stock(x), exact),
        ("sae.decode(acts)", lambda: ours.decode(acts), lambda: stock.decode(acts), shown),
    ):
        rows.append(_row(what + shape, "only x @ W_enc", mine, lambda: x @ weights[0], False, runs))
        row = _row(what, STOCK, mine, theirs, True, runs)
        errors = [float(np.abs(f()[:CHECKED].double().numpy() - expected).max()) for f in (mine, theirs)]
        rows.append({**row, "error": errors[0], "peer_error": errors[1], "same_latents_as_float64": on})
    return rows


def _input_gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    def run_once() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, grad)[0]

    return run_once


def _row(
    what: str, peer: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], same: bool, runs: int = RUNS
) -> dict[str, Any]:
    difference = (ours() - theirs()).abs().max().item() if same else None
    return {"what": what, "peer": peer, "max_difference": difference, **paired(ours, theirs, runs=runs)}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Replacing an activation, and the gradient of the input through it, in float32; the first also in bfloat16."""
    sizes, runs = (QUICK_SIZES, QUICK_RUNS) if quick else (SIZES, RUNS)
    x, weights = case(sizes=sizes)
    stock = stock_sae(weights)
    latent_major = [weights[0].T.contiguous().T, *weights[1:]]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        _, acts = reconstruct(x, *weights)
        shape = f"{sizes[0]} tokens, {sizes[1]} x {sizes[2]}, L0 {acts.l0:.0f}"
        ours = lambda: reconstruct(x, *weights)[0]  # noqa: E731
        rows.append(
            _row(f"sparse reconstruction ({shape})", "only x @ W_enc", ours, lambda: x @ weights[0], False, runs)
        )
        rows.append(_row("sparse reconstruction", STOCK, ours, lambda: stock(x), True, runs))
    theirs = _input_gradient(stock, x, grad)
    for label, tensors in (("", weights), (", latent-major W_enc", latent_major)):
        both = _input_gradient(lambda leaf, tensors=tensors: reconstruct(leaf, *tensors)[0], x, grad)
        rows.append(_row(f"sparse reconstruction and input gradient{label}", STOCK, both, theirs, True, runs))
    with torch.no_grad():
        x, weights = case(torch.bfloat16, sizes)
        stock = stock_sae(weights)
        ours = lambda: reconstruct(x, *weights)[0]  # noqa: E731
        rows.append(_row("sparse reconstruction in bfloat16", STOCK, ours, lambda: stock(x), True, runs))
    return rows + calls(runs, sizes)


def gpu_times(row: dict[str, Any]) -> tuple[int, torch.dtype, float, float]:
    """Of a row of ``splice`` in gpu.json: multiply-adds of the decoder's product, dtype, sparse and dense seconds.

    Files from before the choice between both have SAELens's time in place of this package's dense one.
    """
    found = re.search(r"([\d,]+) tokens, (\d+) x (\d+), (\w+)", row["what"])
    assert found is not None, row["what"]
    tokens, d_in, d_sae = (int(number.replace(",", "")) for number in found.groups()[:3])
    sparse, dense = row.get("sparse_s", row["ours_s"]), row.get("dense_s", row["peer_s"])
    return tokens * d_in * d_sae, getattr(torch, found[4]), sparse, dense


def gpu_crossovers(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Where the sparse and the dense times cross, in multiply-adds, by the bytes of a value.

    A time is a start and a rate, from the smallest and the largest measurement of the narrowest SAE.
    """
    limits: dict[int, float] = {}
    narrowest = min(int(re.search(r"x (\d+),", row["what"])[1]) for row in rows)  # type: ignore[index]
    points = [gpu_times(row) for row in rows if f"x {narrowest}," in row["what"]]
    for size in sorted({dtype.itemsize for _, dtype, _, _ in points}):
        ordered = sorted((at, sparse, dense) for at, dtype, sparse, dense in points if dtype.itemsize == size)
        (low, sparse_low, dense_low), (high, sparse_high, dense_high) = ordered[0], ordered[-1]
        sparse_rate, dense_rate = (sparse_high - sparse_low) / (high - low), (dense_high - dense_low) / (high - low)
        start = (sparse_low - sparse_rate * low) - (dense_low - dense_rate * low)
        limits[size] = start / (dense_rate - sparse_rate)
    return limits


@torch.no_grad()
def crossover() -> list[str]:
    """Each sum as a share of ``x @ W_enc``, sparse and dense, at four densities."""
    x, (w_enc, _, _, w_dec, _) = case()
    lines = ["density  sum                                 sparse  dense"]
    for density in (0.004, 0.02, 0.04, 0.08):
        on = torch.rand(TOKENS, D_SAE, generator=torch.Generator().manual_seed(2)) < density
        acts = SparseActs.from_dense(x[:, :1] * on + on)
        places = acts.offsets, acts.latents
        sums: dict[str, Callable[[], Any]] = {
            "decode": lambda: ops.row_sums(*places, acts.values, w_dec),
            "gradient of values": lambda: ops.sampled(*places, x, w_dec),
            "gradient of x, latent-major W_enc": lambda: ops.column_sums(*places, acts.values, w_dec.T),
            "gradient of x, other W_enc": lambda: ops.column_sums(*places, acts.values, w_enc),
            "gradient of a matrix": lambda: ops.latent_sums(*places, acts.values, D_SAE, x),
        }
        for name, function in sums.items():
            shares: list[float] = []
            for above in (2.0, -1.0):  # never dense, always dense
                names = ("DENSE_ROWS", "DENSE_IN_ORDER", "DENSE_COLUMNS", "DENSE_LATENTS")
                with patch.multiple(ops, **dict.fromkeys(names, above)):
                    shares.append(1 / paired(function, lambda: x @ w_enc, runs=5)["ratio"])
            lines.append(f"{density:6.1%}   {name:36s}{shares[0]:5.2f}  {shares[1]:5.2f}")
    return lines


if __name__ == "__main__":
    if "calls" in sys.argv:
        print("\n".join(map(str, calls(runs=3))))
    elif "crossover" in sys.argv:
        print("\n".join(crossover()))
    else:
        main("sparse", run)
