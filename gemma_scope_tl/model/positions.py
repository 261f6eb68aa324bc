"""Positions in a text, for padded rows and during generation.

Position 0 is the first token of a row that is not padding. In a batch that is padded on the left, this is the BOS of
each row. A negative position counts from the end of the prompt of the row, so -1 is the same token in every step of
generation, with a cache or without. An int must exist in every row, as in ``list[i]``. A slice selects the positions
that exist, as in ``list[i:j]``, and includes generated tokens.

A mask of shape ``[batch, pos]`` applies to the given token ids, including padding. A mask ``[pos]`` selects the
positions at which it is True. Generated tokens outside a mask are not selected. A row of padding alone has no
positions, and none is required there.

If token ids are unknown (a model that ``load_model`` did not make, or a pass from embeddings), positions are indices in
the tensor of the hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int, Shaped

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.model.tracker import TokenTracker
from gemma_scope_tl.sae.arguments import to_tensor

Positions = int | slice | Sequence[int] | torch.Tensor | None


@dataclass(frozen=True)
class Rows:
    """The columns of the texts in a batch of token ids.

    Attributes:
        start: ``[batch]``, the first column that is not padding.
        length: ``[batch]``, number of columns of the prompt from there, without padding on the right.
        total: number of columns so far.
        growing: whether more columns are being generated.
        moved: ``[batch]``, number of columns by which each row was moved to the right before generation; None for no
            move.
    """

    start: Int[torch.Tensor, " batch"]
    length: Int[torch.Tensor, " batch"]
    total: int
    growing: bool
    moved: Int[torch.Tensor, " batch"] | None = None

    @property
    def place(self) -> Int[torch.Tensor, "batch total"]:
        """The position of each column in the text of its row, negative on the left padding."""
        return torch.arange(self.total, device=self.start.device) - self.start[:, None]


def rows_of_mask(mask: Bool[torch.Tensor, "batch total"], prompt: int, growing: bool) -> Rows:
    """The rows of a mask (True at text, False at padding) of which the first ``prompt`` columns were given.

    A row of padding alone has no positions.
    """
    padding = (~mask[:, :prompt]).long()
    start, behind = padding.cumprod(-1).sum(-1), padding.flip(-1).cumprod(-1).sum(-1)
    return Rows(start, (prompt - start - behind).clamp(min=0), mask.shape[1], growing)


def rows_of(x: torch.Tensor, tracker: TokenTracker | None) -> Rows:
    """The rows whose last columns are those of ``x`` (``[batch, pos, …]``), or ``x`` itself if ids are unknown."""
    known = None if tracker is None else tracker.sequence(x)
    if tracker is not None and known is not None:
        moved = tracker.read.moved
        moved = None if moved is None else moved.to(x.device).expand(x.shape[0])
        mask, prompt = known
        growing = tracker.generating or mask.shape[1] > prompt  # by generate, or in a cached loop of the user
        return replace(rows_of_mask(mask, prompt, growing), moved=moved)
    start = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    return Rows(start, start + x.shape[1], x.shape[1], growing=False)


def chosen_columns(positions: Positions, rows: Rows) -> Bool[torch.Tensor, "batch total"]:
    """True at the columns that ``positions`` select.

    Raises:
        SpliceError: for a position that a row does not have, a mask of another shape, or a slice with a step below 1.
    """
    if isinstance(positions, slice):
        return _in_slice(positions, rows)
    if positions is None:
        return torch.ones(rows.place.shape, dtype=torch.bool, device=rows.start.device)
    wanted = to_tensor(positions).to(rows.start.device)
    if wanted.dtype == torch.bool:
        if wanted.ndim == 2:
            return _under_mask(wanted, rows)
        wanted = wanted.nonzero().flatten()
    if wanted.ndim > 1 or (wanted.numel() and (wanted.is_floating_point() or wanted.is_complex())):
        raise SpliceError(
            f"Positions must be an int, a slice, a list of ints, or a boolean mask [pos] or [batch, pos]; given: "
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
            "each row from its first token that is not padding (for a model that load_model did not make, from the "
            "start of the tensor). A slice selects only positions that exist."
        )
    return (rows.place[:, :, None] == resolved[:, None, :]).any(-1) & (rows.place >= 0)


def _in_slice(positions: slice, rows: Rows) -> torch.Tensor:
    step = 1 if positions.step is None else positions.step
    if step < 1:
        raise SpliceError(f"A slice of positions must have a positive step; given: step {step}.")

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
            f"The mask of positions is {list(mask.shape)}, but the batch of tokens is {[batch, rows.total]}."
        )
    chosen = torch.zeros(batch, max(rows.total, width), dtype=torch.bool, device=mask.device)
    chosen[:, :width] = mask if rows.moved is None else move_rows(mask.expand(batch, -1), rows.moved)
    return chosen[:, : rows.total]


def move_rows(x: Shaped[torch.Tensor, "batch pos"], by: Int[torch.Tensor, " batch"]) -> torch.Tensor:
    """Rotate each row to the right by its number of columns."""
    columns = torch.arange(x.shape[1], device=x.device) - by.to(x.device)[:, None]
    return x.gather(1, columns % x.shape[1])
