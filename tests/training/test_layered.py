"""Crosscoders and cross-layer transcoders in training: against NumPy, and what surrounds the steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.training import dense_pass, layered_trainer, optimizer
from gemma_scope_tl.training.layered_spec import LayeredSpec
from gemma_scope_tl.training.layered_trainer import LayeredTrainer
from gemma_scope_tl.training.recipe import Recipe
from gemma_scope_tl.training.shard import Shard
from tests.training.layered_oracle import Arrays, LayeredOracle

STEPS, BATCH, K, D_IN, D_OUT, M = 50, 40, 3, 6, 5, 16
INPUTS, OUTPUTS = (3.7, 5.1, 9.0), (1.5, 0.6, 2.0)
PRINTED = Recipe(
    lr=6e-3,
    lr_warm_up_steps=12,
    lr_decay=0.3,
    batch_size=BATCH,
    l0_penalty="quadratic",
    l0_coefficient=2e-3,
    l0_warm_up_steps=20,
    frequency_coefficient=0.05,
    frequency_limit=0.15,
    init_threshold=0.15,
    bandwidth=0.2,
)
TOGETHER = replace(
    PRINTED,
    betas=(0.9, 0.99),
    ste_to_input=0.8,
    ste_to_input_fade=0.9,
    matryoshka=(0.25, 0.5),
    b_dec_start="mean",
    init_threshold=0.6,
)


def _spec(kind: str, recipe: Recipe, *, skip: bool = False, **values: Any) -> LayeredSpec:
    return LayeredSpec("coder", kind, (1, 2, 4), K * M, recipe, 3, 6.0, skip, l0_start=14.0, **values)


def _data(kind: str, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Sparse sums of directions, of which later layers keep some: ``x [steps, K, n, d_in]`` and targets."""
    rng = np.random.default_rng(seed)
    strengths = rng.exponential(size=(STEPS, BATCH, 20)) * (rng.random((STEPS, BATCH, 20)) < 0.15)
    directions = rng.normal(size=(20, D_IN)) + 0.5 * rng.normal(size=(K, 20, D_IN))
    x = np.einsum("snl,kld->sknd", strengths, directions) + 0.3 * rng.normal(size=D_IN)
    x /= np.sqrt((x**2).sum(-1).mean((0, 2)))[None, :, None, None]
    if kind == "crosscoder":
        return x, x
    y = np.maximum(np.einsum("sknd,kde->skne", x, rng.normal(size=(K, D_IN, D_OUT))), 0.0) + 0.1
    return x, y / np.sqrt((y**2).sum(-1).mean((0, 2)))[None, :, None, None]


def _trainer(spec: LayeredSpec, **options: Any) -> LayeredTrainer:
    d_out = D_OUT if spec.is_transcoder else D_IN
    return LayeredTrainer(D_IN, d_out, spec, total_steps=STEPS, dtype=torch.float64, **options)


def _arrays(trainer: LayeredTrainer) -> Arrays:
    """The trainer's parameters in the oracle's layout."""
    w = {name: value.numpy().copy() for name, value in trainer.weights.named().items()}
    d_out = trainer.d_out
    planes = np.zeros((K, M, K, d_out))
    for j in range(K):
        planes[j, :, j:] = w[f"{j}.dec"].reshape(M, K - j, d_out)
    found = {"E": "enc", "b": "b_enc", "log_theta": "log_threshold"}
    arrays = {new: np.stack([w[f"{j}.{old}"] for j in range(K)]) for new, old in found.items()}
    return arrays | {"W": planes, "c": w["b_dec"]} | ({"S": w["skip"]} if "skip" in w else {})


def _step(trainer: LayeredTrainer, x: np.ndarray, y: np.ndarray) -> None:
    targets = [torch.tensor(one) for one in y] if trainer.spec.is_transcoder else None
    trainer.step([torch.tensor(one) for one in x], targets)


class ThreadShard(Shard):
    """One of several threads that divide the latents or the rows, and add up their parts."""

    barrier: Barrier
    parts: dict[int, torch.Tensor]

    def sharing(self, barrier: Barrier, parts: dict[int, torch.Tensor]) -> ThreadShard:
        """This shard, with what all threads have in common."""
        self.__dict__.update(barrier=barrier, parts=parts)
        return self

    def _sum(self, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        if ranks == 1:
            return tensor
        self.parts[rank] = tensor
        self.barrier.wait()
        total = torch.stack([self.parts[rank] for rank in sorted(self.parts)]).sum(0)
        self.barrier.wait()
        return total

    def sum_latents(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._sum(tensor, self.latent_rank, self.latent_ranks)

    def sum_data(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._sum(tensor, self.data_rank, self.data_ranks)


@pytest.mark.parametrize("axis", ["latent", "data"])
@pytest.mark.parametrize(("kind", "skip"), [("crosscoder", False), ("clt", True)])
def test_a_divided_run_is_the_undivided_one(kind: str, skip: bool, axis: str) -> None:
    """In float64; sums in another order, through Adam's division by roots of small squares."""
    x, y = _data(kind)
    spec = _spec(kind, TOGETHER, skip=skip)
    alone = _trainer(spec)
    for inputs, targets in zip(x, y, strict=True):
        _step(alone, inputs, targets)
    barrier, parts = Barrier(2), dict[int, torch.Tensor]()

    def part(rank: int) -> LayeredTrainer:
        shard = ThreadShard(**{f"{axis}_rank": rank, f"{axis}_ranks": 2}).sharing(barrier, parts)
        trainer, rows = _trainer(spec, shard=shard), shard.rows(BATCH)
        for inputs, targets in zip(x, y, strict=True):
            _step(trainer, inputs[:, rows], targets[:, rows])
        return trainer

    with ThreadPoolExecutor(2) as pool:
        trainers = list(pool.map(part, range(2)))
    for name, value in alone.weights.named().items():
        found = [trainer.weights.named()[name] for trainer in trainers]
        divided = axis == "latent" and name not in ("b_dec", "skip")
        whole = torch.cat(found) if divided else found[0]
        torch.testing.assert_close(whole, value, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
    with ThreadPoolExecutor(2) as pool:
        rows = [row for (row,) in pool.map(lambda trainer: trainer.status(), trainers)]
    (wanted,) = alone.status()
    for row in rows:
        assert {k: v for k, v in row.items() if isinstance(v, str)} == {"name": "coder"}
        for key, value in wanted.items():
            assert row[key] == (pytest.approx(value, rel=1e-8) if isinstance(value, float) else value), key


def test_a_resumed_run_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the choice of the passes differs between layers and steps: it is part of the state."""
    monkeypatch.setattr(layered_trainer, "DENSE_ENTRIES", 0.25)
    x, y = _data("clt")
    spec = replace(_spec("clt", TOGETHER, skip=True), l0_start=None)
    straight, stopped = _trainer(spec), _trainer(spec)
    for trainer in (straight, stopped):
        trainer.start_from({}, 17.3)
    for number in range(STEPS):
        if number == 21:
            state = stopped.state()
            stopped = _trainer(spec)
            stopped.load_state(state)
        for trainer in (straight, stopped):
            _step(trainer, x[number], y[number])
    for name, value in straight.state().items():
        assert torch.equal(value, stopped.state()[name]), name
    with pytest.raises(GemmaScopeError, match="lacks"):
        stopped.load_state({})
    with pytest.raises(GemmaScopeError, match="before the first step only"):
        stopped.start_from({})


def test_what_a_step_refuses() -> None:
    x, y = _data("clt")
    trainer = _trainer(_spec("clt", PRINTED, skip=True))
    before = {name: value.clone() for name, value in trainer.weights.named().items()}
    inputs, targets = [torch.tensor(one) for one in x[0]], [torch.tensor(one) for one in y[0]]
    with pytest.raises(GemmaScopeError, match="needs targets"):
        trainer.step(inputs)
    with pytest.raises(GemmaScopeError, match="x must be 3 times"):
        trainer.step(inputs[:2], targets)
    with pytest.raises(GemmaScopeError, match="not finite. Nothing was changed"):
        trainer.step([inputs[0] * float("nan"), *inputs[1:]], targets)
    assert all(torch.equal(value, before[name]) for name, value in trainer.weights.named().items())


CASES: list[Any] = [
    pytest.param("crosscoder", PRINTED, False, id="crosscoder"),
    pytest.param("clt", PRINTED, True, id="clt with skip"),
    pytest.param("crosscoder", TOGETHER, False, id="crosscoder, all options"),
    pytest.param("clt", TOGETHER, True, id="clt with skip, all options"),
]


@pytest.mark.parametrize(
    ("dense_from", "few"), [(0.0, 0.0), (0.0, 2.0), (0.25, 0.2), (2.0, 0.0)], ids=["dense", "few", "mixed", "sparse"]
)
@pytest.mark.parametrize(("kind", "recipe", "skip"), CASES)
def test_fifty_steps(kind: str, recipe: Recipe, skip: bool, dense_from: float, few: float) -> None:
    """Sums in another order differ by some 1e-16 a step, and Adam divides small numbers by small numbers."""
    x, y = _data(kind)
    with (
        patch.object(layered_trainer, "DENSE_ENTRIES", dense_from),
        patch.object(dense_pass, "BLOCK_BYTES", {"cpu": 8 * BATCH * 8}),
        patch.object(dense_pass, "ACTIVE_ENTRIES", few),
        patch.object(dense_pass, "KEPT_BYTES", 8 * BATCH * 8),  # one block is kept, the others are computed again
        patch.object(optimizer, "CHUNK_BYTES", {"cpu": 8 * D_IN * 4}),
    ):
        trainer = _trainer(_spec(kind, recipe, skip=skip))
        start = _arrays(trainer)
        oracle = LayeredOracle(start, recipe, (14.0, 6.0, 20), STEPS, centred=kind == "crosscoder")
        for inputs, targets in zip(x, y, strict=True):
            oracle_target = trainer.target
            _step(trainer, inputs, targets)
            oracle.step(inputs, targets)
            (row,) = trainer.status()
            assert oracle_target == pytest.approx(oracle.target, rel=1e-14)
            assert row["error"] == pytest.approx(oracle.errors.mean(), rel=1e-10)
            assert row["l0"] == pytest.approx(oracle.l0s.sum(), rel=1e-12)
            for k, layer in enumerate((1, 2, 4)):
                assert row[f"error_layer_{layer}"] == pytest.approx(oracle.errors[k], rel=1e-9)
                assert row[f"l0_layer_{layer}"] == pytest.approx(oracle.l0s[k], rel=1e-12)
    if recipe.init_threshold == TOGETHER.init_threshold:  # latents that were idle for some steps, then moved again
        assert 0 < oracle.idle < STEPS * K * M
    for name, value in _arrays(trainer).items():
        np.testing.assert_allclose(value, oracle.p[name], rtol=1e-9, atol=1e-10, err_msg=name)
        assert np.abs(value - start[name]).max() > 0.01, f"{name} did not train"
    pre, on, _ = oracle.forward(x[0])
    wanted = oracle.outputs(x[0], pre * on)
    released = trainer.released(INPUTS, INPUTS if kind == "crosscoder" else OUTPUTS)
    raw = [torch.tensor(x[0, k] * INPUTS[k]) for k in range(K)]
    f = [torch.relu(raw[k] @ w["W_enc"] + w["b_enc"]) for k, w in enumerate(released)]
    f = [value * (value > w["threshold"]) for value, w in zip(f, released, strict=True)]
    for k, w in enumerate(released):
        out = w["b_dec"] + sum(f[j] @ released[j]["W_dec"][:, k - j] for j in range(k + 1))
        if skip:
            out = out + raw[k] @ w["affine_skip_connection"]
        scale = (INPUTS if kind == "crosscoder" else OUTPUTS)[k]
        np.testing.assert_allclose(out.numpy(), scale * wanted[k], rtol=1e-9, atol=1e-9)
