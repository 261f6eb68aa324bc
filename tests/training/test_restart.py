"""Starting a run over: what is removed and when, what is kept, and a finished run whose SAEs are gone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma_scope_tl.errors import GemmaScopeError, TrainingStateError
from gemma_scope_tl.release.export import export_suite
from gemma_scope_tl.release.release_saes import About
from gemma_scope_tl.training.config import load_config
from gemma_scope_tl.training.earlier import ASIDE, GONE, MOVING, EarlierRun
from gemma_scope_tl.training.ray import jobs
from gemma_scope_tl.training.ray.cluster import Job, JobStatus
from gemma_scope_tl.training.running import TrainingRun
from gemma_scope_tl.training.suite import train_suite
from tests.training.kill import hashes
from tests.training.planted import PlantedSource, tiny_config

RES: list[dict[str, Any]] = [{"sites": ["res"], "layers": [1], "widths": [64], "target_l0s": [6]}]
MLP: list[dict[str, Any]] = [{**RES[0], "sites": ["mlp"]}]


def _train(folder: Path, *, resume: bool = True, source: Any = PlantedSource, **changes: Any) -> Any:
    config = tiny_config(folder, **{"grid": RES, "steps": 6, **changes})
    return train_suite(config, source=source, progress=False, resume=resume)


def _weights(folder: Path) -> list[str]:
    return sorted(file.parent.relative_to(folder).as_posix() for file in folder.rglob("params.npz"))


def _everything(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_another_grid_leaves_nothing_of_the_earlier_one(tmp_path: Path) -> None:
    _train(tmp_path / "run", grid=MLP)
    table = _train(tmp_path / "run", resume=False)
    assert _weights(tmp_path / "run") == list(table["path"]) and not (tmp_path / "run" / "mlp").exists()
    assert not list((tmp_path / "run").glob(".earlier*"))
    _train(tmp_path / "new")
    assert hashes(tmp_path / "run") == hashes(tmp_path / "new")
    (out,) = export_suite(tmp_path / "run", tmp_path / "out", About("mit"), progress=False)
    assert len(_weights(out)) == 1


def test_the_sites_of_an_unfinished_run_are_removed(tmp_path: Path) -> None:
    """As after a crash between the move of the weights into their place and the last record."""
    _train(tmp_path, grid=MLP)
    (tmp_path / "suite.json").unlink()
    table = _train(tmp_path, resume=False)
    assert _weights(tmp_path) == list(table["path"])


def test_folders_that_no_run_has_written_are_kept(tmp_path: Path) -> None:
    _train(tmp_path, grid=MLP)
    for name in ("att", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    _train(tmp_path, resume=False)
    assert (tmp_path / "att" / "mine.txt").exists() and (tmp_path / "notes" / "mine.txt").exists()
    (tmp_path / "mlp").mkdir()
    before = _everything(tmp_path)
    with pytest.raises(TrainingStateError, match="holds mlp, but no run"):
        _train(tmp_path, resume=False, grid=MLP)
    assert _everything(tmp_path) == before


class _NoScales(PlantedSource):
    def mean_squares(self, rows: int) -> Any:
        raise GemmaScopeError("the data are gone")


def _no_source(places: Sequence[Any]) -> Any:
    raise GemmaScopeError("the store is gone")


class _NoBatches(PlantedSource):
    def batches(self, batch_size: int, start: int = 0) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"source": _no_source}, GemmaScopeError, "the store is gone"),
        ({"source": _NoScales}, GemmaScopeError, "the data are gone"),
        ({"source": _NoBatches}, KeyboardInterrupt, None),
        ({"grid": [{**RES[0], "init_from": "run_typo"}]}, GemmaScopeError, "neither a folder nor a release"),
        ({"grid": [{**MLP[0], "layers": [99]}]}, GemmaScopeError, "layer 99"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_start_that_fails_keeps_the_earlier_run(
    tmp_path: Path, changes: dict[str, Any], error: type[BaseException], said: str | None, finished: bool
) -> None:
    _train(tmp_path, grid=MLP)
    if not finished:
        (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
        (tmp_path / "checkpoints" / "step_5" / "manifest.json").write_text("{}")
        (tmp_path / "suite.json").unlink()
    before = _everything(tmp_path)
    with pytest.raises(error, match=said):
        _train(tmp_path, resume=False, **changes)
    assert _everything(tmp_path) == before


def test_a_run_without_an_earlier_one_leaves_its_records(tmp_path: Path) -> None:
    """The next call may continue it: nothing is aside, so nothing is taken back."""
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, resume=False, source=_NoBatches)
    assert (tmp_path / "run.json").exists() and (tmp_path / "metrics.jsonl").exists()
    _train(tmp_path)


def test_after_the_first_step_the_earlier_run_is_gone(tmp_path: Path) -> None:
    _train(tmp_path, grid=MLP)
    step, calls = TrainingRun._step, iter(range(100))  # pyright: ignore[reportPrivateUsage]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingRun, "_step", lambda *a: _interrupt() if next(calls) == 1 else step(*a))
        _train(tmp_path, resume=False)
    assert not _weights(tmp_path) and not list(tmp_path.glob(".earlier*"))
    _train(tmp_path)
    assert _weights(tmp_path)[0].startswith("res/")


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", range(12))
def test_a_process_killed_anywhere_leaves_one_whole_run(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename while files are moved aside, back or away may be the last: the next process finds the whole run."""
    for name in ("run.json", "suite.json", "metrics.jsonl"):
        (tmp_path / name).write_text('{"config": {"grid": [{"sites": ["res", "mlp"]}]}}')
    for site in ("res", "mlp"):
        (tmp_path / site).mkdir()
        (tmp_path / site / "params.npz").write_text(site)
    before = _everything(tmp_path)
    replace, calls = os.replace, iter(range(100))

    def killed(*names: Any) -> None:
        if next(calls) == at:
            raise SystemExit
        replace(*names)

    monkeypatch.setattr(os, "replace", killed)
    earlier = EarlierRun(tmp_path)
    try:
        earlier.set_aside()
        assert (tmp_path / ASIDE).exists() and not (tmp_path / "res").exists()
        (tmp_path / "run.json").write_text("new")
        earlier.put_back()
    except SystemExit:
        pass
    monkeypatch.setattr(os, "replace", replace)
    EarlierRun(tmp_path)
    assert _everything(tmp_path) == before


def test_a_process_killed_while_it_removes_the_earlier_run_keeps_the_new_one(tmp_path: Path) -> None:
    (tmp_path / GONE / "res").mkdir(parents=True)
    (tmp_path / "run.json").write_text("new")
    EarlierRun(tmp_path)
    assert os.listdir(tmp_path) == ["run.json"] and not (tmp_path / MOVING).exists()


def test_a_run_does_not_start_from_its_own_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = _train(Path("run"))["path"][0]
    Path("link").symlink_to(tmp_path / "run")
    before = _everything(Path("run"))
    for start in ("run", "link", str(tmp_path / "run"), f"run/{path}", f"./run/{path}/params.npz", "run/{site}"):
        with pytest.raises(TrainingStateError, match="is inside the output, run, whose SAEs"):
            _train(Path("run"), resume=False, grid=[{**RES[0], "init_from": start}])
    assert _everything(Path("run")) == before
    shutil.copytree("run", "start")
    table = _train(Path("run"), resume=False, grid=[{**RES[0], "init_from": "start"}])
    assert _weights(Path("run")) == list(table["path"])


@pytest.mark.parametrize("call", ["train_suite", "train_on_ray"])
def test_a_finished_run_without_its_weights_raises(tmp_path: Path, call: str) -> None:
    table = _train(tmp_path)
    shutil.rmtree(tmp_path / "res")
    with pytest.raises(TrainingStateError) as caught:
        if call == "train_suite":
            _train(tmp_path)
        else:
            jobs.train_on_ray(tiny_config(tmp_path, grid=RES, steps=6))
    assert "1 of its 1 SAEs are missing" in str(caught.value) and table["path"][0] in str(caught.value)
    assert "resume=False" in str(caught.value) and "--restart" in str(caught.value)
    _train(tmp_path, resume=False)
    assert _train(tmp_path)["path"].equals(table["path"])


def _on_ray(folder: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[Sequence[Job], Any], Any]) -> None:
    monkeypatch.setattr(jobs, "run_jobs", lambda given, show, **_: run(given, show))
    config = load_config(tiny_config(folder, grid=RES, steps=6))
    jobs.train_on_ray(config, resume=False)


def test_on_ray_a_start_that_fails_keeps_the_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Ray is unreachable or all jobs fail; only the tracebacks are added."""
    _train(tmp_path, grid=MLP)
    (tmp_path / "jobs" / "old").mkdir(parents=True)
    (tmp_path / "jobs" / "old" / "suite.json").write_text("{}")
    before = _everything(tmp_path)

    def unreachable(given: Sequence[Job], show: Any) -> Any:
        assert not (tmp_path / "mlp").exists() and not (tmp_path / "jobs" / "old").exists()
        raise GemmaScopeError("Ray is unreachable")

    with pytest.raises(GemmaScopeError, match="Ray is unreachable"):
        _on_ray(tmp_path, monkeypatch, unreachable)
    assert _everything(tmp_path) == before

    def failed(given: Sequence[Job], show: Any) -> Any:
        statuses = [JobStatus(job.name, "failed", reason="no data", trace="a traceback") for job in given]
        show(statuses)
        return statuses

    with pytest.raises(jobs.JobsFailed, match="no data"):
        _on_ray(tmp_path, monkeypatch, failed)
    after = _everything(tmp_path)
    assert {name for name in after if name not in before} == {"jobs/res_layer_1_6_steps.error.txt"}
    assert {name: after[name] for name in before} == before


def test_on_ray_the_earlier_run_is_removed_after_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _train(tmp_path, grid=MLP)

    def stepped(given: Sequence[Job], show: Any) -> Any:
        show([JobStatus(job.name, "running", step=0, steps=6) for job in given])
        assert (tmp_path / ASIDE / "mlp").exists()
        show([JobStatus(job.name, "running", step=1, steps=6) for job in given])
        assert not (tmp_path / ASIDE).exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _on_ray(tmp_path, monkeypatch, stepped)
    assert not (tmp_path / "mlp").exists() and not (tmp_path / "suite.json").exists()
    assert (tmp_path / "run.json").exists()
