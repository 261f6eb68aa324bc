"""Metrics of the logits that attributions explain: logit, logit difference, loss of a token.

Each function makes a ``Metric``: a callable ``logits [batch, pos, vocab] -> scalar``. They sum over the batch, so that
the attributions of a sequence do not depend on the others. Any callable with this signature is a metric too; its logits
are those of the padded ids, while the metrics here know where each text begins and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sae.arguments import as_indices, is_index, listed
from gemma_scope_tl.text.batch import TokenBatch
from gemma_scope_tl.text.tokenizing import text_ids

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

Metric = Callable[[torch.Tensor], torch.Tensor]
Tokens = int | str | Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class TargetMetric:
    """A metric of some tokens' logits at a position.

    Attributes:
        score: a function of the logits ``[batch, vocab]`` at the position and the ids ``[batch]`` of each token; it
            returns ``[batch]``.
        tokens: each an id or a word, or a list with one per sequence.
        position: position in the text: 0 is the first token, -1 the last.
        batch: the batch whose mask marks the texts; None if all columns are text.
    """

    score: Callable[..., torch.Tensor]
    tokens: tuple[Tokens, ...]
    position: int
    batch: TokenBatch | None = None

    def bound_to(self, model: GemmaModel, batch: TokenBatch) -> TargetMetric:
        """The same metric for the texts in ``batch``, with words as ids of the model's vocabulary.

        Raises:
            GemmaScopeError: a word is not one token, or an id is not in the vocabulary.
        """
        ids = [_ids(model, token) for token in self.tokens]
        for one in ids:
            _check_number(len(one), len(batch.ids))
        return replace(self, tokens=tuple(ids), batch=batch)

    def part(self, rows: torch.Tensor, batch: TokenBatch) -> TargetMetric:
        """A bound metric for some of its sequences, ``batch``, whose numbers are ``rows``."""
        ids: list[Any] = list(self.tokens)
        few = [[one[row] for row in rows.tolist()] if len(one) > 1 else one for one in ids]
        return replace(self, tokens=tuple(few), batch=batch)

    def __call__(self, logits: Float[torch.Tensor, "batch pos vocab"]) -> torch.Tensor:
        """The sum of the metric over all sequences that have text."""
        rows, columns = _columns(logits, self.position, self.batch)
        found = [_per_row(token, logits)[rows] for token in self.tokens]
        return self.score(logits[rows, columns], *found).sum()


def logit(token: Tokens, position: int = -1) -> TargetMetric:
    """The logit of ``token`` at ``position``.

    Args:
        token: an id or a word that is one token, such as ``" earth"`` (note the space); or several, one per sequence,
            as a list, an array, a tensor or a column of a table.
        position: position in the text: -1 is the last token, for padding on either side. If a metric is called on
            logits directly, outside :func:`~gemma_scope_tl.attribute` and the like, it takes ids only and positions
            are columns.
    """
    return TargetMetric(_logit, (listed(token),), position)


def logit_difference(token_a: Tokens, token_b: Tokens, position: int = -1) -> TargetMetric:
    """``logit(a) - logit(b)`` at ``position``; arguments as for :func:`logit`."""
    return TargetMetric(_difference, (listed(token_a), listed(token_b)), position)


def token_loss(token: Tokens, position: int = -1) -> TargetMetric:
    """``-log softmax(logits)[token]`` at ``position``, in nats: the loss when ``token`` comes next (:func:`logit`)."""
    return TargetMetric(_loss, (listed(token),), position)


def single_token(model: GemmaModel, text: str) -> int:
    """The id of ``text``, which must be one token of the model's vocabulary.

    Raises:
        GemmaScopeError: the text is not exactly one token, or the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise GemmaScopeError("The model has no tokenizer: give the token's id.")
    (ids,) = text_ids(model.tokenizer, [text])
    if len(ids) != 1:
        pieces = [model.tokenizer.decode([i]) for i in ids]
        meant = f" {text}"
        one = text.strip() == text != "" and len(text_ids(model.tokenizer, [meant])[0]) == 1
        hint = f"Did you mean {meant!r}?" if one else "Give one token (mind the leading space)."
        raise GemmaScopeError(f"{text!r} is {len(ids)} tokens here: {pieces}. {hint}")
    return int(ids[0])


def metric_on(model: GemmaModel, metric: Metric | Tokens, batch: TokenBatch) -> Metric:
    """A metric of the logits of ``batch``; a word or an id means its logit.

    Raises:
        GemmaScopeError: the value is not a metric, or a word is not one token.
    """
    several = isinstance(metric, Iterable) and not isinstance(metric, (bytes, Mapping, set, frozenset))
    if not callable(metric) and (several or is_index(metric)):
        metric = logit(metric)  # pyright: ignore[reportArgumentType]
    if not callable(metric):
        raise GemmaScopeError(
            "A metric is a function of the logits (attributions.targets makes some), a word or a token id, not "
            f"{metric!r}."
        )
    return metric.bound_to(model, batch) if isinstance(metric, TargetMetric) else metric


def metric_value(metric: Metric, logits: torch.Tensor) -> torch.Tensor:
    """``metric`` of the logits, in float32 or wider.

    Raises:
        GemmaScopeError: the value is not one finite number, or carries no gradient.
    """
    value: Any = metric(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        given = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise GemmaScopeError(f"The metric returned {given}: it must return one number, as a tensor.")
    if not value.requires_grad:
        raise GemmaScopeError("The metric carries no gradient: compute it from the logits, without detach or item.")
    if not bool(value.isfinite()):
        raise GemmaScopeError(f"The metric is {float(value.detach())} on this text, and must be finite.")
    return value.reshape(())


def _logit(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return logits.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def _difference(logits: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _logit(logits, a) - _logit(logits, b)


def _loss(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return -_logit(logits.log_softmax(-1), token)


def _ids(model: GemmaModel, token: Tokens) -> list[int]:
    if isinstance(token, str):
        return [single_token(model, token)]
    if isinstance(token, (list, tuple)) and any(isinstance(one, str) for one in token):
        return [single_token(model, one) if isinstance(one, str) else as_indices(one)[0] for one in token]
    return as_indices(token)


def _per_row(token: Tokens, logits: torch.Tensor) -> torch.Tensor:
    """An id for each sequence."""
    if isinstance(token, str) or (isinstance(token, (list, tuple)) and any(isinstance(one, str) for one in token)):
        raise GemmaScopeError(f"A metric that is called directly has no tokenizer: give the token's id, not {token!r}.")
    ids, (batch, _, vocab) = torch.tensor(as_indices(token), dtype=torch.long), logits.shape
    _check_number(ids.numel(), batch)
    if not bool(((ids >= 0) & (ids < vocab)).all()):
        raise GemmaScopeError(f"Token ids {ids.tolist()} are not all in the vocabulary, 0..{vocab - 1}.")
    return ids.to(logits.device).expand(batch)


def _check_number(tokens: int, sequences: int) -> None:
    if tokens not in (1, sequences):
        raise GemmaScopeError(f"{tokens} tokens were given for {sequences} sequences: give one, or one for each.")


def _columns(logits: torch.Tensor, position: int, batch: TokenBatch | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that have text, and the column of ``position`` in each row."""
    if batch is None:
        starts = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
        lengths = starts + logits.shape[1]
    else:
        starts, lengths = batch.start.to(logits.device), batch.length.to(logits.device)
    rows = (lengths > 0).nonzero().flatten()
    starts, lengths = starts[rows], lengths[rows]
    missing = (lengths <= position) if position >= 0 else (lengths < -position)
    if bool(missing.any()) or not len(rows):
        length = int(lengths[missing][0]) if len(rows) else 0
        raise GemmaScopeError(f"No position {position}: there are 0..{length - 1}, and -1 for the last.")
    return rows, starts + position + (lengths if position < 0 else 0)
