"""Steps of a place: against autograd with a dense Adam, resumed to the bit, refused where they must be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.interop.training_sae import FADE, GemmaScopeTrainingSAE, GemmaScopeTrainingSAEConfig
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training import optimizer, place
from gemma_scope_tl.training.loop import adam, decoder_on_sphere, lr_schedule
from gemma_scope_tl.training.optimizer import Lambda
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.recipe import GEMMA_SCOPE_2, Recipe
from gemma_scope_tl.training.shard import Shard
from gemma_scope_tl.training.spec import SAESpec, check_one_place

D, LATENTS, BATCH = 6, 40, 32
RECIPE = Recipe(
    lr=5e-3,
    lr_warm_up_steps=4,
    batch_size=BATCH,
    l0_coefficient=0.03,
    l0_warm_up_steps=6,
    init_threshold=0.3,
    bandwidth=0.2,
)
HERE = Place("res", 1)


def _specs(count: int = 2, recipe: Recipe = RECIPE, target: float | None = None, d_sae: int = LATENTS) -> list[SAESpec]:
    return [SAESpec(f"res/layer_1/{i}", HERE, d_sae, recipe, i, target) for i in range(count)]


def _trainer(specs: list[SAESpec], dtype: torch.dtype = torch.float32, steps: int = 30, d: int = D) -> PlaceTrainer:
    return PlaceTrainer(d, d, specs, total_steps=steps, dtype=dtype)


def _batches(
    steps: int, dtype: torch.dtype = torch.float32, d: int = D, rows: int = BATCH, seed: int = 0
) -> list[Tensor]:
    """Each batch lies near one of two subspaces by turns of five, so latents go silent and return."""
    gen = torch.Generator().manual_seed(seed)
    shapes = [torch.randn(3, d, generator=gen, dtype=torch.float64) for _ in range(2)]
    found = [torch.randn(rows, 3, generator=gen, dtype=torch.float64) @ shapes[t // 5 % 2] for t in range(steps)]
    return [(x / x.square().sum(1).mean().sqrt()).to(dtype) for x in found]


def _autograd(trainer: PlaceTrainer, index: int, batches: list[Tensor]) -> list[Tensor]:
    """The same SAE under autograd with PyTorch's dense Adam: enc, dec, b_enc, log_threshold, b_dec at the end."""
    spec = trainer.specs[index]
    w = {name: value.clone() for name, value in trainer.weights.of(index, trainer.members[index].rows).items()}
    settings_ = spec.recipe.sae_settings(trainer.total_steps)
    sae = GemmaScopeTrainingSAE(
        GemmaScopeTrainingSAEConfig(d_in=trainer.d_in, d_sae=spec.d_sae, dtype="float64", **settings_)
    )
    sae.load_state_dict(
        {"W_enc": w["enc"].T, "W_dec": w["dec"], **{k: w[k] for k in ("b_enc", "log_threshold", "b_dec")}}
    )
    opt = adam(sae.parameters(), spec.recipe)
    schedule = lr_schedule(opt, spec.recipe, trainer.total_steps)
    with decoder_on_sphere(opt, lambda: sae.W_dec):
        for t, x in enumerate(batches):
            lam = spec.recipe.l0_coefficient_at(t)
            opt.zero_grad()
            factors = {"l0": lam, FADE: min(1.0, t / (settings_.get("ste_to_input_steps") or math.inf))}
            sae.training_forward_pass(TrainStepInput(x, factors, None, t, False)).loss.backward()
            opt.step()
            schedule.step()
    return [p.detach() for p in (sae.W_enc.T, sae.W_dec, sae.b_enc, sae.log_threshold, sae.b_dec)]


@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.integers(2, 9),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.sampled_from([0.01, 0.3, 2.0]),
    st.booleans(),
    st.sampled_from([(0.0, 0.0), (0.7, 0.0), (1.0, 0.25)]),
)
@settings(max_examples=30, deadline=None)
def test_any_shape_agrees_with_autograd(
    seed: int, rows: int, d: int, widths: list[int], eps: float, sparse: bool, ste: tuple[float, float]
) -> None:
    recipe = replace(
        RECIPE, bandwidth=eps, ste_to_input=ste[0], ste_to_input_fade=ste[1], b_dec_start="mean" if ste[1] else "zero"
    )
    specs = [replace(s, d_sae=w, seed=seed) for s, w in zip(_specs(len(widths), recipe), widths, strict=True)]
    trainer = _trainer(specs, torch.float64, d=d)
    batches = _batches(4, torch.float64, d, rows, seed)
    expected = [_autograd(trainer, i, batches) for i in range(len(specs))]
    with (
        patch.object(place, "DENSE_ENTRIES", 2.0 if sparse else 0.0),
        patch.object(optimizer, "CHUNK_BYTES", {"cpu": 200}),
    ):
        for x in batches:
            trainer.step(x)
    for i, theirs in enumerate(expected):
        mine = trainer.weights.of(i, trainer.members[i].rows)
        for value, name in zip(theirs, ("enc", "dec", "b_enc", "log_threshold", "b_dec"), strict=True):
            torch.testing.assert_close(mine[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("chunk", "beta2", "eps"), [(200, 0.999, 1e-8), (1 << 20, 0.999, 1e-8), (200, 0.0, 1e-3)])
def test_silent_latents_that_return_agree_with_a_dense_adam(chunk: int, beta2: float, eps: float) -> None:
    """Second moments of rows that are skipped shrink when the row is next touched, not before.

    Without a memory Adam divides each gradient by its size, and a small epsilon would make steps of roundings.
    """
    recipe = replace(RECIPE, init_threshold=0.6, bandwidth=0.05, betas=(0.0, beta2), eps=eps)
    trainer = _trainer(_specs(1, recipe), torch.float64, 60)
    batches = _batches(60, torch.float64)
    (expected,) = [_autograd(trainer, 0, batches)]
    waits = torch.zeros_like(trainer.last)
    with patch.object(place, "DENSE_ENTRIES", 2.0), patch.object(optimizer, "CHUNK_BYTES", {"cpu": chunk}):
        for x in batches:
            before = trainer.last.clone()
            trainer.step(x)
            waits = torch.maximum(waits, trainer.last - before)
    if chunk == 200:
        assert (waits >= 5).sum() > 5, "no latent went silent and came back"
    mine = trainer.weights.of(0, trainer.members[0].rows)
    for value, name in zip(expected, ("enc", "dec", "b_enc", "log_threshold", "b_dec"), strict=True):
        torch.testing.assert_close(mine[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recipe", [RECIPE, replace(GEMMA_SCOPE_2, l0_warm_up_steps=5, init_threshold=0.5)])
def test_a_resumed_run_is_the_run_to_the_bit(tmp_path: Path, recipe: Recipe) -> None:
    recipe = replace(recipe, batch_size=BATCH, lr=5e-3, bandwidth=0.05, init_threshold=0.6)
    specs = _specs(2, recipe, 4.0)
    batches = _batches(30)
    with patch.object(place, "DENSE_ENTRIES", 0.2), patch.object(optimizer, "CHUNK_BYTES", {"cpu": 200}):
        whole = _trainer(specs)
        for x in batches:
            whole.step(x)
        first = _trainer(specs)
        for x in batches[:17]:
            first.step(x)
        save_file(first.state(), tmp_path / "state.safetensors")
        second = _trainer(specs)
        second.load_state(load_file(tmp_path / "state.safetensors"))
        assert second.steps_done == 17
        assert (second.last < 17).any()
        for x in batches[17:]:
            second.step(x)
    expected, found = whole.state(), second.state()
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert whole.status() == second.status()


def test_the_same_batches_give_the_same_bits() -> None:
    states: list[dict[str, Tensor]] = []
    for _ in range(2):
        trainer = _trainer(_specs())
        for x in _batches(10):
            trainer.step(x)
        states.append(trainer.state())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("dense_from", [0.0, 2.0])
def test_company_changes_rounding_only(dense_from: float) -> None:
    with patch.object(place, "DENSE_ENTRIES", dense_from):
        alone, together = _trainer(_specs(3)[1:2], torch.float64), _trainer(_specs(3), torch.float64)
        for x in _batches(20, torch.float64):
            alone.step(x)
            together.step(x)
    for name, value in alone.released(0, 2.0).items():
        torch.testing.assert_close(value, together.released(1, 2.0)[name], rtol=1e-9, atol=1e-11)


def test_a_batch_in_which_nothing_fires() -> None:
    with patch.object(place, "DENSE_ENTRIES", 2.0):
        trainer = _trainer(_specs(1, replace(RECIPE, init_threshold=50.0)))
        trainer.step(torch.ones(3, D))
    row = trainer.status()[0]
    assert row["l0"] == 0.0
    assert row["error"] == pytest.approx(D)
    assert row["silent"] == 1.0
    assert trainer.weights.b_dec.abs().min() > 0
    assert torch.equal(trainer.weights.enc, trainer.weights.dec)


@pytest.mark.parametrize("dense_from", [0.0, 2.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(dense_from: float, bad: float) -> None:
    with patch.object(place, "DENSE_ENTRIES", dense_from):
        trainer = _trainer(_specs(2))
        for x in _batches(3):
            trainer.step(x)
        before = trainer.state()
        x = _batches(1)[0]
        x[2, 1] = bad
        with pytest.raises(GemmaScopeError, match=r"Step 3: the loss of res/layer_1/0, res/layer_1/1 is not finite"):
            trainer.step(x)
        assert all(torch.equal(value, before[name]) for name, value in trainer.state().items())
        trainer.weights.b_dec[1, 0] = bad
        enc = trainer.weights.enc.clone()
        with pytest.raises(GemmaScopeError, match="the loss of res/layer_1/1 is not finite"):
            trainer.step(_batches(1)[0])
        assert torch.equal(trainer.weights.enc, enc)


def test_status_is_of_the_window() -> None:
    trainer = _trainer(_specs(1), torch.float64)
    errors: list[float] = []
    for x in _batches(6, torch.float64):
        single = _trainer(_specs(1), torch.float64)
        single.load_state(trainer.state())
        single.status()
        single.step(x)
        errors.append(float(single.status()[0]["error"]))
        trainer.step(x)
    row = trainer.status()[0]
    assert row["error"] == pytest.approx(sum(errors) / 6, rel=1e-12)
    assert (row["name"], row["step"], row["lr"]) == ("res/layer_1/0", 6, RECIPE.lr_at(6))
    assert row["lambda"] == RECIPE.l0_coefficient_at(6)
    assert math.isnan(float(trainer.status()[0]["error"]))


def test_dead_latents() -> None:
    trainer = _trainer(_specs(1))
    trainer.windows[0].last_fired[:10] = 5
    trainer.windows[0].last_fired[10:] = 6
    trainer.steps_done = 1_005
    assert trainer.status()[0]["dead"] == 10 / LATENTS


@pytest.mark.slow
def test_lambda_is_steered_towards_the_target() -> None:
    recipe = replace(RECIPE, lr=2e-2, l0_warm_up_steps=20, bandwidth=0.3)
    trainer = _trainer(_specs(2, recipe), steps=400)
    trainer.lambdas[1] = Lambda(recipe, 2.0)
    for x in _batches(400):
        trainer.step(x)
        rows = trainer.status()
    assert abs(math.log(float(rows[1]["l0"]) / 2.0)) < 0.5 * abs(math.log(float(rows[0]["l0"]) / 2.0))
    assert rows[0]["lambda"] == recipe.l0_coefficient
    assert Lambda(replace(recipe, l0_penalty="quadratic"), 2.0).target is None
    gains = [Lambda(recipe, 2.0, steps).integral for steps in (None, 10_000, 2_000, 500)]
    assert gains == [0.005, 0.005, 0.005, 0.02]


def test_state_is_checked() -> None:
    trainer = _trainer(_specs(1))
    trainer.step(_batches(1)[0])
    good = trainer.state()
    other = _trainer(_specs(1))
    before = other.state()
    name = "res/layer_1/0/enc"
    for bad, text in (
        ({k: v for k, v in good.items() if k != name}, "lacks"),
        ({**good, "res/layer_1/0/encoder": good[name]}, "Unknown"),
        ({**good, name: good[name][:, 1:]}, r"not torch.float32 \[40, 6\]"),
        ({**good, name: good[name].double()}, "float64"),
        ({**good, name: good[name] * math.nan}, "not finite"),
    ):
        with pytest.raises(GemmaScopeError, match=text):
            other.load_state(bad)
    assert all(torch.equal(value, before[key]) for key, value in other.state().items())
    good[name].zero_()
    assert trainer.weights.enc.any(), "the state is a copy"


def test_wrong_input_is_refused() -> None:
    trainer = _trainer(_specs(1))
    x = _batches(1)[0]
    with pytest.raises(GemmaScopeError, match=r"x must be \[32, 6\], not \[32, 5\]"):
        trainer.step(x[:, 1:])
    with pytest.raises(GemmaScopeError, match="give no y"):
        trainer.step(x, x)
    coder = PlaceTrainer(D, 3, [SAESpec("t", Place("transcoder", 0), 8, RECIPE, 0)], total_steps=5)
    with pytest.raises(GemmaScopeError, match="need a target"):
        coder.step(x)
    with pytest.raises(GemmaScopeError, match=r"y must be \[32, 3\]"):
        coder.step(x, x)
    for specs, text in (
        ([], "at least one"),
        ([*_specs(1), *_specs(1)], "twice"),
        ([*_specs(1), replace(_specs(2)[1], place=Place("mlp", 1))], "one place"),
        ([*_specs(1), replace(_specs(2)[1], recipe=replace(RECIPE, batch_size=8))], "batch_size"),
    ):
        with pytest.raises(GemmaScopeError, match=text):
            _trainer(specs)
    with pytest.raises(GemmaScopeError, match="reconstructs its input"):
        PlaceTrainer(D, 3, _specs(1), total_steps=5)
    with pytest.raises(GemmaScopeError, match="bfloat16"):
        _trainer(_specs(1), torch.bfloat16)
    check_one_place(_specs(2))


def test_specs_are_plain_data() -> None:
    spec = replace(_specs(1)[0], recipe=replace(GEMMA_SCOPE_2, matryoshka=(0.25, 0.5)), target_l0=20.0)
    assert SAESpec.from_json(spec.to_json()) == spec
    with pytest.raises(GemmaScopeError, match="d_sea"):
        SAESpec.from_json({**spec.to_json(), "d_sea": 3})
    with pytest.raises(GemmaScopeError, match="target_l0"):
        replace(spec, target_l0=None)
    with pytest.raises(GemmaScopeError, match="lacks seed"):
        SAESpec.from_json({k: v for k, v in spec.to_json().items() if k != "seed"})


class _Half(Shard):
    """A process whose neighbours have nothing to add: for the slices, not for the sums."""


def test_latents_start_equal_however_they_are_divided() -> None:
    """Blocks of 1,024 are drawn from their own generators; three parts of 3,072 latents cut none of them."""
    specs = _specs(2, d_sae=4096)
    whole = _trainer(specs)
    for ranks in (2, 8):
        parts = [
            PlaceTrainer(D, D, specs, total_steps=5, shard=_Half(rank, ranks), dtype=torch.float32)
            for rank in range(ranks)
        ]
        for name in ("enc", "dec", "log_threshold"):
            for i in range(2):
                pieces = [getattr(part.weights, name)[part.members[i].rows] for part in parts]
                assert torch.equal(torch.cat(pieces), getattr(whole.weights, name)[whole.members[i].rows])
    with pytest.raises(GemmaScopeError, match="subclass"):
        Shard(0, 2)
    with pytest.raises(GemmaScopeError, match="divided equally"):
        _Half(0, 3).latents(4096)
