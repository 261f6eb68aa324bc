"""Gains of norms, and transcoders that contain the gain of the norm before them.

Some transcoders read a norm's output ``x = n * g``, where n is the normalised input and g the gain. A stock
``HookedTransformer`` has a hook at n and none at x. There a transcoder with

    W_enc' = diag(g) W_enc    and    W_skip' = W_skip diag(g)

that reads n gives the same output, because ``x W_enc = n (diag(g) W_enc)`` and ``x W_skip^T = n (W_skip diag(g))^T``.
Models of ``load_model`` have a hook at x on both backends, so nothing has to be folded for them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sae.access import locate

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

T = TypeVar("T")


def gain_of(model: GemmaModel, norm: Any) -> Float[torch.Tensor, " d_model"]:
    """The gain of an RMSNorm of ``model`` in float32. Some libraries store its difference from 1."""
    return norm.w.float() + model.family.gain_offset[model.backend]


@torch.no_grad()
def with_folded_gain(sae: T, model: GemmaModel) -> T:
    """A copy of a transcoder for a stock ``HookedTransformer``, with the gain of the norm that precedes its input.

    Args:
        sae: a transcoder whose site is behind the gain of a norm. It is not changed.
        model: a model from ``load_model`` with the same weights as the stock model, from which the gain is taken.

    Returns:
        A transcoder that reads ``blocks.L.<norm>.hook_normalized``, as its metadata says. Models of ``load_model``
        refuse it, because they read the tensor with the gain.

    Raises:
        SpliceError: for any other SAE, or one that does not fit the model.
    """
    coder: Any = sae
    site, layer = locate(coder, model.family)
    if not site.folded_gain or layer is None:
        raise SpliceError(f"Site {site.name!r} of {model.family.title} has no gain to fold.")
    model.check_fits(coder, site, layer)
    folded: Any = copy.deepcopy(coder)
    gain = gain_of(model, getattr(model.blocks[layer], site.folded_gain)).to(folded.W_enc.device)
    folded.W_enc.mul_(gain[:, None])
    if getattr(folded, "W_skip", None) is not None:
        folded.W_skip.mul_(gain)
    folded.cfg.metadata.hook_name = f"blocks.{layer}.{site.folded_gain}.hook_normalized"
    folded.cfg.metadata.site = None
    if hasattr(folded, "site"):
        folded.site = None
    return folded
