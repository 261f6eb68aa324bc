"""Activations from a model that runs during training, for when a store of them would take too much disk.

One bucket of activations is held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from gemma_scope_tl.activations.harvest import Harvester
from gemma_scope_tl.activations.source import BucketedSource
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place, with_targets
from gemma_scope_tl.text.token_rows import TokenRows

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


class StreamSource(BucketedSource):
    """Activations of token rows, harvested as they are needed.

    The tokens determine how many activations each forward pass gives, so the pass of any row of the data is known
    without running earlier passes. A pass always takes the same token rows, wherever reading began, so its activations
    are the same to the bit. A pass that spans two buckets is run once for both.
    """

    def __init__(
        self,
        model: GemmaModel,
        token_rows: TokenRows,
        places: Sequence[Place],
        *,
        bucket_rows: int,
        seed: int = 0,
        batch_rows: int = 8,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            model: from ``load_model``; it runs in its own dtype and on its own device.
            token_rows: the data.
            places: the places to serve; targets of transcoders are added.
            bucket_rows: rows that are shuffled together; the paper uses about a million.
            seed: seed of the shuffles.
            batch_rows: token rows in a forward pass.
            dtype: dtype of the bucket.
            device: device of the bucket and of the batches.

        Raises:
            SpliceError: the model is not from ``load_model``, or does not have one of the layers.
            GemmaScopeError: the token ids are not the model's, or no position is left to train on.
        """
        self._ends = np.cumsum(token_rows.kept_by_pass(batch_rows))
        self.harvester = Harvester(model, with_targets(places))
        self.token_rows, self.batch_rows = token_rows, batch_rows
        self._last: tuple[int, dict[Place, torch.Tensor]] | None = None
        on_gpu = self.harvester.device.type == "cuda"
        super().__init__(
            self.harvester.widths,
            int(self._ends[-1]),
            bucket_rows=bucket_rows,
            seed=seed,
            dtype=dtype,
            device=device,
            pinned=on_gpu and torch.device(device).type == "cpu",
        )

    def mean_squares(self, rows: int) -> dict[Place, float]:
        """As in the base class."""
        means = super().mean_squares(rows)
        self._last = None
        return means

    def pieces(self, start: int, count: int) -> Iterator[dict[Place, Float[torch.Tensor, "n d"]]]:
        """Rows ``start`` to ``start + count`` of the data, a piece for each forward pass."""
        end = start + count
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < end:
            stop = int(self._ends[number])
            if stop == start:  # no position of this pass is kept
                number += 1
                continue
            values = self._pass(number)
            first = stop - len(next(iter(values.values())))
            used = min(stop, end)
            yield {place: value[start - first : used - first] for place, value in values.items()}
            start, number = used, number + 1
            if used == stop:
                self._last = None

    def _pass(self, number: int) -> dict[Place, torch.Tensor]:
        """Activations of one forward pass, which are kept until the next pass."""
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        self._last = None  # frees its memory for the next pass
        first = number * self.batch_rows
        tokens = self.token_rows[first : first + self.batch_rows]
        values = self.harvester.run(tokens, self.token_rows.keep_mask(tokens))
        for place, value in values.items():
            if not bool(torch.isfinite(value.sum(dtype=torch.float32))):
                raise GemmaScopeError(
                    f"{place.key}: activations of token rows {first} to {first + len(tokens) - 1} are not finite in "
                    f"{value.dtype}. Load the model in another dtype."
                )
        self._last = number, values
        return values
