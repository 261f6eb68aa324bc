"""A suite trained as jobs, whose nodes and workers die, is to the bit the suite of one undisturbed process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from gemma_scope_tl.activations.writer import write_store
from gemma_scope_tl.model.sizes import sizes_of
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.config import TrainingStateError, load_config
from gemma_scope_tl.training.grid import groups_of
from gemma_scope_tl.training.ray.cluster import JobStatus
from gemma_scope_tl.training.ray.jobs import JobsFailed, jobs_of, train_on_ray
from gemma_scope_tl.training.source_factory import load_data
from gemma_scope_tl.training.suite import train_suite
from tests.distributed.ray_nodes import WORKER, two_nodes

pytest.importorskip("ray", reason="Ray is not installed: pip install 'gemma-scope-tl[ray]'")

CONFIG: dict[str, Any] = {
    "data": {"dataset": "bundled", "column": "text", "context": 64, "limit_tokens": 16_384},
    "source": {"kind": "store", "bucket_rows": 4096, "batch_rows": 8, "scale_rows": 4096},
    "recipe": {"preset": "fast", "batch_size": 64, "l0_warm_up_steps": 20, "lr_warm_up_steps": 10},
    "grid": [
        {"sites": ["res", "transcoder"], "layers": [1], "widths": [128, 64], "target_l0s": [8], "steps": 400},
        {"sites": ["res"], "layers": [1], "widths": [96], "lambdas": [1e-3], "steps": 300},
        {"sites": ["transcoder"], "layers": [1], "widths": [64], "target_l0s": [8], "steps": 400, "skip": True},
    ],
    "threads": 1,
    "eval_batches": 4,
    "checkpoint_every": 20,
    "log_every": 50,
}
JOBS = ("res_layer_1_400_steps", "transcoder_layer_1_400_steps", "res_layer_1_300_steps")


def config(output: Path, store: Path, **changes: Any) -> dict[str, Any]:
    return {**CONFIG, "output": str(output), **changes, "source": {**CONFIG["source"], "path": str(store)}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite and store of one process with one thread: ``alone/run``, ``alone/store``."""
    folder = tmp_path_factory.mktemp("alone")
    given = config(folder / "run", folder / "store")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, rows = load_data(load_config(given), progress=False)
        places = [Place("res", 1), Place("transcoder", 1)]
        write_store(folder / "store", model, rows, places, part=(0, 2), progress=False)
        assert write_store(folder / "store", model, rows, places, part=(1, 2), progress=False)
        train_suite(given, progress=False)
    finally:
        torch.set_num_threads(threads)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Everything below a folder that is a result, by its name."""
    skipped = ("jobs", "tokens", "runs.jsonl", ".lock", "run.json", "suite.json")
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in skipped
    }
    suite = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    suite["config"]["source"]["path"] = ""  # the only thing that differs: where the store lies
    return found | {"suite.json": json.dumps(suite).encode()}


def running(job: str) -> psutil.Process | None:
    """The worker process of a job: Ray gives it the job's name."""
    for process in psutil.process_iter(["cmdline"]):
        if any(f"ray::{job}" in part for part in process.info["cmdline"] or []):
            return process
    return None


class Killer:
    """A ``show`` that kills a worker of one job, and then the second node with another job on it, both in mid-training.

    The job on the node is halted until then, so that it is not over before its turn comes.
    """

    def __init__(self, jobs: Path, cluster: Any, node: Any) -> None:
        self.jobs, self.cluster, self.node = jobs, cluster, node
        self.raylet = node.all_processes["raylet"][0].process.pid
        self.halted: psutil.Process | None = None
        self.killed: list[str] = []

    def midway(self) -> Iterator[tuple[str, psutil.Process]]:
        """Jobs that have written a checkpoint and are not done, with their workers."""
        for job in JOBS:
            written = any((self.jobs / job / "checkpoints").glob("step_*"))
            if written and not (self.jobs / job / "suite.json").exists() and (process := running(job)) is not None:
                yield job, process

    def __call__(self, rows: Sequence[JobStatus]) -> None:
        if self.halted is not None and self.killed == ["worker"]:
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.halted.kill()
            self.killed.append("node")
            return
        for _, process in self.midway():
            on_node = process.ppid() == self.raylet
            if on_node and self.halted is None:
                process.suspend()
                self.halted = process
            elif not on_node and not self.killed:
                process.kill()
                self.killed.append("worker")


@pytest.mark.ray
def test_lost_workers_and_nodes_do_not_change_a_bit(cluster: Any, alone: Path, tmp_path: Path) -> None:
    node = cluster.list_all_nodes()[-1]
    killer = Killer(tmp_path / "run" / "jobs", cluster, node)
    statuses: list[JobStatus] = []

    def show(rows: Sequence[JobStatus]) -> None:
        statuses[:] = rows
        killer(rows)

    try:
        table = train_on_ray(config(tmp_path / "run", tmp_path / "store"), harvesters=2, show=show)
    finally:
        cluster.add_node(num_cpus=1, **WORKER)
    assert killer.killed == ["worker", "node"]
    assert sorted(status.starts for status in statuses)[-2:] == [2, 2]
    assert {status.state for status in statuses} == {"done"}
    expected = contents(alone / "run")
    assert len(expected) == 8  # six SAEs, suite.json, metrics.jsonl
    assert contents(tmp_path / "run") == expected
    assert _files(tmp_path / "store") == _files(alone / "store")
    assert list(table["affine"]) == [row.endswith("_affine") for row in table["name"]] and table["affine"].sum() == 1
    with np.load(tmp_path / "run" / table["path"][table["affine"]].item() / "params.npz") as arrays:
        assert arrays["affine_skip_connection"].any()


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.is_file()}


@pytest.mark.ray
def test_a_failed_job_leaves_the_others_and_is_done_later(cluster: Any, alone: Path, tmp_path: Path) -> None:
    given = config(tmp_path / "run", alone / "store", threads=None)
    broken = tmp_path / "run" / "jobs" / JOBS[1]
    broken.mkdir(parents=True)
    (broken / "metrics.jsonl").write_text("not from a run\n")
    with pytest.raises(JobsFailed, match=rf"1 of 3 jobs are not done. {JOBS[1]}: .*holds metrics.jsonl, but no run"):
        train_on_ray(given)
    trace = (broken.parent / f"{JOBS[1]}.error.txt").read_text()
    assert "Traceback" in trace or "train_job" in trace
    assert not (tmp_path / "run" / "suite.json").exists()
    kept = broken.parent / JOBS[0] / "suite.json"
    before = kept.stat().st_mtime_ns
    (broken / "metrics.jsonl").unlink()
    train_on_ray(given)
    assert kept.stat().st_mtime_ns == before
    assert contents(tmp_path / "run") == contents(alone / "run")
    assert not (broken.parent / f"{JOBS[1]}.error.txt").exists()
    with pytest.raises(TrainingStateError, match="another configuration: seed is 0, not 1"):
        train_on_ray({**given, "seed": 1})


def _jobs(output: Path, by: Any = "place", **changes: Any) -> list[Any]:
    checked = load_config({**config(output, output / "none"), **changes})
    return jobs_of(checked, groups_of(checked, sizes_of("bundled").dims), by, 2)


def test_jobs_take_what_the_plan_says(tmp_path: Path) -> None:
    jobs = _jobs(tmp_path)
    assert [job.name for job in jobs] == ["harvest_0", "harvest_1", *JOBS]
    assert [job.after for job in jobs] == [(), (), *[("harvest_0", "harvest_1")] * 3]
    assert [(job.num_cpus, job.num_gpus) for job in jobs] == [(1, 0)] * 5
    weights = 2 * 96 * (128 + 64)  # of a 96-wide model; with Adam's and gradients far more bytes than these
    assert jobs[2].memory > 3 * 4 * weights + 4096 * 96 * 4
    assert max(jobs, key=lambda job: job.cost).name in JOBS[:2]
    on_gpu = _jobs(tmp_path, device="cuda", threads=4)
    assert [(job.num_cpus, job.num_gpus) for job in on_gpu[2:]] == [(4, 1)] * 3
    assert on_gpu[2].memory < jobs[2].memory
    names = [job.name for job in _jobs(tmp_path, by="width")][2:]
    assert names[:2] == [f"{JOBS[0]}_width_64", f"{JOBS[0]}_width_128"]
    assert len(names) == 5
    with pytest.raises(TrainingStateError, match="must be place or width"):
        _jobs(tmp_path, by="site")


@pytest.mark.ray
def test_ray_that_this_process_starts(alone: Path, tmp_path: Path) -> None:
    """By width, on a Ray of its own (in a process of its own: this one is connected to the cluster)."""
    import subprocess
    import sys
    import tempfile

    given = config(tmp_path / "run", alone / "store", only=["res/*/width_64/*", "res/*/width_128/*"])
    code = f"""
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.training.cluster import Job, run_jobs
from gemma_scope_tl.training.jobs import train_job, train_on_ray
print(sorted(train_on_ray({given!r}, by="width")["name"]))
try:
    run_jobs([Job("wide", train_job, num_cpus=4096)])
except GemmaScopeError as error:
    print(error)
"""
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp") as folder:
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert out.returncode == 0, out.stderr
    first, second = out.stdout.strip().splitlines()[-2:]
    assert first == repr(["res/layer_1/width_128/target_l0_8", "res/layer_1/width_64/target_l0_8"])
    assert second.startswith("wide needs 4096 CPU; this machine offers ")
