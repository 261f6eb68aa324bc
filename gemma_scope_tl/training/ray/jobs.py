"""The SAEs of a configuration as jobs on Ray: harvest the store, train the places, merge the suites.

A job trains the SAEs of one place and length with ``train_suite``, in its own folder ``jobs/NAME`` of the run's folder.
The SAEs see the same batches as in one process that trains all of them, and the seeds of the weights follow from the
names. The suite is therefore the same to the bit if a job has as many threads as that process. All nodes must see the
run's folder (and the store) under the same path: a job that is started again finds its checkpoint there, and this
process finds the results there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from filelock import FileLock

from gemma_scope_tl.files import make_folder, write_atomically
from gemma_scope_tl.model.sizes import family_and_sizes
from gemma_scope_tl.sites import parse_place
from gemma_scope_tl.training.checkpoint import (
    LOCK_NAME,
    SUITE_NAME,
    alone,
    check_same_run,
    read_record,
    suite_table,
)
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError, load_config
from gemma_scope_tl.training.earlier import EarlierRun
from gemma_scope_tl.training.grid import AnyGroup, Group, groups_of, places_of
from gemma_scope_tl.training.ray.cluster import Job, JobStatus, Report, run_jobs
from gemma_scope_tl.training.ray.merge_jobs import merge_jobs
from gemma_scope_tl.training.start import absolute_start
from gemma_scope_tl.training.suite import begin_run, train_suite

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from gemma_scope_tl.activations.source import Source
    from gemma_scope_tl.sites import Place

JOBS = "jobs"
_PATIENCE = 120.0  # seconds within which the processes of a lost node should have ended


class JobsFailed(TrainingStateError):
    """Some jobs failed; the results of the others are kept.

    Attributes:
        statuses: the statuses of all jobs.
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
    """Train the SAEs of a configuration as jobs on Ray, with the folder and table of ``train_suite``, plus ``jobs/``.

    If the configuration names a store that does not exist and has ``data``, the store is harvested first. A second call
    does only what is missing: finished jobs and harvested shards are kept, others continue from their checkpoints.

    Args:
        config, overrides: as for ``train_suite``. ``threads`` is the number of threads of a job, by default 1.
        address: address of a cluster; None starts a Ray on this machine.
        by: one job for each place (and length), or for each place and width.
        harvesters: jobs that share the harvest, each with its own copy of the model.
        retries: how often a job is started again after its worker or node was lost.
        resume: False starts over: what jobs have done, and the finished suite, are removed after the first step of a
            job. If that step is not reached, all of it is kept. The store stays.
        show: called with the statuses of all jobs from time to time.

    Raises:
        JobsFailed: jobs failed. The message names each with its reason; tracebacks are in ``jobs/NAME.error.txt``.
        TrainingStateError: the configuration has problems, or its folder holds another run or is not shared by the
            nodes.
        GemmaScopeError: as in :func:`~gemma_scope_tl.training.ray.cluster.run_jobs`.
    """
    checked = load_config(config, overrides)
    if checked.mesh.processes > 1:
        raise TrainingStateError(
            "A job on Ray is one process and cannot have a mesh: remove mesh, or start the run with torchrun."
        )
    folder = Path(checked.output).absolute()
    make_folder(folder)
    with alone(folder):
        family, sizes = family_and_sizes(checked.model.name)
        groups = groups_of(checked, sizes.dims, family)
        with EarlierRun(folder, (JOBS,)) as earlier:
            if resume and (folder / SUITE_NAME).exists():
                check_same_run(read_record(folder / SUITE_NAME)["config"], checked.results, folder)
                return suite_table(folder)
            jobs = jobs_of(checked, groups, by, harvesters)
            training = [job.name for job in jobs if job.function is train_job]
            begin_run(folder, checked, groups, earlier, resume)
            make_folder(folder / JOBS)
            statuses = run_jobs(jobs, address=address, retries=retries, show=_discarding(earlier, training, show))
        _check_done(folder, statuses)
        merge_jobs(folder, checked, groups, [folder / JOBS / name for name in training], family)
        return suite_table(folder)


def _discarding(
    earlier: EarlierRun, training: Sequence[str], show: Callable[[Sequence[JobStatus]], None]
) -> Callable[[Sequence[JobStatus]], None]:
    """``show``, which also discards the earlier run as soon as one of the training jobs has done a step."""

    def seen(statuses: Sequence[JobStatus]) -> None:
        if any(status.step or status.state == "done" for status in statuses if status.name in training):
            earlier.discard()
        show(statuses)

    return seen


def jobs_of(
    config: SuiteConfig, groups: Sequence[AnyGroup], by: Literal["place", "width"] = "place", harvesters: int = 1
) -> list[Job]:
    """The jobs of a configuration, with the resources of each.

    Args:
        config: the configuration of the run.
        groups: the SAEs of the run, from ``groups_of``.
        by, harvesters: as for :func:`train_on_ray`.

    Raises:
        TrainingStateError: ``by`` is unknown, or there is no harvester.
    """
    if by not in ("place", "width") or harvesters < 1:
        raise TrainingStateError(f"by must be place or width, and harvesters 1 or more, not {by!r} and {harvesters}.")
    shared = _for_workers(config)
    jobs: list[Job] = []
    if config.source.kind == "store" and config.data is not None and not _is_store(str(config.source.path)):
        places = [place.key for place in places_of(groups)]
        for part in range(harvesters):
            job = _job(f"harvest_{part}", harvest_job, shared)
            arguments = {**job.arguments, "places": places, "part": (part, harvesters)}
            jobs.append(replace(job, memory=0, cost=0.0, arguments=arguments))
    after = tuple(job.name for job in jobs)
    for group in groups:
        for name, part in _by_width(group) if by == "width" else [(group.name, group)]:
            output = str(Path(shared.output) / JOBS / name)
            own = shared.model_copy(update={"output": output, "only": [spec.name for spec in part.specs]})
            cost = float(part.steps * sum(spec.d_sae for spec in part.specs))
            jobs.append(replace(_job(name, train_job, own), after=after, cost=cost))
    return jobs


def train_job(report: Report, config: Mapping[str, Any]) -> str:
    """Run ``train_suite`` in a worker process, and return the folder of the results."""
    import torch

    from gemma_scope_tl.training.source_factory import OpenSource, source_opener

    checked = load_config(config)
    torch.set_num_threads(checked.threads or 1)
    family, sizes = family_and_sizes(checked.model.name)
    steps = max(group.steps for group in groups_of(checked, sizes.dims, family))
    opener: list[OpenSource] = []

    def source(places: Sequence[Place]) -> Source:
        if not opener:  # opened late, because a finished run needs no model
            opener.append(source_opener(checked, None, progress=False))
        report(0, steps)
        return cast("Source", _ReportingSource(opener[0](places), report, steps))

    folder = Path(checked.output)
    make_folder(folder)
    with FileLock(folder / LOCK_NAME, timeout=_PATIENCE):
        pass  # an earlier attempt, on a node that lost its connection, may be about to end
    train_suite(checked, source=source, progress=False)
    return str(folder)


def harvest_job(report: Report, config: Mapping[str, Any], places: Sequence[str], part: tuple[int, int]) -> bool:
    """Write one part of the store in a worker process, and return whether the store is finished."""
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


class _ReportingSource:
    """A source that reports the number of batches taken from it."""

    def __init__(self, source: Source, report: Report, steps: int) -> None:
        self._source, self._report, self._steps = source, report, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Mapping[Place, torch.Tensor]]:
        for step, batch in enumerate(self._source.batches(batch_size, start), start):
            self._report(min(step, self._steps), self._steps)
            yield batch


def _for_workers(config: SuiteConfig) -> SuiteConfig:
    """The configuration with absolute paths, one folder of tokens for all jobs, and the threads of a job."""
    changes: dict[str, Any] = {"output": _absolute(config.output), "threads": config.threads or 1}
    data, model, source = config.data, config.model, config.source
    if data is not None:
        folder = data.folder or f"{config.output}/tokens"
        dataset = _absolute(data.dataset) if Path(data.dataset).exists() else data.dataset
        changes["data"] = data.model_copy(update={"folder": _absolute(folder), "dataset": dataset})
    changes["grid"] = [
        entry.model_copy(update={"init_from": absolute_start(entry.init_from)}) if entry.init_from else entry
        for entry in config.grid
    ]
    if Path(model.name).is_dir():
        changes["model"] = model.model_copy(update={"name": _absolute(model.name)})
    if source.path is not None and "://" not in source.path:
        changes["source"] = source.model_copy(update={"path": _absolute(source.path)})
    return config.model_copy(update=changes)


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _job(name: str, function: Callable[..., Any], config: SuiteConfig) -> Job:
    """A job with the resources that the plan of its configuration names."""
    from gemma_scope_tl.training.plan import plan_suite

    totals = plan_suite(config, measure=False).totals
    sizes = [(config.device, totals["memory"] - totals["bucket"]), (config.source.device, totals["bucket"])]
    devices = (config.device, config.source.device, config.model.device or "cpu")
    return Job(
        name=name,
        function=function,
        arguments={"config": config.model_dump(mode="json")},
        num_cpus=config.threads or 1,
        num_gpus=float(any(device.startswith("cuda") for device in devices)),
        memory=int(sum(size for device, size in sizes if not device.startswith("cuda"))),
    )


def _by_width(group: AnyGroup) -> list[tuple[str, AnyGroup]]:
    if not isinstance(group, Group):  # one coder
        return [(group.name, group)]
    specs = sorted(group.specs, key=lambda spec: spec.d_sae)
    parts = [(width, tuple(same)) for width, same in groupby(specs, key=lambda spec: spec.d_sae)]
    return [(f"{group.name}_width_{width}", replace(group, specs=same)) for width, same in parts]


def _is_store(path: str) -> bool:
    from gemma_scope_tl.activations.folder import open_folder
    from gemma_scope_tl.activations.manifest import STORE_NAME

    return STORE_NAME in open_folder(path).sizes("")


def _check_done(folder: Path, statuses: Sequence[JobStatus]) -> None:
    """Write the tracebacks of failed jobs, and raise if there are any."""
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
            f"{folder / JOBS}. Finished jobs are kept: run the same again after removing the cause.",
            statuses,
        )
