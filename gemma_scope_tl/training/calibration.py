"""How fast this machine is at what training does, measured in about a second, or as it is said to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from gemma_scope_tl.training.grid import Group

STEP_PRODUCTS = 5.0
"""A dense step is five products of the encoder's size: encode, decode, and the gradients of latents and matrices."""
_LATENTS, _ROWS, _WARM_UP, _RUNS = 1_024, 1_024, 2, 3


@dataclass(frozen=True)
class Speed:
    """What an estimate rests on.

    Attributes:
        flops: floating-point operations a second of the model's products.
        step_flops: of a training step, counted as encoder products (``2 batch d d_sae``).
        basis: in words.
    """

    flops: float
    step_flops: float
    basis: str


def stated(flops: float) -> Speed:
    """A device of which only its FLOP/s are known."""
    return Speed(flops, flops / STEP_PRODUCTS, f"{flops:.3g} FLOP/s as given; a step is {STEP_PRODUCTS:g} products")


def measured(group: Group, d_in: int, d_out: int, d_model: int, d_ff: int, batch: int) -> Speed:
    """Time a product of the model's MLP and a step of a small trainer at the widths of a group, with all threads.

    The step has at most 1,024 latents and 1,024 rows: the rest is proportion.
    """
    from gemma_scope_tl.training.place import PlaceTrainer

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, d_model, generator=generator)
    w = torch.randn(d_model, d_ff, generator=generator)
    flops = 2.0 * x.numel() * d_ff / _seconds(lambda: x @ w)
    spec = group.specs[0]
    rows, latents = min(batch, _ROWS), min(spec.d_sae, _LATENTS)
    small = replace(spec, d_sae=latents)
    trainer = PlaceTrainer(d_in, d_out, [small], total_steps=1_000)
    inputs = torch.randn(rows, d_in, generator=generator) * d_in**-0.5
    transcoder = group.place.target != group.place
    targets = torch.randn(rows, d_out, generator=generator) * d_out**-0.5 if transcoder else None
    step = 2.0 * rows * d_in * latents / _seconds(lambda: trainer.step(inputs.clone(), targets))
    threads = torch.get_num_threads()
    basis = (
        f"measured here, {threads} thread{'s' if threads > 1 else ''}: a product of the model's MLP at "
        f"{flops / 1e9:.1f} GFLOP/s, a step of {latents} latents and {rows} rows at {step / 1e9:.1f} GFLOP/s of its "
        "encoder's product; the rest in proportion"
    )
    return Speed(flops, step, basis)


def _seconds(work: Callable[[], object]) -> float:
    """The best of some runs."""
    for _ in range(_WARM_UP):
        work()
    times: list[float] = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
