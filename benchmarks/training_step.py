"""One training step of a JumpReLU SAE against SAELens's, both against the bare encoder product ``x @ W_enc``.

This package's step is that of ``PlaceTrainer`` by the paper's recipe; the peer's is ``SAETrainer._train_step`` with
``JumpReLUTrainingSAE`` (forward, backward, clipping, Adam). Each shape is measured at two moments of a training run: at
the paper's start, where the threshold of 0.001 leaves about half of the latents active, and later, where few are. Both
sides have the same thresholds, so the same number of latents is active on the same batches.

Times are given in encoder products too. A step of dense products takes at least five of them: one to encode, one to
decode, and three for the gradients of the activations and of both matrices. Where few latents are active, one suffices,
and the rest are sums over the active ones.

Separate processes measure the memory that the steps take in addition to parameters, optimizer state and batches.
Run: ``python -m benchmarks.training_step [--quick]``; ``benchmarks.gpu`` runs it on a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.timing import main, spread
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.recipe import PAPER
from gemma_scope_tl.training.spec import SAESpec

PEER = "SAELens JumpReLUTrainingSAE"
BATCHES = 4
WARM_UP = 2  # the first step of PlaceTrainer assumes that every latent is active, and the second has a measured share
STEP = Callable[[Tensor], None]


@dataclass(frozen=True)
class Shape:
    """The sizes of an SAE and of the batches on which it is trained."""

    d_in: int
    d_sae: int
    batch: int
    l0: int | None
    """The number of active latents; None for the number at the paper's first threshold."""

    @property
    def threshold(self) -> float:
        """The threshold at which ``l0`` of ``d_sae`` latents are active on unit rows (pre-activations N(0, 1/d_in))."""
        if self.l0 is None:
            return PAPER.init_threshold
        upper = torch.tensor(1.0 - self.l0 / self.d_sae, dtype=torch.float64)
        return float(torch.special.ndtri(upper)) / self.d_in**0.5

    def batches(self, device: str) -> list[Tensor]:
        """Rows of unit length."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(BATCHES, self.batch, self.d_in, generator=generator)
        return list(torch.nn.functional.normalize(rows, dim=2).to(device))


CASES = tuple(Shape(d_in, 16_384, batch, l0) for d_in, batch in ((1_024, 2_048), (2_304, 4_096)) for l0 in (64, None))
GPU_CASES = (*CASES, Shape(2_304, 65_536, 4_096, 64))
QUICK_CASES = (Shape(64, 256, 128, 8), Shape(64, 256, 128, None))
DENSE_FLOOR = 5
"""Encoder products of a step of dense products: see the module."""
MEMORY_RUNS = 2  # children of a minute each, whose peaks hardly differ


def ours(shape: Shape, device: str) -> tuple[STEP, Callable[[], float], int]:
    """A step, a function that returns the mean L0 of the last steps, and the bytes of parameters and state."""
    recipe = replace(PAPER, batch_size=shape.batch, init_threshold=shape.threshold, lr_warm_up_steps=1_000)
    spec = SAESpec("ours", Place("res", 0), shape.d_sae, recipe, 0)
    trainer = PlaceTrainer(shape.d_in, shape.d_in, [spec], total_steps=100_000, device=device)
    kept = [value for part in (trainer.weights, trainer.second) for value in vars(part).values()] + [trainer.last]
    return trainer.step, lambda: float(trainer.status()[0]["l0"]), sum(t.numel() * t.element_size() for t in kept)


def theirs(shape: Shape, device: str) -> tuple[STEP, Callable[[], float], int]:
    """The same for SAELens's trainer, with the defaults of its documentation and the same kernel width."""
    cfg = JumpReLUTrainingSAEConfig(
        d_in=shape.d_in,
        d_sae=shape.d_sae,
        device=device,
        jumprelu_init_threshold=shape.threshold,
        jumprelu_bandwidth=PAPER.bandwidth,
        l0_coefficient=PAPER.l0_coefficient,
        decoder_init_norm=1.0,
    )
    settings = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=100_000 * shape.batch,
        device=device,
        autocast=False,
        lr=PAPER.lr,
        lr_end=PAPER.lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=1_000,
        adam_beta1=0.0,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=shape.batch,
        dead_feature_window=1_000,
        feature_sampling_window=2_000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    torch.manual_seed(0)
    sae = JumpReLUTrainingSAE(cfg)
    trainer = SAETrainer(settings, sae, iter(()))
    last: list[Tensor] = []

    def step(x: Tensor) -> None:
        out = trainer._train_step(sae, x)  # pyright: ignore[reportPrivateUsage]
        last[:] = [out.feature_acts.detach().bool().sum(1).float().mean()]

    # parameters, and both moments of Adam
    return step, lambda: float(last[0]), 3 * sum(p.numel() * p.element_size() for p in sae.parameters())


MAKERS = {"ours": ours, "theirs": theirs}


def run(
    quick: bool = False, *, device: str = "cpu", cases: tuple[Shape, ...] | None = None, rounds: int = 5
) -> list[dict[str, Any]]:
    """A row for each shape."""
    if quick:
        return [_row(shape, device, 2, 1) for shape in QUICK_CASES]
    return [_row(shape, device, rounds) for shape in cases or (CASES if device == "cpu" else GPU_CASES)]


def _row(shape: Shape, device: str, rounds: int, memory_runs: int = MEMORY_RUNS) -> dict[str, Any]:
    times, (l0, peer_l0) = _times(shape, device, rounds)
    memory = [[_child(who, shape, device) for who in MAKERS] for _ in range(memory_runs)]
    products = {who: [a / b for a, b in zip(times[who], times["product"], strict=True)] for who in MAKERS}
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    where = f"L0 {l0:,.0f}"
    if shape.l0 is None:
        where = (
            f"at the paper's start (threshold {PAPER.init_threshold:g}, {where}; dense floor {DENSE_FLOOR} products)"
        )
    return {
        "id": f"d{shape.d_in}-{'start' if shape.l0 is None else 'l0'}" + ("-wide" if shape.d_sae > 16_384 else ""),
        "what": f"training step, d {shape.d_in}, {shape.d_sae:,} latents, batch {shape.batch}, {where}",
        "peer": PEER,
        "start": shape.l0 is None,
        **spread("ours_s", times["ours"]),
        **spread("peer_s", times["theirs"]),
        **spread("product_s", times["product"]),
        **spread("ratio", ratios),
        **spread("ours_products", products["ours"]),
        **spread("peer_products", products["theirs"]),
        **spread("ours_extra_mib", [pair[0] for pair in memory]),
        **spread("peer_extra_mib", [pair[1] for pair in memory]),
        "l0": l0,
        "peer_l0": peer_l0,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "runs": rounds,
    }


def _times(shape: Shape, device: str, rounds: int) -> tuple[dict[str, list[float]], tuple[float, float]]:
    """Seconds of the product, of this package's step and of the peer's, in turn, and the L0 of both."""
    batches = shape.batches(device)
    w_enc = torch.randn(shape.d_in, shape.d_sae, device=device)
    (mine, my_l0, _), (its, its_l0, _) = ours(shape, device), theirs(shape, device)
    functions: dict[str, STEP] = {"product": lambda x: _discard(x @ w_enc), "ours": mine, "theirs": its}
    for x in batches[:WARM_UP]:
        for function in functions.values():
            function(x)
    my_l0()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name, function in functions.items():
            times[name].append(_seconds(function, batches[number % BATCHES], device))
    return times, (my_l0(), its_l0())


def _discard(_: Tensor) -> None:
    """Discard the product."""


def _seconds(function: STEP, x: Tensor, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    function(x)
    wait()
    return time.perf_counter() - started


def _child(who: str, shape: Shape, device: str) -> float:
    numbers = [str(value) for value in (shape.d_in, shape.d_sae, shape.batch, shape.l0 or 0)]
    command = [sys.executable, "-m", "benchmarks.training_step", "--memory", who, *numbers, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _memory(who: str, shape: Shape, device: str) -> float:
    """Peak memory in MiB of the steps of ``who``, without parameters, state and batches."""
    MAKERS[who](Shape(8, 16, 4, 2), device)[0](torch.randn(4, 8, device=device))  # loads the code
    batches, before = shape.batches(device), _held(device)
    step, _, kept = MAKERS[who](shape, device)
    step(batches[0])  # allocates Adam's moments
    step(batches[1])
    _forget_peak(device)
    for x in batches[2:]:
        step(x)
    return (_peak(device) - before - kept) / 2**20


def _held(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak (Linux)


def _status(name: str) -> int:
    with Path("/proc/self/status").open(encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{name}:"))


def _child_main(argv: list[str]) -> None:
    """Measure memory in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--memory", nargs=5, metavar=("WHO", "D_IN", "D_SAE", "BATCH", "L0"))
    options = parser.parse_args(argv)
    who, d_in, d_sae, batch, l0 = options.memory
    print(json.dumps(_memory(who, Shape(int(d_in), int(d_sae), int(batch), int(l0) or None), options.device)))


if __name__ == "__main__":
    if "--memory" in sys.argv:
        _child_main(sys.argv[1:])
    else:
        main("training_step", run)
