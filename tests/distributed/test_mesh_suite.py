"""``train_suite`` on several processes: the files of one process within rounding, killed and resumed to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_scope_tl.training.config import TrainingStateError, load_config
from gemma_scope_tl.training.ray.jobs import train_on_ray
from gemma_scope_tl.training.suite import train_suite
from tests.distributed.mesh_suite_worker import mesh_config
from tests.training.kill import PAUSE, hashes
from tests.training.planted import PlantedSource, tiny_config

ROOT = Path(__file__).resolve().parents[2]


def start(out: Path, latents: int, data: int, pause: float = 0.0) -> subprocess.Popen[str]:
    """A run, with that many seconds before every flush of a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(latents * data)]
    worker = ["-m", "tests.distributed.mesh_suite_worker", str(out), str(latents), str(data)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), PAUSE: str(pause)}
    return subprocess.Popen([*command, *worker], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_suite(mesh_config(folder), source=PlantedSource, progress=False)
    return folder


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite of two processes with half of the latents each."""
    folder = tmp_path_factory.mktemp("halves") / "run"
    finish(start(folder, 2, 1))
    return folder


def suite(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "suite.json").read_text(encoding="utf-8"))


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of an SAE, or of the layers of a coder."""
    if (folder / "params.npz").exists():
        with np.load(folder / "params.npz") as file:
            return {name: file[name] for name in file.files}
    files = sorted(folder.glob("params_layer_*.safetensors"))
    return {f"{number}.{name}": value for number, path in enumerate(files) for name, value in load_file(path).items()}


def compare(found: Path, expected: Path) -> None:
    """Released weights, measurements and log of two runs that added up in another order."""
    skips = 0
    for here, there in zip(suite(found)["saes"], suite(expected)["saes"], strict=True):
        assert here["path"] == there["path"] and here.get("affine") == there.get("affine")
        # float32 sums of 24 steps; the thresholds' gradients jump where a pre-activation crosses the kernel's edge
        assert here["l0"] == pytest.approx(there["l0"], abs=0.02)
        assert here["fvu"] == pytest.approx(there["fvu"], rel=1e-3)
        mine, its = arrays(found / here["path"]), arrays(expected / there["path"])
        assert list(mine) == list(its)
        paths = [its[name] for name in its if name.endswith("affine_skip_connection")]
        assert bool(paths) == there["path"].endswith("_affine")
        skips += sum(bool(path.any()) for path in paths)
        for name, value in its.items():
            assert mine[name].shape == value.shape
            assert np.abs(mine[name] - value).max() <= 2e-3 * np.abs(value).max(), (here["path"], name)
    assert skips == 1 + 3  # matrices of zeros, with which training begins, would be equal too
    rows = [(f / "metrics.jsonl").read_text().splitlines() for f in (found, expected)]
    assert len(rows[0]) == len(rows[1])  # one process logs


@pytest.mark.slow
def test_latents_divided(halves: Path, alone: Path) -> None:
    compare(halves, alone)


@pytest.mark.slow
def test_latents_and_batch_divided(alone: Path, tmp_path: Path) -> None:
    finish(start(tmp_path / "run", 2, 2))
    compare(tmp_path / "run", alone)


@pytest.mark.kill
def test_killed_and_resumed(halves: Path, tmp_path: Path) -> None:
    """Each process has its files in the checkpoint; all go on from there to the same bits."""
    out = tmp_path / "run"
    process = start(out, 2, 1, pause=0.2)
    checkpoint = out / "checkpoints" / "step_10"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.005)
    _kill_workers(out)
    process.kill()
    process.communicate()
    assert not (out / "suite.json").exists()
    files = {path.name for path in max((out / "checkpoints").glob("step_*")).iterdir()}
    assert {name.split(".", 1)[1] for name in files} == {"json", "0_of_2.safetensors", "1_of_2.safetensors"}
    with pytest.raises(TrainingStateError, match="mesh is .*, not null"):
        train_suite(mesh_config(out), source=PlantedSource, progress=False)
    finish(start(out, 2, 1))
    assert hashes(out) == hashes(halves)


def _kill_workers(out: Path) -> None:
    """Workers have sessions of their own, so the group's signal does not reach them."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if str(out) in (process.info["cmdline"] or []):
            process.kill()
            process.wait()


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingStateError, match=r"mesh.latents, 3, does not divide the widths \[64\]"):
        load_config(tiny_config(tmp_path, mesh={"latents": 3}))
    with pytest.raises(TrainingStateError, match="mesh.data, 5, does not divide the batch size, 64"):
        load_config(tiny_config(tmp_path, mesh={"data": 5}))
    with pytest.raises(TrainingStateError, match="torchrun"):
        train_on_ray(tiny_config(tmp_path, mesh={"data": 2}))
