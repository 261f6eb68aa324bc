"""Metrics of the logits that attributions explain: logit, logit difference, loss of a token.

Each function makes a ``Metric``: a callable ``logits [batch, pos, vocab] -> scalar``. They sum over the batch, so that
the attributions of a sequence do not depend on its neighbours. Any callable of that shape serves as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float

from gemma_scope_tl.errors import GemmaScopeError

Metric = Callable[[torch.Tensor], torch.Tensor]
Tokens = int | Sequence[int]


def logit(token: Tokens, position: int = -1) -> Metric:
    """The logit of ``token`` (an id, or one per sequence) at ``position``; -1, the last, suits left-padded batches."""

    def metric(logits: Float[torch.Tensor, "batch pos vocab"]) -> torch.Tensor:
        return _at(logits, token, position).sum()

    return metric


def logit_difference(token_a: Tokens, token_b: Tokens, position: int = -1) -> Metric:
    """``logit(a) - logit(b)`` at ``position``; ids, or one id per sequence."""

    def metric(logits: Float[torch.Tensor, "batch pos vocab"]) -> torch.Tensor:
        return (_at(logits, token_a, position) - _at(logits, token_b, position)).sum()

    return metric


def token_loss(token: Tokens, position: int = -1) -> Metric:
    """``-log softmax(logits)[token]`` at ``position``, in nats: the loss when ``token`` comes next."""

    def metric(logits: Float[torch.Tensor, "batch pos vocab"]) -> torch.Tensor:
        return -_at(logits.log_softmax(-1), token, position).sum()

    return metric


def single_token(model: Any, text: str) -> int:
    """The id of ``text``, which must be one token of the model's vocabulary.

    Raises:
        GemmaScopeError: when it is none or several, with how it splits; when the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise GemmaScopeError("The model has no tokenizer: give the token's id.")
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        pieces = [model.tokenizer.decode([i]) for i in ids]
        raise GemmaScopeError(f"{text!r} is {len(ids)} tokens here: {pieces}. Give one token (mind the leading space).")
    return int(ids[0])


def metric_value(metric: Metric, logits: torch.Tensor) -> torch.Tensor:
    """``metric`` of the logits, in float32 or wider.

    Raises:
        GemmaScopeError: when it is not one finite number, or carries no gradient.
    """
    value: Any = metric(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        given = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise GemmaScopeError(f"The metric gave {given}: it must make one number (a tensor) of the logits.")
    if not value.requires_grad:
        raise GemmaScopeError("The metric carries no gradient: compute it from the logits, without detach or item.")
    if not bool(value.isfinite()):
        raise GemmaScopeError(f"The metric is {float(value.detach())} on this text: it has no attributions.")
    return value.reshape(())


def _at(logits: torch.Tensor, token: Tokens, position: int) -> torch.Tensor:
    batch, length, vocab = logits.shape
    ids = torch.as_tensor([token] if isinstance(token, int) else list(token), device=logits.device)
    if ids.numel() not in (1, batch):
        raise GemmaScopeError(f"{ids.numel()} tokens were given for {batch} sequences: give one, or one for each.")
    if not -length <= position < length:
        raise GemmaScopeError(f"No position {position}: there are 0..{length - 1}, and -1 for the last.")
    if not bool(((ids >= 0) & (ids < vocab)).all()):
        raise GemmaScopeError(f"Token ids {ids.tolist()} are not all in the vocabulary, 0..{vocab - 1}.")
    return logits[:, position].gather(-1, ids.expand(batch).unsqueeze(-1)).squeeze(-1)
