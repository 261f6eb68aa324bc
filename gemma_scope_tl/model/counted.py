"""The tokens of a text that SAEs apply to and that count: not BOS, EOS or padding, and at the chosen positions.

Everything that reads, explains or measures tokens takes them from here, so that ``positions=`` and
``exclude_special_tokens=`` select the same tokens there as in splices and edits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool

from gemma_scope_tl.model.positions import Positions, chosen_columns, rows_of_mask
from gemma_scope_tl.sae.choices import checked_positions
from gemma_scope_tl.text.batch import Text, TokenBatch
from gemma_scope_tl.text.rows import aligned, given_rows
from gemma_scope_tl.text.tokenizing import pad_id

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


@dataclass(frozen=True)
class CountedBatch(TokenBatch):
    """Token ids, and which of them count.

    Attributes:
        counted: True at text that SAEs apply to.
    """

    counted: Bool[torch.Tensor, "batch pos"]

    def chosen(self, special: Iterable[int]) -> dict[str, str]:
        """What a key or a record of settings has to say about chosen positions, beside ids, mask and ``special``.

        It is empty if all text counts that is not in ``special``, whether positions were given or not.
        """
        if torch.equal(self.counted, self.ordinary(special)):
            return {}
        return {"counted": hashlib.sha256(self.counted.cpu().contiguous().numpy().tobytes()).hexdigest()}


def counted_tokens(
    batch: TokenBatch, special: Iterable[int], positions: Positions = None
) -> Bool[torch.Tensor, "batch pos"]:
    """True at the text of a batch whose id is not in ``special``, at ``positions``.

    Args:
        batch: token ids and their mask.
        special: ids that do not count.
        positions: as in splices (:mod:`gemma_scope_tl.model.positions`); None for all.

    Raises:
        SpliceError: for a position that a row does not have, or invalid ``positions``.
    """
    ordinary = batch.ordinary(special)
    if checked_positions(positions) is None:
        return ordinary
    rows = rows_of_mask(batch.mask, batch.mask.shape[1], growing=False)
    return ordinary & chosen_columns(positions, rows).to(ordinary.device)


def counted_rows(
    model: GemmaModel,
    data: Text,
    context: int,
    special: Iterable[int],
    positions: Positions = None,
    attention_mask: Any = None,
    limit: int | None = None,
) -> CountedBatch:
    """Rows for a measurement (:func:`~gemma_scope_tl.text.rows.as_rows`), and which of their tokens count.

    Args:
        model, data, context, attention_mask, limit: as for ``as_rows``.
        special, positions: as for :func:`counted_tokens`. A mask ``[rows, pos]`` lies over the ids as they were given,
            with their padding, or over the packed rows of texts.

    Raises:
        SpliceError: as :func:`counted_tokens`.
        GemmaScopeError: as ``as_rows``.
    """
    given = given_rows(model, data, context, attention_mask, limit)
    batch, counted = aligned(given, pad_id(model.tokenizer), counted_tokens(given, special, positions))
    return CountedBatch(batch.ids, batch.mask, counted)
