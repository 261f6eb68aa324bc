"""The prompts of a generation: any way of giving texts, as rows that end where new tokens follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.inputs import TokenBatch, as_batch, as_indices
from gemma_scope_tl.positions import move_rows
from gemma_scope_tl.text_read import TextRead
from gemma_scope_tl.tracker import Generation


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids.

    Attributes:
        ids: ``[batch, pos]``, padded on the left; or embeddings ``[batch, pos, d_model]``.
        mask: ``[batch, pos]``, True at text; None for embeddings.
        moved: ``[batch]``, by how many columns each row was moved to the right, None for not at all.
        as_text: whether they were given as texts, so that texts come back.
    """

    ids: torch.Tensor
    mask: Bool[torch.Tensor, "batch pos"] | None
    moved: Int[torch.Tensor, " batch"] | None = None
    as_text: bool = False

    def generation(self, by_hugging_face: bool = False) -> Generation:
        """A generation that knows its prompts before they enter the model."""
        if self.mask is None:
            return Generation(by_hugging_face=by_hugging_face)
        read = TextRead(self.ids, self.mask, self.ids.shape[1], self.moved, growing=True)
        return Generation(read, by_hugging_face=by_hugging_face)


def prompts_of(model: Any, given: Any, call: dict[str, Any]) -> Prompts:
    """Prompts from whatever stands for texts; what says how to read them is taken out of ``call``.

    New tokens follow behind the last column, so rows that are padded on the right are moved to the right edge.

    Raises:
        GemmaScopeError: what is given is no text, or ``max_new_tokens`` is below 1.
    """
    if int(call.get("max_new_tokens", 1)) < 1:
        raise GemmaScopeError(f"max_new_tokens is at least 1; given: {call['max_new_tokens']}.")
    how: dict[str, Any] = {
        name: call.pop(name) for name in ("attention_mask", "prepend_bos", "padding_side") if name in call
    }
    if isinstance(given, torch.Tensor) and given.is_floating_point() and given.ndim == 3:
        if how.get("attention_mask") is not None:
            if model.backend == "hooked_transformer":
                raise GemmaScopeError("HookedTransformer.generate takes no attention_mask with embeddings.")
            call["attention_mask"] = how["attention_mask"]
        return Prompts(given, None)
    given = list(given) if isinstance(given, Iterator) else given
    as_text = is_text(given)
    how["padding_side"] = "left"
    batch = as_batch(model, given, add_generation_prompt=True, **how)
    return align_right(Prompts(batch.ids, batch.mask, as_text=as_text))


def align_right(prompts: Prompts) -> Prompts:
    """The same rows, those with padding on the right moved to the right edge."""
    assert prompts.mask is not None
    behind = (~prompts.mask).flip(-1).long().cumprod(-1).sum(-1)
    behind = torch.where(prompts.mask.any(-1), behind, 0)
    if not bool(behind.any()):
        return prompts
    ids, mask = move_rows(prompts.ids, behind), move_rows(prompts.mask, behind)
    return replace(prompts, ids=ids, mask=mask, moved=behind)


def is_text(given: Any) -> bool:
    """Whether texts or messages were given, rather than ids in any form."""
    while not isinstance(given, (str, Mapping)):
        if isinstance(given, (torch.Tensor, TokenBatch)):
            return False
        if not hasattr(given, "__len__") or len(given) == 0:
            return False
        given = next(iter(given))
    return isinstance(given, str) or "role" in given


def stop_ids(model: Any, call: dict[str, Any]) -> list[int] | int | None:
    """Where generation stops: ``eos_token_id`` of the call, else where the model says that it stops.

    Raises:
        GemmaScopeError: when nothing says where to stop.
    """
    given = call.get("eos_token_id")
    if isinstance(given, (torch.Tensor, set, frozenset, tuple)):
        given = sorted(as_indices(given))
    if given is not None or not call.get("stop_at_eos", True):
        return given
    eos = getattr(model.tokenizer, "eos_token_id", None)
    ids = list(model.stop_token_ids) or ([] if eos is None else [eos])
    if not ids:
        raise GemmaScopeError(
            "Nothing says at which token generation stops (no generation_config, no tokenizer): pass eos_token_id=, or "
            "stop_at_eos=False."
        )
    return ids[0] if len(ids) == 1 else ids


def fill_id(tokenizer: Any, stop: list[int] | int | None) -> int | None:
    """What stands behind the end of a text that is done before others of its batch: padding, as in Hugging Face."""
    pad = getattr(tokenizer, "pad_token_id", None)
    first = stop[0] if isinstance(stop, list) and stop else stop
    return pad if pad is not None else first if isinstance(first, int) else None


class Filler:
    """Puts padding behind the first stop token of each row, where TransformerLens puts EOS; piece by piece."""

    def __init__(self, stop: list[int] | int | None, tokenizer: Any, prompt: int) -> None:
        self._stops = [] if stop is None else [stop] if isinstance(stop, int) else stop
        self._fill = fill_id(tokenizer, stop)
        self._prompt = prompt
        self._done: torch.Tensor | None = None

    def __call__(self, ids: Int[torch.Tensor, "batch new"]) -> Int[torch.Tensor, "batch new"]:
        """The next columns of every row, the prompt's with the first."""
        if not self._stops or self._fill is None:
            return ids
        new = ids[:, self._prompt :] if self._done is None else ids
        done = torch.zeros_like(ids[:, 0], dtype=torch.bool) if self._done is None else self._done
        stopped = torch.isin(new, torch.tensor(self._stops, device=ids.device))
        after = (stopped.cumsum(-1) - stopped.long() > 0) | done[:, None]
        self._done = done | stopped.any(-1)
        return torch.cat([ids[:, : ids.shape[1] - new.shape[1]], new.masked_fill(after, self._fill)], dim=1)
