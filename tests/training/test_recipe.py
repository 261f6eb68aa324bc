"""The recipe's pieces, and whole training steps against an oracle written in NumPy from the paper's equations."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.interop.runners import recipe_applied
from gemma_scope_tl.interop.training_sae import GemmaScopeTrainingSAE, GemmaScopeTrainingSAEConfig
from gemma_scope_tl.training.loop import (
    StreamingRMS,
    adam,
    decoder_on_sphere,
    lr_schedule,
    project_out_rows,
    unit_rows_,
)
from gemma_scope_tl.training.recipe import FAST, PAPER, Recipe, fast

STEPS, BATCH, D_IN, D_SAE, SCALE = 40, 64, 6, 15, 3.7
RECIPE = Recipe(
    lr=4e-3,
    lr_warm_up_steps=10,
    batch_size=BATCH,
    l0_coefficient=0.05,
    l0_warm_up_steps=25,
    init_threshold=0.2,
    bandwidth=0.4,
)


def _data() -> np.ndarray:
    """``[STEPS, BATCH, D_IN]`` with ``E ||x||^2`` near ``SCALE**2`` and a mean that is not 0."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(STEPS, BATCH, D_IN)) + rng.normal(size=D_IN)
    return x * SCALE / np.sqrt((x**2).sum(-1).mean())


def _sae() -> GemmaScopeTrainingSAE:
    torch.manual_seed(2)
    return GemmaScopeTrainingSAE(
        GemmaScopeTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64", **RECIPE.sae_settings())
    )


def _numpy_params(sae: GemmaScopeTrainingSAE) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in sae.state_dict().items()}


def _gradients(p: dict[str, np.ndarray], x: np.ndarray, lam: float, eps: float) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a batch and its gradients, by hand."""
    theta, n = np.exp(p["log_threshold"]), len(x)
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    on = pre > theta
    f = pre * on
    error = f @ p["W_dec"] + p["b_dec"] - x
    loss = (error**2).sum() / n + lam * on.sum() / n
    g_out = 2 * error / n
    g_f = g_out @ p["W_dec"].T
    g_pre = g_f * on
    near = np.abs((pre - theta) / eps) < 0.5
    g_theta = -(near * (theta * g_f + lam / n)).sum(0) / eps
    return loss, {
        "W_dec": f.T @ g_out,
        "W_enc": (x - p["b_dec"]).T @ g_pre,
        "b_enc": g_pre.sum(0),
        "b_dec": g_out.sum(0) - p["W_enc"] @ g_pre.sum(0),
        "log_threshold": theta * g_theta,
    }


def _oracle(p: dict[str, np.ndarray], data: np.ndarray, recipe: Recipe) -> tuple[list[float], dict[str, np.ndarray]]:
    """Train in NumPy: loss, projection, Adam with betas (0, b2), renormalisation."""
    second = {name: np.zeros_like(value) for name, value in p.items()}
    losses: list[float] = []
    for t, x in enumerate(data):
        lam = recipe.l0_coefficient * min(1.0, t / recipe.l0_warm_up_steps)
        warm = min(1.0, t / recipe.lr_warm_up_steps)
        lr = recipe.lr * (0.1 + 0.9 * (1 - math.cos(math.pi * warm)) / 2)
        loss, grads = _gradients(p, x, lam, recipe.bandwidth)
        losses.append(loss)
        rows = p["W_dec"] / np.linalg.norm(p["W_dec"], axis=1, keepdims=True)
        grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * rows).sum(1, keepdims=True) * rows
        for name, g in grads.items():
            second[name] = recipe.betas[1] * second[name] + (1 - recipe.betas[1]) * g**2
            corrected = second[name] / (1 - recipe.betas[1] ** (t + 1))
            p[name] = p[name] - lr * g / (np.sqrt(corrected) + recipe.eps)
        p["W_dec"] = p["W_dec"] / np.linalg.norm(p["W_dec"], axis=1, keepdims=True)
    return losses, p


def _assert_same(sae: GemmaScopeTrainingSAE, expected: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> None:
    for name, value in _numpy_params(sae).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-10, err_msg=name)
        assert np.abs(value - start[name]).max() > 0.01, f"{name} did not train"


def test_a_plain_loop_agrees_with_the_numpy_oracle() -> None:
    sae, data = _sae(), _data() / SCALE
    start = _numpy_params(sae)
    expected_losses, expected = _oracle(dict(start), data, RECIPE)
    optimizer = adam(sae.parameters(), RECIPE)
    schedule = lr_schedule(optimizer, RECIPE)
    losses: list[float] = []
    with decoder_on_sphere(optimizer, lambda: sae.W_dec):
        for t, x in enumerate(data):
            step_input = TrainStepInput(torch.tensor(x), {"l0": RECIPE.l0_coefficient_at(t)}, None, t, False)
            loss = sae.training_forward_pass(step_input).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-11)
    _assert_same(sae, expected, start)


def _trainer(sae: GemmaScopeTrainingSAE, data: np.ndarray) -> SAETrainer[Any, Any]:
    cfg = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=STEPS * BATCH,
        device="cpu", autocast=False, lr=RECIPE.lr, lr_end=RECIPE.lr, lr_scheduler_name="constant", lr_warm_up_steps=0,
        adam_beta1=0.0, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=BATCH,
        dead_feature_window=1000, feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=1,
    )  # fmt: skip
    return SAETrainer(cfg, sae, iter(torch.tensor(data)))


@pytest.mark.parametrize("gain", [1.0, 30.0])
def test_saelens_trainer_agrees_with_the_numpy_oracle(gain: float) -> None:
    """Through SAELens's own loop: scale, schedule and hooks; with ``gain`` most steps would be clipped."""
    sae, data = _sae(), _data()
    start = _numpy_params(sae)
    scale = SCALE / gain
    _, expected = _oracle(dict(start), data / scale, RECIPE)
    trainer = _trainer(sae, data)
    with recipe_applied(trainer, RECIPE, scale):
        trainer.fit()
    for name in ("b_enc", "b_dec"):
        expected[name] = expected[name] * scale
    expected["log_threshold"] = expected["log_threshold"] + math.log(scale)
    _assert_same(sae, expected, start)
    assert sae.grad_scale == 1.0
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    assert not any(getattr(trainer.optimizer, name) for name in hooks)


def test_saelens_alone_is_not_the_recipe() -> None:
    """What the hooks are for: the same loop without them clips and lets decoder rows drift."""
    sae = _sae()
    _trainer(sae, _data()).fit()
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-3


def test_presets() -> None:
    assert (PAPER.lr, PAPER.betas, PAPER.eps, PAPER.batch_size) == (7e-5, (0.0, 0.999), 1e-8, 4096)
    assert (PAPER.bandwidth, PAPER.init_threshold) == (1e-3, 1e-3)
    assert (PAPER.lr_warm_up_steps, PAPER.l0_warm_up_steps) == (1000, 10_000)
    assert (FAST.betas, FAST.eps, FAST.lr_start) == ((0.9, 0.95), PAPER.eps, PAPER.lr_start)
    assert fast(128) == FAST
    with pytest.raises(AttributeError):
        PAPER.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("betas", ("0.9", 0.95)),
        ("betas", (False, 0.9)),
        ("betas", 0.9),
        ("matryoshka", ("a",)),
        ("lr", "a"),
        ("lr", True),
        ("batch_size", 64.0),
        ("l0_penalty", ["linear"]),
    ],
)
def test_values_of_other_types_are_refused(name: str, value: Any) -> None:
    """In plain data and in the constructor."""
    for make in (lambda: Recipe(**{name: value}), lambda: Recipe.from_json({name: value})):
        with pytest.raises(GemmaScopeError, match=rf"recipe\.{name} cannot be "):
            make()
    assert Recipe(lr=np.float32(0.5), batch_size=np.int64(8)).lr == 0.5  # type: ignore[arg-type]


def test_fast_knows_its_limits() -> None:
    """The quantile of a share that vanishes beside 1 is infinite; of the last one above it, it is not."""
    assert math.isfinite(fast(128, d_sae=1 << 30, target_l0=1e-6).init_threshold)
    sizes: dict[str, Any]
    for sizes in ({"target_l0": 1e-300}, {"d_sae": 10**18, "target_l0": 6}, {"target_l0": 0}, {"target_l0": math.nan}):
        with pytest.raises(GemmaScopeError, match="knows no start for an L0 of"):
            fast(128, **sizes)
    for sizes in ({"d_sae": 0}, {"steps": 0}):
        with pytest.raises(GemmaScopeError, match="1 or more"):
            fast(128, **sizes)


def test_learning_rate() -> None:
    rates = [PAPER.lr_at(t) for t in range(1002)]
    assert rates[0] == pytest.approx(7e-6)
    assert rates[500] == pytest.approx(0.55 * 7e-5)
    assert rates[1000] == rates[1001] == 7e-5
    assert all(a < b for a, b in itertools.pairwise(rates[:1001]))
    decaying = replace(PAPER, lr_decay=0.25)
    assert decaying.lr_at(3000, 4000) == 7e-5
    assert decaying.lr_at(3500, 4000) == pytest.approx(3.5e-5)
    assert decaying.lr_at(4000, 4000) == 0.0
    with pytest.raises(GemmaScopeError, match="total_steps"):
        decaying.lr_at(5)


def test_a_continued_schedule_is_the_same_schedule() -> None:
    def optimizer() -> torch.optim.Adam:
        return adam([torch.nn.Parameter(torch.zeros(1))], PAPER)

    first = optimizer()
    schedule = lr_schedule(first, PAPER)
    for _ in range(137):
        first.step()
        schedule.step()
    second = optimizer()
    lr_schedule(second, PAPER, steps_done=137)
    assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"] == PAPER.lr_at(137)


def test_projection_leaves_the_tangent_part() -> None:
    grad, rows = torch.randn(5, 3, dtype=torch.float64), unit_rows_(torch.randn(5, 3, dtype=torch.float64))
    tangent = project_out_rows(grad, rows)
    torch.testing.assert_close((tangent * rows).sum(1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(project_out_rows(tangent, rows), tangent)


def test_streaming_rms_is_the_root_mean_square_norm() -> None:
    x = torch.randn(100, 7, dtype=torch.float64)
    rms = StreamingRMS()
    for part in x.split(9):
        rms.update(part)
    assert rms.scale == pytest.approx(math.sqrt((x**2).sum(1).mean().item()), rel=1e-12)
    assert ((x / rms.scale) ** 2).sum(1).mean().item() == pytest.approx(1.0)
    wide = StreamingRMS()
    wide.update(x.reshape(4, 25, 7).bfloat16())
    assert wide.scale == pytest.approx(rms.scale, rel=1e-2)
    with pytest.raises(GemmaScopeError, match="0 activations"):
        _ = StreamingRMS().scale
