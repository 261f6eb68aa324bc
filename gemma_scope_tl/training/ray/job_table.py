"""The suites that jobs have written, put together as one process would have written them."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from gemma_scope_tl.files import make_folder, write_atomically, writing
from gemma_scope_tl.training.checkpoint import METRICS_NAME, SUITE_NAME, read_record, write_suite
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError
from gemma_scope_tl.training.grid import Group, places_of
from gemma_scope_tl.training.ray.cluster import JobStatus
from gemma_scope_tl.training.release import folder_names, staged
from gemma_scope_tl.weights.checks import PARAMS_NAME


def join_suites(folder: Path, config: SuiteConfig, groups: Sequence[Group], parts: Sequence[Path]) -> None:
    """Write the suite of a run from those of its jobs.

    ``params.npz`` are hard links to the jobs' files where the file system has them. Equal to the bit to what one
    process writes; ``metrics.jsonl`` too where all lengths are multiples of ``log_every`` (a process that trains
    several lengths logs at each one's end).

    Args:
        folder: of the run.
        config: its configuration.
        groups: its SAEs, in the order of the grid.
        parts: folders of the jobs.

    Raises:
        TrainingStateError: a job's suite is not there.
    """
    found, scales = _suites(parts)
    specs = [spec for group in groups for spec in group.specs]
    names = folder_names([(spec, found[spec.name][1]["l0"]) for spec in specs])
    rows: list[dict[str, Any]] = []
    with staged(folder, specs) as stage:
        for spec, name in zip(specs, names, strict=True):
            part, row = found[spec.name]
            make_folder(stage / name)
            _link(part / row["path"] / PARAMS_NAME, stage / name / PARAMS_NAME)
            rows.append({**row, "id": name.removeprefix(f"{spec.place.site}/"), "path": name})
    write_atomically(folder / METRICS_NAME, _metrics({spec.name: i for i, spec in enumerate(specs)}, parts))
    write_suite(folder, config, {place: scales[place.key] for place in places_of(groups)}, rows)


def _suites(parts: Sequence[Path]) -> tuple[dict[str, tuple[Path, dict[str, Any]]], dict[str, float]]:
    """Every SAE's job and row, by its name, and all scales."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    scales: dict[str, float] = {}
    for part in parts:
        if not (part / SUITE_NAME).exists():
            raise TrainingStateError(
                f"A job is done, and {part / SUITE_NAME} is not there: output must be a folder that all nodes share, "
                "under one path."
            )
        facts = read_record(part / SUITE_NAME)
        scales |= facts["scales"]
        found |= {row["name"]: (part, row) for row in facts["saes"]}
    return found, scales


def _metrics(order: Mapping[str, int], parts: Sequence[Path]) -> bytes:
    """All jobs' metrics, by step and then in the order of the grid."""
    lines: list[tuple[int, int, bytes]] = []
    for part in parts:
        for line in (part / METRICS_NAME).read_bytes().splitlines(keepends=True):
            row = json.loads(line)
            lines.append((row["step"], order[row["name"]], line))
    return b"".join(line for _, _, line in sorted(lines))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without a second name for a file
        with writing(target):
            shutil.copyfile(source, target)


_ROWS = 30
_STYLE = {"failed": "red", "left out": "yellow", "running": "bold", "waiting": "dim", "done": "green"}
_ORDER = tuple(_STYLE)


@contextmanager
def shown_jobs(console: Console) -> Generator[Callable[[Sequence[JobStatus]], None], None, None]:
    """A function that shows statuses, for :func:`~gemma_scope_tl.training.ray.cluster.run_jobs`."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda statuses: live.update(job_table(statuses), refresh=True)


def job_table(statuses: Sequence[JobStatus], rows: int = _ROWS) -> Table:
    """Counts of each state, and the ``rows`` jobs that matter most: failed ones first, done ones last."""
    table = Table("job", "state", "step", "time", "node", "", title=job_counts(statuses), title_justify="left")
    for status in sorted(statuses, key=lambda status: _ORDER.index(status.state))[:rows]:
        steps = f"{status.step:,}/{status.steps:,}" if status.steps else ""
        time = f"{status.seconds:,.0f} s" if status.starts else ""
        table.add_row(
            escape(status.name),
            f"[{_STYLE[status.state]}]{status.state}[/]",
            steps,
            time,
            status.node,
            escape(_remark(status)),
        )
    return table


def job_counts(statuses: Sequence[JobStatus]) -> str:
    """How many jobs are in each state.

    >>> job_counts([JobStatus("a", "done"), JobStatus("b"), JobStatus("c", "done")])
    '3 jobs: 1 waiting, 2 done'
    """
    counts = Counter(status.state for status in statuses)
    return f"{len(statuses)} jobs: " + ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])


def _remark(status: JobStatus) -> str:
    again = f"started {status.starts} times" if status.starts > 1 else ""
    return "; ".join(part for part in (again, status.reason) if part)


class _Lines:
    """For logs: a line when a job changes its state or is started again."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.before: dict[str, tuple[str, int]] = {}

    def __call__(self, statuses: Sequence[JobStatus]) -> None:
        changed = False
        for status in statuses:
            now = (status.state, status.starts)
            if self.before.get(status.name, ("waiting", 0)) != now:
                remark = _remark(status)
                line = f"{status.name}: {status.state}" + (f" ({remark})" if remark else "")
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)
                changed = True
            self.before[status.name] = now
        if changed:
            self.console.print(job_counts(statuses), markup=False, highlight=False)
