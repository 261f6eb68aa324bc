"""Logits as linear functions of a frozen pass.

With u the logits before a soft-cap c, the model's are ``y = c tanh(u / c)``. The frozen pass takes the ratio ``r_v =
y_v / u_v`` of every token as a constant, so ``y_v = r_v u_v = x (r_v W_U_v)`` is linear, and parts of it add up to it
exactly; without a soft-cap r is 1. A target is the logit of a token, or by default the *centred* logit

    y_v - mean_w y_w = x (r_v W_U_v - mean_w r_w W_U_w)

since a constant that all logits share changes no probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.attributions.frozen import FrozenPass, soft_cap_of
from gemma_scope_tl.attributions.placing import layer_stage
from gemma_scope_tl.attributions.targets import single_token
from gemma_scope_tl.counts import checked_count, checked_real, whole_number
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.sae.arguments import as_indices, listed

SOFT_CAPS = ("ratio", "before")
"""How a soft-cap is treated: its ratio is frozen, or the targets are the logits before it."""


@dataclass(frozen=True, eq=False)
class Readout:
    """The logits that are the targets of a graph.

    Attributes:
        token_ids: their tokens, the most probable first.
        probabilities: of these tokens.
        values: the targets' values in the frozen pass.
        vectors: ``[n, d]``; a value is the product of a row with the input of the unembedding at the position.
    """

    token_ids: list[int]
    probabilities: list[float]
    values: Tensor
    vectors: Tensor


@torch.no_grad()
def readout(frozen: FrozenPass, logits: Any, share: float, centred: bool, soft_cap: str) -> Readout:
    """Choose logits at the position of a pass, and make them linear.

    Args:
        frozen: the pass.
        logits: how many of the most probable tokens at most; or tokens, as words or ids in a list.
        share: probability that the most probable tokens need to have together, at most ``logits`` of them.
        centred: whether to subtract the mean over the vocabulary.
        soft_cap: one of :data:`SOFT_CAPS`.

    Raises:
        GemmaScopeError: for no or too many tokens, or a word that is not one token.
        UnknownNameError: for another ``soft_cap``.
    """
    if soft_cap not in SOFT_CAPS:
        raise unknown_name("soft_cap", soft_cap, SOFT_CAPS)
    x = frozen.replay({})[layer_stage(frozen.n_layers) + 1][frozen.position]
    before = torch.cat([x @ columns for _, columns in frozen.unembedding()])
    cap = soft_cap_of(frozen.model)
    model_logits = before if cap is None else cap * (before / cap).tanh()
    probabilities = model_logits.softmax(0)
    ids = _chosen(frozen, logits, share, probabilities)
    ratio = torch.ones_like(before)
    if cap is not None and soft_cap == "ratio":
        ratio = torch.where(before == 0, ratio, model_logits / before)
    vectors = frozen.model.W_U.detach()[:, ids].T.to(x) * ratio[ids, None]
    if centred:
        mean = torch.zeros_like(x)
        for some, columns in frozen.unembedding():
            mean += columns @ ratio[some]
        vectors = vectors - mean / len(ratio)
    values = before * ratio
    found = values[ids] - values.mean() if centred else values[ids]
    return Readout(ids, probabilities[ids].tolist(), found, vectors)


def _chosen(frozen: FrozenPass, logits: Any, share: float, probabilities: Tensor) -> list[int]:
    count = whole_number(logits)
    if count is not None:
        checked_count(count, "logits", most=len(probabilities))
        if checked_real(share, "probability", least=0.0) > 1:
            raise GemmaScopeError(f"probability must be at most 1, not {share}: it is that of several tokens together.")
        top = probabilities.topk(count)
        needed = int((top.values.cumsum(0) < share).sum()) + 1
        return top.indices[:needed].tolist()
    if isinstance(logits, (bool, float)) or logits is None:
        raise GemmaScopeError(f"logits takes a number of tokens, or tokens as words or ids; given: {logits!r}.")
    ids: list[int] = []
    for token in [logits] if isinstance(logits, str) else listed(logits):
        ids += [single_token(frozen.model, token)] if isinstance(token, str) else as_indices(token)
    for one in ids:
        if not 0 <= one < len(probabilities):
            raise GemmaScopeError(f"Token {one} is not in the vocabulary, 0..{len(probabilities) - 1}.")
    if not ids or len(set(ids)) < len(ids):
        raise GemmaScopeError(f"Give one token or several different ones as logits; given: {ids}.")
    return ids
