"""Generation that SAEs and positions survive: prompts in any form, padding masked, stops where the model says."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch

from gemma_scope_tl.adapters.keywords import named
from gemma_scope_tl.adapters.prompts import Filler, Prompts, align_right, prompts_of, stop_ids
from gemma_scope_tl.tokens import attendable, text_mask
from gemma_scope_tl.tracker import Generation, TokenTracker


class Generates:
    """``generate`` and ``generate_stream`` of both backends."""

    token_tracker: TokenTracker
    tokenizer: Any

    def generate(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens, from whatever stands for texts; attached SAEs know the token ids.

        Args:
            input: as for ``forward``. Padding is masked. New tokens follow on the last column, so rows that are padded
                on the right are moved to the right edge, and come back so.
            *args, **kwargs: of the backend's ``generate``, and ``attention_mask`` over the prompt. Without
                ``eos_token_id`` generation stops where the model's ``generation_config`` says
                (:attr:`stop_token_ids`), as Hugging Face's does.

        Returns:
            Text for texts, ids for ids, prompts included, or what ``return_type`` asks for.

        Raises:
            UnknownKeywordError: for a keyword that ``generate`` does not take.
            GemmaScopeError: no text, no new tokens, or nothing that says where to stop.
            SpliceError: with an SAE on the embedding of a ``HookedTransformer``, whose ``generate`` skips that hook.
        """
        prompts, call = self._prepared("generate", input, args, kwargs)
        with self.token_tracker.running(prompts.generation()):
            result = super().generate(prompts.ids, **call)  # pyright: ignore[reportAttributeAccessIssue]
        if prompts.mask is None:
            return result
        return _filled(result, Filler(call["eos_token_id"], self.tokenizer, prompts.ids.shape[1]))

    def generate_stream(self, input: Any = "", *args: Any, **kwargs: Any) -> Iterator[Any]:
        """:meth:`generate` in pieces, as in TransformerLens: the first holds the prompt too.

        Between pieces the model may be used for anything else.
        """
        prompts, call = self._prepared("generate_stream", input, args, kwargs)
        pieces = super().generate_stream(prompts.ids, **call)  # pyright: ignore[reportAttributeAccessIssue]
        pieces = self._pieces(pieces, prompts.generation())
        if call.get("return_type", "input") != "str":
            pieces = map(Filler(call["eos_token_id"], self.tokenizer, prompts.ids.shape[1]), pieces)
        return self._stream(pieces, call.get("return_type", "input"))

    def _stream(self, pieces: Iterator[Any], return_type: str) -> Iterator[Any]:
        """For a backend that does not turn what it streams into what ``return_type`` asks for."""
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
        """Prompts and the arguments of TransformerLens's method."""
        call = named(self, method, args, kwargs)
        prompts = prompts_of(self, input, call)
        call["eos_token_id"] = stop_ids(self, call)
        call.setdefault("verbose", False)
        if prompts.as_text and call.get("return_type", "input") == "input":
            call["return_type"] = "str"
        return prompts, call


def _filled(result: Any, filler: Filler) -> Any:
    """What ``generate`` gives, its ids with padding behind the end of each text."""
    if isinstance(result, torch.Tensor):
        return filler(result) if result.ndim == 2 and not result.is_floating_point() else result
    if isinstance(result, tuple):  # with a cache, or the prompt's ids, behind it
        return (_filled(result[0], filler), *result[1:])
    if hasattr(result, "sequences"):
        result.sequences = filler(result.sequences)
    return result


def decoded(pieces: Iterator[torch.Tensor], tokenizer: Any) -> Iterator[str | list[str]]:
    """Pieces of ids ``[batch, new]`` as the text that each adds; a character that is not whole waits for its rest."""
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

    Attached SAEs and interventions then know the prompt as in the bridge's own ``generate``, and padded ids without a
    mask get one. An object and not a function, so that copies of the model call their own.
    """

    def __init__(self, hf_model: Any, model: Any) -> None:
        self.hf_model, self.model = hf_model, model

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """See the model's class."""
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
