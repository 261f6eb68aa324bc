"""Sampling of windows of a corpus as examples of each latent, in one pass over the corpus.

Memory is bounded, samples of parts of a corpus can be merged, and a seed fixes the result.

Rows of tokens are cut into windows; the activation of a window is the largest activation of its tokens. Each latent
keeps

- the windows of largest activation;
- a uniform sample of the windows in which it fires, later cut into quantiles of activation: every pair of window and
  latent has a priority, a hash of the seed and both, and the lowest priorities are kept. This is sampling without
  replacement, which depends neither on the order of the data nor on its division into batches;
- windows in which it does not fire, from a pool of windows that all latents share and that is drawn in the same way.

Forward passes round differently at other batch sizes, so two windows of nearly equal activation may change places.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sae.sparse import SparseActs

Array = NDArray[Any]


@dataclass(frozen=True)
class Sampling:
    """How many examples of each kind are kept.

    Attributes:
        top: number of windows of largest activation.
        quantiles, per_quantile: number of bins of activation, and of windows from each.
        silent: number of windows in which the latent does not fire.
        window: number of tokens in a window.
        pool: number of windows from which silent ones are drawn; a latent that fires in almost all of them gets fewer.
        seed: seed of all draws.
    """

    top: int = 10
    quantiles: int = 4
    per_quantile: int = 5
    silent: int = 10
    window: int = 32
    pool: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        low = {"top": 1, "quantiles": 1, "window": 2, "pool": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "seed" and value < low.get(field.name, 0):
                raise GemmaScopeError(f"{field.name} is {low.get(field.name, 0)} or more, not {value}.")

    @property
    def reservoir(self) -> int:
        """Number of firing windows sampled for each latent, four times as many as the quantiles need."""
        return 4 * self.quantiles * self.per_quantile

    def bytes_per_latent(self) -> int:
        """Memory for each latent: 20 bytes for a kept window, and one byte for each window of the pool.

        >>> Sampling().bytes_per_latent()
        2332
        """
        return 20 * (self.top + self.reservoir) + self.pool + 20


class Collector:
    """The samples of one SAE's latents, collected batch by batch.

    Args:
        latents: indices of the latents to sample, int64 ``[n]``.
        d_sae: number of latents of the SAE.
        context: number of tokens in a row.
        sampling: how many windows to keep.
    """

    def __init__(self, latents: Array, d_sae: int, context: int, sampling: Sampling) -> None:
        n = len(latents)
        self.latents, self.sampling = latents, sampling
        self.windows_per_row = -(-context // sampling.window)
        self.top = Lowest(n, sampling.top)
        self.sample = Lowest(n, sampling.reservoir)
        self.pool = Pool(n, sampling.pool)
        self.fired, self.maxima, self.tokens = np.zeros(n, np.int64), np.zeros(n, np.float32), 0
        self._index = np.full(d_sae, -1, np.int64)
        self._index[latents] = np.arange(n)

    @property
    def nbytes(self) -> int:
        """Memory in bytes, which does not grow with the data."""
        held = (self.top, self.sample, self.pool)
        return sum(part.nbytes for part in held) + self.fired.nbytes + self.maxima.nbytes + self._index.nbytes

    def update(self, rows: Array, acts: SparseActs, counted: Bool[torch.Tensor, "batch pos"]) -> None:
        """Add rows of tokens.

        Args:
            rows: the number of each row in the corpus, int64 ``[batch]``.
            acts: the latents of the counted tokens, in the order of the True entries of ``counted``.
            counted: True at tokens that count.
        """
        seen, window, where, values = self.entries(rows, acts, counted)
        np.add.at(self.fired, where, 1)
        np.maximum.at(self.maxima, where, values)
        self.tokens += acts.n_tokens
        order = np.lexsort((-values, where, window))
        window, where, values = window[order], where[order], values[order]
        first = np.ones(len(window), bool)
        first[1:] = (np.diff(window) != 0) | (np.diff(where) != 0)
        window, where, values = window[first], where[first], values[first]
        self.top.update(where, -values.astype(np.float64), window, values)
        priority = hashed(self.sampling.seed, window, self.latents[where])
        self.sample.update(where, priority, window, values)
        self.pool.update(seen, hashed(self.sampling.seed, seen, -1), window, where)

    def entries(
        self, rows: Array, acts: SparseActs, counted: Bool[torch.Tensor, "batch pos"]
    ) -> tuple[Array, Array, Array, Array]:
        """The windows with a counted token, and the window, index of the latent and value of each active entry."""
        at, positions = (part.numpy() for part in counted.cpu().nonzero(as_tuple=True))
        windows = rows[at] * self.windows_per_row + positions // self.sampling.window
        token, where = acts.tokens().cpu().numpy(), self.index_of(acts)
        values = acts.values.detach().float().cpu().numpy()
        kept = (where >= 0) & (values != 0)
        return np.unique(windows), windows[token[kept]], where[kept], values[kept]

    def index_of(self, acts: SparseActs) -> Array:
        """The index of each entry's latent among the sampled latents; -1 for other latents."""
        return self._index[acts.latents.cpu().numpy()]

    def merge(self, other: Collector) -> None:
        """Add the samples of ``other``, which has seen other rows of the same corpus.

        Raises:
            GemmaScopeError: the latents or the sampling differ.
        """
        if self.sampling != other.sampling or not np.array_equal(self.latents, other.latents):
            raise GemmaScopeError("Samples can only be merged if they have the same latents and the same sampling.")
        for mine, theirs in ((self.top, other.top), (self.sample, other.sample)):
            mine.update(*theirs.listed())
        self.pool.merge(other.pool)
        self.fired += other.fired
        self.maxima = np.maximum(self.maxima, other.maxima)
        self.tokens += other.tokens

    def chosen(self, number: int) -> list[tuple[str, int, int]]:
        """Kind, quantile (0 is the lowest; -1 for other kinds) and window of each example of latent ``number``."""
        found = [("top", -1, int(window)) for window in self.top.of(number)[1]]
        taken = {window for *_, window in found}
        scores, windows, values = self.sample.of(number)
        rest = [at for at in np.lexsort((windows, values)) if int(windows[at]) not in taken]
        if len(rest) >= self.sampling.quantiles:
            for quantile, part in enumerate(np.array_split(np.asarray(rest), self.sampling.quantiles)):
                drawn = part[np.argsort(scores[part], kind="stable")][: self.sampling.per_quantile]
                found += [("quantile", quantile, int(windows[at])) for at in drawn]
        silent = self.pool.silent(number)
        order = np.argsort(hashed(self.sampling.seed, silent, int(self.latents[number])), kind="stable")
        return found + [("silent", -1, int(window)) for window in silent[order][: self.sampling.silent]]


class Lowest:
    """The ``k`` entries of lowest score of each latent, with their windows; of equal scores, the earlier window."""

    def __init__(self, n: int, k: int) -> None:
        self.scores = np.full((n, k), np.inf)
        self.windows = np.full((n, k), -1, np.int64)
        self.values = np.zeros((n, k), np.float32)

    @property
    def nbytes(self) -> int:
        """Memory in bytes, 20 for each entry."""
        return self.scores.nbytes + self.windows.nbytes + self.values.nbytes

    def update(self, where: Array, scores: Array, windows: Array, values: Array) -> None:
        """Add entries; ``where`` holds the index of each entry's latent."""
        k = self.scores.shape[1]
        order = np.lexsort((windows, scores, where))
        where, scores, windows, values = where[order], scores[order], windows[order], values[order]
        touched, starts, counts = np.unique(where, return_index=True, return_counts=True)
        if not len(touched) or not k:
            return
        rank = np.arange(len(where)) - np.repeat(starts, counts)
        line = np.repeat(np.arange(len(touched)), counts)
        kept = rank < k
        fresh = Lowest(len(touched), k)
        place = (line[kept], rank[kept])
        fresh.scores[place], fresh.windows[place], fresh.values[place] = scores[kept], windows[kept], values[kept]
        both = np.concatenate([self.scores[touched], fresh.scores], 1)
        all_windows = np.concatenate([self.windows[touched], fresh.windows], 1)
        best = np.lexsort((all_windows, both), axis=-1)[:, :k]
        self.scores[touched] = np.take_along_axis(both, best, 1)
        self.windows[touched] = np.take_along_axis(all_windows, best, 1)
        all_values = np.concatenate([self.values[touched], fresh.values], 1)
        self.values[touched] = np.take_along_axis(all_values, best, 1)

    def listed(self) -> tuple[Array, Array, Array, Array]:
        """All entries, in the form of the arguments of :meth:`update`."""
        held = np.isfinite(self.scores)
        return np.nonzero(held)[0], self.scores[held], self.windows[held], self.values[held]

    def of(self, number: int) -> tuple[Array, Array, Array]:
        """Scores, windows and values of one latent, lowest score first."""
        held = np.isfinite(self.scores[number])
        return self.scores[number][held], self.windows[number][held], self.values[number][held]


class Pool:
    """Windows of lowest priority, the same for all latents, and the latents that fire in each."""

    def __init__(self, n: int, size: int) -> None:
        self.size = size
        self.scores = np.zeros(0)
        self.windows = np.zeros(0, np.int64)
        self.active = np.zeros((0, n), bool)

    @property
    def nbytes(self) -> int:
        """Memory in bytes, one for each pair of latent and window."""
        return self.scores.nbytes + self.windows.nbytes + self.active.nbytes

    def update(self, seen: Array, scores: Array, window: Array, where: Array) -> None:
        """Add windows with their priorities, and the pairs of window and latent that are active."""
        best = np.argsort(scores, kind="stable")[: self.size]
        kept = np.sort(seen[best])
        active = np.zeros((len(kept), self.active.shape[1]), bool)
        place = np.searchsorted(kept, window).clip(0, max(len(kept) - 1, 0))
        hit = kept[place] == window if len(kept) else np.zeros(len(window), bool)
        active[place[hit], where[hit]] = True
        self._add(scores[np.searchsorted(seen, kept)], kept, active)

    def merge(self, other: Pool) -> None:
        """Add the windows of another pool."""
        self._add(other.scores, other.windows, other.active)

    def silent(self, number: int) -> Array:
        """Windows in which this latent does not fire."""
        return self.windows[~self.active[:, number]]

    def _add(self, scores: Array, windows: Array, active: Array) -> None:
        scores, windows = np.concatenate([self.scores, scores]), np.concatenate([self.windows, windows])
        best = np.lexsort((windows, scores))[: self.size]
        self.active = np.concatenate([self.active, active])[best]
        self.scores, self.windows = scores[best], windows[best]


def hashed(seed: int, first: Array, second: Array | int) -> NDArray[np.float64]:
    """Pseudo-random numbers in [0, 1) as a function of seed, ``first`` and ``second`` (splitmix64)."""
    state = np.full(np.shape(first), np.uint64(seed & (2**64 - 1)))
    for part in (np.asarray(first), np.asarray(second)):
        state = _mixed(state ^ part.astype(np.int64).astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
