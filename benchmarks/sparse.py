"""The sparse JumpReLU at the shape of a splice, against the bare encoder product and SAELens's JumpReLUSAE.

``python -m benchmarks.sparse`` writes the rows; ``python -m benchmarks.sparse crossover`` prints the time of each sum,
sparse and dense, by density: the table in ``gemma_scope_tl/sae/sparse_ops.py``, from which the constants there follow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from torch import Tensor

from benchmarks.timing import main, paired
from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.sae.sparse import SparseActs, reconstruct

TOKENS, D_IN, D_SAE = SIZES = 512, 2304, 16384
QUICK_SIZES = 32, 48, 256
RUNS, QUICK_RUNS = 9, 1
THRESHOLD = 2.63  # standard deviations of a pre-activation: 70 of 16384 latents are above
BOS_SCALE = 5.15  # puts 5,000 latents of the first token above
STOCK = "SAELens JumpReLUSAE"


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


def _input_gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    def run_once() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, grad)[0]

    return run_once


def _row(
    what: str, peer: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], same: bool, runs: int
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
    return rows


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
    if "crossover" in sys.argv:
        print("\n".join(crossover()))
    else:
        main("sparse", run)
