"""The text that a forward pass, or one generation, has read so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int


@dataclass
class TextRead:
    """The text that a forward pass, or one generation, has read so far.

    Attributes:
        ids: ``[batch, total]``, None in a pass that began from embeddings.
        mask: ``[batch, total]``, True at text, False at padding.
        prompt: how many columns came with the prompt; the rest was generated.
        moved: ``[batch]``, by how many columns generation moved each row of the prompt to the right, None for not at
            all: new tokens follow on the last column, so padding on the right has to go to the left.
        whole: False where a key-value cache holds columns before these that are unknown.
        growing: whether it is the text of a generation, whose prompt stays the prompt.
        by_column: whether the model numbered positions by column, padding included, as Hugging Face does unasked.
    """

    ids: Int[torch.Tensor, "batch total"] | None = None
    mask: Bool[torch.Tensor, "batch total"] | None = None
    prompt: int | None = None
    moved: Int[torch.Tensor, " batch"] | None = None
    whole: bool = True
    growing: bool = False
    by_column: bool = False

    def serves(self, batch: int, seen: int) -> bool:
        """Whether a pass over ``batch`` rows can go on behind the first ``seen`` columns of this text."""
        return self.ids is not None and self.whole and batch % self.ids.shape[0] == 0 and self.ids.shape[1] >= seen

    def mask_over(self, total: int, batch: int) -> Bool[torch.Tensor, "batch total"] | None:
        """The mask of ``total`` columns, those behind the known ones being text; None when it is unknown."""
        if self.mask is None or batch % self.mask.shape[0] or not self.whole:
            return None
        known = self.mask[:, :total].repeat_interleave(batch // self.mask.shape[0], dim=0)
        return torch.nn.functional.pad(known, (0, total - known.shape[1]), value=True)

    def ends(self, ids: Int[torch.Tensor, "batch pos"], seen: int) -> bool:
        """Whether ``ids`` are all that follows behind the first ``seen`` columns of this text."""
        if self.ids is None or self.ids.shape[1] != seen + ids.shape[1] or not self.serves(ids.shape[0], seen):
            return False
        known = self.ids[:, seen:].repeat_interleave(ids.shape[0] // self.ids.shape[0], dim=0)
        return torch.equal(known.to(ids.device), ids)


def joined_mask(ids: torch.Tensor, mask: torch.Tensor | None, before: TextRead, known_first: bool) -> torch.Tensor:
    """The mask over all of ``ids`` from the one given and that of the text before."""
    batch, total = ids.shape
    known = before.mask_over(total, batch)
    if known_first and known is not None:
        return known.to(ids.device)
    if mask is not None and mask.shape[0] == batch and mask.shape[1] >= total:
        return mask[:, -total:].bool().to(ids.device)
    whole = torch.ones_like(ids, dtype=torch.bool) if known is None else known.to(ids.device)
    if mask is not None and mask.shape[0] == batch:  # of the new columns alone
        whole[:, -mask.shape[1] :] = mask.bool().to(ids.device)
    return whole
