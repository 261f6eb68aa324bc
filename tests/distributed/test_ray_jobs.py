"""Jobs on a real Ray cluster of two nodes on this machine: what is lost is started again, what fails is named."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.training.ray.cluster import Job, JobStatus, Report, run_jobs
from gemma_scope_tl.training.ray.job_table import job_table, shown_jobs
from tests.distributed.ray_nodes import WORKER, two_nodes

pytest.importorskip("ray", reason="Ray is not installed: pip install 'gemma-scope-tl[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as nodes:
        yield nodes


def count(report: Report, folder: str, name: str, steps: int = 1, until: str = "") -> list[str]:
    """Write down that it ran, by which process; then count, waiting half-way for the file ``until``."""
    Path(folder, f"{name}.{os.getpid()}").touch()
    for step in range(steps):
        report(step, steps)
        while step == steps // 2 and until and not Path(until).exists():
            time.sleep(0.02)
    report(steps, steps)
    return sorted(path.name for path in Path(folder).iterdir())


def refuse(report: Report, message: str) -> None:
    raise ValueError(message)


def refuse_politely(report: Report) -> None:
    raise UnknownNameError("Unknown site 'ress'. Nearest: res.")


def job(folder: Path, name: str, **kwargs: Any) -> Job:
    after, cost, cpus = kwargs.pop("after", ()), kwargs.pop("cost", 1.0), kwargs.pop("num_cpus", 1.0)
    return Job(name, count, {"folder": str(folder), "name": name, **kwargs}, cpus, after=after, cost=cost)


@pytest.mark.ray
def test_jobs_run_after_those_they_wait_for(cluster: Any, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    jobs = [job(tmp_path, "last", after=("a", "b")), job(tmp_path, "a", steps=4), job(tmp_path, "b")]
    statuses = run_jobs(jobs, show=lambda rows: seen.append([row.state for row in rows]), poll=0.05)
    assert [(row.name, row.state, row.starts, row.step) for row in statuses] == [
        ("last", "done", 1, 1),
        ("a", "done", 1, 4),
        ("b", "done", 1, 1),
    ]
    assert [name.split(".")[0] for name in statuses[0].value] == ["a", "b", "last"]
    assert seen[0][0] == "waiting"
    assert seen[-1] == ["done"] * 3


@pytest.mark.ray
def test_a_failed_job_is_named_and_the_others_are_done(cluster: Any, tmp_path: Path) -> None:
    jobs = [
        Job("bad", refuse, {"message": "no good\nbecause"}),
        Job("rude", refuse_politely),
        job(tmp_path, "needs bad", after=("bad",)),
        job(tmp_path, "needs that", after=("needs bad",)),
        job(tmp_path, "fine"),
    ]
    statuses = {row.name: row for row in run_jobs(jobs, poll=0.05)}
    states = {name: row.state for name, row in statuses.items()}
    assert states.pop("fine") == "done"
    assert states == {"bad": "failed", "rude": "failed", "needs bad": "left out", "needs that": "left out"}
    assert statuses["bad"].reason == "ValueError: because"
    assert statuses["bad"].starts == 1  # its own error: not tried again
    assert "test_ray_jobs.py" in statuses["bad"].trace
    assert statuses["rude"].reason == "Unknown site 'ress'. Nearest: res."
    assert statuses["needs that"].reason == "needs needs bad"
    assert [path.name.split(".")[0] for path in tmp_path.iterdir()] == ["fine"]


def _once(ready: Callable[[], bool], act: Callable[[], Any]) -> Callable[[Sequence[JobStatus]], None]:
    """A ``show`` that does ``act`` as soon as ``ready``, once."""
    done: list[bool] = []

    def show(rows: Sequence[JobStatus]) -> None:
        if not done and ready():
            done.append(True)
            act()

    return show


@pytest.mark.ray
def test_a_killed_worker_is_replaced(cluster: Any, tmp_path: Path) -> None:
    folder, go = tmp_path / "ran", tmp_path / "go"
    folder.mkdir()

    def kill() -> None:
        (path,) = folder.iterdir()
        os.kill(int(path.suffix[1:]), signal.SIGKILL)
        go.touch()

    (status,) = run_jobs(
        [job(folder, "a", steps=2, until=str(go))], show=_once(lambda: bool(list(folder.iterdir())), kill), poll=0.05
    )
    assert (status.state, status.starts, len(status.value)) == ("done", 2, 2)


@pytest.mark.ray
def test_a_job_whose_workers_all_die_has_failed(cluster: Any, tmp_path: Path) -> None:
    def kill_all(rows: Sequence[JobStatus]) -> None:
        for path in tmp_path.iterdir():
            path.unlink()
            os.kill(int(path.suffix[1:]), signal.SIGKILL)

    jobs = [job(tmp_path, "a", steps=2, until="/nowhere")]
    (status,) = run_jobs(jobs, show=kill_all, poll=0.05, retries=1)
    assert (status.state, status.starts) == ("failed", 2)
    assert status.reason == "its worker processes died, also when it was started again"


@pytest.mark.ray
def test_a_job_waits_for_a_node_that_can_hold_it(cluster: Any, tmp_path: Path) -> None:
    reasons: list[str] = []
    node: list[Any] = []

    def show(rows: Sequence[JobStatus]) -> None:
        reasons.append(rows[0].reason)
        if rows[0].reason and not node:
            node.append(cluster.add_node(num_cpus=3, **WORKER))

    try:
        (status,) = run_jobs([job(tmp_path, "wide", num_cpus=3)], address="auto", show=show, poll=0.05)
    finally:
        for added in node:
            cluster.remove_node(added)
    assert "no node has 3 CPU" in reasons
    assert (status.state, status.reason) == ("done", "")


@pytest.mark.ray
def test_bad_jobs_are_refused(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(GemmaScopeError, match="twice: a"):
        run_jobs([job(tmp_path, "a"), job(tmp_path, "a")])
    with pytest.raises(UnknownNameError, match=r"Unknown job 'c'. Nearest: "):
        run_jobs([job(tmp_path, "a"), job(tmp_path, "b", after=("c",))])
    with pytest.raises(GemmaScopeError, match="wait for each other: a, b"):
        run_jobs([job(tmp_path, "a", after=("b",)), job(tmp_path, "b", after=("a",)), job(tmp_path, "c")])
    with pytest.raises(GemmaScopeError, match="retries must be 0 or more"):
        run_jobs([], retries=-1)


ROWS = [
    JobStatus("res/layer_0", "done", 10, 10, 1, "one", 3.0),
    JobStatus("res/layer_1", "failed", 4, 10, 4, "two", 5.0, "its nodes were lost [/x]"),
    JobStatus("join"),
]


def test_the_table_shows_the_failed_first() -> None:
    out = io.StringIO()
    Console(file=out, width=120).print(job_table(ROWS))
    lines = [line.split() for line in out.getvalue().splitlines() if "/layer" in line or "join" in line]
    assert [line[1] for line in lines] == ["res/layer_1", "join", "res/layer_0"]
    assert "started 4 times; its nodes were lost [/x]" in out.getvalue()
    assert "3 jobs: 1 failed, 1 waiting, 1 done" in out.getvalue()


def test_logs_get_a_line_for_a_change() -> None:
    out = io.StringIO()
    with shown_jobs(Console(file=out, width=40)) as show:
        show(ROWS)
        show(ROWS)
    assert out.getvalue().splitlines() == [
        "res/layer_0: done",
        "res/layer_1: failed (started 4 times; its nodes were lost [/x])",
        "3 jobs: 1 failed, 1 waiting, 1 done",
    ]
