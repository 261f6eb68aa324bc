"""Examples of where latents fire, for any number of SAEs in one run of the unspliced model over a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET, ReadBatch, read_batches, rows_that_fit
from gemma_scope_tl.evals.saes import Subject, latents_of, subjects_of
from gemma_scope_tl.interp.sampling import Collector, Sampling
from gemma_scope_tl.model.counted import CountedBatch, counted_rows
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.arguments import as_indices
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.text.rows import special_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


@dataclass(frozen=True)
class Example:
    """A window of text with the activations of one latent.

    Attributes:
        latent: index of the latent.
        kind: ``top``, ``quantile`` or ``silent``.
        quantile: index of the quantile, 0 for the weakest activations; -1 for other kinds.
        row, start: row and position of the window's first token in the corpus.
        tokens: text of each token.
        values: the latent's activation on each token, 0 where it does not fire or the token does not count.
    """

    latent: int
    kind: str
    quantile: int
    row: int
    start: int
    tokens: tuple[str, ...]
    values: NDArray[np.float32]

    @property
    def activation(self) -> float:
        """The largest activation."""
        return float(self.values.max())

    @property
    def text(self) -> str:
        """The tokens in one string."""
        return "".join(self.tokens)


class Examples:
    """The examples of one SAE's latents.

    Attributes:
        subject: the SAE.
        latents: indices of the latents, ascending.
        fired: number of tokens on which each latent fired, int64 ``[n]``.
        maxima: largest activation of each latent, ``[n]``.
        tokens: number of tokens in the corpus that count.
        sampling: how many examples of each kind were kept.
    """

    def __init__(self, subject: Subject, kept: Collector, corpus: torch.Tensor, tokenizer: Any) -> None:
        self.subject, self.latents, self.sampling = subject, kept.latents, kept.sampling
        self.fired, self.maxima, self.tokens = kept.fired, kept.maxima, kept.tokens
        self._kept, self._corpus, self._tokenizer = kept, corpus, tokenizer
        self._words: dict[int, str] = {}
        listed = [(number, *slot) for number in range(len(kept.latents)) for slot in kept.chosen(number)]
        self._slots = np.asarray([(number, window) for number, _, _, window in listed], np.int64).reshape(-1, 2)
        self._kinds = [(kind, quantile) for _, kind, quantile, _ in listed]
        self._ends = np.searchsorted(self._slots[:, 0], np.arange(len(kept.latents) + 1))
        self._values = np.zeros((len(listed), self.sampling.window), np.float32)
        keys = self._key(self._slots[:, 1], self._slots[:, 0])
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def sae_columns(self) -> dict[str, Any]:
        """The columns of a table that identify the SAE."""
        subject = self.subject
        return {"release": subject.release, "id": subject.id, "site": subject.place.site, "layer": subject.place.layer}

    def rows(self) -> set[int]:
        """The rows of the corpus that examples come from."""
        return set((self._slots[:, 1] // self._kept.windows_per_row).tolist())

    def fill(self, rows: NDArray[np.int64], acts: Any, batch: ReadBatch) -> None:
        """Fill in the activations of windows in rows of the corpus; ``rows`` are their numbers there."""
        _, window, where, values = self._kept.entries(rows, acts, batch.counted)
        positions = batch.counted.cpu().nonzero(as_tuple=True)[1].numpy()[acts.tokens().cpu().numpy()]
        index = self._kept.index_of(acts)
        positions = positions[(index >= 0) & (acts.values.detach().cpu().numpy() != 0)]
        keys = self._key(window, where)
        place = np.searchsorted(self._keys, keys).clip(0, max(len(self._keys) - 1, 0))
        hit = self._keys[place] == keys if len(self._keys) else np.zeros(len(keys), bool)
        self._values[self._order[place[hit]], positions[hit] % self.sampling.window] = values[hit]

    def of(self, latent: int, *kinds: str) -> list[Example]:
        """A latent's examples of these kinds (by default all): strongest first, then by quantile, then silent ones.

        Raises:
            SpliceError: the latent was not collected.
        """
        number = int(np.searchsorted(self.latents, latent))
        if number >= len(self.latents) or self.latents[number] != latent:
            raise SpliceError(f"Latent {latent} was not collected; {len(self.latents)} latents were.")
        found = [self._example(at) for at in range(self._ends[number], self._ends[number + 1])]
        return [example for example in found if not kinds or example.kind in kinds]

    def __iter__(self) -> Iterator[Example]:
        return (self._example(at) for at in range(len(self._slots)))

    def frame(self, latents: Iterable[int] | None = None) -> pd.DataFrame:
        """A table with one row per example of the given latents, by default of all.

        The columns are ``release, id, site, layer, latent, kind, quantile, row, start, activation, text``, and
        ``tokens`` and ``values`` as lists.
        """
        import pandas as pd

        found = self if latents is None else (example for latent in latents for example in self.of(latent))
        rows = [
            {
                **self.sae_columns,
                **{key: getattr(one, key) for key in ("latent", "kind", "quantile", "row", "start", "activation")},
                "text": one.text,
                "tokens": list(one.tokens),
                "values": one.values.tolist(),
            }
            for one in found
        ]
        return pd.DataFrame(rows)

    def words(self, ids: Iterable[int]) -> list[str]:
        """The text of each token."""
        out: list[str] = []
        for i in ids:
            if i not in self._words:
                self._words[i] = self._tokenizer.decode([i]) if self._tokenizer else f"<{i}>"
            out.append(self._words[i])
        return out

    def _example(self, at: int) -> Example:
        number, window = (int(part) for part in self._slots[at])
        row, start = divmod(window, self._kept.windows_per_row)
        start *= self.sampling.window
        ids = self._corpus[row, start : start + self.sampling.window].tolist()
        kind, quantile = self._kinds[at]
        values = self._values[at, : len(ids)]
        return Example(int(self.latents[number]), kind, quantile, row, start, tuple(self.words(ids)), values)

    def _key(self, window: NDArray[Any], number: NDArray[Any]) -> NDArray[Any]:
        return window * max(len(self.latents), 1) + number


def top_examples(
    model: GemmaModel,
    saes: Any,
    data: Text,
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
    *,
    latents: Iterable[int] | None = None,
    sampling: Sampling | None = None,
    memory_budget: int = MEMORY_BUDGET,
    positions: Positions = None,
) -> list[Examples]:
    """Examples of each SAE's latents: where they fire most, at each quantile of activation, and not at all.

    The model makes two passes over the corpus, which all SAEs share. The second pass runs only the rows with chosen
    windows, to read their activations. Memory: :meth:`Sampling.bytes_per_latent` for each latent (2.3 kB with the
    defaults, 38 MB for 16,384 latents), then ``4 * window`` bytes for each example, and the token ids.

    Args:
        model, saes, data, context, batch_size, progress, memory_budget, positions: as
            :func:`~gemma_scope_tl.evals.suite.evaluate` takes them.
        latents: indices of latents of every SAE; None for all.
        sampling: number of examples of each kind, length of a window, and seed.

    Returns:
        One :class:`Examples` for each SAE, in the order of the SAEs.

    Raises:
        SpliceError: an SAE does not fit the model or does not have one of the latents, or a row lacks a position.
        GemmaScopeError: there is less text than one row.
    """
    subjects, counted = subjects_of(model, saes), counted_rows(model, data, context, special_ids(model), positions)
    tokens = counted.ids
    settings = sampling or Sampling()
    kept = [Collector(chosen_latents(s, latents), s.d_sae, tokens.shape[1], settings) for s in subjects]
    rows = rows_that_fit(model, [s.place for s in subjects], tokens.shape[1], batch_size, memory_budget)
    for batch, inputs in passes(model, subjects, counted, rows, progress, "finding examples"):
        for subject, collector in zip(subjects, kept, strict=True):
            collector.update(batch.rows.numpy(), latents_of(subject.get(), inputs[subject.place]), batch.counted)
    pairs = zip(subjects, kept, strict=True)
    found = [Examples(subject, collector, tokens, model.tokenizer) for subject, collector in pairs]
    needed = sorted(set[int]().union(*(examples.rows() for examples in found)))
    for run in _runs(needed):
        part = counted.part(torch.arange(run.start, run.stop))
        for batch, inputs in passes(model, subjects, part, rows, False, ""):
            for subject, examples in zip(subjects, found, strict=True):
                acts = latents_of(subject.get(), inputs[subject.place])
                examples.fill(run.start + batch.rows.numpy(), acts, batch)
    return found


def passes(
    model: GemmaModel, subjects: Sequence[Subject], text: CountedBatch, rows: int, progress: bool, what: str
) -> Iterator[tuple[ReadBatch, dict[Any, torch.Tensor]]]:
    """Yield each batch, and the activations at the places of all subjects."""
    from rich.progress import track

    places = list(dict.fromkeys(subject.place for subject in subjects))
    total = -(-text.ids.shape[0] // rows)
    batches = read_batches(model, text, places, rows)
    for batch in track(batches, what, total, transient=True, disable=not progress):
        yield batch, {place: batch.activations(place) for place in places}


def _runs(rows: Sequence[int]) -> list[range]:
    """Ascending numbers as runs of consecutive ones."""
    runs: list[range] = []
    for row in rows:
        if runs and runs[-1].stop == row:
            runs[-1] = range(runs[-1].start, row + 1)
        else:
            runs.append(range(row, row + 1))
    return runs


def chosen_latents(subject: Subject, latents: Iterable[int] | None) -> NDArray[np.int64]:
    """Ascending indices of latents without duplicates; None for all latents.

    Raises:
        SpliceError: the SAE does not have one of the latents.
        GemmaScopeError: the list of latents is empty.
    """
    if latents is None:
        return np.arange(subject.d_sae)
    chosen = np.unique(np.asarray(as_indices(latents), np.int64))
    if not len(chosen):
        raise GemmaScopeError("No latent was given: give at least one, or None for all.")
    if chosen[0] < 0 or chosen[-1] >= subject.d_sae:
        raise SpliceError(f"Latents run from {chosen[0]} to {chosen[-1]}; the SAE's are 0..{subject.d_sae - 1}.")
    return chosen
