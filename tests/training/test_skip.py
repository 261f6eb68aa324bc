"""Skip transcoders in training: gradients against stock SAELens, units, files, configurations and old records."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig

from gemma_scope_tl.errors import GemmaScopeError, TrainingStateError
from gemma_scope_tl.sae.loading import load_folder
from gemma_scope_tl.sites import Place, target_of
from gemma_scope_tl.training import plan as costs
from gemma_scope_tl.training.checkpoint import SUITE_NAME, load_manifest, steps_of
from gemma_scope_tl.training.config import load_config
from gemma_scope_tl.training.dense_pass import DensePass
from gemma_scope_tl.training.grid import groups_of
from gemma_scope_tl.training.optimizer import Prices
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.recipe import FAST, GEMMA_SCOPE_2, PAPER, Recipe
from gemma_scope_tl.training.release import folder_names
from gemma_scope_tl.training.running import TrainingRun, TrainingStopped
from gemma_scope_tl.training.sparse_pass import SparsePass
from gemma_scope_tl.training.spec import SAESpec
from gemma_scope_tl.training.stack import Batch
from gemma_scope_tl.training.suite import train_suite
from tests.helpers import shared_model
from tests.training.kill import hashes
from tests.training.planted import DIMS, PlantedSource, tiny_config

HERE = Place("transcoder", 1)
D_IN, D_OUT, LATENTS, ROWS = 7, 5, 40, 64
RECIPE = Recipe(batch_size=ROWS, init_threshold=0.4, bandwidth=0.2)
SHORT = {"preset": "gemma_scope_2", "lr": 3e-3, "init_threshold": 0.05, "bandwidth": 0.05}
GRID: list[dict[str, Any]] = [
    {
        "sites": ["transcoder"],
        "layers": [1],
        "widths": [64],
        "target_l0s": [6],
        "skip": [False, True],
        "recipe": SHORT,
    }
]


def _spec(name: str = "t", *, skip: bool = True, recipe: Recipe = RECIPE, d_sae: int = LATENTS) -> SAESpec:
    return SAESpec(name, HERE, d_sae, recipe, 5, 6.0, skip)


def _data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, D_IN, dtype=torch.float64, generator=generator)
    y = x.relu() @ torch.randn(D_IN, D_OUT, dtype=torch.float64, generator=generator) + 0.2
    return x / x.square().sum(1).mean().sqrt(), y / x.square().sum(1).mean().sqrt()


def _moved_trainer() -> PlaceTrainer:
    """A skip transcoder whose parameters have all left their initial values."""
    recipe = replace(RECIPE, lr=0.05, lr_warm_up_steps=0, l0_coefficient=0.0)
    trainer = PlaceTrainer(D_IN, D_OUT, [_spec(recipe=recipe)], total_steps=20, dtype=torch.float64)
    for seed in range(5):
        trainer.step(*_data(seed))
    assert trainer.weights.skip.abs().min() > 0.0
    return trainer


def _stock(trainer: PlaceTrainer, scale: float = 1.0) -> JumpReLUSkipTranscoder:
    arrays = trainer.released(0, scale)
    config = JumpReLUSkipTranscoderConfig(
        d_in=D_IN, d_out=D_OUT, d_sae=LATENTS, dtype="float64", apply_b_dec_to_input=False
    )
    sae = JumpReLUSkipTranscoder(config)
    w_skip = arrays.pop("affine_skip_connection").T
    sae.load_state_dict({**arrays, "W_skip": w_skip})
    return sae


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradients_are_those_of_saelens_class_under_autograd(kind: str) -> None:
    """All but the threshold's, which SAELens's class for inference does not have. Float64: sums in another order."""
    trainer, (x, y) = _moved_trainer(), _data(9)
    sae = _stock(trainer)
    (sae(x) - y).square().sum(1).mean().backward()
    batch = Batch(x, y, ROWS, False, trainer.shard)
    member = trainer.members[0]
    each = (
        DensePass(trainer.weights, member, batch) if kind == "dense" else SparsePass(trainer.weights, [member], batch)
    )
    each.backward([Prices(0.0)])
    enc, dec = torch.zeros(LATENTS, D_IN).double(), torch.zeros(LATENTS, D_OUT).double()
    for chunk in each.chunks(0):
        at = torch.arange(chunk.rows.start, chunk.rows.stop)
        at = at if chunk.touched is None else at[chunk.touched]
        enc[at], dec[at] = chunk.enc, chunk.dec
    skip = each.skip[0]
    assert skip is not None
    mine = {"W_skip": skip.T, "W_enc": enc.T, "W_dec": dec, "b_enc": each.vectors.b_enc, "b_dec": each.b_dec[0]}
    for name, gradient in mine.items():
        theirs = getattr(sae, name).grad
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(gradient, theirs, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_the_matrix_has_no_unit() -> None:
    """Trained on ``x / C`` and ``y / C``: the files give ``C`` times the reconstruction, with ``S`` to the bit."""
    trainer, (x, _), scale = _moved_trainer(), _data(9), 37.3
    before = _stock(trainer)(x)
    after = _stock(trainer, scale)(x * scale)
    torch.testing.assert_close(after, before * scale, rtol=1e-12, atol=1e-11)
    assert torch.equal(trainer.released(0, scale)["affine_skip_connection"], trainer.weights.skip[0])


def test_it_starts_at_zero_and_changes_no_other_weight() -> None:
    plain = PlaceTrainer(D_IN, D_OUT, [_spec(skip=False)], total_steps=5)
    both = PlaceTrainer(D_IN, D_OUT, [_spec("a"), _spec("b", skip=False)], total_steps=5)
    assert plain.weights.skip.shape == (0, D_IN, D_OUT)
    assert not both.weights.skip.any()
    for index in range(2):
        mine = both.weights.of(index, both.members[index].rows)
        for name, value in plain.weights.of(0, plain.members[0].rows).items():
            assert torch.equal(value, mine[name])


def test_a_linear_map_is_learnt_by_the_skip_path_alone() -> None:
    """The target is linear in the input, so the latents have nothing to add: the error falls to that of float32."""
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(D_IN, D_OUT, generator=generator)
    recipe = replace(PAPER, batch_size=ROWS, lr=0.03, lr_warm_up_steps=0, lr_decay=0.7, init_threshold=50.0)
    trainer = PlaceTrainer(D_IN, D_OUT, [SAESpec("t", HERE, 8, recipe, 0, skip=True)], total_steps=600)
    for _ in range(600):
        x = torch.randn(ROWS, D_IN, generator=generator) / D_IN**0.5
        trainer.step(x, x @ matrix)
    assert trainer.status()[0]["l0"] == 0.0
    torch.testing.assert_close(trainer.weights.skip[0], matrix, rtol=0, atol=1e-3)


def test_state_goes_on_to_the_bit_and_that_of_before_still_loads() -> None:
    recipe = replace(FAST, batch_size=ROWS)
    first = PlaceTrainer(D_IN, D_OUT, [_spec("a", recipe=recipe), _spec("b", skip=False)], total_steps=12)
    for seed in range(4):
        first.step(*_data(seed))
    state = first.state()
    extra = {name for name in state if name.endswith("skip")}
    assert extra == {"a/skip", "a/second.skip", "a/first.skip"}
    second = PlaceTrainer(D_IN, D_OUT, list(first.specs), total_steps=12)
    second.load_state(state)
    for seed in range(4, 8):
        first.step(*_data(seed))
        second.step(*_data(seed))
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())
    old = PlaceTrainer(D_IN, D_OUT, [_spec("b", skip=False)], total_steps=12)
    old.load_state(
        {name: value for name, value in state.items() if name.startswith("b/") and "first." not in name}
        | {"steps_done": state["steps_done"]}
    )
    with pytest.raises(GemmaScopeError, match="lacks a/skip"):
        first.load_state({name: value for name, value in state.items() if name != "a/skip"})


def test_descriptions_of_before_are_read_and_written() -> None:
    plain = _spec(skip=False)
    assert {"skip", "init_from"}.isdisjoint(plain.to_json())
    for spec in (plain, _spec()):
        assert SAESpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(GemmaScopeError, match="only a transcoder has a skip path"):
        SAESpec("r", Place("res", 1), 8, RECIPE, 0, skip=True)


def test_a_configuration_has_skip_beside_widths(tmp_path: Path) -> None:
    config = load_config(tiny_config(tmp_path, grid=GRID))
    (group,) = groups_of(config, DIMS)
    assert [(spec.name, spec.skip) for spec in group.specs] == [
        ("transcoder/layer_1/width_64/target_l0_6", False),
        ("transcoder/layer_1/width_64/target_l0_6_affine", True),
    ]
    assert config.results["grid"][0]["skip"] == [False, True]
    assert load_config(config) == config
    alone = [{**GRID[0], "skip": False}]
    old = [{key: value for key, value in GRID[0].items() if key != "skip"}]
    plain, before = (load_config(tiny_config(tmp_path, grid=grid)).results["grid"] for grid in (alone, old))
    assert plain == before and {"skip", "init_from"}.isdisjoint(before[0])
    for grid, said in (
        ([{**GRID[0], "sites": ["transcoder", "mlp"]}], "only transcoders have a skip path, not mlp"),
        ([{**GRID[0], "skip": "yes"}], r"skip: should be true, false or \[false, true\]"),
        ([{**GRID[0], "skip": [True, True]}], "skip"),
        ([{**GRID[0], "skip": []}], "skip"),
    ):
        with pytest.raises(TrainingStateError, match=said):
            load_config(tiny_config(tmp_path, grid=grid))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skip") / "run"
    train_suite(tiny_config(folder, grid=GRID), source=PlantedSource, progress=False)
    return folder


def test_files_and_measurements_of_a_run(finished: Path) -> None:
    """The table's L0 and FVU are NumPy's in float64 with the files' arrays; the package and SAELens read the files."""
    table = train_suite(tiny_config(finished, grid=GRID), source=PlantedSource, progress=False)
    assert list(table["affine"]) == [False, True]
    batches = list(islice(PlantedSource([HERE]).batches(64, 24), 2))
    x = np.concatenate([b[HERE].double().numpy() for b in batches])
    y = np.concatenate([b[target_of(HERE)].double().numpy() for b in batches])
    for row in table.to_dict("records"):
        p = dict(np.load(finished / row["path"] / "params.npz"))
        assert ("affine_skip_connection" in p) == row["affine"] == row["path"].endswith("_affine")
        z = x @ p["W_enc"] + p["b_enc"]
        out = (z * (z > p["threshold"])) @ p["W_dec"] + p["b_dec"]
        if row["affine"]:
            assert p["affine_skip_connection"].any()
            out = out + x @ p["affine_skip_connection"]
        assert row["l0"] > 1.0
        assert row["l0"] == pytest.approx((z > p["threshold"]).sum(1).mean(), abs=0.05)
        fvu = ((y - out) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert row["fvu"] == pytest.approx(fvu, rel=1e-3)
        sae = load_folder(finished / row["path"], "bundled", "transcoder", 1)
        loaded = sae(torch.from_numpy(x).float()).detach().double().numpy()
        np.testing.assert_allclose(loaded, out, atol=1e-4)  # float32, of values up to some 10
    assert {"affine"}.isdisjoint(json.loads((finished / SUITE_NAME).read_text())["saes"][0])


def test_a_stopped_run_ends_with_the_same_bits(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(100))

    def fail(*args: Any) -> None:
        if next(steps) == 7:
            raise TrainingStopped("stopped", 15)

    config, step = tiny_config(tmp_path / "run", grid=GRID), TrainingRun._step  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(TrainingRun, "_step", lambda *a: (fail(), step(*a)))
    with pytest.raises(TrainingStopped):
        train_suite(config, source=PlantedSource, progress=False)
    monkeypatch.undo()
    root = tmp_path / "run" / "checkpoints"
    assert load_manifest(root / f"step_{steps_of(root)[-1]}").step == 5
    train_suite(config, source=PlantedSource, progress=False)
    assert hashes(tmp_path / "run") == hashes(finished)


def test_names_of_folders_tell_the_kinds_apart() -> None:
    saes = [(_spec("a", skip=False), 12.2), (_spec("b"), 12.2), (_spec("c"), 12.3)]
    names = [name.rsplit("/", 1)[-1] for name in folder_names(saes)]
    assert names == ["average_l0_12", "average_l0_12.2_affine", "average_l0_12.3_affine"]


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_plan_counts_what_training_allocates(beta1: float) -> None:
    recipe = replace(GEMMA_SCOPE_2, betas=(beta1, 0.95))
    specs = [_spec("a", recipe=recipe, d_sae=256), _spec("b", recipe=recipe, d_sae=256, skip=False)]
    trainer = PlaceTrainer(128, 96, specs, total_steps=10)
    state = sum(tensor.nbytes for tensor in trainer.state().values())
    formula = costs.state_bytes(128, 96, [256, 256], momentum=beta1 > 0.0, skips=1)
    assert formula <= state <= formula + 64 * 512 + 4096  # counters: some bytes a latent
    for index, spec in enumerate(specs):
        numbers = sum(array.numel() for array in trainer.released(index, 1.0).values())
        assert numbers == costs.parameters(128, 96, 256, skip=spec.skip)


def test_the_plan_of_a_configuration(tmp_path: Path) -> None:
    found: list[Any] = []
    for skip in (False, True):
        grid = [{**GRID[0], "skip": skip}]
        config = tiny_config(tmp_path, grid=grid, model={"name": "gemma-2-2b"})
        found.append(costs.plan_suite(config, memory=2.0**40, device_flops=1e12).jobs.iloc[0])
    plain, skip = found
    square = 2304 * 2304
    assert skip["parameters"] - plain["parameters"] == square
    assert skip["checkpoint"] - plain["checkpoint"] == 4 * 2 * square  # weights and one moment
    assert skip["memory"] - plain["memory"] == 4 * 3 * square  # and a gradient
    assert skip["released"] - plain["released"] == 4 * square
    products = 2 * 2.0 * 64 * square * plain["steps"]  # two products of 64 rows
    assert skip["seconds"] - plain["seconds"] == pytest.approx(products / 1e12)


def test_gemma_scope_2_end_to_end_on_the_bundled_model(tmp_path: Path) -> None:
    """Every part of the preset is at work: each, left out, changes where training ends."""
    recipe = {
        "preset": "gemma_scope_2",
        "batch_size": 128,
        "matryoshka": [0.25, 0.5],
        "l0_warm_up_steps": 2,
        "lr": 3e-3,
    }
    base: dict[str, Any] = {
        "output": str(tmp_path / "all"),
        "model": {"name": "bundled", "device": "cpu"},
        "data": {"dataset": "bundled", "column": "text", "context": 32, "limit_tokens": 4096},
        "source": {"bucket_rows": 512, "scale_rows": 512, "batch_rows": 16},
        "steps": 8,
        "recipe": recipe,
        "grid": [
            {"sites": ["res"], "layers": [1], "widths": [64], "target_l0s": [6]},
            {"sites": ["transcoder"], "layers": [1], "widths": [64], "target_l0s": [6], "skip": [False, True]},
        ],
        "eval_batches": 2,
        "log_every": 4,
        "threads": 1,
    }
    model = shared_model("bundled", "bridge")
    table = train_suite(base, model=model, progress=False)
    assert list(table["affine"]) == [False, False, True]
    assert table["fvu"].between(0.0, 5.0).all() and (table["l0"] > 0).all()
    assert not np.array_equal(*(np.load(tmp_path / "all" / path / "params.npz")["W_enc"] for path in table["path"][1:]))
    ends = {"all": list(table["sha256"])}
    for key, value in (("frequency_coefficient", 0.0), ("matryoshka", []), ("l0_penalty", "linear")):
        config = {**base, "output": str(tmp_path / key), "recipe": {**recipe, key: value}}
        ends[key] = list(train_suite(config, model=model, progress=False)["sha256"])
    assert all(mine != other for key in list(ends)[1:] for mine, other in zip(ends["all"], ends[key], strict=True))
