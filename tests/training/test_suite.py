"""``train_suite`` on a planted dictionary and on the bundled model: what is written, resumed and refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

import gemma_scope_tl as gs
from gemma_scope_tl.registry.schema import parse_release
from gemma_scope_tl.sites import Place, target_of
from gemma_scope_tl.training.config import TrainingStateError
from gemma_scope_tl.training.recipe import FAST, fast
from gemma_scope_tl.training.recipe_table import planned_recipes, trained_recipes
from gemma_scope_tl.training.release import folder_names
from gemma_scope_tl.training.spec import SAESpec
from gemma_scope_tl.training.suite import train_suite
from tests.training.kill import hashes
from tests.training.planted import PlantedSource, tiny_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def _train(folder: Path, source: Any = PlantedSource, **changes: Any) -> Any:
    return train_suite(tiny_config(folder, **changes), source=source, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite") / "run"
    _train(folder)
    return folder


def test_the_number_of_threads_is_the_callers_again(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    _train(tmp_path / "run", threads=1)
    assert torch.get_num_threads() == 2


def test_the_number_of_threads_is_the_callers_again_after_a_failed_start(tmp_path: Path) -> None:
    class NoScales(PlantedSource):
        def mean_squares(self, rows: int) -> Any:
            raise OSError("the disk went away")

    torch.set_num_threads(2)
    with pytest.raises(OSError, match="went away"):
        _train(tmp_path / "run", NoScales, threads=1)
    assert torch.get_num_threads() == 2


def test_files_and_measurements(finished: Path) -> None:
    """L0 and FVU in the table are those of the files, computed by NumPy in float64 on the batches after training."""
    table = _train(finished)
    assert len(table) == 5
    places = [Place("res", 0), Place("res", 1), Place("transcoder", 1)]
    batches = list(islice(PlantedSource(places).batches(64, 24), 2))
    for row in table.to_dict("records"):
        p = dict(np.load(finished / row["path"] / "params.npz"))
        place = Place(row["site"], int(row["layer"]))
        x = np.concatenate([b[place].double().numpy() for b in batches])
        y = np.concatenate([b[target_of(place)].double().numpy() for b in batches])
        z = x @ p["W_enc"] + p["b_enc"]
        on = z > p["threshold"]
        error = y - (z * on) @ p["W_dec"] - p["b_dec"]
        assert row["l0"] == pytest.approx(on.sum(1).mean(), abs=0.05)  # float32 may turn one borderline latent
        assert row["fvu"] == pytest.approx((error**2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-3)
        assert row["path"].split("/")[-1].startswith("average_l0_")
    assert not (finished / "checkpoints").exists()
    columns = ("id", "site", "layer", "width", "d_sae", "d_in", "path", "sha256")
    rows = [{key: row[key] for key in columns} | {"l0": row["l0"] or None} for row in table.to_dict("records")]
    res = [row for row in rows if row["site"] == "res"]
    facts = {"release": "mine", "repo": "./x", "model": "bundled", "license": "MIT", "description": "d", "saes": res}
    assert len(parse_release(facts, "mine.yaml").saes) == 4


def test_scales_are_root_mean_squares_and_transcoders_use_their_input(finished: Path) -> None:
    facts = json.loads((finished / "suite.json").read_text())
    source = PlantedSource([Place("transcoder", 1)])
    first = next(iter(source.pieces(0, 64)))[Place("transcoder", 1)]
    assert set(facts["scales"]) == {"res/layer_0", "res/layer_1", "transcoder/layer_1"}
    x = np.concatenate([p[Place("transcoder", 1)].double().numpy() for p in source.pieces(0, 512)])
    assert first.shape == (64, 128)
    assert facts["scales"]["transcoder/layer_1"] == pytest.approx(math.sqrt((x**2).sum(1).mean()), rel=1e-12)


def test_recipes_are_those_of_each_sae_and_not_of_the_preset(finished: Path) -> None:
    """``fast`` as it was resolved for each SAE, with the values that the configuration gives, in plan and record."""
    planned, trained = planned_recipes(tiny_config(finished)), trained_recipes(finished)
    pd.testing.assert_frame_equal(planned.loc[trained.index], trained)
    for name, row in trained.to_dict("index").items():
        target = {} if math.isnan(row["target_l0"]) else {"target_l0": row["target_l0"]}
        own = {"batch_size": 64, "l0_warm_up_steps": 4, "lr_warm_up_steps": 4}
        own |= {} if target else {"l0_coefficient": 0.01}
        expected = replace(fast(128, d_sae=64, steps=row["steps"], **target), **own)
        assert {key: row[key] for key in asdict(expected)} == asdict(expected), name
    assert trained["steps"].nunique() == 2 and trained["init_threshold"].nunique() > 1
    assert "recipe" not in _train(finished).columns


def test_a_record_of_before_recipes_is_read(finished: Path, tmp_path: Path) -> None:
    old = tmp_path / "run"
    shutil.copytree(finished, old)
    facts = json.loads((old / "suite.json").read_text())
    for row in facts["saes"]:
        del row["recipe"]
    (old / "suite.json").write_text(json.dumps(facts))
    assert _train(old).equals(_train(finished))
    with pytest.raises(TrainingStateError, match="did not record recipes"):
        trained_recipes(old)
    (out,) = gs.export_suite(old, tmp_path / "out", gs.About("mit"), progress=False)
    assert "## Recipe\n\nNot stated by the authors." in (out / "README.md").read_text()


def test_metrics_have_a_row_per_sae_and_logged_step(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps: dict[str, list[int]] = {}
    for row in rows:
        steps.setdefault(row["name"], []).append(row["step"])
    assert steps["res/layer_0/width_64/target_l0_4"] == [4, 8, 12, 16, 17, 20, 24]
    assert steps["transcoder/layer_1/width_64/lambda_0.01"] == [4, 8, 12, 16, 17]
    assert {"error", "l0", "lambda"} <= set(rows[0])


def test_training_learns(tmp_path: Path) -> None:
    table = _train(tmp_path, steps=400, only=["res/layer_0/*_9"], checkpoint_every=1000)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["error"] < 0.5 * rows[0]["error"]
    assert table["fvu"].iloc[0] < 0.5


@pytest.mark.slow
def test_threads_and_a_shorter_neighbour_change_nothing(finished: Path, tmp_path: Path) -> None:
    """SAEs alone, in two threads, are those of the whole suite: the log of the others is all that is missing."""
    _train(tmp_path / "two", threads=2)
    assert hashes(tmp_path / "two") == hashes(finished)
    _train(tmp_path / "alone", only=["res/layer_1/*"])
    both = {key: value for key, value in hashes(finished).items() if key.startswith("res/layer_1")}
    assert {k: v for k, v in hashes(tmp_path / "alone").items() if k.startswith("res")} == both


class _Broken(PlantedSource):
    """Serves eleven batches."""

    def batches(self, batch_size: int, start: int = 0) -> Any:
        yield from islice(super().batches(batch_size, start), max(0, 11 - start))
        raise RuntimeError("the cable is out")


def test_resume_gives_the_same_files(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cable"):
        _train(tmp_path, source=_Broken)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_5"]
    _train(tmp_path, checkpoint_every=7)  # what does not change results may change
    assert hashes(tmp_path) == hashes(finished)


def test_refusals(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(RuntimeError, match="cable"):
        _train(tmp_path / "a", source=_Broken)
    with pytest.raises(TrainingStateError, match="seed is 3, not 4"):
        _train(tmp_path / "a", seed=4)
    with pytest.raises(TrainingStateError, match="steps is 24, not 25"):
        _train(finished, steps=25)
    with FileLock(tmp_path / "a" / ".lock"), pytest.raises(TrainingStateError, match="Another process"):
        _train(tmp_path / "a")
    manifest = tmp_path / "a" / "checkpoints" / "step_10" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[:40])
    with pytest.raises(TrainingStateError, match="or remove .*step_10"):
        _train(tmp_path / "a")
    shutil.rmtree(manifest.parent)
    _train(tmp_path / "a")  # from step 5
    assert hashes(tmp_path / "a") == hashes(finished)
    (tmp_path / "b" / "res").mkdir(parents=True)
    with pytest.raises(TrainingStateError, match="holds res, but no run"):
        _train(tmp_path / "b")
    assert (tmp_path / "b" / "res").exists()


def test_starting_over(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(RuntimeError, match="cable"):
        _train(tmp_path, source=_Broken, seed=9)
    train_suite(tiny_config(tmp_path), source=PlantedSource, progress=False, resume=False)
    assert hashes(tmp_path) == hashes(finished)


def test_equal_rounded_l0s_get_decimals() -> None:
    spec = SAESpec("a", Place("res", 0), 64, FAST, 0)
    names = folder_names([(spec, l0) for l0 in (3.2, 3.4, 3.41, 9.0, 5.0, 5.0)])
    assert [n.split("average_l0_")[1] for n in names] == ["3.2", "3.40", "3.41", "9", "5.000", "5.000_2"]
    assert len(set(names)) == len(names)


def test_the_demo_on_the_bundled_model(tmp_path: Path) -> None:
    """The demo's configuration, shortened: a real model, packed text, a transcoder and the embedding."""
    table = gs.train_suite(
        CONFIGS / "demo.yaml",
        overrides=[
            f"output={tmp_path}",
            "steps=6",
            "recipe.batch_size=256",
            "source.bucket_rows=1024",
            "source.scale_rows=1024",
            "data.limit_tokens=8192",
            "eval_batches=1",
            "log_every=3",
            "grid.0.sites=[transcoder, embedding]",
            "grid.0.widths=[64]",
        ],
        progress=False,
    )
    assert list(table["site"]) == ["transcoder", "embedding"]
    embedding = table.iloc[1]
    folder = tmp_path / embedding["path"]
    sae = gs.JumpReLUSAE.from_folder(folder, site="embedding")
    raw = np.load(folder / "params.npz")
    assert np.allclose(sae.W_dec.detach().numpy(), raw["W_dec"] * math.sqrt(128), rtol=1e-6)
    assert np.allclose(np.linalg.norm(sae.W_dec.detach().numpy(), axis=1), 1.0, atol=1e-5)  # unit rows in use
