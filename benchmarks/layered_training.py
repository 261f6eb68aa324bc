"""One training step of a crosscoder and of a cross-layer transcoder (CLT) against plain PyTorch with autograd.

The peer (``benchmarks/layered_plain.py``) is what one writes without kernels: dense latents, a product for each pair
of layers, gradients by autograd, and PyTorch's fused Adam. It has the same loss, initial weights, learning rate and
constraint on decoder rows. Before anything is timed, both take the same steps and the benchmark compares losses, L0s
and parameters.

Each shape is measured as that of an SAE in ``benchmarks/training_step.py``: at the paper's start, where about every
second latent is active and everything is dense products, and where few are. The recipe is ``gemma_scope_2`` without
Matryoshka prefixes and frequency penalty, which the peer does not have. Inputs are normal numbers, a part of which all
layers share; targets of a CLT are others.

Times are given in encoder products, ``x @ W_enc`` of all layers. Processes of their own measure the memory that steps
take in addition to parameters, Adam's moments and batches; the peer's gradients are part of that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.layered_coders import threshold_of
from benchmarks.layered_plain import PlainTrainer
from benchmarks.timing import in_turn, main, spread
from gemma_scope_tl.training.layered_spec import LayeredSpec
from gemma_scope_tl.training.layered_trainer import LayeredTrainer
from gemma_scope_tl.training.recipe import GEMMA_SCOPE_2, Recipe

PEER = "plain PyTorch, autograd and fused Adam"
BATCHES, WARM_UP, CHECKED = 4, 1, 3
APART, SHARE = 0.05, 0.02  # of the learning rates; and the share of parameters that may differ by more
ROUNDS, MEMORY_RUNS = 3, 1
Batch = tuple[list[Tensor], list[Tensor] | None]


@dataclass(frozen=True)
class Shape:
    """The sizes of a coder and of the batches on which it is trained.

    Attributes:
        kind: ``crosscoder`` or ``clt``.
        layers: number of layers.
        d: width of inputs and outputs.
        latents: of each layer.
        batch: rows of a batch.
        l0: active latents of all layers together; None for the number at the paper's first threshold.
    """

    kind: str
    layers: int
    d: int
    latents: int
    batch: int
    l0: int | None

    @property
    def recipe(self) -> Recipe:
        """The recipe, with the threshold at which ``l0`` latents are active. Lambda is whole from the second step on.

        Pre-activations are N(0, r^2 / d) for encoder rows of length r, which is sqrt(2) for a CLT.
        """
        whole: dict[str, Any] = {"matryoshka": (), "frequency_coefficient": 0.0, "l0_warm_up_steps": 1}
        recipe = replace(GEMMA_SCOPE_2, batch_size=self.batch, **whole)
        if self.l0 is None:
            return recipe
        length = 2**0.5 if self.kind == "clt" else 1.0
        threshold = threshold_of(self.l0, self.layers * self.latents) * length / self.d**0.5
        return replace(recipe, init_threshold=threshold)

    @property
    def spec(self) -> LayeredSpec:
        """The coder as this package trains it."""
        target = float(self.l0 or 60)
        total = self.layers * self.latents
        return LayeredSpec("ours", self.kind, tuple(range(self.layers)), total, self.recipe, 0, target, l0_start=target)

    @property
    def what(self) -> str:
        """The row's words."""
        name = "CLT" if self.kind == "clt" else "crosscoder"
        sizes = f"{self.layers} layers x {self.latents:,} latents, d {self.d}, batch {self.batch:,}"
        return f"training step of a {name}, {sizes}"

    def batches(self) -> list[Batch]:
        """Rows of unit mean square for each layer, and targets for a CLT."""
        generator = torch.Generator().manual_seed(0)

        def rows() -> list[Tensor]:
            shared, *own = torch.randn(1 + self.layers, self.batch, self.d, generator=generator)
            return [(shared + one).mul_((2 * self.d) ** -0.5) for one in own]

        return [(rows(), rows() if self.kind == "clt" else None) for _ in range(BATCHES)]


CASES = tuple(Shape("clt", 8, 640, 2_048, 1_024, l0) for l0 in (64, None)) + tuple(
    Shape("crosscoder", 4, 1_152, 4_096, 1_024, l0) for l0 in (64, None)
)
QUICK_CASES = tuple(Shape(kind, 3, 32, 64, 64, l0) for kind in ("clt", "crosscoder") for l0 in (12, None))


def ours(shape: Shape) -> LayeredTrainer:
    """This package's trainer."""
    return LayeredTrainer(shape.d, shape.d, shape.spec, total_steps=100_000)


def theirs(shape: Shape, trainer: LayeredTrainer | None = None) -> PlainTrainer:
    """The peer with the initial weights of ``trainer``; None for those of a new one."""
    start = ours(shape) if trainer is None else trainer
    return PlainTrainer(start.weights.named(), shape.layers, shape.recipe, shape.spec.target_l0 or 1.0, shape.kind)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """A row for each shape."""
    return [
        _row(shape, 2 if quick else ROUNDS, 1 if quick else MEMORY_RUNS) for shape in (QUICK_CASES if quick else CASES)
    ]


def _row(shape: Shape, rounds: int, memory_runs: int) -> dict[str, Any]:
    l0, errors = check(shape)
    times = _times(shape, rounds)
    memory = [[_child(who, shape) for who in ("ours", "theirs")] for _ in range(memory_runs)]
    where = f"L0 {l0:,.0f}"
    if shape.l0 is None:
        where = f"at the paper's start (threshold {shape.recipe.init_threshold:g}, {where})"
    mine, other, product = times
    return {
        "id": f"{shape.kind}-{'start' if shape.l0 is None else 'l0'}",
        "what": f"{shape.what}, {where}",
        "peer": PEER,
        **spread("ours_s", mine),
        **spread("peer_s", other),
        **spread("product_s", product),
        **spread("ratio", [b / a for a, b in zip(mine, other, strict=True)]),
        **spread("ours_products", [a / b for a, b in zip(mine, product, strict=True)]),
        **spread("peer_products", [a / b for a, b in zip(other, product, strict=True)]),
        **spread("ours_extra_mib", [pair[0] for pair in memory]),
        **spread("peer_extra_mib", [pair[1] for pair in memory]),
        "tokens_per_s": shape.batch / spread("s", mine)["s"],
        "peer_tokens_per_s": shape.batch / spread("s", other)["s"],
        "l0": l0,
        **errors,
        "runs": rounds,
    }


def check(shape: Shape) -> tuple[float, dict[str, float]]:
    """Step both sides from equal weights on equal batches, and compare them.

    The loss differs by the rounding of sums. A latent that rounds to the other side of its threshold is active on one
    side only, and Adam without momentum moves a parameter by about the learning rate in the direction of its gradient,
    whose sign is rounding where it is nearly 0. So all agree to twice the rates, and nearly all to rounding.

    Returns:
        The L0 of both; the largest relative difference of errors; the largest difference of parameters in units of the
        sum of the learning rates; and the share that differs by more than rounding, of the kind of parameters with the
        largest share.
    """
    mine = ours(shape)
    other, recipe = theirs(shape, mine), shape.recipe
    found: list[tuple[float, float, float, float]] = []
    for x, y in shape.batches()[:CHECKED]:
        mine.step(x, y)
        report = other.step(x, y)
        status = mine.status()[0]
        found.append((float(status["error"]) * shape.layers, report["error"], float(status["l0"]), report["l0"]))
    error = max(abs(a - b) / b for a, b, _, _ in found)
    l0 = max(abs(a - b) / b for _, _, a, b in found)
    assert error < 1e-4 and l0 < 1e-3, found
    rates = sum(recipe.lr_at(step) for step in range(CHECKED))
    named, peers = mine.weights.named(), other.named()
    assert set(named) == set(peers)
    shares = dict.fromkeys(("enc", "dec", "b_enc", "log_threshold", "b_dec"), 0.0)
    largest = 0.0
    for kind in shares:
        pairs = [(named[name], peers[name]) for name in named if name.split(".")[-1] == kind]
        apart = torch.cat([(a - b).abs().flatten() for a, b in pairs]) / rates
        largest = max(largest, float(apart.max()))
        shares[kind] = float((apart > APART).double().mean())
    assert largest <= 2.1 and max(shares.values()) < SHARE, (largest, shares)
    return found[-1][2], {
        "error_difference": error,
        "parameter_largest": largest,
        "parameter_share": max(shares.values()),
    }


def _times(shape: Shape, rounds: int) -> list[list[float]]:
    """Seconds of our step, the peer's and the products, in turn."""
    batches, numbers = shape.batches(), [0, 0, 0]
    mine, other = ours(shape), theirs(shape)
    w_enc = [torch.randn(shape.d, shape.latents) for _ in range(shape.layers)]

    def products(x: list[Tensor], _: Any) -> None:
        for rows, matrix in zip(x, w_enc, strict=True):
            torch.mm(rows, matrix)

    def turn(which: int, function: Callable[..., Any]) -> Callable[[], None]:
        def once() -> None:
            numbers[which] += 1
            function(*batches[numbers[which] % BATCHES])

        return once

    functions = (mine.step, other.step, products)
    return in_turn([turn(i, function) for i, function in enumerate(functions)], runs=rounds, warmup=WARM_UP)


def _child(who: str, shape: Shape) -> float:
    given = json.dumps([shape.kind, shape.layers, shape.d, shape.latents, shape.batch, shape.l0])
    command = [sys.executable, "-m", "benchmarks.layered_training", "--memory", who, given]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory(who: str, shape: Shape) -> float:
    """Peak memory in MiB of the steps of ``who``, without parameters, Adam's moments and batches."""
    make: dict[str, Callable[[Shape], Any]] = {"ours": ours, "theirs": theirs}
    tiny = Shape(shape.kind, 2, 8, 16, 4, 4)
    make[who](tiny).step(*tiny.batches()[0])  # loads the code
    batches, before = shape.batches(), _status("VmRSS")
    trainer = make[who](shape)
    for batch in batches[:2]:  # makes Adam's moments
        trainer.step(*batch)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak (Linux)
    for batch in batches[2:]:
        trainer.step(*batch)
    return (_status("VmHWM") - before) / 1024 - _kept(who, trainer)


def _kept(who: str, trainer: Any) -> float:
    """MiB of parameters and Adam's moments."""
    if who == "theirs":
        return trainer.kept_bytes() / 2**20
    tensors = [*trainer.weights.named().values(), *trainer.second.named().values(), *trainer.last]
    tensors += [] if trainer.first is None else list(trainer.first.named().values())
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def _status(name: str) -> int:
    """A number of ``/proc/self/status``, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _child_main(argv: list[str]) -> None:
    """Measure memory in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", nargs=2, metavar=("WHO", "SHAPE"))
    who, shape = parser.parse_args(argv).memory
    print(json.dumps(memory(who, Shape(*json.loads(shape)))))


if __name__ == "__main__":
    if "--memory" in sys.argv:
        _child_main(sys.argv[1:])
    else:
        main("layered_training", run)
