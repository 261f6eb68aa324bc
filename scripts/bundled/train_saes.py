"""Train the bundled SAE suite: every layer, res, mlp and att, two sparsities, all from one stream of forward passes.

The recipe is the paper's with the values of ``FAST`` (see ``gemma_scope_tl/training/recipe.py``), but for lambda, which
is steered so that each SAE ends near a target L0: see :class:`Lambda`.
"""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.training.recipe import FAST, Recipe, StreamingRMS, adam, decoder_on_sphere
from gemma_scope_tl.training.step import Weights, loss_and_gradients
from gemma_scope_tl.weights.fold import fold
from scripts.bundled.sae_data import SITES, Place, ShuffleBuffer, load_bundled, site_width


@dataclass(frozen=True)
class SuiteConfig:
    """Settings of one run; `recipe.batch_size` activations a step."""

    steps: int = 4_500
    recipe: Recipe = field(default_factory=lambda: replace(FAST, batch_size=1_024))
    d_sae: int = 1_024
    targets: tuple[float, ...] = (12.0, 26.0)
    layers: tuple[int, ...] = (0, 1, 2, 3)
    sites: tuple[str, ...] = SITES
    buffer_rows: int = 131_072
    threads: int = 2
    seed: int = 0
    log_every: int = 200


class Lambda:
    """The sparsity coefficient, steered towards a target L0.

    With `e = log(L0 / target)`, clipped to [-1, 1], `lambda = base exp(P e)`, and `base` grows by the factor `exp(I e)`
    a step: where L0 stays too high the penalty rises until it is not. Warm-up as in the recipe: linear from 0.
    """

    PROPORTIONAL, INTEGRAL, SMOOTHING = 1.0, 0.005, 0.1

    def __init__(self, recipe: Recipe, target: float) -> None:
        self.base, self.warm_up, self.target = recipe.l0_coefficient, recipe.l0_warm_up_steps, target
        self.error = 0.0

    def at(self, step: int) -> float:
        """Lambda of this step."""
        return self.base * math.exp(self.PROPORTIONAL * self.error) * min(1.0, step / max(1, self.warm_up))

    def saw(self, step: int, l0: float) -> None:
        """Take note of a batch's L0."""
        error = max(-1.0, min(1.0, math.log(max(l0, 1e-3) / self.target)))
        self.error += self.SMOOTHING * (error - self.error)
        if step >= self.warm_up:
            self.base *= math.exp(self.INTEGRAL * self.error)


class Run:
    """One SAE in training."""

    def __init__(self, place: Place, d_in: int, target: float, config: SuiteConfig, stack: ExitStack) -> None:
        self.place, self.config = place, config
        seed = hash((config.seed, SITES.index(place[0]), place[1], round(target))) % 2**31
        self.weights = Weights.initial(d_in, config.d_sae, config.recipe, torch.Generator().manual_seed(seed))
        self.optimizer = adam(self.weights.tensors(), config.recipe, fused=True)
        stack.enter_context(decoder_on_sphere(self.optimizer, lambda: self.weights.dec))
        self.coefficient = Lambda(config.recipe, target)
        self.fired = torch.zeros(config.d_sae)
        self.error = self.l0 = 0.0
        self.seconds = 0.0

    @torch.no_grad()
    def step(self, number: int, x: Tensor) -> None:
        """Train on activations in units of `E ||x||^2 = 1`."""
        began = time.thread_time()
        recipe = self.config.recipe
        result = loss_and_gradients(self.weights, x, self.coefficient.at(number), recipe.bandwidth)
        self.coefficient.saw(number, result.l0)
        for parameter, grad in zip(self.weights.tensors(), result.grads, strict=True):
            parameter.grad = grad
        self.optimizer.param_groups[0]["lr"] = recipe.lr_at(number, self.config.steps)
        self.optimizer.step()
        self.fired += result.fired
        blend = 1.0 if number == 0 else 0.02
        self.error += blend * (result.error - self.error)
        self.l0 += blend * (result.l0 - self.l0)
        self.seconds += time.thread_time() - began

    def status(self, number: int) -> dict[str, Any]:
        """A row of the training log."""
        row = {
            "step": number,
            "site": self.place[0],
            "layer": self.place[1],
            "target_l0": self.coefficient.target,
            "error": round(self.error, 5),
            "l0": round(self.l0, 2),
            "lambda": float(f"{self.coefficient.at(number):.4g}"),
            "threshold": round(self.weights.log_threshold.mean().exp().item(), 5),
            "silent": round((self.fired == 0).float().mean().item(), 4),
            "ms": round(1e3 * self.seconds / max(1, number + 1), 2),
        }
        self.fired.zero_()
        return row


@dataclass
class Suite:
    """What training gives: a run for each SAE, and each site's scale C."""

    runs: list[Run]
    scales: dict[Place, float]
    seconds: float
    tokens: int


def train_suite(model_folder: Path, work: Path, log: Path, config: SuiteConfig) -> Suite:
    """Train all SAEs of `config` in lockstep and write the log, one JSON object a line."""
    torch.set_num_threads(config.threads)
    model = load_bundled(model_folder)
    places = [(site, layer) for layer in config.layers for site in config.sites]
    began = time.monotonic()
    batch = config.recipe.batch_size
    buffer = ShuffleBuffer(model, work, places, rows=config.buffer_rows, batch=batch, seed=config.seed + 1)
    scales = {place: _scale(buffer.data[place]) for place in places}
    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, log.open("w", encoding="utf-8") as file:
        pool = stack.enter_context(ThreadPoolExecutor(config.threads, initializer=lambda: torch.set_num_threads(1)))

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        write({"event": "start", "config": asdict(config), "scales": {f"{s}/{n}": c for (s, n), c in scales.items()}})
        runs = {p: [Run(p, site_width(model, p[0]), t, config, stack) for t in config.targets] for p in places}
        for number in range(config.steps):
            rows = buffer.next_rows()

            def train_place(place: Place, number: int = number, rows: Tensor = rows) -> None:
                x = buffer.take(place, rows).div_(scales[place])
                for run in runs[place]:
                    run.step(number, x)

            list(pool.map(train_place, places))
            if (number + 1) % config.log_every == 0 or number + 1 == config.steps:
                for run in (run for place in places for run in runs[place]):
                    write(run.status(number))
                torch.set_num_threads(config.threads)
                write({"event": "time", "step": number, "seconds": round(time.monotonic() - began, 1)})
    return Suite([run for place in places for run in runs[place]], scales, time.monotonic() - began, buffer.seen)


def folded_arrays(run: Run, scale: float) -> dict[str, Any]:
    """The run's weights for raw activations, rounded to bfloat16 precision, as float32 NumPy arrays."""
    exact = fold({name: value.double() for name, value in run.weights.named().items()}, scale)
    return {name: value.to(torch.bfloat16).float().contiguous().numpy() for name, value in exact.items()}


def _scale(activations: Tensor) -> float:
    rms = StreamingRMS()
    for part in activations.split(8192):
        rms.update(part)
    return rms.scale
