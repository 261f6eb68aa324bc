"""One evaluation: finding the missing pieces, one loop over the data that measures all of them, and checkpoints.

``EvaluationRun.finish`` reads from top to bottom: find finished pieces in the cache, compute the mean activations, then
for each batch a clean pass, and a :class:`BatchMeasurements` that measures every place and SAE on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from gemma_scope_tl.counts import LARGEST, checked_count, checked_real
from gemma_scope_tl.errors import unknown_name
from gemma_scope_tl.evals.accumulators import TokenMean
from gemma_scope_tl.evals.cache import Checkpoint, MetricsCache, key_of
from gemma_scope_tl.evals.clean_pass import (
    MEMORY_BUDGET,
    CleanBatch,
    ReadBatch,
    clean_batches,
    read_batches,
    rows_that_fit,
)
from gemma_scope_tl.evals.facts import facts_of
from gemma_scope_tl.evals.metrics import l0, latent_importance, squared_error, uniformity
from gemma_scope_tl.evals.next_token import LogitHead, logit_gradients, sampled_positions
from gemma_scope_tl.evals.saes import Subject, latents_and_output
from gemma_scope_tl.evals.sums import Centre, Piece, Sums
from gemma_scope_tl.model.counted import CountedBatch
from gemma_scope_tl.sites import Place, flatten_heads, target_of
from gemma_scope_tl.weights.modes import make_ordinary

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

Batch = TypeVar("Batch", bound=ReadBatch)

ABLATIONS = ("zero", "mean")


@dataclass(frozen=True)
class Settings:
    """The settings of an evaluation.

    Attributes:
        batch_size: rows in a forward pass; fewer if ``memory_budget`` requires it.
        ablations: ablations relative to which loss recovered is measured: ``"zero"``, ``"mean"`` (of the dataset), both
            or none.
        uniformity: number of positions of each row at which the importance of latents is measured; 0 for none.
        memory_budget: bytes that tensors may take besides weights: half for the pass, a quarter each for logits and for
            residual streams whose logits are still to be computed. The pass of one row and the logits of one token are
            held for any budget.
        checkpoint_every: number of batches between checkpoints, if there is a cache.
        progress: show a progress bar.

    Raises:
        UnknownNameError: an ablation is unknown.
        GemmaScopeError: a number is too small, or none.
    """

    batch_size: int = 8
    ablations: tuple[str, ...] = ABLATIONS
    uniformity: int = 0
    memory_budget: int = MEMORY_BUDGET
    checkpoint_every: int = 16
    progress: bool = True

    def __post_init__(self) -> None:
        for name in self.ablations:
            if name not in ABLATIONS:
                raise unknown_name("ablation", name, ABLATIONS)
        for name, least in (("batch_size", 1), ("checkpoint_every", 1), ("uniformity", 0)):
            object.__setattr__(self, name, checked_count(getattr(self, name), name, least))
        budget = min(checked_real(self.memory_budget, "memory_budget", least=1), LARGEST)  # bytes, also as 1e9
        object.__setattr__(self, "memory_budget", int(budget))


@dataclass
class EvaluationRun:
    """One evaluation of ``subjects`` on ``rows``; :meth:`finish` completes ``sums``."""

    model: GemmaModel
    subjects: list[Subject]
    rows: CountedBatch
    special: tuple[int, ...]
    settings: Settings
    cache: MetricsCache

    @cached_property
    def sums(self) -> Sums:
        """All sums; empty before :meth:`finish`."""
        return Sums.empty(self.subjects, self.settings.ablations, self.settings.uniformity > 0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self) -> Sums:
        """Measure the pieces that the cache does not hold."""
        make_ordinary(self.model)  # for the gradients of uniformity
        sums = self.sums
        self._set_keys()
        for piece in sums.pieces():
            kept = self.cache.load(piece.key)
            if kept is not None:
                piece.restore(kept)
                piece.done = True
        # Centres are computed before the main loop, which needs them, and are left out of its checkpoints.
        pending = [piece for piece in sums.pieces() if not piece.done and not isinstance(piece, Centre)]
        if pending:
            self._compute_centres()
            checkpoint = Checkpoint(self.cache, self._checkpoint_key(pending), dict(enumerate(pending)))
            self._measure(checkpoint)
            for piece in pending:
                self._complete(piece)
            checkpoint.drop()
        return sums

    # -- pieces and their keys ----------------------------------------------------------------------------------------

    def _set_keys(self) -> None:
        """Give each piece its key in the cache. Without a cache, no fingerprints need to be computed."""
        if self.cache.folder is None:
            return
        common = facts_of(self.model, self.rows, self.special)
        self.sums.clean.key = key_of({**common, "unit": "clean"})
        for place, sums in self.sums.places.items():
            for kind, piece in sums.pieces().items():
                piece.key = key_of({**common, "unit": kind, "place": place.key})
        for number, subject in enumerate(self.subjects):
            facts = {**common, "place": subject.place.key, "sae": subject.facts()}
            self.sums.saes[number].key = key_of({**facts, "unit": "sae"})
            if self.sums.uniformity:
                facts["positions"] = str(self.settings.uniformity)
                self.sums.uniformity[number].key = key_of({**facts, "unit": "uniformity"})

    def _checkpoint_key(self, pending: Sequence[Piece]) -> str:
        sizes = [self.settings.batch_size, self.settings.memory_budget]
        # Rows of several lengths are not measured in the given order, so an earlier version's checkpoint does not fit.
        order = {"order": "by length"} if self.rows.ragged else {}
        return key_of({"pending": [piece.key for piece in pending], "sizes": sizes, **order})

    def _complete(self, piece: Piece) -> None:
        self.cache.save(piece.key, piece.state())
        piece.done = True

    # -- the two loops ------------------------------------------------------------------------------------------------

    def _compute_centres(self) -> None:
        """The dataset's mean activation at every place that needs it."""
        centres = {place: sums.centre for place, sums in self.sums.places.items() if sums.needs_centre}
        if not centres:
            return
        for batch in shown_batches(self, "means", read_batches, list(centres)):
            for place, centre in centres.items():
                centre.mean.update(batch.activations(place))
        for centre in centres.values():
            self._complete(centre)

    def _measure(self, checkpoint: Checkpoint) -> None:
        start = checkpoint.restore()
        head = LogitHead(self.model, self.settings.memory_budget // 4)
        places = list(dict.fromkeys(subject.place for n, subject in enumerate(self.subjects) if self._is_needed(n)))
        for number, batch in enumerate(shown_batches(self, "evaluating", clean_batches, places, start), 1):
            if number == 1:
                batch.clean.check(target_of(place) for place in places)
            BatchMeasurements(self, head, batch).measure()
            if number % self.settings.checkpoint_every == 0 and batch.done < self.rows.ids.shape[0]:
                checkpoint.save(batch.done)

    def _is_needed(self, number: int) -> bool:
        """Whether a piece of this SAE, or of the place that it writes, is still to be measured."""
        of_place = self.sums.place_of(number).pieces()
        pieces = [*self.sums.of_sae(number), *(piece for kind, piece in of_place.items() if kind != "centre")]
        return not all(piece.done for piece in pieces)

    @property
    def rows_per_batch(self) -> int:
        """Number of rows in a forward pass."""
        # The places of all SAEs count, measured or not, so that batches and checkpoints are the same in every run.
        places, size = [subject.place for subject in self.subjects], self.settings.batch_size
        return rows_that_fit(self.model, places, self.rows.ids.shape[1], size, self.settings.memory_budget // 2)


class Measured(Protocol):
    """What :func:`shown_batches` needs of an evaluation."""

    @property
    def model(self) -> GemmaModel:
        """The model."""
        ...

    @property
    def rows(self) -> CountedBatch:
        """All rows."""
        ...

    @property
    def settings(self) -> Settings:
        """The settings."""
        ...

    @property
    def rows_per_batch(self) -> int:
        """Number of rows in a forward pass."""
        ...


def shown_batches(
    run: Measured, what: str, passes: Callable[..., Iterator[Batch]], places: list[Place], start: int = 0
) -> Iterator[Batch]:
    """The batches of an evaluation from row ``start`` on, with a progress bar named ``what``.

    Args:
        run: the evaluation.
        what: the name of the progress bar.
        passes: ``clean_batches`` or ``read_batches``.
        places: the places whose tensors are kept.
        start: number of rows that earlier batches had.
    """
    from rich.progress import Progress

    with Progress(transient=True, disable=not run.settings.progress) as bar:
        task = bar.add_task(what, total=run.rows.ids.shape[0], completed=start)
        for batch in passes(run.model, run.rows, places, run.rows_per_batch, start):
            yield batch
            bar.advance(task, batch.tokens.shape[0])


@dataclass(frozen=True)
class _Unscored:
    """Residual streams after the final norm whose loss is still to be computed, with the accumulators for the loss."""

    normed: torch.Tensor
    loss: TokenMean
    kl: TokenMean | None


@dataclass(frozen=True)
class Gradients:
    """Gradients at sampled positions of a place.

    Attributes:
        positions: ``[batch, count]``; -1 where a row has fewer positions.
        values: the gradients, ``[batch, count, d]``.
    """

    positions: torch.Tensor
    values: torch.Tensor


class BatchMeasurements:
    """The measurements on one batch. Residual streams are collected, so that several share the clean logits."""

    def __init__(self, run: EvaluationRun, head: LogitHead, batch: CleanBatch) -> None:
        self.run, self.sums, self.head, self.batch = run, run.sums, head, batch
        self._clean = head.normed(batch.clean.final)[:, :-1][batch.scored]
        self._unscored: list[_Unscored] = []
        size = max(1, self._clean.numel() * self._clean.element_size())
        self._most = max(1, run.settings.memory_budget // 4 // size)
        self._clean_scored = self.sums.clean.done

    def measure(self) -> None:
        """Measure the clean pass, each place, and each SAE that writes there."""
        gradients = self._gradients()
        for place in self.sums.places:
            self._measure_place(place)
            for number, target in enumerate(self.sums.targets):
                if target == place:
                    self._measure_sae(number, place, gradients.get(number))
        self._score()

    def _measure_place(self, place: Place) -> None:
        sums, batch = self.sums.places[place], self.batch
        ablated = {kind: piece.value for kind, piece in sums.ablated.items() if not piece.done}
        if sums.deviation.done and not ablated:
            return
        y = batch.activations(place)
        if not sums.deviation.done:
            deviation = squared_error(y, replacement("mean", y, sums.centre))
            sums.deviation.value.update(deviation, batch.counted, batch.rows)
        for kind, loss in ablated.items():
            self._add(batch.spliced(place, replacement(kind, y, sums.centre)), loss)

    def _measure_sae(self, number: int, target: Place, gradients: Gradients | None) -> None:
        run, batch, sums = self.run, self.batch, self.sums.saes[number]
        if all(piece.done for piece in self.sums.of_sae(number)):
            return
        subject = run.subjects[number]
        sae, x = subject.get(), batch.activations(subject.place)
        if gradients is not None:
            self._measure_uniformity(self.sums.uniformity[number].value, sae, subject.place, gradients)
        if sums.done:
            return
        acts, out = latents_and_output(sae, x)
        sums.l0.update(l0(acts), batch.counted, batch.rows)
        sums.fired.update(acts)
        sums.error.update(squared_error(batch.activations(target), out), batch.counted, batch.rows)
        self._add(batch.spliced(target, out), sums.loss, sums.kl)

    # -- uniformity of latent importance ------------------------------------------------------------------------------

    def _gradients(self) -> dict[int, Gradients]:
        """Gradients at the place that an SAE writes, by the number of each SAE whose uniformity is to be measured."""
        run, batch = self.run, self.batch
        wanted = {n: self.sums.targets[n] for n, piece in enumerate(self.sums.uniformity) if not piece.done}
        if not wanted:
            return {}
        positions = sampled_positions(batch.scored, batch.rows, run.settings.uniformity)
        places = list(dict.fromkeys(wanted.values()))
        found = logit_gradients(run.model, self.head, batch.tokens, places, positions)
        return {number: Gradients(positions, found[place]) for number, place in wanted.items()}

    def _measure_uniformity(self, mean: TokenMean, sae: Any, place: Place, gradients: Gradients) -> None:
        # Sort the sampled positions in row-major order, the order in which a mask lists its True entries.
        rows, columns = (gradients.positions >= 0).nonzero(as_tuple=True)
        at = gradients.positions[rows, columns]
        order = (rows * self.batch.scored.shape[1] + at).argsort()
        rows, columns, at = rows[order], columns[order], at[order]
        device = self.batch.tokens.device
        x = flatten_heads(self.batch.clean.values[place])[rows.to(device), at.to(device)]
        acts = latents_and_output(sae, x)[0]
        gradient = gradients.values[rows.to(device), columns.to(device)]
        values = uniformity(latent_importance(acts, gradient, sae.W_dec.detach()), acts).cpu()
        kept = ~values.isnan()
        counted = torch.zeros(self.batch.scored.shape, dtype=torch.bool)
        counted[rows[kept], at[kept]] = True
        mean.update(values[kept], counted, self.batch.rows)

    # -- losses -------------------------------------------------------------------------------------------------------

    def _add(self, final: torch.Tensor, loss: TokenMean, kl: TokenMean | None = None) -> None:
        normed = self.head.normed(final)[:, :-1][self.batch.scored]
        self._unscored.append(_Unscored(normed, loss, kl))
        if len(self._unscored) >= self._most:
            self._score()

    def _score(self) -> None:
        """Compute the losses of all residual streams collected so far."""
        if not self._unscored and self._clean_scored:
            return
        others = [(one.normed, one.kl is not None) for one in self._unscored]
        clean, scores = self.head.score(self._clean, others, self.batch.targets())
        if not self._clean_scored:
            self.sums.clean.loss.update(clean, self.batch.scored, self.batch.rows)
            self._clean_scored = True
        for one, score in zip(self._unscored, scores, strict=True):
            one.loss.update(score.losses, self.batch.scored, self.batch.rows)
            if one.kl is not None and score.divergences is not None:
                one.kl.update(score.divergences, self.batch.scored, self.batch.rows)
        self._unscored.clear()


def replacement(ablation: str, y: torch.Tensor, centre: Centre) -> torch.Tensor:
    """The values by which an ablation replaces the activations ``y``, ``[n, d]``."""
    match ablation:
        case "zero":
            return torch.zeros_like(y[:1]).expand_as(y)
        case "mean":
            return centre.mean.value.to(y.device).expand_as(y)
        case _:
            raise unknown_name("ablation", ablation, ABLATIONS)
