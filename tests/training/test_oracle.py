"""Whole runs against an implementation in NumPy, written from the papers' equations: dense, float64, its own Adam."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from gemma_scope_tl.sites import Place
from gemma_scope_tl.training import dense_pass, optimizer, place
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.recipe import Recipe
from gemma_scope_tl.training.spec import SAESpec

STEPS, BATCH, D_IN, D_OUT, D_SAE, SCALE = 50, 48, 7, 5, 30, 3.7
PLAIN = Recipe(
    lr=6e-3,
    lr_warm_up_steps=12,
    lr_decay=0.3,
    batch_size=BATCH,
    l0_coefficient=0.02,
    l0_warm_up_steps=20,
    init_threshold=0.15,
    bandwidth=0.2,
)
SECOND = replace(
    PLAIN,
    l0_penalty="quadratic",
    l0_coefficient=2e-3,
    frequency_coefficient=0.05,
    frequency_limit=0.15,
    matryoshka=(0.2, 0.5),
)
MOMENTUM = replace(
    PLAIN, betas=(0.9, 0.95), ste_to_input=0.8, ste_to_input_fade=0.9, init_threshold=0.7, b_dec_start="mean"
)
TOGETHER = replace(SECOND, betas=(0.9, 0.99), ste_to_input=0.8, ste_to_input_fade=0.9)
Arrays = dict[str, np.ndarray]


class Oracle:
    """One SAE or transcoder, trained by the equations."""

    def __init__(self, start: Arrays, recipe: Recipe, target: float | None, transcoder: bool) -> None:
        self.p = {name: value.copy() for name, value in start.items()}
        self.m = {name: np.zeros_like(value) for name, value in start.items()}
        self.v = {name: np.zeros_like(value) for name, value in start.items()}
        self.recipe, self.target, self.transcoder = recipe, target, transcoder
        self.t = self.idle = 0
        self.error = self.l0 = 0.0

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        shift = 0.0 if self.transcoder else self.p["b_dec"]
        theta = np.exp(self.p["log_threshold"])
        pre = (x - shift) @ self.p["W_enc"] + self.p["b_enc"]
        return pre, (pre > theta).astype(float), theta

    def gradients(self, x: np.ndarray, y: np.ndarray) -> Arrays:
        r, p, n = self.recipe, self.p, len(x)
        pre, on, theta = self.forward(x)
        f = pre * on
        kernel = (np.abs((pre - theta) / r.bandwidth) < 0.5).astype(float)
        d_f = np.zeros_like(f)
        grads = {name: np.zeros_like(value) for name, value in p.items()}
        sizes = [round(share * D_SAE) for share in r.matryoshka] + [D_SAE]
        for size in sizes:
            error = f[:, :size] @ p["W_dec"][:size] + p["b_dec"] - y
            if "skip" in p:
                error += x @ p["skip"]
            d_hat = 2.0 * error / (n * len(sizes))
            if "skip" in p:
                grads["skip"] += x.T @ d_hat
            grads["W_dec"][:size] += f[:, :size].T @ d_hat
            grads["b_dec"] += d_hat.sum(0)
            d_f[:, :size] += d_hat @ p["W_dec"][:size].T
        self.error, self.l0 = (error**2).sum() / n, on.sum() / n
        warm = min(1.0, self.t / r.l0_warm_up_steps)
        lam = r.l0_coefficient * warm
        counts = on.sum(1, keepdims=True)
        if r.l0_penalty == "quadratic":
            assert self.target is not None
            d_on = np.tile(lam * (2 / self.target) * 2 * (counts - self.target) / n, (1, D_SAE))
        else:
            d_on = np.full_like(on, lam / n)
        d_on = d_on + r.frequency_coefficient * warm * (on.mean(0) > r.frequency_limit) / n
        d_theta = (-(theta / r.bandwidth) * kernel * d_f - kernel * d_on / r.bandwidth).sum(0)
        grads["log_threshold"] = d_theta * theta
        d_pre = d_f * on
        if r.ste_to_input:
            factor = r.ste_to_input * max(0.0, 1.0 - self.t / (r.ste_to_input_fade * STEPS))
            d_pre = d_pre + factor * kernel * (theta * d_f + d_on) / r.bandwidth
        self.touched = (on + kernel).any(0)
        self.idle += int((~self.touched).sum())
        shift = 0.0 if self.transcoder else p["b_dec"]
        grads["W_enc"] = (x - shift).T @ d_pre
        grads["b_enc"] = d_pre.sum(0)
        if not self.transcoder:
            grads["b_dec"] -= (d_pre @ p["W_enc"].T).sum(0)
        return grads

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        r = self.recipe
        if self.t == 0 and r.b_dec_start == "mean":
            self.p["b_dec"] = y.mean(0)
        grads = self.gradients(x, y)
        d = self.p["W_dec"]
        grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * d).sum(1, keepdims=True) * d
        lr = r.lr
        if self.t < r.lr_warm_up_steps:
            lr *= 0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * self.t / r.lr_warm_up_steps))
        lr *= min(1.0, (STEPS - self.t) / (r.lr_decay * STEPS))
        self.t += 1
        (beta1, beta2), moved = (
            r.betas,
            {"W_enc": self.touched, "W_dec": self.touched[:, None], "b_dec": True, "skip": True},
        )
        for name, g in grads.items():
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * g
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * g**2
            m, v = self.m[name] / (1 - beta1**self.t), self.v[name] / (1 - beta2**self.t)
            self.p[name] = self.p[name] - moved.get(name, self.touched) * lr * m / (np.sqrt(v) + 1e-8)
        self.p["W_dec"] /= np.linalg.norm(self.p["W_dec"], axis=1, keepdims=True)

    def released(self, x: np.ndarray) -> np.ndarray:
        """The reconstruction of raw activations."""
        pre, on, _ = self.forward(x / SCALE)
        out = (pre * on) @ self.p["W_dec"] + self.p["b_dec"]
        return SCALE * (out + x / SCALE @ self.p["skip"] if "skip" in self.p else out)


def _data(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sparse sums of directions with a mean that is not 0, and a linear function of them."""
    rng = np.random.default_rng(seed)
    strengths = rng.exponential(size=(STEPS, BATCH, 20)) * (rng.random((STEPS, BATCH, 20)) < 0.15)
    x = strengths @ rng.normal(size=(20, D_IN)) + 0.3 * rng.normal(size=D_IN)
    x /= np.sqrt((x**2).sum(-1).mean())
    return x, x @ rng.normal(size=(D_IN, D_OUT)) * 0.7 + 0.1


def _start(trainer: PlaceTrainer, index: int) -> Arrays:
    member = trainer.members[index]
    found = {name: value.numpy().copy() for name, value in trainer.weights.of(index, member.rows, member.skip).items()}
    found["W_enc"], found["W_dec"] = found.pop("enc").T.copy(), found.pop("dec")
    return found


def _trainer(
    recipe: Recipe, target: float | None, transcoder: bool, saes: int = 2, skips: tuple[int, ...] = ()
) -> PlaceTrainer:
    site = "transcoder" if transcoder else "mlp"
    specs = [SAESpec(f"sae {i}", Place(site, 0), D_SAE, recipe, i, target, i in skips) for i in range(saes)]
    d_out = D_OUT if transcoder else D_IN
    return PlaceTrainer(D_IN, d_out, specs, total_steps=STEPS, dtype=torch.float64)


CASES: list[Any] = [
    pytest.param(PLAIN, None, False, (), id="paper"),
    pytest.param(PLAIN, None, True, (), id="transcoder"),
    pytest.param(PLAIN, None, True, (0, 1), id="skip transcoders"),
    pytest.param(SECOND, 3.0, False, (), id="gemma-scope-2"),
    pytest.param(SECOND, 3.0, True, (1,), id="gemma-scope-2 transcoder without and with skip"),
    pytest.param(MOMENTUM, None, False, (), id="momentum, gradient to the input"),
    pytest.param(replace(MOMENTUM, ste_to_input=0.0), None, True, (0,), id="momentum, skip"),
    pytest.param(
        replace(SECOND, betas=(0.9, 0.99), ste_to_input=0.8, ste_to_input_fade=0.9), 3.0, False, (), id="all together"
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "target", "transcoder", "skips"), CASES)
@pytest.mark.parametrize(
    ("dense_from", "few"),
    [(0.0, 0.0), (0.0, 2.0), (0.2, 0.2), (2.0, 0.0)],
    ids=["dense", "dense pre-activations", "mixed", "sparse"],
)
def test_fifty_steps(
    recipe: Recipe, target: float | None, transcoder: bool, skips: tuple[int, ...], dense_from: float, few: float
) -> None:
    """Sums in another order differ by some 1e-16 a step, and Adam divides small numbers by small numbers."""
    x, y = _data(3)
    with (
        patch.object(place, "DENSE_ENTRIES", dense_from),
        patch.object(dense_pass, "BLOCK_BYTES", {"cpu": 8 * BATCH * 8}),
        patch.object(dense_pass, "ACTIVE_ENTRIES", few),
        patch.object(dense_pass, "KEPT_BYTES", 8 * BATCH * 8),  # one block is kept, the others are computed again
        patch.object(optimizer, "CHUNK_BYTES", {"cpu": 8 * D_IN * 4}),
    ):
        trainer = _trainer(recipe, target, transcoder, skips=skips)
        starts = [_start(trainer, i) for i in range(2)]
        oracles = [Oracle(start, recipe, target, transcoder) for start in starts]
        for inputs, targets in zip(x, y, strict=True):
            trainer.step(torch.tensor(inputs), torch.tensor(targets) if transcoder else None)
            for oracle in oracles:
                oracle.step(inputs, targets if transcoder else inputs)
            status = trainer.status()
            for row, oracle in zip(status, oracles, strict=True):
                assert row["error"] == pytest.approx(oracle.error, rel=1e-10)
                assert row["l0"] == pytest.approx(oracle.l0, rel=1e-12)
    if recipe.init_threshold == MOMENTUM.init_threshold:  # latents that were idle for some steps, then moved again
        assert all(0 < oracle.idle < STEPS * D_SAE // 2 for oracle in oracles)
    for i, oracle in enumerate(oracles):
        for name, value in _start(trainer, i).items():
            np.testing.assert_allclose(value, oracle.p[name], rtol=1e-9, atol=1e-10, err_msg=name)
            assert np.abs(value - starts[i][name]).max() > 0.01, f"{name} did not train"
        raw = SCALE * x[0]
        w = {name: value.numpy() for name, value in trainer.released(i, SCALE).items()}
        pre = raw @ w["W_enc"] + w["b_enc"]
        out = (pre * (pre > w["threshold"])) @ w["W_dec"] + w["b_dec"]
        if i in skips:  # of raw activations, although trained on scaled ones: it has no unit
            out = out + raw @ w["affine_skip_connection"]
        np.testing.assert_allclose(out, oracle.released(raw), rtol=1e-9, atol=1e-9)


def test_the_penalties_are_at_work() -> None:
    """The case above would not see a penalty that is never due: here each changes where training ends."""
    x, _ = _data(3)
    ends: list[Arrays] = []
    for changes in ({}, {"frequency_coefficient": 0.0}, {"l0_penalty": "linear"}, {"matryoshka": ()}):
        trainer = _trainer(replace(SECOND, **changes), 3.0, False, saes=1)
        for inputs in x:
            trainer.step(torch.tensor(inputs))
        ends.append(_start(trainer, 0))
    for other in ends[1:]:
        assert np.abs(ends[0]["log_threshold"] - other["log_threshold"]).max() > 1e-3


def test_transcoders_start_untied() -> None:
    tied = _start(_trainer(PLAIN, None, False), 0)
    np.testing.assert_array_equal(tied["W_enc"], tied["W_dec"].T)
    free = _start(_trainer(PLAIN, None, True), 0)
    bound = math.sqrt(6 / D_IN)
    assert 0.9 * bound < np.abs(free["W_enc"]).max() <= bound
    assert np.abs(free["W_enc"].mean()) < 0.3 * bound
    for start in (tied, free):
        np.testing.assert_allclose(np.linalg.norm(start["W_dec"], axis=1), 1.0, rtol=1e-12)
        np.testing.assert_allclose(np.exp(start["log_threshold"]), PLAIN.init_threshold, rtol=1e-12)
        assert not start["b_enc"].any()
        assert not start["b_dec"].any()
