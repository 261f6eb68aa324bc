"""What one batch adds to every piece of an evaluation that is still to be measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.activations.source import Place
from gemma_scope_tl.evals.accumulators import LatentCounts, TokenMean
from gemma_scope_tl.evals.clean_pass import Batch
from gemma_scope_tl.evals.importance import logit_gradients, sampled_positions
from gemma_scope_tl.evals.metrics import l0, latent_importance, squared_error, uniformity
from gemma_scope_tl.evals.next_token import LogitHead, Scores
from gemma_scope_tl.evals.subjects import latents_and_output
from gemma_scope_tl.evals.units import CLEAN
from gemma_scope_tl.sae.sparse import SparseActs
from gemma_scope_tl.sites import flatten_heads

if TYPE_CHECKING:
    from gemma_scope_tl.evals.run import Run

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
            by_place.setdefault(subject.place.target, []).append(number)
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
        wanted = [s.place.target for n, s in enumerate(run.subjects) if run.wanted(f"uniformity {n}")]
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
        gradient = by_place[place.target][rows.to(device), columns.to(device)]
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
