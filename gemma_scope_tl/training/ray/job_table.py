"""The progress of jobs on a terminal or in a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from gemma_scope_tl.training.ray.cluster import JobStatus

_STYLE = {"failed": "red", "left out": "yellow", "running": "bold", "waiting": "dim", "done": "green"}
_ORDER = tuple(_STYLE)


@contextmanager
def shown_jobs(console: Console) -> Generator[Callable[[Sequence[JobStatus]], None], None, None]:
    """Yield an argument ``show`` for ``run_jobs``: a live table on a terminal, or a line per change in a log."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda statuses: live.update(job_table(statuses), refresh=True)


def job_table(statuses: Sequence[JobStatus], rows: int = 30) -> Table:
    """A table of the first ``rows`` jobs (failed ones first, done ones last), titled with the counts of all states."""
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
    """The number of jobs in each state.

    >>> job_counts([JobStatus("a", "done"), JobStatus("b"), JobStatus("c", "done")])
    '3 jobs: 1 waiting, 2 done'
    """
    counts = Counter(status.state for status in statuses)
    return f"{len(statuses)} jobs: " + ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])


def _remark(status: JobStatus) -> str:
    again = f"started {status.starts} times" if status.starts > 1 else ""
    return "; ".join(part for part in (again, status.reason) if part)


class _Lines:
    """Prints a line when a job changes its state or is started again."""

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
