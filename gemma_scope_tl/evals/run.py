"""The evaluation itself: which pieces are missing, one loop over the data for all of them, and checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.evals.accumulators import CLEAN, LatentCounts, TokenMean, Unit, VectorMean, token_means
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET, Batch, clean_batches, rows_that_fit
from gemma_scope_tl.evals.importance import logit_gradients, sampled_positions
from gemma_scope_tl.evals.metrics import l0, latent_importance, squared_error, uniformity
from gemma_scope_tl.evals.next_token import LogitHead, Scores
from gemma_scope_tl.evals.saes import Subject, fingerprint, latents_and_output
from gemma_scope_tl.evals.store import Store, key_of
from gemma_scope_tl.sae.sparse import SparseActs
from gemma_scope_tl.sites import Place, flatten_heads, target_of
from gemma_scope_tl.text.batch import TokenBatch
from gemma_scope_tl.weights.modes import make_ordinary

Gradients = tuple[torch.Tensor, dict[Place, torch.Tensor]]
"""The positions sampled, ``[batch, count]``, and the gradients there, ``[batch, count, d]`` by place."""


class Step:
    """All that is measured on one batch. Residual streams wait until several can share the clean logits."""

    def __init__(self, run: Run, head: LogitHead, batch: Batch) -> None:
        self.run, self.head, self.batch = run, head, batch
        self._clean = head.normed(batch.clean.final)[:, :-1][batch.scored]
        self._waiting: list[tuple[torch.Tensor, TokenMean, TokenMean | None]] = []
        size = max(1, self._clean.numel() * self._clean.element_size())
        self._most = max(1, run.settings.memory_budget // 4 // size)
        self._clean_scored = not run.wanted(CLEAN)

    def measure(self) -> None:
        """Measure the clean pass, each place, and each SAE there."""
        run, by_place = self.run, dict[Place, list[int]]()
        for number, subject in enumerate(run.subjects):
            by_place.setdefault(target_of(subject.place), []).append(number)
        gradients = self._gradients()
        for place, numbers in by_place.items():
            self._place(place)
            for number in numbers:
                self._subject(number, place, gradients)
        self._score()

    def _place(self, place: Place) -> None:
        run, batch = self.run, self.batch
        if not any(run.wanted(f"{kind} {place.key}") for kind in ("deviation", *run.settings.ablations)):
            return
        y = batch.activations(place)
        if run.wanted(f"deviation {place.key}"):
            centre = run.units[f"centre {place.key}"].vector_mean().value.to(y.device)
            run.units[f"deviation {place.key}"].token_mean("value").update(squared_error(y, centre), batch.ordinary)
        for kind in run.settings.ablations:
            if run.wanted(f"{kind} {place.key}"):
                fill = torch.zeros_like(y[:1]) if kind == "zero" else self._mean(place)
                unit = run.units[f"{kind} {place.key}"]
                self._wait(batch.spliced(place, fill.expand_as(y)), unit.token_mean("value"), None)

    def _mean(self, place: Place) -> torch.Tensor:
        return self.run.units[f"centre {place.key}"].vector_mean().value.to(self.batch.tokens.device)[None]

    def _subject(self, number: int, place: Place, gradients: Gradients) -> None:
        run, batch = self.run, self.batch
        named = f"sae {number}", f"uniformity {number}"
        if not any(map(run.wanted, named)):
            return
        sae = run.subjects[number].get()
        x = batch.activations(run.subjects[number].place)
        if run.wanted(named[1]):
            self._uniformity(run.units[named[1]].token_mean("value"), sae, run.subjects[number].place, gradients)
        if not run.wanted(named[0]):
            return
        unit = run.units[named[0]]
        acts, out = latents_and_output(sae, x)
        unit.token_mean("l0").update(l0(acts), batch.ordinary)
        fired = unit.parts["fired"]
        if isinstance(fired, LatentCounts):
            fired.update(acts)
        unit.token_mean("error").update(squared_error(batch.activations(place), out), batch.ordinary)
        self._wait(batch.spliced(place, out), unit.token_mean("loss"), unit.token_mean("kl"))

    def _gradients(self) -> Gradients:
        run, batch = self.run, self.batch
        wanted = [target_of(s.place) for n, s in enumerate(run.subjects) if run.wanted(f"uniformity {n}")]
        if not wanted:
            return torch.empty(0), {}
        positions = sampled_positions(batch.scored, batch.start, run.settings.uniformity)
        places = list(dict.fromkeys(wanted))
        return positions, logit_gradients(run.model, self.head, batch.tokens, places, positions)

    def _uniformity(self, mean: TokenMean, sae: Any, place: Place, gradients: Gradients) -> None:
        positions, by_place = gradients
        rows, columns = (positions >= 0).nonzero(as_tuple=True)
        at = positions[rows, columns]
        order = (rows * self.batch.scored.shape[1] + at).argsort()
        rows, columns, at = rows[order], columns[order], at[order]
        device = self.batch.tokens.device
        x = flatten_heads(self.batch.clean.values[place])[rows.to(device), at.to(device)]
        acts: SparseActs = latents_and_output(sae, x)[0]
        gradient = by_place[target_of(place)][rows.to(device), columns.to(device)]
        values = uniformity(latent_importance(acts, gradient, sae.W_dec.detach()), acts).cpu()
        counted = torch.zeros(self.batch.scored.shape, dtype=torch.bool)
        kept = ~values.isnan()
        counted[rows[kept], at[kept]] = True
        mean.update(values[kept], counted)

    def _wait(self, final: torch.Tensor, loss: TokenMean, divergence: TokenMean | None) -> None:
        normed = self.head.normed(final)[:, :-1][self.batch.scored]
        self._waiting.append((normed, loss, divergence))
        if len(self._waiting) >= self._most:
            self._score()

    def _score(self) -> None:
        """Make the losses of those that wait."""
        if not self._waiting and self._clean_scored:
            return
        others = [(normed, divergence is not None) for normed, _, divergence in self._waiting]
        clean, scores = self.head.score(self._clean, others, self.batch.targets())
        if not self._clean_scored:
            self.run.units[CLEAN].token_mean("loss").update(clean, self.batch.scored)
            self._clean_scored = True
        for (_, loss, divergence), score in zip(self._waiting, scores, strict=True):
            self._take(score, loss, divergence)
        self._waiting.clear()

    def _take(self, score: Scores, loss: TokenMean, divergence: TokenMean | None) -> None:
        loss.update(score.losses, self.batch.scored)
        if divergence is not None and score.divergences is not None:
            divergence.update(score.divergences, self.batch.scored)


ABLATIONS = ("zero", "mean")


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        batch_size: rows in a forward pass, fewer where ``memory_budget`` asks for it.
        ablations: what loss recovered is measured against: ``"zero"``, ``"mean"`` (of the dataset), both or none.
        uniformity: positions of each row at which the importance of latents is measured, 0 for none.
        memory_budget: bytes that tensors may take beside weights: half for the pass, a quarter each for logits and for
            residual streams that wait for theirs. A row's pass and 1 token's logits are the least.
        checkpoint_every: batches between checkpoints, where there is a cache.
        progress: show a bar.
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
        for name in ("batch_size", "memory_budget", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise GemmaScopeError(f"{name} must be 1 or more, not {getattr(self, name)}.")
        if self.uniformity < 0:
            raise GemmaScopeError(f"uniformity is a number of positions, not {self.uniformity}.")


@dataclass
class Run:
    """One evaluation of ``subjects`` on ``rows``; :meth:`finish` completes ``units``."""

    model: Any
    subjects: list[Subject]
    rows: TokenBatch
    special: tuple[int, ...]
    settings: Settings
    store: Store
    units: dict[str, Unit] = field(default_factory=dict[str, Unit])

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self) -> None:
        """Measure what the store does not have yet."""
        make_ordinary(self.model)  # gradients are part of it
        self._plan()
        for name, unit in self.units.items():
            kept = self.store.load(self._key(name)) if self._caching else None
            if kept is not None:
                unit.restore(kept)
                unit.done = True
        pending = self._pending()
        if not pending:
            return
        self._centre()
        self._measure()
        for name in pending:
            if self._caching:
                self.store.save(self._key(name), self.units[name].state())
            self.units[name].done = True
        if self._caching:
            self.store.drop(self._checkpoint_key)

    # -- what there is to do ------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        self.units = {CLEAN: Unit(token_means("loss"), {"unit": CLEAN})}
        for number, subject in enumerate(self.subjects):
            place = target_of(subject.place).key
            for kind in ("centre", "deviation", *self.settings.ablations):
                fresh = {"mean": VectorMean()} if kind == "centre" else token_means("value")
                self.units.setdefault(f"{kind} {place}", Unit(dict(fresh), {"unit": kind, "place": place}))
            facts = {"place": subject.place.key, "sae": subject.fingerprint() if self._caching else ""}
            means = token_means("l0", "error", "loss", "kl")
            self.units[f"sae {number}"] = Unit(
                {**means, "fired": LatentCounts.empty(subject.d_sae)}, {"unit": "sae", **facts}
            )
            if self.settings.uniformity:
                facts["positions"] = str(self.settings.uniformity)
                self.units[f"uniformity {number}"] = Unit(token_means("value"), {"unit": "uniformity", **facts})

    def _pending(self) -> list[str]:
        """What the main loop has to measure; centres are made before it."""
        return [name for name, unit in self.units.items() if not unit.done and unit.facts["unit"] != "centre"]

    def wanted(self, name: str) -> bool:
        """Whether this piece is part of the evaluation, and still to be measured."""
        return name in self.units and not self.units[name].done

    @property
    def _caching(self) -> bool:
        return self.store.folder is not None

    @cached_property
    def _common(self) -> dict[str, Any]:
        return facts_of(self.model, self.rows, self.special)

    def _key(self, name: str) -> str:
        return key_of({**self._common, **self.units[name].facts})

    @cached_property
    def _checkpoint_key(self) -> str:
        sizes = [self.settings.batch_size, self.settings.memory_budget]
        return key_of({"pending": [self._key(name) for name in self._pending()], "sizes": sizes})

    # -- the two loops ------------------------------------------------------------------------------------------------

    def _batches(self, what: str, places: list[Place], start: int = 0) -> Iterator[Batch]:
        from rich.progress import Progress

        rows = self._rows_per_batch
        with Progress(transient=True, disable=not self.settings.progress) as bar:
            task = bar.add_task(what, total=self.rows.ids.shape[0], completed=start)
            ids, mask = self.rows.ids, self.rows.mask
            for batch in clean_batches(self.model, ids, places, self.special, rows, start, mask):
                yield batch
                bar.advance(task, batch.tokens.shape[0])

    @cached_property
    def _rows_per_batch(self) -> int:
        places, size = [subject.place for subject in self.subjects], self.settings.batch_size
        return rows_that_fit(self.model, places, self.rows.ids.shape[1], size, self.settings.memory_budget // 2)

    def _centre(self) -> None:
        """The dataset's mean at every place that needs it: FVU's centre, and what mean ablation puts in."""
        missing = [
            target_of(subject.place)
            for subject in self.subjects
            if self.wanted(f"centre {target_of(subject.place).key}")
            and any(self.wanted(f"{kind} {target_of(subject.place).key}") for kind in ("deviation", "mean"))
        ]
        places = list(dict.fromkeys(missing))
        if not places:
            return
        for batch in self._batches("means", places):
            for place in places:
                self.units[f"centre {place.key}"].vector_mean().update(batch.activations(place))
        for place in places:
            name = f"centre {place.key}"
            if self._caching:
                self.store.save(self._key(name), self.units[name].state())
            self.units[name].done = True

    def _measure(self) -> None:
        start = self._resume()
        head = LogitHead(self.model, self.settings.memory_budget // 4)
        used = [s for n, s in enumerate(self.subjects) if self._needs(n, s)]
        places = list(dict.fromkeys(subject.place for subject in used))
        for number, batch in enumerate(self._batches("evaluating", places, start)):
            if number == 0:
                batch.clean.check(target_of(place) for place in places)
            Step(self, head, batch).measure()
            done = batch.start + batch.tokens.shape[0]
            if (number + 1) % self.settings.checkpoint_every == 0 and done < self.rows.ids.shape[0]:
                self._checkpoint(done)

    def _needs(self, number: int, subject: Subject) -> bool:
        place = target_of(subject.place).key
        names = [f"sae {number}", f"uniformity {number}", *(f"{kind} {place}" for kind in ("deviation", *ABLATIONS))]
        return any(self.wanted(name) for name in names)

    def _checkpoint(self, done: int) -> None:
        if not self._caching:
            return
        state = {"rows": torch.tensor(done)}
        for number, name in enumerate(self._pending()):
            state |= self.units[name].state(f"{number}/")
        self.store.save(self._checkpoint_key, state)

    def _resume(self) -> int:
        kept = self.store.load(self._checkpoint_key) if self._caching else None
        if kept is None:
            return 0
        for number, name in enumerate(self._pending()):
            self.units[name].restore(kept, f"{number}/")
        return int(kept["rows"])


def facts_of(model: Any, rows: TokenBatch, special: tuple[int, ...]) -> dict[str, Any]:
    """What every number measured on a model and token rows depends on, SAEs aside: part of the key of what is kept.

    Raises:
        GemmaScopeError: when there are hooks on the model, which no key can name.
    """
    hooked = [name for name, point in model.hook_dict.items() if point.fwd_hooks]
    if hooked:
        raise GemmaScopeError(
            f"There are hooks on the model ({', '.join(hooked[:3])}), and a cache cannot tell what they do: remove "
            "them, or measure without cache=."
        )
    sizes = ("output_logits_soft_cap", "attn_scores_soft_cap", "eps", "window_size", "attn_scale", "rotary_base")
    return {
        "model": fingerprint(model),
        "config": [model.backend, *(repr(getattr(model.cfg, name, None)) for name in sizes)],
        "tokens": hashlib.sha256(rows.ids.contiguous().numpy().tobytes()).hexdigest(),
        "shape": list(rows.ids.shape),
        "special": list(special),
        **({} if bool(rows.mask.all()) else {"lengths": rows.length.tolist()}),
    }
