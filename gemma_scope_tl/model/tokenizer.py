"""The tokenizer of a model, which is a copy of the given object and never loaded again by its name."""

from __future__ import annotations

import copy
import heapq
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gemma_scope_tl.errors import AdapterError
from gemma_scope_tl.text.tokenizing import text_ids, tokenize

logger = logging.getLogger(__name__)

_MARK = "_gemma_scope_prepared"


def prepared(tokenizer: Any, own: bool = False) -> Any:
    """Prepare ``tokenizer`` for the models of this package: it pads on the left and has a padding token.

    The result is a copy, with all added tokens and the chat template, so that the caller's object pads as before. A
    tokenizer without a padding token gets ``<pad>`` if its vocabulary has that, else EOS, else BOS. It does not add BOS
    or EOS to texts.

    Args:
        tokenizer: a ``PreTrainedTokenizerBase`` of any kind. A prepared tokenizer is returned unchanged.
        own: whether no other code uses this object, so that it may be changed in place.

    Raises:
        AdapterError: for an object that is not a tokenizer of transformers, or has no token for padding.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        hint = ""
        if isinstance(getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerBase):
            hint = " Give its .tokenizer."
        elif type(tokenizer).__module__.split(".")[0] == "tokenizers":
            hint = " Wrap it: PreTrainedTokenizerFast(tokenizer_object=…, bos_token=…, eos_token=…, pad_token=…)."
        raise AdapterError(f"tokenizer= takes a tokenizer of transformers, not a {type(tokenizer).__name__}.{hint}")
    if getattr(tokenizer, _MARK, False):
        return tokenizer
    tokenizer = tokenizer if own else copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _padding_token(tokenizer)
    if tokenizer.bos_token_id is None:
        logger.warning("the tokenizer has no BOS token: texts begin without the BOS that models were trained with")
    setattr(tokenizer, _MARK, True)
    return tokenizer


def _padding_token(tokenizer: Any) -> str:
    if "<pad>" in tokenizer.get_vocab():
        return "<pad>"
    for token in (tokenizer.eos_token, tokenizer.bos_token):
        if token is not None:
            return str(token)
    raise AdapterError("The tokenizer has no padding, EOS or BOS token. Set one first, as in tokenizer.pad_token = …")


def adds_special_tokens(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a tokenizer adds BOS before a text, and EOS after it, by default."""
    special = set(tokenizer.all_special_ids)
    text, plain = "", []
    for text in _short_texts(tokenizer):
        plain = list(tokenizer.encode(text, add_special_tokens=False))
        if plain and not set(plain) & special:
            break
    whole = list(tokenizer.encode(text))
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    after = whole[before + len(plain) :]
    return before > 0 and whole[before - 1] == tokenizer.bos_token_id, bool(after) and after[
        0
    ] == tokenizer.eos_token_id


def _short_texts(tokenizer: Any) -> Iterator[str]:
    """Short texts, at least one of which should have tokens, since a vocabulary need not contain "a"."""
    yield "a"
    yield from heapq.nsmallest(100, tokenizer.get_vocab(), key=len)


class HasTokenizer:
    """The ``tokenizer`` of a hooked model, and the conversions between texts and token ids.

    An assigned tokenizer is copied and prepared, never loaded again by its name.

    Attributes:
        stop_token_ids: the ids that end a text (:func:`stop_token_ids`).
    """

    stop_token_ids: tuple[int, ...]
    _tokenizer: Any
    cfg: Any

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model, which pads on the left; None if the model was loaded without one."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        if tokenizer is not None:
            tokenizer = prepared(tokenizer)
            self.cfg.tokenizer_prepends_bos, self.cfg.tokenizer_appends_eos = adds_special_tokens(tokenizer)
        self._tokenizer = tokenizer

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Set the tokenizer. TransformerLens's method would load a tokenizer that adds no BOS again by its name.

        Args:
            tokenizer: a tokenizer of transformers.
            default_padding_side: the padding side; ``"left"`` if None.
        """
        self.tokenizer = tokenizer
        if default_padding_side is not None:
            self._tokenizer.padding_side = default_padding_side

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool | None = None,
    ) -> torch.Tensor:
        """Token ids ``[batch, pos]`` of a text or several, as in TransformerLens.

        A text that begins with BOS, such as from a chat template, gets no second BOS.

        Args:
            input: a text or several.
            prepend_bos: None for the model's default, which is True.
            padding_side: ``"left"`` or ``"right"``, None for the tokenizer's.
            move_to_device: whether to move the ids to the device of the model.
            truncate: True cuts texts to the model's context, None cuts with a warning, False does not cut.

        Raises:
            GemmaScopeError: for no tokenizer, no text, or a text that is not valid Unicode.
        """
        ids, _ = tokenize(self, input, prepend_bos, padding_side, truncate)
        return ids.to(self.cfg.device) if move_to_device else ids

    def to_string(self, tokens: Any) -> Any:
        """Convert token ids to a text, or several rows to texts, as in TransformerLens.

        Raises:
            GemmaScopeError: without a tokenizer.
        """
        text_ids(self.tokenizer, [])
        return super().to_string(tokens)  # pyright: ignore[reportAttributeAccessIssue]

    def to_str_tokens(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Convert an input to the text of each token, as in TransformerLens.

        Raises:
            GemmaScopeError: without a tokenizer.
        """
        text_ids(self.tokenizer, [])
        return super().to_str_tokens(input, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def stop_token_ids(hf_model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text, as in Hugging Face's ``generate``.

    They come from ``generation_config.eos_token_id`` (one id or several), else from the model's config, else from the
    tokenizer.
    """
    for source in (getattr(hf_model, "generation_config", None), getattr(hf_model, "config", None), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(int(i) for i in (found if isinstance(found, (list, tuple)) else [found]))
    return ()
