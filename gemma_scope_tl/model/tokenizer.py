"""A model's tokenizer: a copy of the given object, never loaded again by its name."""

from __future__ import annotations

import copy
import heapq
import logging
from collections.abc import Iterator
from typing import Any

from gemma_scope_tl.errors import AdapterError

logger = logging.getLogger(__name__)

_MARK = "_gemma_scope_prepared"


def prepared(tokenizer: Any, own: bool = False) -> Any:
    """``tokenizer`` as the models here need it: padding on the left, and a padding token.

    A copy, so that the caller's object pads as before, with all its added tokens and its chat template. A tokenizer
    without a padding token gets ``<pad>`` if its vocabulary has that, else EOS, else BOS. BOS and EOS are not added.

    Args:
        tokenizer: a ``PreTrainedTokenizerBase`` of any kind; one that was prepared before is returned as it is.
        own: whether nobody else uses this object, so that it may be changed in place.

    Raises:
        AdapterError: for what is no tokenizer of transformers, or has no token to pad with.
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
        logger.warning("the tokenizer has no BOS token: texts begin without the BOS that models are trained with")
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
    """Whether a tokenizer puts BOS before a text, and EOS after it, by itself."""
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
    """Short texts, of which one at least should have tokens: a vocabulary need not contain "a"."""
    yield "a"
    yield from heapq.nsmallest(100, tokenizer.get_vocab(), key=len)


class HasTokenizer:
    """The ``tokenizer`` of a hooked model. An assigned one is copied and prepared, never loaded again by its name.

    Attributes:
        stop_token_ids: the ids that end a text (:func:`stop_token_ids`).
    """

    stop_token_ids: tuple[int, ...]
    _tokenizer: Any
    cfg: Any

    @property
    def tokenizer(self) -> Any:
        """The model's own tokenizer, which pads on the left; None where it was loaded without one."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        if tokenizer is not None:
            tokenizer = prepared(tokenizer)
            self.cfg.tokenizer_prepends_bos, self.cfg.tokenizer_appends_eos = adds_special_tokens(tokenizer)
        self._tokenizer = tokenizer

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """As in TransformerLens, which would load a tokenizer that adds no BOS again by its name.

        Args:
            tokenizer: of transformers.
            default_padding_side: where it pads; ``"left"`` if None.
        """
        self.tokenizer = tokenizer
        if default_padding_side is not None:
            self._tokenizer.padding_side = default_padding_side


def stop_token_ids(hf_model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text, as Hugging Face's ``generate`` finds them.

    ``generation_config.eos_token_id`` (one id or several); where that is None the model's config, then the tokenizer.
    """
    for source in (getattr(hf_model, "generation_config", None), getattr(hf_model, "config", None), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(int(i) for i in (found if isinstance(found, (list, tuple)) else [found]))
    return ()
