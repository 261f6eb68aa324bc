"""``generate`` on both backends, with prompts in every form, padding and stop tokens.

It also gives attached SAEs access to the text that is generated.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int

from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.keywords import named, taken_input
from gemma_scope_tl.model.positions import move_rows
from gemma_scope_tl.model.tracker import Generation, TokenTracker
from gemma_scope_tl.sae.arguments import as_indices
from gemma_scope_tl.text.batch import TokenBatch, as_batch
from gemma_scope_tl.text.tokens import TextRead, attendable, text_mask


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids.

    Attributes:
        ids: ``[batch, pos]``, padded on the left; or embeddings ``[batch, pos, d_model]``.
        mask: ``[batch, pos]``, True at text; None for embeddings.
        moved: ``[batch]``, number of columns by which each row was moved to the right; None for no move.
        as_text: whether the prompts are texts, so that texts are returned.
    """

    ids: torch.Tensor
    mask: Bool[torch.Tensor, "batch pos"] | None
    moved: Int[torch.Tensor, " batch"] | None = None
    as_text: bool = False

    def generation(self, by_hugging_face: bool = False) -> Generation:
        """A generation from these prompts, before their first pass."""
        if self.mask is None:
            return Generation(by_hugging_face=by_hugging_face)
        read = TextRead(self.ids, self.mask, self.ids.shape[1], self.moved, growing=True)
        return Generation(read, by_hugging_face=by_hugging_face)


def prompts_of(model: Any, given: Any, call: dict[str, Any]) -> Prompts:
    """Convert texts in any form to prompts, and remove the arguments of this conversion from ``call``.

    New tokens are added after the last column, so rows that are padded on the right are moved to the right edge.

    Raises:
        GemmaScopeError: for an input that is not text, or a number of new tokens that is no integer from 1.
    """
    for name in ("max_new_tokens", "max_tokens_per_yield"):
        if name in call:
            call[name] = checked_count(call[name], name)
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
    """The same prompts, with rows that have padding on the right moved to the right edge."""
    assert prompts.mask is not None
    behind = (~prompts.mask).flip(-1).long().cumprod(-1).sum(-1)
    behind = torch.where(prompts.mask.any(-1), behind, 0)
    if not bool(behind.any()):
        return prompts
    ids, mask = move_rows(prompts.ids, behind), move_rows(prompts.mask, behind)
    return replace(prompts, ids=ids, mask=mask, moved=behind)


def is_text(given: Any) -> bool:
    """Whether ``given`` is texts or messages, and not ids in any form."""
    while not isinstance(given, (str, Mapping)):
        if isinstance(given, (torch.Tensor, TokenBatch)):
            return False
        if not hasattr(given, "__len__"):
            return False
        if getattr(given, "ndim", 1) == 0:  # one text or number in an array, which has no length
            given = given.item()
            continue
        if len(given) == 0:
            return False
        given = next(iter(given))
    return isinstance(given, str) or "role" in given


def stop_ids(model: Any, call: dict[str, Any]) -> list[int] | int | None:
    """The ids at which generation stops: ``eos_token_id`` of the call, or else of the model.

    Raises:
        GemmaScopeError: when no stop token is known.
    """
    given = call.get("eos_token_id")
    if given is not None and not isinstance(given, (int, list)):
        given = sorted(as_indices(given))
    if given is not None or not call.get("stop_at_eos", True):
        return given
    eos = getattr(model.tokenizer, "eos_token_id", None)
    ids = list(model.stop_token_ids) or ([] if eos is None else [eos])
    if not ids:
        raise GemmaScopeError(
            "The stop token of generation is unknown (no generation_config, no tokenizer): pass eos_token_id=, or "
            "stop_at_eos=False."
        )
    return ids[0] if len(ids) == 1 else ids


def fill_id(tokenizer: Any, stop: list[int] | int | None) -> int | None:
    """The id after the end of a text that is shorter than others of its batch: padding, as in Hugging Face."""
    pad = getattr(tokenizer, "pad_token_id", None)
    first = stop[0] if isinstance(stop, list) and stop else stop
    return pad if pad is not None else first if isinstance(first, int) else None


class Filler:
    """Writes padding after the first stop token of each row, where TransformerLens writes EOS, piece by piece."""

    def __init__(self, stop: list[int] | int | None, tokenizer: Any, prompt: int) -> None:
        self._stops = [] if stop is None else [stop] if isinstance(stop, int) else stop
        self._fill = fill_id(tokenizer, stop)
        self._prompt = prompt
        self._done: torch.Tensor | None = None

    def __call__(self, ids: Int[torch.Tensor, "batch new"]) -> Int[torch.Tensor, "batch new"]:
        """Fill the next columns of every row. The first call includes the prompt."""
        if not self._stops or self._fill is None:
            return ids
        new = ids[:, self._prompt :] if self._done is None else ids
        done = torch.zeros_like(ids[:, 0], dtype=torch.bool) if self._done is None else self._done
        stopped = torch.isin(new, torch.tensor(self._stops, device=ids.device))
        after = (stopped.cumsum(-1) - stopped.long() > 0) | done[:, None]
        self._done = done | stopped.any(-1)
        return torch.cat([ids[:, : ids.shape[1] - new.shape[1]], new.masked_fill(after, self._fill)], dim=1)


class Generates:
    """``generate`` and ``generate_stream`` of both backends."""

    token_tracker: TokenTracker
    tokenizer: Any

    def generate(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as in TransformerLens, from texts in any form. Attached SAEs have access to the token ids.

        Args:
            input: as for ``forward``, also as ``input_ids=``. Padding is masked. New tokens are added after the last
                column, so rows that are padded on the right are moved to the right edge, and returned in that form.
            *args, **kwargs: arguments of the backend's ``generate``, and ``attention_mask`` over the prompt. Without
                ``eos_token_id`` generation stops at the tokens of the model's ``generation_config``
                (:attr:`stop_token_ids`), as in Hugging Face.

        Returns:
            Text for texts, ids for ids, including prompts, or the type that ``return_type`` names.

        Raises:
            UnknownKeywordError: for a keyword that ``generate`` does not accept.
            GemmaScopeError: for no prompt, no new tokens, or an unknown stop token. The empty text is a prompt: BOS.
        """
        prompts, call = self._prepared("generate", input, args, kwargs)
        with self.token_tracker.running(prompts.generation()):
            result = super().generate(prompts.ids, **call)  # pyright: ignore[reportAttributeAccessIssue]
        if prompts.mask is None:
            return result
        return _filled(result, Filler(call["eos_token_id"], self.tokenizer, prompts.ids.shape[1]))

    def generate_stream(self, input: Any = None, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Generate in pieces, as in TransformerLens. The first piece includes the prompt.

        Between pieces the model may be used for other passes.
        """
        prompts, call = self._prepared("generate_stream", input, args, kwargs)
        pieces = super().generate_stream(prompts.ids, **call)  # pyright: ignore[reportAttributeAccessIssue]
        pieces = self._pieces(pieces, prompts.generation())
        if call.get("return_type", "input") != "str":
            pieces = map(Filler(call["eos_token_id"], self.tokenizer, prompts.ids.shape[1]), pieces)
        return self._stream(pieces, call.get("return_type", "input"))

    def _stream(self, pieces: Iterator[Any], return_type: str) -> Iterator[Any]:
        """Convert the stream of a backend that ignores ``return_type``."""
        return pieces

    def _pieces(self, pieces: Generator[Any], generation: Generation) -> Iterator[Any]:
        try:
            while True:
                with self.token_tracker.running(generation):
                    try:
                        piece = next(pieces)
                    except StopIteration:
                        return
                yield piece
        finally:
            pieces.close()

    def _prepared(
        self, method: str, input: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Prompts, dict[str, Any]]:
        """The prompts, and the arguments for TransformerLens's method."""
        call = named(self, method, args, kwargs)
        prompts = prompts_of(self, taken_input(method, input, call), call)
        call["eos_token_id"] = stop_ids(self, call)
        call.setdefault("verbose", False)
        if prompts.as_text and call.get("return_type", "input") == "input":
            call["return_type"] = "str"
        return prompts, call


def _filled(result: Any, filler: Filler) -> Any:
    """The result of ``generate``, with padding after the end of each text."""
    if isinstance(result, torch.Tensor):
        return filler(result) if result.ndim == 2 and not result.is_floating_point() else result
    if isinstance(result, tuple):  # followed by a cache or the ids of the prompt
        return (_filled(result[0], filler), *result[1:])
    if hasattr(result, "sequences"):
        result.sequences = filler(result.sequences)
    return result


def decoded(pieces: Iterator[torch.Tensor], tokenizer: Any) -> Iterator[str | list[str]]:
    """The text that each piece of ids ``[batch, new]`` adds. An incomplete character is added to a later piece."""
    history: torch.Tensor | None = None
    given: list[str] = []
    for piece in pieces:
        history = piece if history is None else torch.cat([history, piece], dim=-1)
        texts = [tokenizer.decode(row, skip_special_tokens=True).rstrip("\ufffd") for row in history]
        given = given or [""] * len(texts)
        added = [text[len(before) :] for text, before in zip(texts, given, strict=True)]
        given = texts
        yield added[0] if len(added) == 1 else added
    if history is not None:
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in history]
        rest = [text[len(before) :] for text, before in zip(texts, given, strict=True)]
        if any(rest):
            yield rest[0] if len(rest) == 1 else rest


class TrackedGenerate:
    """``generate`` of a Hugging Face model inside a bridge, for pipelines and evaluation harnesses that call it.

    Attached SAEs and interventions have access to the prompt, as in the bridge's own ``generate``, and padded ids
    without a mask get a mask. It is an object and not a function, so that a copy of the model has a copy of it.
    """

    def __init__(self, hf_model: Any, model: Any) -> None:
        self.hf_model, self.model = hf_model, model

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as in Hugging Face."""
        plain = type(self.hf_model).generate
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
            if inputs is None and ids is not None:
                kwargs["input_ids"] = ids
            with self.model.token_tracker.running(Generation(by_hugging_face=True)):
                return plain(self.hf_model, inputs, *args, **kwargs)
        if self.model.token_tracker.is_running(ids):  # hf_generate has prepared it
            return plain(self.hf_model, ids, *args, **kwargs)
        given = kwargs.pop("attention_mask", None)
        mask = text_mask(ids, self.model.tokenizer) if given is None or given.shape != ids.shape else given.bool()
        prompts = align_right(Prompts(ids, mask))
        cached = kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None
        if given is not None and given.shape != ids.shape:
            kwargs["attention_mask"] = given
        elif given is not None or not (bool(mask.all()) or cached):
            assert prompts.mask is not None
            kwargs["attention_mask"] = attendable(prompts.mask).long()
        with self.model.token_tracker.running(prompts.generation(by_hugging_face=True)):
            return plain(self.hf_model, prompts.ids, *args, **kwargs)
