"""Jobs on a Ray cluster, or on a Ray that this process starts for itself: what Ray is asked for, and nothing of SAEs.

Ray places a job on a node that has its processors, GPUs and memory, and starts it again elsewhere when its worker or
node is lost. What a job's own code raises is not tried again: it would fail the same way. One failed job does not stop
the others, only those that need it. Ray is imported when it is used: ``pip install 'gemma-scope-tl[ray]'``.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gemma_scope_tl.errors import GemmaScopeError, unknown_name

if TYPE_CHECKING:
    from types import ModuleType

Report = Callable[[int, int], None]
"""What a job calls with the steps done and the steps in all."""
State = Literal["waiting", "running", "done", "failed", "left out"]

_OBJECT_STORE = 128 * 2**20  # bytes; jobs exchange files, so Ray's own store holds only their arguments
_SECONDS_BETWEEN_REPORTS = 0.5


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: unique among the jobs of a run.
        function: an importable function; called as ``function(report, **arguments)`` in a worker process. Running it
            again after a lost attempt must be safe.
        arguments: small values that can be pickled.
        num_cpus, num_gpus: processors and GPUs that Ray keeps for it.
        memory: bytes that Ray keeps for it; 0 for no reservation.
        after: names of jobs that must be done before.
        cost: any measure of its length; among jobs that could start, longer ones are first.
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
        """What it takes, in Ray's names."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": float(self.memory)}
        return {name: amount for name, amount in wanted.items() if amount}


@dataclass
class JobStatus:
    """Where a job is.

    Attributes:
        state: ``left out`` is a job that was not started because one that it needs failed.
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
    """Run ``jobs`` to their end, whatever happens to one of them; a status each, in their order.

    Args:
        jobs: any number; those that wait for others may come before them.
        address: of a running cluster (``auto``, ``host:6379``, ``ray://host:10001``). None starts a Ray on this machine
            and stops it at the end. In a process that is connected to a cluster already, that one is used.
        retries: how often a job is started again after its worker or node was lost.
        show: called with all statuses about every ``poll`` seconds and at the end.
        poll: seconds.

    Raises:
        GemmaScopeError: Ray is missing or unreachable; two jobs have one name, or wait for an unknown one or for each
            other; or, on this machine alone, a job is larger than it. Failures of jobs are in the statuses.
    """
    _check(jobs, retries)
    ray = import_ray()
    alone = address is None and not ray.is_initialized()
    with _connection(ray, address):
        if alone:
            _refuse_what_never_fits(jobs, _nodes(ray))
        run = _Run(ray, jobs, retries)
        try:
            while run.pending():
                run.submit()
                run.collect(poll)
                run.look(alone)
                show(run.statuses)
            show(run.statuses)
        finally:
            run.cancel()
        return run.statuses


def import_ray() -> ModuleType:
    """Ray.

    Raises:
        GemmaScopeError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for statistics to be sent
    try:
        import ray
    except ImportError as error:
        raise GemmaScopeError("Running jobs on Ray needs Ray: pip install 'gemma-scope-tl[ray]'.") from error
    return ray


class Board:
    """Where the workers write how far they are: one small actor, read by the driver."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, str, int, int]] = {}

    def started(self, name: str, node: str) -> None:
        """A worker begins the job: once more, if it was there before."""
        starts = self.rows.get(name, (0, "", 0, 0))[0]
        self.rows[name] = (starts + 1, node, 0, 0)

    def reached(self, name: str, step: int, steps: int) -> None:
        """A worker is at this step."""
        starts, node, _, _ = self.rows.get(name, (1, "", 0, 0))  # a board that was started again knows nothing
        self.rows[name] = (starts, node, step, steps)

    def read(self) -> dict[str, tuple[int, str, int, int]]:
        """Starts, node, step and steps of every job that was started."""
        return self.rows


def _work(job: Job, board: Any, version: str) -> Any:
    """What runs in a worker process."""
    from gemma_scope_tl import __version__

    if __version__ != version:
        raise GemmaScopeError(f"This worker has gemma-scope-tl {__version__}; the run was started with {version}.")
    ray = import_ray()
    with suppress(ray.exceptions.RayError):  # waited for, so that a lost attempt is known; without a board work goes on
        ray.get(board.started.remote(job.name, socket.gethostname()), timeout=10.0)
    said = -_SECONDS_BETWEEN_REPORTS

    def report(step: int, steps: int) -> None:
        nonlocal said
        now = time.monotonic()
        if step >= steps or now - said >= _SECONDS_BETWEEN_REPORTS:
            said = now
            board.reached.remote(job.name, step, steps)

    return job.function(report, **job.arguments)


class _Run:
    """The jobs of one :func:`run_jobs`, and the tasks that stand for them."""

    def __init__(self, ray: Any, jobs: Sequence[Job], retries: int) -> None:
        from gemma_scope_tl import __version__

        self.ray, self.version, self.retries = ray, __version__, retries
        self.jobs = {job.name: job for job in jobs}
        self.status = {job.name: JobStatus(job.name) for job in jobs}
        self.tasks: dict[Any, str] = {}
        self.began: dict[str, float] = {}
        self.work = ray.remote(_work)
        # The head node outlives the others; without it there is no cluster. A lost board would only lose the display.
        head = {"node:__internal_head__": 0.001}
        self.board = ray.remote(Board).options(num_cpus=0, resources=head, max_restarts=-1).remote()

    @property
    def statuses(self) -> list[JobStatus]:
        return list(self.status.values())

    def pending(self) -> bool:
        return any(status.state in ("waiting", "running") for status in self.statuses)

    def submit(self) -> None:
        """Hand Ray every job that waits for no other, the longest first; leave out those that wait in vain."""
        given = set(self.tasks.values())
        for job in sorted(self.jobs.values(), key=lambda job: -job.cost):
            status = self.status[job.name]
            if status.state != "waiting" or job.name in given:
                continue
            missing = [name for name in job.after if self.status[name].state in ("failed", "left out")]
            if missing:
                status.state, status.reason = "left out", f"needs {missing[0]}"
            elif all(self.status[name].state == "done" for name in job.after):
                self.tasks[self._start(job)] = job.name
                status.reason = ""
            else:
                status.reason = "waits for other jobs"

    def _start(self, job: Job) -> Any:
        wanted = {"num_cpus": job.num_cpus, "num_gpus": job.num_gpus, "memory": job.memory or None}
        task = self.work.options(name=job.name, max_retries=self.retries, retry_exceptions=False, **wanted)
        return task.remote(job, self.board, self.version)

    def collect(self, seconds: float) -> None:
        """Wait up to ``seconds`` for a task to end, and take note of all that have."""
        if not self.tasks:
            return
        done, _ = self.ray.wait(list(self.tasks), num_returns=1, timeout=seconds)
        if done:
            done, _ = self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)
        for task in done:
            status = self.status[self.tasks.pop(task)]
            try:
                status.value = self.ray.get(task)
            except self.ray.exceptions.RayError as error:
                status.state, status.reason, status.trace = "failed", _reason(self.ray, error), str(error)
            else:
                status.state, status.step, status.reason = "done", status.steps, ""

    def look(self, alone: bool) -> None:
        """Bring progress, times and the reasons for waiting up to date."""
        now = time.monotonic()
        rows: dict[str, tuple[int, str, int, int]] = {}
        with suppress(self.ray.exceptions.RayError):
            rows = self.ray.get(self.board.read.remote(), timeout=5.0)
        for name, (starts, node, step, steps) in rows.items():
            status = self.status[name]
            began = self.began.setdefault(name, now)
            status.starts, status.node, status.steps = starts, node, steps
            status.step = steps if status.state == "done" else step
            if status.state == "waiting":
                status.state = "running"
            if name in self.tasks.values() or not status.seconds:
                status.seconds = now - began
        waiting = [name for name in self.tasks.values() if self.status[name].state == "waiting"]
        if waiting and not alone:
            nodes = _nodes(self.ray)
            for name in waiting:
                fits = any(_fits(self.jobs[name], node) for node in nodes)
                self.status[name].reason = "" if fits else f"no node has {_amounts(self.jobs[name].resources)}"

    def cancel(self) -> None:
        """Stop what still runs, when the driver was interrupted."""
        for task in self.tasks:
            with suppress(Exception):
                self.ray.cancel(task, force=True)


def _check(jobs: Sequence[Job], retries: int) -> None:
    names = [job.name for job in jobs]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise GemmaScopeError(f"Names of jobs must be unique; twice: {', '.join(double)}.")
    if retries < 0:
        raise GemmaScopeError(f"retries must be 0 or more, not {retries}.")
    waits = {job.name: set(job.after) for job in jobs}
    for name in sorted(set[str]().union(*waits.values())):
        if name not in waits:
            raise unknown_name("job", name, names)
    while ready := [name for name, others in waits.items() if not others & set(waits)]:
        for name in ready:
            del waits[name]
    if waits:
        raise GemmaScopeError(f"These jobs wait for each other: {', '.join(sorted(waits))}.")


@contextmanager
def _connection(ray: Any, address: str | None) -> Generator[None, None, None]:
    """Connected to a cluster; afterwards as before."""
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
    """What each live node has, in Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fits(job: Job, node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in job.resources.items())


def _refuse_what_never_fits(jobs: Sequence[Job], nodes: Sequence[Mapping[str, float]]) -> None:
    """Ray would wait for ever: on one machine no node can join."""
    for job in jobs:
        if not any(_fits(job, node) for node in nodes):
            has = "; ".join(_amounts({name: node.get(name, 0.0) for name in job.resources}) for node in nodes)
            raise GemmaScopeError(f"{job.name} needs {_amounts(job.resources)}; this machine offers {has}.")


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
    lost = {
        "OutOfMemoryError": "its workers ran out of memory",
        "NodeDiedError": "its nodes were lost",
        "WorkerCrashedError": "its worker processes died",
        "TaskCancelledError": "it was cancelled",
    }
    name = type(error).__name__
    return f"{lost.get(name, name)}, also when it was started again" if name in lost else f"{name}: {error}"
