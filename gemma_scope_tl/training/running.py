"""The loop of a run: batches in; steps of all groups, metrics and checkpoints out."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place, parse_place, target_of
from gemma_scope_tl.training.checkpoint import (
    CheckpointManifest,
    check_same_run,
    load_manifest,
    load_state,
    save_checkpoint,
    steps_of,
)
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError
from gemma_scope_tl.training.grid import AnyGroup, Group, last_step, places_of, scaled_places_of
from gemma_scope_tl.training.layered_release import TrainedLayered
from gemma_scope_tl.training.layered_spec import LayeredGroup, LayeredSpec
from gemma_scope_tl.training.layered_start import begin_layered
from gemma_scope_tl.training.layered_trainer import LayeredTrainer
from gemma_scope_tl.training.logs import Logger, MetricsFile, open_loggers
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.release import TrainedSAE, measure
from gemma_scope_tl.training.shard import WHOLE, Shard
from gemma_scope_tl.training.source_factory import OpenSource
from gemma_scope_tl.training.start import begin

SIGNALS = (signal.SIGINT, signal.SIGTERM)

UpdateBar = Callable[[int, Sequence[Mapping[str, Any]]], None]
"""A function of the number of steps done and the newest rows of metrics, if any."""
ForEach = Callable[[Callable[[AnyGroup], None], Iterable[AnyGroup]], Any]
"""A function that calls another with every group."""


class TrainingStopped(GemmaScopeError):
    """A run was stopped by a signal, after its checkpoint was written.

    Attributes:
        signal: the signal's number; command lines exit with 128 more.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


@contextmanager
def torch_threads(count: int) -> Generator[None]:
    """Use ``count`` processor threads in PyTorch within the context, and restore the caller's number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TrainingRun:
    """A run, from its last checkpoint (or its beginning) to its end.

    Attributes:
        step: number of steps done.
        scales: ``C`` of every place.
        threads: processor threads of PyTorch, on which the last bits of results depend.
    """

    def __init__(
        self,
        config: SuiteConfig,
        groups: Sequence[AnyGroup],
        source: OpenSource,
        metrics: Path,
        checkpoints: Path,
        begun: Callable[[], None] = lambda: None,
        *,
        progress: bool = True,
        shard: Shard = WHOLE,
    ) -> None:
        """Read the last checkpoint, if there is one, or measure the scales. ``begun`` is called after step 1."""
        self.config, self.groups, self.checkpoints, self.shard = config, groups, checkpoints, shard
        self.progress, self._begun = progress and shard.leads, begun
        self.threads = torch.get_num_threads()
        self.ends = sorted({group.steps for group in groups})
        self.status: dict[str, dict[str, Any]] = {}
        self._open, self._source = source, source(places_of(groups))
        self.trainers = {group.name: self._trainer(group) for group in groups}
        steps = steps_of(checkpoints)
        manifest = self._restored(checkpoints / f"step_{steps[-1]}") if steps else None
        if manifest is None:
            squares = self._source.mean_squares(config.source.scale_rows)
            self.step, self.scales = 0, {place: _scale(place, squares) for place in scaled_places_of(groups)}
            for group in groups:
                trainer = self.trainers[group.name]
                if isinstance(trainer, LayeredTrainer):
                    begin_layered(trainer, *self._scales_of(trainer.spec), config.model.name)
                elif isinstance(group, Group):
                    begin(trainer, self.scales[group.place], config.model.name)
        else:
            self.step = manifest.step
            self.scales = {parse_place(key): value for key, value in manifest.scales.items()}
        self.metrics = MetricsFile(metrics, manifest.metrics_bytes if manifest else 0) if shard.leads else None
        self.loggers: list[Logger] = []
        if self.metrics is not None:
            self.loggers += [self.metrics, *open_loggers(config, metrics.parent, self.step)]

    def to_the_end(self) -> list[TrainedSAE | TrainedLayered]:
        """Train all groups, then measure their SAEs on later batches.

        Raises:
            TrainingStopped: a signal was received, and a checkpoint was written.
        """
        with StopSignals() as stop, suite_bar(self.ends[-1], self.step, self.config.batch_size, self.progress) as bar:
            for end in self.ends:
                if end > self.step:
                    self._segment(end, stop, bar)
        saes = [sae for group in self.groups for sae in self._trained(group)]
        if self._served_places() != set(places_of(self.groups)):
            self._source = self._open(places_of(self.groups))
        unseen = self._source.batches(self.config.batch_size, last_step(self.config))
        measure(saes, unseen, self.config.eval_batches)
        return saes

    def _trained(self, group: AnyGroup) -> list[TrainedSAE | TrainedLayered]:
        """The SAEs of a group for raw activations."""
        trainer = self.trainers[group.name]
        if isinstance(trainer, LayeredTrainer):
            spec = trainer.spec
            arrays = trainer.released(*self._scales_of(spec))
            status, model = self.status.get(spec.name, {}), self.config.model.name
            return [TrainedLayered(spec, group.steps, arrays, status, self.shard, model)]
        assert isinstance(group, Group)
        return [
            TrainedSAE(
                spec,
                group.steps,
                trainer.released(index, self.scales[group.place]),
                self.status.get(spec.name, {}),
                self.shard,
            )
            for index, spec in enumerate(group.specs)
        ]

    def _scales_of(self, spec: LayeredSpec) -> tuple[list[float], list[float]]:
        """The scales of what a coder over several layers reads, and of what it writes."""
        return [self.scales[place] for place in spec.reads], [self.scales[place] for place in spec.writes]

    def save(self) -> Path:
        """Write a checkpoint, and return its folder."""
        manifest = CheckpointManifest(
            step=self.step,
            config=self.config.results,
            scales={place.key: value for place, value in self.scales.items()},
            metrics_bytes=self.metrics.sync() if self.metrics is not None else 0,
            threads=self.threads,
            files={},
            status=self.status,
        )
        states = {name: trainer.state() for name, trainer in self.trainers.items()}
        return save_checkpoint(self.checkpoints, manifest, states, self.shard)

    def close(self) -> None:
        """Close all loggers, also when one of them raises."""
        with ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close)

    def _segment(self, end: int, stop: StopSignals, bar: UpdateBar) -> None:
        """Train up to step ``end``, at which some groups are done, with a source of the places that still train."""
        active = [group for group in self.groups if group.steps >= end]
        if self._served_places() > set(places_of(active)):
            self._source = self._open(places_of(active))
        batches = iter(self._source.batches(self.config.batch_size, self.step))
        with self._for_each(len(active)) as for_each:
            while self.step < end:
                batch = next(batches)
                for_each(lambda group, batch=batch: self._step(group, batch), active)
                self.step += 1
                if self.step == 1:
                    self._begun()
                rows = self._log(active) if self.step % self.config.log_every == 0 or self.step == end else []
                seen = self.shard.most(stop.seen or 0)
                if seen or self.step % self.config.checkpoint_every == 0 or self.step == end:
                    folder = self.save()
                    if seen:
                        name = signal.Signals(seen).name
                        raise TrainingStopped(
                            f"Stopped by {name} after step {self.step} of {self.ends[-1]}; {folder} is written, and "
                            "the same call continues from there.",
                            seen,
                        )
                bar(self.step, rows)

    @torch.no_grad()
    def _step(self, group: AnyGroup, batch: Mapping[Place, torch.Tensor]) -> None:
        """Step a group on the activations of its places.

        All are divided by the scale of the place that is read; those of a coder over several layers each by its own.
        """
        own, trainer = self.shard.rows(self.config.batch_size), self.trainers[group.name]

        def scaled(place: Place, by: Place) -> torch.Tensor:
            return (batch[place][own] / self.scales[by]).to(self.config.device)

        if isinstance(trainer, LayeredTrainer):
            spec = trainer.spec
            x = [scaled(place, place) for place in spec.reads]
            trainer.step(x, [scaled(place, place) for place in spec.writes] if spec.is_transcoder else None)
            return
        (place,) = group.places
        target = target_of(place)
        trainer.step(scaled(place, place), None if target == place else scaled(target, place))

    @contextmanager
    def _for_each(self, groups: int) -> Generator[ForEach, None, None]:
        """One thread for each group if there are enough of them; otherwise one group after the other on all threads."""
        divided = self.shard is not WHOLE  # processes must exchange their sums in the same order
        if divided or self.threads == 1 or groups < self.threads or torch.device(self.config.device).type != "cpu":
            yield lambda function, active: [function(group) for group in active]
            return
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def for_each(function: Callable[[AnyGroup], None], active: Iterable[AnyGroup]) -> None:
                # Some of PyTorch's libraries share one number of threads among all callers, so this thread's number
                # must be 1, too. Batches are made between the calls, with all threads.
                with torch_threads(1):
                    list(pool.map(function, active))

            yield for_each

    def _log(self, active: Sequence[AnyGroup]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for group in active:
            statuses = self.trainers[group.name].status()
            for spec, status in zip(group.specs, statuses, strict=True):
                where = {"name": spec.name, **spec.where}
                numbers = {key: value for key, value in status.items() if key not in ("step", *where)}
                rows.append({**where, "target_l0": spec.target_l0, **numbers})
                self.status[spec.name] = numbers
        for logger in self.loggers:
            logger.log(self.step, rows)
        return rows

    def _restored(self, folder: Path) -> CheckpointManifest:
        """Load the trainers' states from a checkpoint."""
        manifest = load_manifest(folder)
        check_same_run(manifest.config, self.config.results, folder)
        missing = [place.key for place in scaled_places_of(self.groups) if place.key not in manifest.scales]
        if missing:
            raise TrainingStateError(f"{folder} has no scale of {missing[0]}: it is damaged. Remove it.")
        for group in self.groups:
            self.trainers[group.name].load_state(load_state(folder, manifest, f"{group.name}{self.shard.part}"))
        self.status = {name: dict(values) for name, values in manifest.status.items()}
        return manifest

    def _trainer(self, group: AnyGroup) -> PlaceTrainer | LayeredTrainer:
        widths, place = self._source.widths, group.places[0]
        sizes = widths[place], widths[target_of(place)]
        options: dict[str, Any] = {"total_steps": group.steps, "device": self.config.device, "shard": self.shard}
        if isinstance(group, LayeredGroup):
            return LayeredTrainer(*sizes, group.spec, **options)
        return PlaceTrainer(*sizes, group.specs, **options)

    def _served_places(self) -> set[Place]:
        """The places of the run that the current source serves."""
        return set(places_of(self.groups)) & set(self._source.widths)


class StopSignals:
    """Within the context, the first SIGINT or SIGTERM is remembered; a second one acts as it did before.

    Only the main thread can catch signals; in others nothing is changed.

    Attributes:
        seen: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.seen: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.seen = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


class _Speed(TextColumn):
    """Tokens per second."""

    def __init__(self, batch_size: int) -> None:
        super().__init__("")
        self.batch_size = batch_size

    def render(self, task: Task) -> Text:
        return Text(f"{(task.speed or 0.0) * self.batch_size:,.0f} tokens/s")


@contextmanager
def suite_bar(total: int, done: int, batch_size: int, shown: bool) -> Generator[UpdateBar]:
    """A progress bar on standard error, with the mean L0 and error of the newest metrics."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), _Speed(batch_size), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.fields[means]}"), console=console, disable=not shown) as bar:
        task = bar.add_task("training", total=total, completed=done, means="")

        def update(step: int, rows: Sequence[Mapping[str, Any]]) -> None:
            bar.update(task, completed=step)
            if rows:
                means = [f"{key} {mean(float(row[key]) for row in rows):.4g}" for key in ("l0", "error")]
                bar.update(task, means="  ".join(means))

        yield update


def _scale(place: Place, squares: Mapping[Place, float]) -> float:
    square = squares[place]
    if not 0.0 < square < math.inf:
        raise TrainingStateError(f"{place.key}: E ||x||^2 is {square}, from which no scale can be computed.")
    return math.sqrt(square)
