"""One configuration's SAEs as jobs on Ray: harvest the store, train the places, put the suite together.

A job trains the SAEs of one place and length, by ``train_suite`` in a folder of its own, ``jobs/NAME`` in the run's.
Its SAEs see what they would see in one process with all the others, and the seeds of weights follow from names; so the
suite is the same to the bit where a job has as many threads as that process. All nodes must see the run's folder (and
the store) under the same path: that is where a job that is started again finds its checkpoint, and where this process
finds the results.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from gemma_scope_tl.files import make_folder, write_atomically
from gemma_scope_tl.model.sizes import sizes_of
from gemma_scope_tl.sites import parse_place
from gemma_scope_tl.training.checkpoint import (
    LOCK_NAME,
    METRICS_NAME,
    RUN_NAME,
    SUITE_NAME,
    alone,
    check_same_run,
    read_record,
    suite_table,
    write_run,
)
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError, load_config
from gemma_scope_tl.training.grid import Group, groups_of, places_of
from gemma_scope_tl.training.ray.cluster import Job, JobStatus, Report, run_jobs
from gemma_scope_tl.training.ray.job_table import join_suites
from gemma_scope_tl.training.suite import train_suite

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from gemma_scope_tl.activations.source import Source
    from gemma_scope_tl.sites import Place

JOBS = "jobs"
_PATIENCE = 120.0  # seconds in which a lost node's processes should be gone
_HARVEST = "harvest"


class JobsFailed(TrainingStateError):
    """Some jobs failed; the others are done and stay done.

    Attributes:
        statuses: of all jobs.
    """

    def __init__(self, message: str, statuses: Sequence[JobStatus]) -> None:
        super().__init__(message)
        self.statuses = list(statuses)


def train_on_ray(
    config: str | Path | Mapping[str, Any] | SuiteConfig,
    *,
    overrides: Sequence[str] = (),
    address: str | None = None,
    by: Literal["place", "width"] = "place",
    harvesters: int = 1,
    retries: int = 3,
    resume: bool = True,
    show: Callable[[Sequence[JobStatus]], None] = lambda statuses: None,
) -> pd.DataFrame:
    """Train the SAEs of a configuration as jobs on Ray; the folder and table of ``train_suite``, plus ``jobs/``.

    A configuration whose source is a store, and which has ``data``, harvests the store first if it is not there. Called
    again, it does what is missing: finished jobs and harvested shards stay, others go on from their checkpoints.

    Args:
        config, overrides: as for ``train_suite``. ``threads`` are a job's, 1 unless given.
        address: of a cluster; None starts a Ray on this machine.
        by: a job a place (and length), or one a place and width, which is smaller.
        harvesters: jobs that share the harvest, each with its own copy of the model.
        retries: how often a job is started again after its worker or node was lost.
        resume: False throws away what jobs have done, but not the store.
        show: takes the statuses of all jobs now and then.

    Raises:
        JobsFailed: naming each job and its reason; their tracebacks are in ``jobs/NAME.error.txt``.
        TrainingStateError: a wrong configuration, a folder that holds another run, or that the jobs' nodes do not see.
        GemmaScopeError: as :func:`~gemma_scope_tl.training.ray.cluster.run_jobs`.
    """
    checked = load_config(config, overrides)
    if checked.mesh.processes > 1:
        raise TrainingStateError(
            "A job on Ray is one process, so mesh does not go with it: start the run with torchrun."
        )
    folder = Path(checked.output).absolute()
    make_folder(folder / JOBS)
    with alone(folder):
        return _train(checked, folder, address, by, harvesters, retries, resume, show)


def _train(
    config: SuiteConfig,
    folder: Path,
    address: str | None,
    by: Literal["place", "width"],
    harvesters: int,
    retries: int,
    resume: bool,
    show: Callable[[Sequence[JobStatus]], None],
) -> pd.DataFrame:
    groups = groups_of(config, sizes_of(config.model.name).dims)
    _begin(folder, config, resume)
    if not (folder / SUITE_NAME).exists():
        jobs = jobs_of(config, groups, by, harvesters)
        statuses = run_jobs(jobs, address=address, retries=retries, show=show)
        _report_failures(folder, statuses)
        join_suites(folder, config, groups, [folder / JOBS / job.name for job in jobs if job.function is train_job])
    return suite_table(folder)


def jobs_of(
    config: SuiteConfig, groups: Sequence[Group], by: Literal["place", "width"] = "place", harvesters: int = 1
) -> list[Job]:
    """The jobs of a configuration, with what each takes.

    Args:
        config: the run.
        groups: its SAEs, from ``groups_of``.
        by, harvesters: as for :func:`train_on_ray`.

    Raises:
        TrainingStateError: ``by`` or ``harvesters`` are not what they can be.
    """
    if by not in ("place", "width") or harvesters < 1:
        raise TrainingStateError(f"Jobs are by place or width, with a harvester at least; not {by!r}, {harvesters}.")
    harvest: list[Job] = []
    if config.source.kind == "store" and config.data is not None and not _is_store(str(config.source.path)):
        places = [place.key for place in places_of(groups)]
        harvest = [
            _job(
                f"{_HARVEST}_{part}",
                harvest_job,
                _for_workers(config),
                {"places": places, "part": (part, harvesters)},
                0.0,
            )
            for part in range(harvesters)
        ]
    parts = [part for group in groups for part in (_by_width(group) if by == "width" else [(group.name, group)])]
    after = tuple(job.name for job in harvest)
    return [
        *harvest,
        *(
            replace(_job(name, train_job, _alone(config, name, group), {}, _cost(group)), after=after)
            for name, group in parts
        ),
    ]


def train_job(report: Report, config: Mapping[str, Any]) -> str:
    """A job: ``train_suite`` in a worker process. Returns the folder of its results."""
    import torch

    from gemma_scope_tl.training.source_factory import source_opener

    checked = load_config(config)
    torch.set_num_threads(checked.threads or 1)
    steps = max(group.steps for group in groups_of(checked, sizes_of(checked.model.name).dims))
    opener: list[Callable[[Sequence[Place]], Source]] = []

    def source(places: Sequence[Place]) -> Source:
        if not opener:  # a finished run is found before the model would be loaded
            opener.append(source_opener(checked, None, progress=False))
        return _Reporting(opener[0](places), report, steps)

    folder = Path(checked.output)
    make_folder(folder)
    with FileLock(folder / LOCK_NAME, timeout=_PATIENCE):
        pass  # an earlier attempt, on a node that was only cut off, may still be about to end
    train_suite(checked, source=source, progress=False)
    return str(folder)


def harvest_job(report: Report, config: Mapping[str, Any], places: Sequence[str], part: tuple[int, int]) -> bool:
    """A job: one part of the store. Returns whether the store is finished."""
    import torch

    from gemma_scope_tl.activations.writer import write_store
    from gemma_scope_tl.training.source_factory import load_data

    checked = load_config(config)
    torch.set_num_threads(checked.threads or 1)
    model, rows = load_data(checked, progress=False)
    report(0, 1)
    finished = write_store(
        str(checked.source.path),
        model,
        rows,
        [parse_place(key) for key in places],
        dtype=checked.source.dtype,
        batch_rows=checked.source.batch_rows,
        part=part,
        progress=False,
    )
    report(1, 1)
    return finished


class _Reporting:
    """A source that says how many batches were taken from it."""

    def __init__(self, source: Source, report: Report, steps: int) -> None:
        self._source, self._report, self._steps = source, report, steps

    @property
    def widths(self) -> Mapping[Place, int]:
        return self._source.widths

    @property
    def rows(self) -> int:
        return self._source.rows

    @property
    def bucket_rows(self) -> int:
        return self._source.bucket_rows

    def mean_squares(self, rows: int) -> dict[Place, float]:
        self._report(0, self._steps)
        return self._source.mean_squares(rows)

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Mapping[Place, torch.Tensor]]:
        for step, batch in enumerate(self._source.batches(batch_size, start), start):
            self._report(min(step, self._steps), self._steps)
            yield batch


def _alone(config: SuiteConfig, name: str, group: Group) -> SuiteConfig:
    """The configuration of one job: some SAEs, a folder of their own, and the run's tokens."""
    shared = _for_workers(config)
    output = str(Path(shared.output) / JOBS / name)
    return shared.model_copy(update={"output": output, "only": [spec.name for spec in group.specs]})


def _for_workers(config: SuiteConfig) -> SuiteConfig:
    """Paths that hold in any folder, tokens in one place, and a job's threads."""
    changes: dict[str, Any] = {"output": _absolute(config.output), "threads": config.threads or 1}
    data, model, source = config.data, config.model, config.source
    if data is not None:
        folder = data.folder or f"{config.output}/tokens"
        dataset = _absolute(data.dataset) if Path(data.dataset).exists() else data.dataset
        changes["data"] = data.model_copy(update={"folder": _absolute(folder), "dataset": dataset})
    if Path(model.name).is_dir():
        changes["model"] = model.model_copy(update={"name": _absolute(model.name)})
    if source.path is not None and "://" not in source.path:
        changes["source"] = source.model_copy(update={"path": _absolute(source.path)})
    return config.model_copy(update=changes)


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _job(
    name: str, function: Callable[..., Any], config: SuiteConfig, arguments: Mapping[str, Any], cost: float
) -> Job:
    from gemma_scope_tl.training.plan import plan_suite

    totals = plan_suite(config, measure=False).totals
    on_gpu = [(config.device, totals["memory"] - totals["bucket"]), (config.source.device, totals["bucket"])]
    memory = sum(size for device, size in on_gpu if not device.startswith("cuda"))
    devices = (config.device, config.source.device, config.model.device or "cpu")
    return Job(
        name=name,
        function=function,
        arguments={"config": config.model_dump(mode="json"), **arguments},
        num_cpus=config.threads or 1,
        num_gpus=float(any(device.startswith("cuda") for device in devices)),
        memory=int(memory) if function is train_job else 0,
        cost=cost,
    )


def _by_width(group: Group) -> list[tuple[str, Group]]:
    specs = sorted(group.specs, key=lambda spec: spec.d_sae)
    parts = [(width, tuple(same)) for width, same in groupby(specs, key=lambda spec: spec.d_sae)]
    return [(f"{group.name}_width_{width}", replace(group, specs=same)) for width, same in parts]


def _cost(group: Group) -> float:
    return float(group.steps * sum(spec.d_sae for spec in group.specs))


def _is_store(path: str) -> bool:
    from gemma_scope_tl.activations.folder import open_folder
    from gemma_scope_tl.activations.manifest import STORE_NAME

    return STORE_NAME in open_folder(path).sizes("")


def _begin(folder: Path, config: SuiteConfig, resume: bool) -> None:
    """Say what the folder holds, or find that it holds another run."""
    if not resume:
        for name in (RUN_NAME, SUITE_NAME, METRICS_NAME):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / JOBS, ignore_errors=True)
        make_folder(folder / JOBS)
    for name in (SUITE_NAME, RUN_NAME):
        if (folder / name).exists():
            check_same_run(read_record(folder / name)["config"], config.results, folder)
            return
    write_run(folder, config)


def _report_failures(folder: Path, statuses: Sequence[JobStatus]) -> None:
    for status in statuses:
        path = folder / JOBS / f"{status.name}.error.txt"
        if status.trace:
            write_atomically(path, status.trace + "\n")
        else:
            path.unlink(missing_ok=True)
    failed = [f"{status.name}: {status.reason}" for status in statuses if status.state == "failed"]
    if failed:
        undone = sum(status.state != "done" for status in statuses)
        raise JobsFailed(
            f"{undone} of {len(statuses)} jobs are not done. " + " | ".join(failed) + f" | Tracebacks are in "
            f"{folder / JOBS}. What is done stays done: run the same again after the cause is gone.",
            statuses,
        )
