"""What Gemma's chat format puts before and after a document (section 3.1: how the instruction-tuned suite was fed)."""

from __future__ import annotations

from typing import Any, NamedTuple

from gemma_scope_tl.errors import GemmaScopeError

START, END = "<start_of_turn>", "<end_of_turn>"
_MARK = "DOCUMENT"


class Wrapping(NamedTuple):
    """Ids around a document.

    Attributes:
        prefix: between BOS and the document: ``<start_of_turn>user\\n``.
        suffix: after it: ``<end_of_turn>\\n<start_of_turn>model\\n``.
    """

    prefix: list[int]
    suffix: list[int]


def chat_wrapping(tokenizer: Any) -> Wrapping:
    """The ids around a user's turn: from the tokenizer's chat template, else from Gemma's own tokens.

    Raises:
        GemmaScopeError: a template that does not show where the document begins and ends; no template, and a tokenizer
            that does not know Gemma's turn tokens.
    """
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": _MARK}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        parts = text.removeprefix(tokenizer.bos_token or "").split(_MARK)
        if len(parts) != 2:
            raise GemmaScopeError(
                f"The tokenizer's chat template renders a turn as {text!r}: no way to wrap documents."
            )
    else:
        known = tokenizer.get_vocab()
        missing = [token for token in (START, END) if token not in known]
        if missing:
            raise GemmaScopeError(
                f"This tokenizer has no chat template and does not know {' and '.join(missing)}: chat=True needs the "
                "tokenizer of an instruction-tuned Gemma."
            )
        parts = [f"{START}user\n", f"{END}\n{START}model\n"]
    return Wrapping(*(tokenizer.encode(part, add_special_tokens=False) for part in parts))
