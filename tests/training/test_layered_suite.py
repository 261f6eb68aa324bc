"""``train_suite`` on coders over several layers: files, measurements, resuming, starts, plans and refusals."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemma_scope_tl.errors import GemmaScopeError, TrainingStateError
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sae.loading import load_folder
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.config import load_config
from gemma_scope_tl.training.layered_start import chosen_latents
from gemma_scope_tl.training.plan import plan_suite
from gemma_scope_tl.training.recipe import fast
from gemma_scope_tl.training.recipe_table import planned_recipes, trained_recipes
from gemma_scope_tl.training.suite import train_suite
from tests.training.kill import hashes
from tests.training.planted import DIMS, PlantedSource, tiny_config

QUADRATIC = {"preset": "fast", "batch_size": 64, "l0_penalty": "quadratic", "l0_coefficient": 4e-3}
SHORT = {**QUADRATIC, "l0_warm_up_steps": 4, "lr_warm_up_steps": 4}
CLT: dict[str, Any] = {"sites": ["clt"], "widths": [128], "target_l0s": [12], "skip": True, "l0_start": 30}
CROSS: dict[str, Any] = {"sites": ["crosscoder"], "layers": [0, 2], "widths": [64], "target_l0s": [8]}
GRID: list[dict[str, Any]] = [CLT, CROSS, {"sites": ["res"], "layers": [2], "widths": [64], "target_l0s": [4]}]


class Interrupted(Exception):
    """What stops a run in these tests."""


class Breaking(PlantedSource):
    """Ends with an error after some batches."""

    left = 11

    def batches(self, batch_size: int, start: int = 0) -> Any:
        for batch in super().batches(batch_size, start):
            self.left -= 1
            if self.left < 0:
                raise Interrupted
            yield batch


def _config(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny_config(folder, **{"grid": GRID, "recipe": SHORT, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layered") / "run"
    train_suite(_config(folder), source=PlantedSource, progress=False)
    return folder


def _rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "suite.json").read_text())["saes"]


def _batches(count: int = 2, start: int = 24) -> list[Any]:
    places = [Place("transcoder", layer) for layer in range(4)] + [Place("res", layer) for layer in range(4)]
    return list(islice(PlantedSource(places).batches(64, start), count))


def test_the_files_load_and_have_the_metrics_of_the_table(finished: Path) -> None:
    """L0 and FVU are those of the files, computed by NumPy in float64 on the batches after training."""
    for row in _rows(finished)[:2]:
        coder = load_folder(finished / row["path"], "bundled")
        assert isinstance(coder, LayeredCoder)
        assert (coder.kind, list(coder.layers), coder.l0) == (row["site"], row["layers"], row["target_l0"])
        reads, writes = ("transcoder", "mlp") if coder.kind == "clt" else ("res", "res")
        batches = _batches()
        x, y = (
            [np.concatenate([b[Place(site, k)].double().numpy() for b in batches]) for k in coder.layers]
            for site in (reads, writes)
        )
        files = [load_file(finished / row["path"] / f"params_layer_{k}.safetensors") for k in range(len(x))]
        w = [{name: value.double().numpy() for name, value in file.items()} for file in files]
        pre = [x[k] @ w[k]["w_enc"] + w[k]["b_enc"] for k in range(len(x))]
        f = [z * (z > w[k]["threshold"]) for k, z in enumerate(pre)]
        np.testing.assert_allclose(sum((one > 0).sum(1).mean() for one in f), row["l0"], atol=0.05)
        errors, variances = np.zeros(len(x)), np.zeros(len(x))
        for k in range(len(x)):
            assert (w[k]["w_dec"][:, :k] == 0).all()
            out = w[k]["b_dec"] + np.add.reduce([f[j] @ w[j]["w_dec"][:, k] for j in range(len(x))])
            if coder.kind == "clt":
                assert w[k]["affine_skip_connection"].any()
                out = out + x[k] @ w[k]["affine_skip_connection"]
            errors[k], variances[k] = ((y[k] - out) ** 2).sum(), ((y[k] - y[k].mean(0)) ** 2).sum()
        assert row["fvu_layers"] == pytest.approx(list(errors / variances), rel=1e-3)  # of float32
        assert row["fvu"] == pytest.approx(errors.sum() / variances.sum(), rel=1e-3)
        assert row["l0"] == pytest.approx(sum(row["l0_layers"]), rel=1e-12)


def test_names_records_and_metrics(finished: Path) -> None:
    facts = json.loads((finished / "suite.json").read_text())
    clt, cross, res = facts["saes"]
    assert clt["name"] == "clt/layers_all/width_128/target_l0_12_affine" and clt["affine"]
    assert cross["name"] == "crosscoder/layers_0_2/width_64/target_l0_8"
    assert clt["path"] == f"clt/width_128_l0_{clt['l0']:.0f}_affine"
    assert cross["path"] == f"crosscoder/layer_0_2_width_64_l0_{cross['l0']:.0f}"
    assert res["path"].startswith("res/layer_2/")
    read = {*(f"{site}/layer_{k}" for site in ("transcoder", "mlp") for k in range(4)), "res/layer_0", "res/layer_2"}
    assert set(facts["scales"]) == read
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    clts = [row for row in rows if row["site"] == "clt"]
    assert [row["step"] for row in clts] == [4, 8, 12, 16, 20, 24]
    assert clts[0]["target"] == 12.0  # after the four steps over which lambda rises
    for row in clts:
        assert row["l0"] == pytest.approx(sum(row[f"l0_layer_{k}"] for k in range(4)), rel=1e-12)
    config = json.loads((finished / clt["path"] / "config.json").read_text())
    assert "hf_hook_point_in" not in config  # no module of Gemma 2 returns what its transcoders read
    other = json.loads((finished / cross["path"] / "config.json").read_text())
    assert other["hf_hook_point_in"] == other["hf_hook_point_out"] == "model.layers.{0,2}.output"
    assert (config["type"], config["width"], config["l0"], config["affine_connection"]) == ("clt", 128, 12.0, True)


def test_recipes_are_those_of_a_layer(finished: Path) -> None:
    """``fast`` follows the width and the target of one layer: 32 latents and an L0 of 3."""
    name = "clt/layers_all/width_128/target_l0_12_affine"
    found = trained_recipes(finished)["init_threshold"].to_dict()
    assert found[name] == fast(128, d_sae=32, target_l0=3.0, steps=24).init_threshold
    assert planned_recipes(_config(finished))["init_threshold"].to_dict() == found


def test_a_run_that_was_stopped_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train_suite(_config(tmp_path / "run"), source=Breaking, progress=False)
    assert (tmp_path / "run" / "checkpoints" / "step_10").exists()
    train_suite(_config(tmp_path / "run"), source=PlantedSource, progress=False)
    assert hashes(tmp_path / "run") == hashes(finished)


def test_coders_train_alike_alone(finished: Path, tmp_path: Path) -> None:
    train_suite(_config(tmp_path / "run", only=["crosscoder*"]), source=PlantedSource, progress=False)
    (row,) = _rows(tmp_path / "run")
    assert row["sha256s"] == _rows(finished)[1]["sha256s"]


STILL = {**SHORT, "lr": 1e-30, "l0_warm_up_steps": 8}


def test_training_goes_on_from_a_coder(finished: Path, tmp_path: Path) -> None:
    """Without steps that move anything, the files say the same; only the unit of activations differs."""
    grid = [{**entry, "init_from": str(finished)} for entry in GRID[:2]]
    train_suite(_config(tmp_path / "run", grid=grid, recipe=STILL, steps=2), source=PlantedSource, progress=False)
    for before, after in zip(_rows(finished), _rows(tmp_path / "run"), strict=False):
        old, new = load_folder(finished / before["path"], "bundled"), load_folder(tmp_path / "run" / after["path"])
        site = "transcoder" if old.kind == "clt" else "res"
        x = [_batches()[0][Place(site, k)] for k in old.layers]
        for mine, its in zip(new(x), old(x), strict=True):
            torch.testing.assert_close(mine, its, rtol=2e-4, atol=2e-4)


def test_a_crosscoder_starts_from_saes_of_single_layers(tmp_path: Path) -> None:
    singles = [{"sites": ["res"], "layers": [0, 2], "widths": [64], "target_l0s": [4]}]
    train_suite(_config(tmp_path / "singles", grid=singles), source=PlantedSource, progress=False)
    grid = [{**CROSS, "init_from": str(tmp_path / "singles")}]
    train_suite(_config(tmp_path / "run", grid=grid, recipe=STILL, steps=2), source=PlantedSource, progress=False)
    (row,) = _rows(tmp_path / "run")
    saes = _rows(tmp_path / "singles")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    total = saes[0]["l0"] + saes[1]["l0"]
    assert first["target"] == pytest.approx(total + (8 - total) * 2 / 8, rel=1e-12)
    coder = load_folder(tmp_path / "run" / row["path"])
    for k, sae_row in enumerate(saes):
        sae = load_folder(tmp_path / "singles" / sae_row["path"], "bundled", "res", int(sae_row["layer"]))
        x = _batches()[0][Place("res", int(sae_row["layer"]))]
        acts, wanted = coder.encode_at(k, x).to_dense(), sae.encode(x)
        if k == 0:  # its first latents, which nothing struck out
            own = acts @ coder.W_dec[0][:, 0]
            torch.testing.assert_close(own, wanted[:, :32] @ sae.W_dec[:32], rtol=1e-3, atol=1e-3)
            ratio = coder.W_dec[0][:, 1].norm(dim=1) / coder.W_dec[0][:, 0].norm(dim=1)
            torch.testing.assert_close(ratio, torch.ones(32), rtol=1e-4, atol=0)  # the same row in both layers
        assert int((acts > 0).sum()) > 0


def test_similar_latents_of_later_layers_are_struck_out() -> None:
    """Against loops over latents, in float64."""
    generator = torch.Generator().manual_seed(0)
    encoders = [torch.randn(6, 20, dtype=torch.float64, generator=generator) for _ in range(3)]
    decoders = [torch.randn(20, 6, dtype=torch.float64, generator=generator) for _ in range(3)]
    struck: list[set[int]] = [set(), set(), set()]
    for j in range(3):
        order = [i for i in range(20) if i not in struck[j]] + sorted(struck[j])
        assert chosen_latents(encoders, decoders, 8)[j].tolist() == order[:8]
        for i in order[:8]:
            for k in range(j + 1, 3):
                products = [float(decoders[j][i] @ encoders[k][:, other]) for other in range(20)]
                struck[k].add(products.index(max(products)))
    assert struck[2]


def test_the_plan_counts_what_the_run_has(finished: Path, tmp_path: Path) -> None:
    plan = plan_suite(_config(tmp_path), measure=False)
    for row, job in zip(_rows(finished), plan.jobs.to_dict("records"), strict=True):
        if row["layer"] is None:
            folder = finished / row["path"]
            files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
            sizes = [array.numel() for file in files for array in file.values()]
            assert job["released"] == 4 * sum(sizes)
            earlier = sum(file["w_dec"][:, :k].numel() for k, file in enumerate(files))
            assert job["parameters"] == sum(sizes) - earlier
            assert job["memory"] > job["checkpoint"] + job["bucket"]
    assert plan.jobs["place"].tolist() == ["clt/layers_all", "crosscoder/layers_0_2", "res/layer_2"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**CLT, "sites": ["clt", "res"], "skip": False}, "coders over several layers and those of res need two"),
        ({**CROSS, "skip": True}, "only transcoders have a skip path, not crosscoder"),
        ({**CROSS, "widths": [65]}, "65 is not a multiple of the 2 layers, as 64 is"),
        ({**CROSS, "layers": [2, 0]}, "layers must ascend"),
        ({**GRID[2], "l0_start": 9}, "l0_start and l0_decay_steps belong to crosscoder and clt"),
        ({**CROSS, "sites": ["crosscoders"]}, "Coders over several layers are crosscoder and clt"),
        ({**CROSS, "target_l0s": [64]}, "64 is not below the width 64"),
    ],
)
def test_entries_that_do_not_fit_are_refused(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingStateError, match=message):
        load_config(_config(tmp_path, grid=[entry]))


def test_layers_and_widths_are_compared_with_the_model(tmp_path: Path) -> None:
    assert DIMS.n_layers == 4
    for changes, message in (
        ({"widths": [126]}, "must be a multiple of their number, 4"),
        ({"recipe": {"l0_penalty": "linear"}}, "belongs to the quadratic penalty"),
        ({"layers": [0, 9]}, "9"),
    ):
        with pytest.raises(GemmaScopeError, match=message):
            plan_suite(_config(tmp_path, grid=[{**CLT, **changes}]), measure=False)
