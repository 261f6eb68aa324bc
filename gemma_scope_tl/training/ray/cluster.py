"""Jobs on a Ray cluster, or on a Ray that this process starts for itself. Nothing here knows of SAEs.

Ray starts a job on a node that has its processors, GPUs and memory, after the jobs whose results it takes, and starts
it again elsewhere when its worker or node is lost. An error that the job's own code raises is not retried, since it
would occur again; it stops the jobs that need the failed one, and no others. Ray is imported on use:
``pip install 'gemma-scope-tl[ray]'``.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gemma_scope_tl import __version__
from gemma_scope_tl.errors import GemmaScopeError, unknown_name

if TYPE_CHECKING:
    from types import ModuleType

Report = Callable[[int, int], None]
"""What a job calls with the steps done and the steps in all."""
State = Literal["waiting", "running", "done", "failed", "left out"]

_OBJECT_STORE = 128 * 2**20  # bytes; jobs exchange files, so Ray's own store holds only their arguments
_SECONDS_BETWEEN_REPORTS = 0.5
_LOST = {
    "OutOfMemoryError": "its workers ran out of memory",
    "NodeDiedError": "its nodes were lost",
    "WorkerCrashedError": "its worker processes died",
    "TaskCancelledError": "it was cancelled",
}
"""Ray's errors for a job that was lost more often than it may be retried."""


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: unique among the jobs of a run.
        function: an importable function, called as ``function(report, **arguments)`` in a worker process. It must be
            safe to run again after a lost attempt.
        arguments: small values that can be pickled.
        num_cpus, num_gpus: processors and GPUs that Ray reserves for it.
        memory: bytes that Ray reserves for it; 0 for no reservation.
        after: names of the jobs that must be done before.
        cost: any measure of its length; longer jobs start first.
    """

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory: int = 0
    after: tuple[str, ...] = ()
    cost: float = 1.0

    @property
    def resources(self) -> dict[str, float]:
        """The resources that it needs, in Ray's names."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": float(self.memory)}
        return {name: amount for name, amount in wanted.items() if amount}

    def fits(self, node: Mapping[str, float]) -> bool:
        """Whether a node has the resources."""
        return all(node.get(name, 0.0) >= amount for name, amount in self.resources.items())


@dataclass
class JobStatus:
    """The state of a job.

    Attributes:
        state: a job is ``left out`` if one that it needs failed.
        step, steps: its own measure of progress; 0, 0 until it reports.
        starts: how often it was started; more than 1 after a worker or node was lost.
        node: where it was last started.
        seconds: from its first start to its end, lost attempts included.
        reason: why it waits, failed or was left out.
        trace: the traceback in the worker.
        value: what its function returned.
    """

    name: str
    state: State = "waiting"
    step: int = 0
    steps: int = 0
    starts: int = 0
    node: str = ""
    seconds: float = 0.0
    reason: str = ""
    trace: str = ""
    value: Any = None


def run_jobs(
    jobs: Sequence[Job],
    *,
    address: str | None = None,
    retries: int = 3,
    show: Callable[[Sequence[JobStatus]], None] = lambda statuses: None,
    poll: float = 0.5,
) -> list[JobStatus]:
    """Run ``jobs`` to their end, even if some of them fail, and return a status for each, in their order.

    Args:
        jobs: any number; those that wait for others may come before them.
        address: of a running cluster (``auto``, ``host:6379``, ``ray://host:10001``). None starts a Ray on this machine
            and stops it at the end. A process that is connected to a cluster already uses that one.
        retries: how often a job is started again after its worker or node was lost.
        show: called with all statuses about every ``poll`` seconds and at the end.
        poll: seconds.

    Raises:
        GemmaScopeError: Ray is missing or unreachable; two jobs have one name, or wait for an unknown one or for each
            other; or a job is larger than this machine, where Ray runs on it alone. Failures of jobs are in the
            statuses.
    """
    _check(jobs, retries)
    ray = import_ray()
    alone = address is None and not ray.is_initialized()
    with _connection(ray, address):
        if alone:
            _check_sizes(jobs, _nodes(ray))
        run = _SubmittedJobs(ray, jobs, retries)
        try:
            while run.pending:
                run.collect(poll)
                run.update(alone)
                show(run.statuses)
            show(run.statuses)
        finally:
            run.cancel()
        return run.statuses


def import_ray() -> ModuleType:
    """Ray, without its usage statistics.

    Raises:
        GemmaScopeError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise GemmaScopeError("Running jobs on Ray needs Ray: pip install 'gemma-scope-tl[ray]'.") from error
    return ray


class Progress(NamedTuple):
    """How far a job is: how often it was started, on which node last, and its steps."""

    starts: int = 0
    node: str = ""
    step: int = 0
    steps: int = 0


class Board:
    """An actor to which workers report their progress and from which the driver reads it."""

    def __init__(self) -> None:
        self.rows: dict[str, Progress] = {}

    def started(self, name: str, node: str) -> None:
        """A worker starts the job, perhaps again."""
        self.rows[name] = Progress(self.rows.get(name, Progress()).starts + 1, node)

    def reached(self, name: str, step: int, steps: int) -> None:
        """A worker is at this step. A board that was itself restarted does not know the job's earlier starts."""
        self.rows[name] = self.rows.get(name, Progress(1))._replace(step=step, steps=steps)

    def read(self) -> dict[str, Progress]:
        """The progress of every job that was started."""
        return self.rows


def _work(job: Job, board: Any, version: str, *needed: Any) -> Any:
    """Run a job in a worker process. ``needed`` are the results of other jobs, for which Ray waits."""
    if __version__ != version:
        raise GemmaScopeError(f"This worker has gemma-scope-tl {__version__}; the run was started with {version}.")
    ray = import_ray()

    def arrived(message: Any) -> None:
        with suppress(ray.exceptions.RayError):  # the job itself needs no board
            ray.get(message, timeout=10.0)

    arrived(board.started.remote(job.name, socket.gethostname()))  # so that a lost attempt is counted
    reported = -_SECONDS_BETWEEN_REPORTS

    def report(step: int, steps: int) -> None:
        nonlocal reported
        now = time.monotonic()
        if step >= steps or now - reported >= _SECONDS_BETWEEN_REPORTS:
            reported = now
            message = board.reached.remote(job.name, step, steps)
            if step >= steps:  # before the result, which the driver may see first
                arrived(message)

    return job.function(report, **job.arguments)


class _SubmittedJobs:
    """The jobs of one :func:`run_jobs`, each submitted as a task that takes the results of those before it."""

    def __init__(self, ray: Any, jobs: Sequence[Job], retries: int) -> None:
        self.ray, self.retries = ray, retries
        self.jobs = {job.name: job for job in jobs}
        self.status = {job.name: JobStatus(job.name) for job in jobs}
        self.began: dict[str, float] = {}
        self._work = ray.remote(_work)
        # On the head node, which outlives the others. A board that is lost loses the display only.
        head = {"node:__internal_head__": 0.001}
        self.board = ray.remote(Board).options(num_cpus=0, resources=head, max_restarts=-1).remote()
        self.results: dict[str, Any] = {}
        for job in sorted(jobs, key=lambda job: -job.cost):
            self._submit(job)
        self.pending = {result: name for name, result in self.results.items()}  # those that jobs need come first

    def _submit(self, job: Job) -> Any:
        """The reference to a job's result."""
        if job.name not in self.results:
            needed = [self._submit(self.jobs[name]) for name in job.after]
            task = self._work.options(
                name=job.name,
                num_cpus=job.num_cpus,
                num_gpus=job.num_gpus,
                memory=job.memory or None,
                max_retries=self.retries,
                retry_exceptions=False,
            )
            self.results[job.name] = task.remote(job, self.board, __version__, *needed)
        return self.results[job.name]

    @property
    def statuses(self) -> list[JobStatus]:
        return list(self.status.values())

    def collect(self, seconds: float) -> None:
        """Wait up to ``seconds`` for a job to end, and record the results of all that have."""
        waiting = list(self.pending)
        self.ray.wait(waiting, num_returns=1, timeout=seconds)
        done, _ = self.ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for result in [one for one in waiting if one in set(done)]:
            job = self.jobs[self.pending.pop(result)]
            status = self.status[job.name]
            lacking = [name for name in job.after if self.status[name].state in ("failed", "left out")]
            try:
                status.value = self.ray.get(result)
            except self.ray.exceptions.RayError as error:
                if lacking:  # Ray raises the other job's error here
                    status.state, status.reason = "left out", f"needs {lacking[0]}"
                else:
                    status.state, status.reason, status.trace = "failed", _reason(self.ray, error), str(error)
            else:
                status.state, status.step, status.reason = "done", status.steps, ""

    def update(self, alone: bool) -> None:
        """Bring progress, times and the reasons for waiting up to date."""
        now = time.monotonic()
        rows: dict[str, Progress] = {}
        with suppress(self.ray.exceptions.RayError):
            rows = self.ray.get(self.board.read.remote(), timeout=5.0)
        running = set(self.pending.values())
        for name, (starts, node, step, steps) in rows.items():
            status = self.status[name]
            began = self.began.setdefault(name, now)
            status.starts, status.node, status.steps = starts, node, steps
            status.step = steps if status.state == "done" else step
            if status.state == "waiting":
                status.state, status.reason = "running", ""
            if name in running or not status.seconds:
                status.seconds = now - began
        waiting = [name for name in running if self.status[name].state == "waiting"]
        nodes = _nodes(self.ray) if waiting and not alone else []
        for name in waiting:
            job = self.jobs[name]
            if any(self.status[other].state != "done" for other in job.after):
                self.status[name].reason = "waits for other jobs"
            else:
                fits = alone or any(job.fits(node) for node in nodes)
                self.status[name].reason = "" if fits else f"no node has {_amounts(job.resources)}"

    def cancel(self) -> None:
        """Stop what still runs when the driver was interrupted."""
        for result in self.pending:
            with suppress(Exception):
                self.ray.cancel(result, force=True)


def _check(jobs: Sequence[Job], retries: int) -> None:
    names = [job.name for job in jobs]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise GemmaScopeError(f"Names of jobs must be unique; twice: {', '.join(double)}.")
    if retries < 0:
        raise GemmaScopeError(f"retries must be 0 or more, not {retries}.")
    for name in (name for job in jobs for name in job.after):
        if name not in names:
            raise unknown_name("job", name, names)
    try:
        TopologicalSorter({job.name: job.after for job in jobs}).prepare()
    except CycleError as error:
        raise GemmaScopeError(f"These jobs wait for each other: {', '.join(sorted(set(error.args[1])))}.") from None


def _check_sizes(jobs: Sequence[Job], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise if a job fits no node: on one machine, which no node can join, Ray would wait for ever."""
    for job in jobs:
        if not any(job.fits(node) for node in nodes):
            has = "; ".join(_amounts({name: node.get(name, 0.0) for name in job.resources}) for node in nodes)
            raise GemmaScopeError(f"{job.name} needs {_amounts(job.resources)}; this machine offers {has}.")


@contextmanager
def _connection(ray: Any, address: str | None) -> Generator[None, None, None]:
    """Within the context this process is connected to a cluster; a connection that was there before stays."""
    if ray.is_initialized():
        yield
        return
    own = {} if address else {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        where = f"the Ray cluster at {address}" if address else "a Ray on this machine"
        raise GemmaScopeError(f"Could not reach {where}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _nodes(ray: Any) -> list[dict[str, float]]:
    """The resources of each live node, in Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _amounts(resources: Mapping[str, float]) -> str:
    parts = [
        f"{amount / 2**30:.1f} GiB of memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in resources.items()
    ]
    return ", ".join(parts) or "nothing"


def _reason(ray: Any, error: Exception) -> str:
    """One line for people: what the job raised, or how it was lost."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = getattr(error, "cause", None) or error
        lines = str(cause).strip().splitlines() or [""]
        return lines[0] if isinstance(cause, GemmaScopeError) else f"{type(cause).__name__}: {lines[-1]}"
    name = type(error).__name__
    return f"{_LOST[name]}, also when it was started again" if name in _LOST else f"{name}: {error}"
