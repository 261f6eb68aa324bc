"""The bar of a run: steps, tokens a second, time left, mean L0 and error of the last metrics."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(TextColumn):
    """Tokens a second."""

    def __init__(self, batch_size: int) -> None:
        super().__init__("")
        self.batch_size = batch_size

    def render(self, task: Task) -> Text:
        """As the base class."""
        return Text(f"{(task.speed or 0.0) * self.batch_size:,.0f} tokens/s")


@contextmanager
def suite_bar(
    total: int, done: int, batch_size: int, shown: bool
) -> Generator[Callable[[int, Sequence[Mapping[str, Any]]], None], None, None]:
    """A bar on standard error; call what it yields with the steps done and the newest rows of metrics, if any."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), _Speed(batch_size), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.fields[means]}"), console=console, disable=not shown) as bar:
        task = bar.add_task("training", total=total, completed=done, means="")

        def update(step: int, rows: Sequence[Mapping[str, Any]]) -> None:
            if rows:
                parts = [
                    f"{key} {mean(float(row[key]) for row in rows):.4g}"
                    for key in ("l0", "error")
                    if all(key in row for row in rows)
                ]
                bar.update(task, completed=step, means="  ".join(parts))
            else:
                bar.update(task, completed=step)

        yield update
