"""Training that starts from SAEs that exist: units, what may be named, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError, TrainingStateError, UnknownNameError
from gemma_scope_tl.registry.catalog import resolve
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.checkpoint import read_record
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.recipe import FAST
from gemma_scope_tl.training.running import TrainingRun
from gemma_scope_tl.training.shard import Shard
from gemma_scope_tl.training.spec import SAESpec
from gemma_scope_tl.training.start import absolute_start, read_start, unfolded
from gemma_scope_tl.training.suite import train_suite
from tests.training.planted import PlantedSource, tiny_config

L0 = 16
GRID = [
    {"sites": ["res"], "layers": [1], "widths": [64], "target_l0s": [6]},
    {"sites": ["transcoder"], "layers": [1], "widths": [64], "target_l0s": [6], "skip": [False, True]},
]
STILL = {"lr": 1e-30, "b_dec_start": "mean"}  # a step moves nothing, and the mean would replace b_dec


class Stretched(PlantedSource):
    """The same activations, 2.5 times as long: those of another model."""

    def pieces(self, start: int, count: int) -> Any:
        for piece in super().pieces(start, count):
            yield {place: 2.5 * value for place, value in piece.items()}


def _config(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny_config(folder, **{"grid": GRID, **changes})


def _from(start: Path | str, grid: Sequence[Mapping[str, Any]] = GRID) -> list[dict[str, Any]]:
    return [{**entry, "init_from": str(start)} for entry in grid]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    train_suite(_config(folder, steps=60), source=PlantedSource, progress=False)
    return folder


def _arrays(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    rows = read_record(folder / "suite.json")["saes"]
    return {row["name"]: dict(np.load(folder / row["path"] / "params.npz")) for row in rows}


@pytest.mark.parametrize("site", ["res", "transcoder"])
def test_unfolding_undoes_folding(site: str) -> None:
    """Float64, and products with ``b_dec`` in another order."""
    recipe = replace(FAST, batch_size=32, lr_warm_up_steps=0)
    trainer = PlaceTrainer(
        6, 6, [SAESpec("s", Place(site, 0), 20, recipe, 0, skip=site != "res")], total_steps=9, dtype=torch.float64
    )
    for seed in range(6):
        x = torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 6**0.5
        trainer.step(x, None if site == "res" else x.abs())
    arrays = trainer.released(0, 4.7)
    if site != "res":
        arrays["W_skip"] = arrays.pop("affine_skip_connection").T
    found = unfolded(arrays, 4.7, pre_encoder_bias=site == "res")
    mine = trainer.weights.of(0, trainer.members[0].rows, trainer.members[0].skip)
    assert set(found) == set(mine)
    for name, value in mine.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_decoder_rows_of_any_length_give_the_same_reconstruction() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.uniform(0.3, 4.0, 20)
    w = {"W_enc": rng.normal(size=(6, 20)), "W_dec": rng.normal(size=(20, 5)) * lengths[:, None]}
    w |= {"b_enc": rng.normal(size=20), "b_dec": rng.normal(size=5), "threshold": rng.uniform(0.1, 1.0, 20)}
    found = unfolded({k: torch.from_numpy(v) for k, v in w.items()}, 3.0, pre_encoder_bias=False)
    np.testing.assert_allclose(found["dec"].norm(dim=1), 1.0, rtol=1e-12)
    x = rng.normal(size=(50, 6))

    def out(x: np.ndarray, enc: Any, dec: Any, b_enc: Any, b_dec: Any, theta: Any) -> np.ndarray:
        z = x @ enc + b_enc
        return (z * (z > theta)) @ dec + b_dec

    raw = out(x, w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"], w["threshold"])
    f = {name: value.numpy() for name, value in found.items()}
    scaled = out(x / 3.0, f["enc"].T, f["dec"], f["b_enc"], f["b_dec"], np.exp(f["log_threshold"]))
    np.testing.assert_allclose(3.0 * scaled, raw, rtol=1e-11, atol=1e-12)
    with pytest.raises(GemmaScopeError, match=r"^The set of arrays .* Latent 0 has a decoder row of 0 \(20 latents"):
        unfolded({k: torch.from_numpy(v * (k != "W_dec")) for k, v in w.items()}, 3.0, pre_encoder_bias=False)
    w["threshold"][3] = 0.0
    with pytest.raises(GemmaScopeError, match=r"^res/x: folder/x .* Latent 3 has a threshold that is not positive\.$"):
        arrays = {k: torch.from_numpy(v) for k, v in w.items()}
        unfolded(arrays, 3.0, pre_encoder_bias=False, source="res/x: folder/x")


def test_a_run_starts_from_the_saes_of_another_model(finished: Path, tmp_path: Path) -> None:
    """After a step that moves nothing the files are those of the start, although the scale is another.

    Float32: a bias is divided by C and multiplied again, and the part of ``b_dec`` is added and taken away.
    """
    recipe = {**_config(tmp_path)["recipe"], **STILL}
    config = _config(tmp_path / "tuned", grid=_from(finished), steps=1, recipe=recipe)
    train_suite(config, source=Stretched, progress=False)
    before, after = _arrays(finished), _arrays(tmp_path / "tuned")
    scales = [read_record(folder / "suite.json")["scales"]["res/layer_1"] for folder in (finished, tmp_path / "tuned")]
    assert scales[1] == pytest.approx(2.5 * scales[0], rel=1e-3)
    assert set(before) == set(after) and len(before) == 3
    for name, arrays in before.items():
        assert set(after[name]) == set(arrays)
        for key, value in arrays.items():
            np.testing.assert_allclose(after[name][key], value, rtol=2e-6, atol=2e-6, err_msg=f"{name} {key}")
        assert arrays["b_dec"].any()


def test_finetuning_begins_where_training_ended(finished: Path, tmp_path: Path) -> None:
    """The first logged error is near the last of the run it goes on from, and far below that of a new run."""
    errors: dict[str, float] = {}
    recipe = {**_config(tmp_path)["recipe"], "l0_warm_up_steps": 0, "lr": 1e-4}
    for name, grid in (("new", GRID), ("tuned", _from(finished))):
        train_suite(_config(tmp_path / name, grid=grid, steps=8, recipe=recipe), source=PlantedSource, progress=False)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        errors[name] = sum(row["error"] for row in rows if row["step"] == 4)
    assert errors["tuned"] < 0.6 * errors["new"]


def test_a_stopped_run_does_not_start_over(finished: Path, tmp_path: Path) -> None:
    """The start is read at step 0 only: a run goes on although what it started from is gone."""
    start = tmp_path / "start"
    start.symlink_to(finished)
    config = _config(tmp_path / "run", grid=_from(start))
    whole = train_suite({**config, "output": str(tmp_path / "whole")}, source=PlantedSource, progress=False)
    step, calls = TrainingRun._step, iter(range(100))  # pyright: ignore[reportPrivateUsage]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingRun, "_step", lambda *a: _interrupt() if next(calls) == 30 else step(*a))
        train_suite(config, source=PlantedSource, progress=False)
    start.unlink()
    found = train_suite(config, source=PlantedSource, progress=False)
    assert list(found["sha256"]) == list(whole["sha256"])


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_row_of_the_registry() -> None:
    release, sae_id = "bundled-transcoders", f"layer_1/width_512/average_l0_{L0}"
    text = f"{release}/layer_{{layer}}/width_{{width}}/average_l0_{L0}{{affine}}"
    spec = SAESpec("t", Place("transcoder", 1), 512, FAST, 0, init_from=text)
    row = resolve(release, sae_id)
    expected = load_row(row).state_dict()
    found = read_start(spec, 128, 128, "bundled")
    assert set(found) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_workers_of_a_cluster_get_absolute_paths(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parent)
    for name in ("run", "run/{site}/layer_{layer}", "run/transcoder/layer_{layer}"):
        assert absolute_start(name) == str(finished.parent / name)
    for name in ("bundled-res/layer_{layer}/width_256/average_l0_8", "{site}/x", "bundled-res/layer_0", str(finished)):
        assert absolute_start(name) == name


def test_each_process_gets_its_latents() -> None:
    spec = SAESpec("t", Place("transcoder", 1), 8, FAST, 0, skip=True)
    params = {"enc": torch.randn(8, 3), "dec": torch.randn(8, 2), "b_enc": torch.randn(8), "b_dec": torch.randn(2)}
    params |= {"log_threshold": torch.randn(8), "skip": torch.randn(3, 2)}

    class Second(Shard):
        """The second of two processes."""

    trainer = PlaceTrainer(3, 2, [spec], total_steps=5, shard=Second(1, 2))
    trainer.start_from(0, params)
    for name, value in trainer.weights.of(0, slice(0, 4), 0).items():
        assert torch.equal(value, params[name] if name in ("b_dec", "skip") else params[name][4:]), name
    trainer.steps_done = 1
    with pytest.raises(GemmaScopeError, match="before the first step only"):
        trainer.start_from(0, params)


def test_what_cannot_be_a_start_is_refused(finished: Path, tmp_path: Path) -> None:
    affine = next(path for path in finished.rglob("*_affine") if path.is_dir())
    transcoder = SAESpec("t", Place("transcoder", 1), 64, FAST, 0)
    cases: list[tuple[SAESpec, str, type[Exception], str]] = [
        (transcoder, str(finished), UnknownNameError, "SAE of the run"),
        (transcoder, str(affine), GemmaScopeError, "skip path, which would be lost"),
        (replace(transcoder, d_sae=32), str(affine), GemmaScopeError, r"W_enc of .* is \[128, 64\], not \[128, 32\]"),
        (transcoder, "no/such/folder", GemmaScopeError, "neither a folder nor a release and an id"),
        (transcoder, "runs/{wdith}", UnknownNameError, "width"),
        (transcoder, "runs/{width", GemmaScopeError, "its marks are"),
        (transcoder, "bundled-res/layer_1/width_256/average_l0_8", GemmaScopeError, "SAE of res"),
    ]
    for spec, start, kind, said in cases:
        with pytest.raises(kind, match=said):
            read_start(replace(spec, init_from=start), 128, 128, "bundled")
    with pytest.raises(TrainingStateError, match="init_from"):
        train_suite(_config(tmp_path, grid=[{**GRID[0], "init_from": 3}]), source=PlantedSource, progress=False)


def test_a_skip_path_may_be_added(finished: Path) -> None:
    rows = read_record(finished / "suite.json")["saes"]
    plain = next(finished / row["path"] for row in rows if row["site"] == "transcoder" and "affine" not in row)
    spec = SAESpec("t", Place("transcoder", 1), 64, FAST, 0, skip=True, init_from=str(plain))
    assert "skip" not in unfolded(read_start(spec, 128, 128, "bundled"), 2.0, pre_encoder_bias=False)
