"""The measurements of one SAE on the whole text, as plain numbers for the report."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.suite import measure_suite
from gemma_scope_tl.text.documents import read_texts
from gemma_scope_tl.text.rows import pack_texts
from gemma_scope_tl.text.tokens import special_token_ids

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

NUMBERS = (
    "l0", "l0_low", "l0_high", "fvu", "fvu_low", "fvu_high", "delta_loss", "delta_loss_low", "delta_loss_high",
    "loss_clean", "loss_spliced", "loss_zero_ablated", "loss_recovered", "loss_recovered_low", "loss_recovered_high",
    "kl", "dead", "tokens", "sequences",
)  # fmt: skip
USER_ROLE = "user"


def token_rows(
    model: GemmaModel, texts: str | PathLike[str] | None, tokens: int, context: int, tuned: bool
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Rows of token ids, and the ids that are not counted.

    An instruction-tuned model reads each row as a user's turn, between the prefixes with which its SAEs were trained
    (section 3.1); the tokens of the prefixes are not counted. A tokenizer without the tokens of a turn gets plain text.

    Args:
        model: from ``load_model``.
        texts: a file or data set, as for :func:`~gemma_scope_tl.text.documents.read_texts`; None for bundled text.
        tokens: number of tokens, all rows together.
        context: tokens in a row.
        tuned: whether the model is instruction-tuned.

    Raises:
        GemmaScopeError: there is less text than one row.
    """
    context = min(context, model.cfg.n_ctx)
    special = special_token_ids(model.tokenizer)
    before, after = _turn(model) if tuned else ([], [])
    body = context - len(before) - len(after)
    if body < 2:
        raise GemmaScopeError(f"Rows of {context} tokens have no room for text between the turn's prefixes.")
    rows = pack_texts(model.tokenizer, read_texts(texts), body, max(1, tokens // context))
    if before:
        wrap = [torch.tensor(ids, dtype=rows.dtype).expand(len(rows), -1) for ids in (before, after)]
        rows = torch.cat([rows[:, :1], wrap[0], rows[:, 1:], wrap[1]], dim=1)
        special = tuple(sorted({*special, *before, *after}))
    return rows, special


def _turn(model: GemmaModel) -> tuple[list[int], list[int]]:
    """Token ids before and after the text of a user's turn, up to where the model's answer begins."""
    family, tokenizer = model.family, model.tokenizer
    known = tokenizer.get_vocab()
    if not {family.turn_start, family.turn_end} <= set(known):
        return [], []

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    answer = f"{family.turn_end}\n{family.turn_start}{family.answer_role}\n"
    return ids(f"{family.turn_start}{USER_ROLE}\n"), ids(answer)


def measure(
    model: GemmaModel,
    saes: list[Any],
    tokens: torch.Tensor,
    special: tuple[int, ...],
    *,
    batch_size: int,
    memory_budget: int,
    cache: PathLike[str] | None = None,
) -> list[dict[str, float]]:
    """L0, FVU, delta loss and loss under zero ablation of SAEs of one place, with their 95 % intervals.

    Args:
        model: from ``load_model``.
        saes: the SAEs.
        tokens: ``[rows, pos]``.
        special: ids that do not count.
        batch_size, memory_budget: as for ``evaluate``.
        cache: folder of the measurements that the SAEs of one place share, and of those of an interrupted SAE.
    """
    found = measure_suite(
        model, saes, tokens, batch_size=batch_size, progress=False, ablations=("zero",), memory_budget=memory_budget,
        cache=cache, exclude_special_tokens=special,
    )  # fmt: skip
    rows: list[dict[str, Any]] = found.table().to_dict("records")  # pyright: ignore[reportAssignmentType]
    return [{name: float(row[name]) for name in NUMBERS} for row in rows]
