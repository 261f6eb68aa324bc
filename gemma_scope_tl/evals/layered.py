"""The evaluation of crosscoders and cross-layer transcoders: each layer, and the model with all outputs replaced.

L0, firing and FVU of a layer come from the clean pass, as those of an SAE. In the spliced pass all outputs are replaced
at once, so a later layer reads what the earlier replacements made of the model. Ablations replace all outputs, too::

    L0 = sum_k L0_k        FVU_k = sum ||y_k - y_hat_k||^2 / sum ||y_k - mean(y_k)||^2        FVU = the same over all k

In the table of ``evaluate`` a coder has a row without ``layer`` for all its layers together, and then a row for each
layer, in which the metrics of a spliced or ablated pass are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.evals.accumulators import LatentCounts, TokenMean
from gemma_scope_tl.evals.cache import Checkpoint, MetricsCache, key_of
from gemma_scope_tl.evals.clean_pass import (
    CleanBatch,
    clean_batches,
    hook_point,
    read_batches,
    removed_after,
    rows_that_fit,
    run_to_final_norm,
)
from gemma_scope_tl.evals.facts import facts_of
from gemma_scope_tl.evals.metrics import l0, squared_error
from gemma_scope_tl.evals.next_token import LogitHead
from gemma_scope_tl.evals.run import Settings, replacement, shown_batches
from gemma_scope_tl.evals.sums import Centre, CleanLoss, PerToken, Piece, PlaceSums
from gemma_scope_tl.model.counted import CountedBatch
from gemma_scope_tl.sae.access import places_of
from gemma_scope_tl.sae.choices import bring
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sites import Place, flatten_heads, target_of, unflatten_heads
from gemma_scope_tl.weights.fingerprint import fingerprint
from gemma_scope_tl.weights.modes import make_ordinary

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


@dataclass
class LayerSums(Piece):
    """The sums of one layer of a coder on the clean pass.

    Attributes:
        fired: number of tokens on which each latent of the layer is active.
        l0: number of active latents of the layer.
        error: squared error of the output at the layer.
    """

    fired: LatentCounts
    l0: TokenMean = field(default_factory=TokenMean)
    error: TokenMean = field(default_factory=TokenMean)


@dataclass
class TogetherSums(Piece):
    """The sums of all layers of a coder.

    Attributes:
        l0: number of active latents in all layers.
        loss, kl: cross-entropy of the model with all outputs replaced, and KL divergence from the clean prediction.
    """

    l0: TokenMean = field(default_factory=TokenMean)
    loss: TokenMean = field(default_factory=TokenMean)
    kl: TokenMean = field(default_factory=TokenMean)


@dataclass
class LayeredSums:
    """All pieces of the evaluation of one coder.

    Attributes:
        layers: the sums of each layer.
        places: mean and variance of the tensor that each layer writes.
        together: the sums of all layers.
        ablated: the model's loss when all these tensors are replaced, by the kind of ablation.
        clean: sums of the model alone.
    """

    layers: list[LayerSums]
    places: list[PlaceSums]
    ablated: dict[str, PerToken]
    together: TogetherSums = field(default_factory=TogetherSums)
    clean: CleanLoss = field(default_factory=CleanLoss)

    def pieces(self) -> list[Piece]:
        """Every piece but the means, in the order of checkpoints."""
        deviations = [place.deviation for place in self.places]
        return [self.clean, *deviations, *self.layers, self.together, *self.ablated.values()]

    @property
    def centres(self) -> list[Centre]:
        """The means of the tensors that the layers write."""
        return [place.centre for place in self.places]


@dataclass
class LayeredRun:
    """The evaluation of one coder on ``rows``; :meth:`finish` completes ``sums``.

    The arguments are those of :class:`~gemma_scope_tl.evals.run.EvaluationRun`.
    """

    model: GemmaModel
    coder: LayeredCoder
    rows: CountedBatch
    special: tuple[int, ...]
    settings: Settings
    cache: MetricsCache

    def __post_init__(self) -> None:
        for site, layer in places_of(self.coder, self.model.family):
            self.model.check_fits(self.coder, site, layer)

    @cached_property
    def read(self) -> list[Place]:
        """The places that the coder reads."""
        return [Place(self.coder.site, layer) for layer in self.coder.layers]

    @cached_property
    def written(self) -> list[Place]:
        """The places that the coder writes."""
        return [target_of(place) for place in self.read]

    @cached_property
    def sums(self) -> LayeredSums:
        """All sums; empty before :meth:`finish`."""
        layers = [LayerSums(LatentCounts.empty(width)) for width in self.coder.widths]
        ablated = {kind: PerToken() for kind in self.settings.ablations}
        return LayeredSums(layers, [PlaceSums({}) for _ in layers], ablated)

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self) -> LayeredSums:
        """Measure the pieces that the cache does not hold."""
        make_ordinary(self.model)
        self._set_keys()
        for piece in (*self.sums.pieces(), *self.sums.centres):
            kept = self.cache.load(piece.key)
            if kept is not None:
                piece.restore(kept)
                piece.done = True
        pending = [piece for piece in self.sums.pieces() if not piece.done]
        if pending:
            self._compute_centres()
            sizes = [self.settings.batch_size, self.settings.memory_budget]
            key = key_of({"pending": [piece.key for piece in pending], "sizes": sizes})
            checkpoint = Checkpoint(self.cache, key, dict(enumerate(pending)))
            self._measure(checkpoint)
            for piece in pending:
                self._complete(piece)
            checkpoint.drop()
        return self.sums

    def _set_keys(self) -> None:
        if self.cache.folder is None:
            return
        common = facts_of(self.model, self.rows, self.special)
        self.sums.clean.key = key_of({**common, "unit": "clean"})  # the keys of an SAE's evaluation
        for place, sums in zip(self.written, self.sums.places, strict=True):
            for kind, piece in sums.pieces().items():
                piece.key = key_of({**common, "unit": kind, "place": place.key})
        coder = {"kind": self.coder.kind, "layers": list(self.coder.layers), "weights": fingerprint(self.coder)}
        for layer, sums in zip(self.coder.layers, self.sums.layers, strict=True):
            sums.key = key_of({**common, "unit": "layer of a coder", "layer": layer, "coder": coder})
        self.sums.together.key = key_of({**common, "unit": "layered coder", "coder": coder})
        for kind, piece in self.sums.ablated.items():
            piece.key = key_of({**common, "unit": kind, "places": [place.key for place in self.written]})

    def _complete(self, piece: Piece) -> None:
        self.cache.save(piece.key, piece.state())
        piece.done = True

    def _compute_centres(self) -> None:
        missing = {p: c for p, c in zip(self.written, self.sums.centres, strict=True) if not c.done}
        if not missing:
            return
        for batch in shown_batches(self, "means", read_batches, list(missing)):
            for place, centre in missing.items():
                centre.mean.update(batch.activations(place))
        for centre in missing.values():
            self._complete(centre)

    def _measure(self, checkpoint: Checkpoint) -> None:
        start = checkpoint.restore()
        head = LogitHead(self.model, self.settings.memory_budget // 4)
        batches: Iterator[CleanBatch] = shown_batches(self, "evaluating", clean_batches, self.read, start)
        for number, batch in enumerate(batches, 1):
            self._measure_batch(head, batch)
            if number % self.settings.checkpoint_every == 0 and batch.done < self.rows.ids.shape[0]:
                checkpoint.save(batch.done)

    @property
    def rows_per_batch(self) -> int:
        """Number of rows in a forward pass."""
        size, budget = self.settings.batch_size, self.settings.memory_budget // 2
        return rows_that_fit(self.model, self.read, self.rows.ids.shape[1], size, budget)

    def _measure_batch(self, head: LogitHead, batch: CleanBatch) -> None:
        sums, where = self.sums, (batch.counted, batch.rows)
        total = torch.zeros(int(batch.counted.sum()), dtype=torch.float64)
        needed = not all(piece.done for piece in (*sums.layers, sums.together))
        acts: list[Any] = []
        for k, (read, written) in enumerate(zip(self.read, self.written, strict=True)):
            y = batch.activations(written)
            if not sums.places[k].deviation.done:
                mean = replacement("mean", y, sums.centres[k])
                sums.places[k].deviation.value.update(squared_error(y, mean), *where)
            if not needed:
                continue
            x = batch.activations(read).to(bring(self.coder, y.device).dtype)
            acts.append(self.coder.encode_at(k, x))
            active = l0(acts[k]).cpu()
            total += active
            if not sums.layers[k].done:
                sums.layers[k].fired.update(acts[k])
                sums.layers[k].l0.update(active, *where)
                sums.layers[k].error.update(squared_error(y, self.coder.decode_at(k, acts, x)), *where)
        if not sums.together.done:
            sums.together.l0.update(total, *where)
        self._measure_losses(head, batch)

    def _measure_losses(self, head: LogitHead, batch: CleanBatch) -> None:
        sums = self.sums
        others: list[tuple[torch.Tensor, TokenMean, TokenMean | None]] = []
        if not sums.together.done:
            others.append((self._spliced(batch), sums.together.loss, sums.together.kl))
        for kind, piece in sums.ablated.items():
            if not piece.done:
                others.append((self._ablated(batch, kind), piece.value, None))
        scored = batch.scored
        normed = [(head.normed(final)[:, :-1][scored], kl is not None) for final, _, kl in others]
        clean, scores = head.score(head.normed(batch.clean.final)[:, :-1][scored], normed, batch.targets())
        if not sums.clean.done:
            sums.clean.loss.update(clean, scored, batch.rows)
        for (_, loss, kl), score in zip(others, scores, strict=True):
            loss.update(score.losses, scored, batch.rows)
            if kl is not None and score.divergences is not None:
                kl.update(score.divergences, scored, batch.rows)

    def _spliced(self, batch: CleanBatch) -> torch.Tensor:
        """The residual stream before the final norm with the coder's outputs at the counted tokens."""
        where: Mapping[str, Any] = {"exclude_special_tokens": False, "positions": batch.counted}
        with self.model.saes(self.coder, error_term=False, **where):
            return run_to_final_norm(self.model, batch.tokens)

    def _ablated(self, batch: CleanBatch, kind: str) -> torch.Tensor:
        """The residual stream before the final norm with all outputs ablated at the counted tokens."""

        def ablating(centre: Centre) -> Any:
            def hook(_module: Any, _args: Any, value: torch.Tensor) -> torch.Tensor:
                flat = flatten_heads(value).clone()
                flat[batch.counted] = replacement(kind, flat[batch.counted], centre).to(flat.dtype)
                return unflatten_heads(flat, value)

            return hook

        with removed_after() as handles:
            for place, centre in zip(self.written, self.sums.centres, strict=True):
                handles.append(hook_point(self.model, place).register_forward_hook(ablating(centre)))
            return run_to_final_norm(self.model, batch.tokens)
