"""A comparison of two recipes on the same activations: this package's, and SAELens's own for its JumpReLU SAE.

Both read the same batches in the same order through their own trainers (``PlaceTrainer``, ``SAETrainer``). The trained
SAEs are compared by one evaluation, as Gemma Scope weights for raw activations.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from scipy import stats
from torch import Tensor

from benchmarks.timing import RESULTS, save
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.metrics import DENSE_FREQUENCY
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.loop import StreamingRMS
from gemma_scope_tl.training.recipe import Recipe
from gemma_scope_tl.training.spec import SAESpec
from gemma_scope_tl.viz.figures import save_figure
from gemma_scope_tl.viz.training_figures import pareto

Arrays = dict[str, Tensor]
NORM_BATCHES = 32
SEEDS = (0, 1, 2)
PEER = "SAELens JumpReLU"


@dataclass(frozen=True)
class Budget:
    """The budget of both recipes: ``steps`` batches of ``batch_size`` activations for SAEs of ``d_sae`` latents."""

    d_sae: int
    steps: int
    batch_size: int = 1_024
    seed: int = 0


@dataclass(frozen=True)
class PeerSettings:
    """Settings of SAELens's JumpReLU recipe, in its units (mean norm of activations is the root of their width).

    The defaults are those of SAELens's documentation for the tanh penalty, which it recommends: bandwidth 2, threshold
    0.1, the pre-activation loss, gradients to the encoder, a penalty that grows over the whole run, and a learning rate
    that falls over the last fifth. ``step`` is DeepMind's penalty; ``quadratic`` is Gemma Scope 2's, with a target L0.
    """

    mode: str = "tanh"
    lr: float = 3e-4
    bandwidth: float = 2.0
    init_threshold: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    pre_act_loss: float | None = 3e-6
    ste_to_input: bool = True
    l0_warm_up: float = 1.0
    lr_warm_up: float = 0.0
    lr_decay: float = 0.2
    decoder_init_norm: float = 0.1


STEP = PeerSettings("step", bandwidth=0.05, init_threshold=0.01, pre_act_loss=None, ste_to_input=False, l0_warm_up=0.1)


@dataclass
class Trained:
    """An SAE for raw activations under Gemma Scope's names, and the settings of its training."""

    recipe: str
    arrays: Arrays
    settings: dict[str, Any]
    seconds: float
    seed: int = 0


def batches(x: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Float32 batches ``[batch_size, d]`` of ``x [n, d]`` without end, every epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // batch_size * batch_size].split(batch_size):
            yield x.index_select(0, rows).float()


def ours(x: Tensor, recipes: Mapping[float, Recipe], budget: Budget, place: Place, name: str = "ours") -> list[Trained]:
    """An SAE per target L0, each by its recipe, all trained together by ``PlaceTrainer``."""
    from gemma_scope_tl.training.place import PlaceTrainer

    recipes = {target: replace(recipe, batch_size=budget.batch_size) for target, recipe in recipes.items()}
    specs = [
        SAESpec(f"{place.key}/width_{budget.d_sae}/target_l0_{target:g}", place, budget.d_sae, one, budget.seed, target)
        for target, one in recipes.items()
    ]
    rms, stream = StreamingRMS(), batches(x, budget.batch_size, budget.seed)
    for _ in range(NORM_BATCHES):
        rms.update(next(stream))
    began = time.perf_counter()
    trainer = PlaceTrainer(x.shape[1], x.shape[1], specs, total_steps=budget.steps)
    stream = batches(x, budget.batch_size, budget.seed)
    for _ in range(budget.steps):
        trainer.step(next(stream).div_(rms.scale))
    seconds = (time.perf_counter() - began) / len(recipes)
    return [
        Trained(name, trainer.released(i, rms.scale), {"target_l0": target, **asdict(one)}, seconds, budget.seed)
        for i, (target, one) in enumerate(recipes.items())
    ]


def theirs(
    x: Tensor, settings: PeerSettings, coefficient: float, budget: Budget, target_l0: float | None = None
) -> Trained:
    """SAELens's JumpReLU SAE, trained by its ``SAETrainer``."""
    torch.manual_seed(budget.seed)
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=x.shape[1],
            d_sae=budget.d_sae,
            normalize_activations="expected_average_only_in",
            decoder_init_norm=settings.decoder_init_norm,
            jumprelu_init_threshold=settings.init_threshold,
            jumprelu_bandwidth=settings.bandwidth,
            jumprelu_sparsity_loss_mode=settings.mode,  # type: ignore[arg-type]
            jumprelu_ste_to_input=settings.ste_to_input,
            pre_act_loss_coefficient=settings.pre_act_loss,
            l0_coefficient=coefficient,
            l0_warm_up_steps=int(settings.l0_warm_up * budget.steps),
            target_l0=target_l0,
        )
    )
    cfg = SAETrainerConfig(
        total_training_samples=budget.steps * budget.batch_size,
        train_batch_size_samples=budget.batch_size,
        lr=settings.lr,
        lr_end=settings.lr / 10,
        lr_decay_steps=int(settings.lr_decay * budget.steps),
        lr_warm_up_steps=int(settings.lr_warm_up * budget.steps),
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        n_batches_for_norm_estimate=NORM_BATCHES,
    )
    trainer: SAETrainer[Any, Any] = SAETrainer(cfg, sae, _norm_batches_first(x, budget))
    began = time.perf_counter()
    sae = trainer.fit()
    seconds = time.perf_counter() - began
    chosen = {"l0_coefficient": coefficient, "target_l0": target_l0, **asdict(settings)}
    arrays = peer_arrays(sae)
    _check_same(sae, arrays, x[:256].float())
    return Trained(f"{PEER}, {settings.mode}", arrays, chosen, seconds, budget.seed)


def _norm_batches_first(x: Tensor, budget: Budget) -> Iterator[Tensor]:
    """The batches that measure the scale, then all batches from the first, so that both train on the same batches."""
    measured = batches(x, budget.batch_size, budget.seed)
    for _ in range(NORM_BATCHES):
        yield next(measured)
    yield from batches(x, budget.batch_size, budget.seed)


@torch.no_grad()
def peer_arrays(sae: Any) -> Arrays:
    """A trained SAELens JumpReLU SAE as Gemma Scope weights: the pre-encoder bias goes into ``b_enc``.

    SAELens sets thresholds below 0 to 0 at every forward pass, so those that its last update left there become 0 here.
    """
    b_enc = sae.b_enc - sae.b_dec @ sae.W_enc if sae.cfg.apply_b_dec_to_input else sae.b_enc
    named = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": b_enc, "b_dec": sae.b_dec}
    named["threshold"] = sae.threshold.clamp_min(0.0)
    return {name: value.detach().clone().float() for name, value in named.items()}


@torch.no_grad()
def _check_same(sae: Any, arrays: Arrays, x: Tensor) -> None:
    """Check that the converted weights reconstruct as SAELens's own class does, up to float32 rounding.

    Rows in which rounding moves a latent over its threshold are left out; there are few.
    """
    pre, acts = x @ arrays["W_enc"] + arrays["b_enc"], sae.encode(x)
    f = pre * (pre > arrays["threshold"])
    same = ((f > 0) == (acts > 0)).all(dim=1)
    own, x_hat = sae.decode(acts)[same], (f @ arrays["W_dec"] + arrays["b_dec"])[same]
    share, error = float(same.float().mean()), float((own - x_hat).norm() / own.norm())
    if not (share > 0.95 and error <= 1e-4):
        raise GemmaScopeError(f"The converted SAE is not SAELens's: {share:.1%} of rows alike, error {error:.1e}.")


@torch.no_grad()
def measure(arrays: Arrays, x: Tensor) -> dict[str, float]:
    """``l0``, ``fvu``, ``alive`` and ``dense_share`` on raw activations ``x [n, d]``, sums in float64.

    ``alive`` is the share of latents that fire at all, ``dense_share`` the share of L0 that comes from latents which
    fire on more than a tenth of the activations: 0 for a sparse dictionary, 1 for a basis.
    """
    error, total, square = 0.0, torch.zeros(x.shape[1], dtype=torch.float64), 0.0
    fired = torch.zeros(len(arrays["b_enc"]), dtype=torch.float64)
    for part in x.split(4096):
        rows = part.float()
        pre = rows @ arrays["W_enc"] + arrays["b_enc"]
        f = pre * (pre > arrays["threshold"])
        fired += (f > 0).sum(0)
        error += float((rows - f @ arrays["W_dec"] - arrays["b_dec"]).double().square().sum())
        square += float(rows.double().square().sum())
        total += rows.double().sum(0)
    variance = square - float(total.square().sum()) / len(x)
    frequency = fired / len(x)
    l0 = float(frequency.sum())
    return {
        "l0": l0,
        "fvu": error / variance,
        "alive": float((fired > 0).double().mean()),
        "dense_share": float(frequency[frequency > DENSE_FREQUENCY].sum()) / l0 if l0 else 0.0,
    }


def interpolated(points: Sequence[tuple[float, float]], l0: float) -> float:
    """The value at ``l0`` of the lower envelope of ``points (l0, value)``: straight between neighbours in logarithms.

    Raises:
        GemmaScopeError: ``l0`` is outside the points' range: nothing is extrapolated.
    """
    best: list[tuple[float, float]] = []
    for at, value in sorted(points):
        if not best or value < best[-1][1]:
            best.append((at, value))
    for (a, va), (b, vb) in pairwise(best):
        if a <= l0 <= b:
            share = (math.log(l0) - math.log(a)) / (math.log(b) - math.log(a))
            return math.exp((1.0 - share) * math.log(va) + share * math.log(vb))
    raise GemmaScopeError(f"No points on both sides of L0 {l0:.2f}: {[round(at, 2) for at, _ in best]}.")


def coefficient_for(
    train: Callable[[float], float], target: float, guess: float, *, tries: int = 4, close: float = 0.1
) -> float:
    """A coefficient at which ``train(coefficient) -> L0`` comes within ``close`` of the target: secants in logarithms.

    The first step assumes that L0 falls like the coefficient to the power -0.7.
    """
    seen: list[tuple[float, float]] = []
    at = math.log(guess)
    for _ in range(tries):
        miss = math.log(max(train(math.exp(at)), 1e-2) / target)
        seen.append((at, miss))
        if abs(miss) <= close:
            break
        slope = -0.7
        if len(seen) > 1 and seen[-1][0] != seen[-2][0]:
            slope = min(-0.1, max(-3.0, (seen[-1][1] - seen[-2][1]) / (seen[-1][0] - seen[-2][0])))
        at += max(-2.0, min(2.0, -miss / slope))
    return math.exp(min(seen, key=lambda pair: abs(pair[1]))[0])


def peer_points(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of SAELens's recipes."""
    return [point for point in points if point["recipe"].startswith(PEER)]


def comparison(points: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Rows of the table: FVU and delta loss of this package and of the peer, interpolated to the same L0.

    A value is compared with the peer's of the same seed. Intervals are Student's 95 % intervals over the seeds.
    """
    rows: list[dict[str, Any]] = []
    own = [point for point in points if point["recipe"] == "ours"]
    for target in sorted({point["settings"]["target_l0"] for point in own}):
        same = [point for point in own if point["settings"]["target_l0"] == target]
        for metric, label in (("fvu", "FVU"), ("delta_loss", "delta loss")):
            values = [point[metric] for point in same]
            others = [_peer_at(points, metric, point) for point in same]
            ratios = [other / value for value, other in zip(values, others, strict=True)]
            low, high = interval(ratios)
            rows.append(
                {
                    "what": f"{label} at L0 {target:g}, {what}",
                    "peer": f"{PEER}, best found, interpolated",
                    "ours": _shown(values),
                    "theirs": _shown(others),
                    "ratio": sum(ratios) / len(ratios),
                    "ratio_low": low,
                    "ratio_high": high,
                    "seeds": len(same),
                }
            )
    return rows


def _peer_at(points: Sequence[dict[str, Any]], metric: str, point: dict[str, Any]) -> float:
    """The peer's value at the L0 of one of our points, by the SAEs of its seed."""
    near = [(p["l0"], p[metric]) for p in peer_points(points) if p["seed"] == point["seed"]]
    return interpolated(near, point["l0"])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean; a single value has no interval, which is shown as NaN."""
    if len(values) < 2:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _shown(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{sum(values) / len(values):.4f}" + ("" if math.isnan(low) else f" ± {(high - low) / 2:.4f}")


def save_points(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write ``results/<name>.json``: rows of the README's table, and further data for the figure."""
    path = save(name, rows)
    return write_atomically(path, json.dumps({**json.loads(path.read_text("utf-8")), **more}, indent=2) + "\n")


def load_points(name: str) -> dict[str, Any]:
    """Read what :func:`save_points` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def draw(name: str, where: str, out: Path) -> Path:
    """Draw the figure of the points that :func:`save_points` wrote; ``where`` is the beginning of the title."""
    import pandas as pd

    stored = load_points(name)
    setting = stored["setting"]
    title = f"{where}, {setting['budget']['d_sae']} latents, {setting['tokens'] / 1e6:.1f}M tokens"
    return save_figure(pareto(pd.DataFrame(stored["points"]), ("fvu", "delta_loss", "dense_share"), title=title), out)
