"""Positions in a text, also while it is being generated and when rows are padded.

A position counts from 0 at the first token of its row that is not padding: in a batch padded on the left, position 0 is
each row's BOS. A negative one counts from the end of the row's prompt, so -1 is the same token in every step of
generation, with a cache or without. Ints must exist (in every row), as in ``list[i]``; slices take what there is, as in
``list[i:j]``, and go on into what is generated.

A mask of shape ``[batch, pos]`` lies over the token ids as they were given, padding included; a mask ``[pos]`` stands
for the positions at which it is True. Generated tokens that a mask does not reach are not chosen. A row of padding
alone has no positions, and none is required there.

Where token ids are unknown (a model that ``load_model`` did not make, a pass from embeddings), positions count in
the tensor at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int, Shaped

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.model.tracker import TokenTracker

Positions = int | slice | Sequence[int] | torch.Tensor | None


@dataclass(frozen=True)
class Rows:
    """Which columns of a batch of token ids hold its texts.

    Attributes:
        start: ``[batch]``, the first column that is not padding.
        length: ``[batch]``, how many columns of the prompt follow from there, padding on the right not counted.
        total: columns so far.
        growing: whether more are being generated.
        moved: ``[batch]``, by how many columns each row was moved to the right before generation; None for not at all.
    """

    start: Int[torch.Tensor, " batch"]
    length: Int[torch.Tensor, " batch"]
    total: int
    growing: bool
    moved: Int[torch.Tensor, " batch"] | None = None

    @property
    def place(self) -> Int[torch.Tensor, "batch total"]:
        """The position in its text of each column; negative on the left padding."""
        return torch.arange(self.total, device=self.start.device) - self.start[:, None]


def rows_of_mask(mask: Bool[torch.Tensor, "batch total"], prompt: int, growing: bool) -> Rows:
    """The rows of a mask (True at text, False at padding) of which the first ``prompt`` columns were given.

    A row of padding alone has no positions.
    """
    padding = (~mask[:, :prompt]).long()
    start, behind = padding.cumprod(-1).sum(-1), padding.flip(-1).cumprod(-1).sum(-1)
    return Rows(start, (prompt - start - behind).clamp(min=0), mask.shape[1], growing)


def rows_of(x: torch.Tensor, tracker: TokenTracker | None) -> Rows:
    """The rows whose last columns ``x`` (``[batch, pos, …]``) holds; where token ids are unknown, ``x`` is the text."""
    known = None if tracker is None else tracker.sequence(x)
    if tracker is not None and known is not None:
        moved = tracker.read.moved
        moved = None if moved is None else moved.to(x.device).expand(x.shape[0])
        mask, prompt = known
        growing = tracker.generating or mask.shape[1] > prompt  # by generate, or in a cached loop written by hand
        return replace(rows_of_mask(mask, prompt, growing), moved=moved)
    start = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    return Rows(start, start + x.shape[1], x.shape[1], growing=False)


def chosen_columns(positions: Positions, rows: Rows) -> Bool[torch.Tensor, "batch total"]:
    """True at the columns that ``positions`` choose.

    Raises:
        SpliceError: a position that a row does not have, a mask of another shape, a slice with a step below 1.
    """
    if isinstance(positions, slice):
        return _in_slice(positions, rows)
    if positions is None:
        return torch.ones(rows.place.shape, dtype=torch.bool, device=rows.start.device)
    wanted = torch.as_tensor(positions, device=rows.start.device)
    if wanted.dtype == torch.bool:
        if wanted.ndim == 2:
            return _under_mask(wanted, rows)
        wanted = wanted.nonzero().flatten()
    if wanted.ndim > 1 or (wanted.numel() and (wanted.is_floating_point() or wanted.is_complex())):
        raise SpliceError(
            f"Positions are an int, a slice, a list of ints, or a boolean mask [pos] or [batch, pos]; given: "
            f"{wanted.dtype}, shape {list(wanted.shape)}."
        )
    wanted = wanted.long().reshape(1, -1)
    resolved = torch.where(wanted < 0, wanted + rows.length[:, None], wanted)
    too_far = resolved < 0 if rows.growing else (resolved < 0) | (resolved >= rows.length[:, None])
    too_far &= rows.length[:, None] > 0
    if bool(too_far.any()):
        row, which = (int(i) for i in too_far.nonzero()[0])
        raise SpliceError(
            f"No position {int(wanted[0, which])}: row {row} has {int(rows.length[row])} tokens. Positions count in "
            "each row from its first token that is not padding (a model that load_model did not make cannot tell, and "
            "counts in the tensor at hand). A slice takes what there is."
        )
    return (rows.place[:, :, None] == resolved[:, None, :]).any(-1) & (rows.place >= 0)


def _in_slice(positions: slice, rows: Rows) -> torch.Tensor:
    step = 1 if positions.step is None else positions.step
    if step < 1:
        raise SpliceError(f"A slice of positions steps forward; given: step {step}.")

    def resolved(bound: int) -> torch.Tensor:
        return (rows.length + bound).clamp(min=0) if bound < 0 else torch.full_like(rows.length, bound)

    first = resolved(positions.start or 0)[:, None]
    chosen = (rows.place >= first) & ((rows.place - first) % step == 0)
    if positions.stop is not None:
        chosen &= rows.place < resolved(positions.stop)[:, None]
    return chosen if rows.growing else chosen & (rows.place < rows.length[:, None])


def _under_mask(mask: torch.Tensor, rows: Rows) -> torch.Tensor:
    batch, width = len(rows.start), mask.shape[1]
    if mask.shape[0] not in (1, batch) or (width != rows.total and not rows.growing):
        raise SpliceError(
            f"The mask of positions is {list(mask.shape)}, the batch of tokens {[batch, rows.total]}: they must agree."
        )
    chosen = torch.zeros(batch, max(rows.total, width), dtype=torch.bool, device=mask.device)
    chosen[:, :width] = mask if rows.moved is None else move_rows(mask.expand(batch, -1), rows.moved)
    return chosen[:, : rows.total]


def move_rows(x: Shaped[torch.Tensor, "batch pos"], by: Int[torch.Tensor, " batch"]) -> torch.Tensor:
    """Each row rotated to the right by its own number of columns."""
    columns = torch.arange(x.shape[1], device=x.device) - by.to(x.device)[:, None]
    return x.gather(1, columns % x.shape[1])
