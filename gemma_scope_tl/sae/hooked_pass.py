"""One pass through a JumpReLU SAE that makes dense tensors only for hooks that look at them.

Between its steps an SAE offers tensors to hooks: its input, pre-activations, activations ``[..., d_sae]`` and
reconstruction. Without hooks nothing dense is made beyond blocks of pre-activations. A hook gets the dense tensor; only
if it really changed something (gave another tensor back, or wrote into the one it got) do the later steps and the clean
reconstruction cost anything more. A hook that only reads, as a cache does, leaves the sparse pass as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.sae.sparse import SparseActs, compact, decode_sparse, encode_sparse


@dataclass
class HookedPass:
    """What a pass gives.

    Attributes:
        out: ``[..., d_out]``, flat and in the SAE's dtype, with whatever hooks changed, and with the skip path.
        clean: the same without any hook, without gradient; ``out`` itself where no hook changed anything.
    """

    out: Tensor
    clean: Tensor


def hooked_pass(sae: Any, x: Tensor, need_clean: bool) -> HookedPass:
    """Reconstruct flat activations through an SAE's hook points.

    Args:
        sae: of this package.
        x: ``[..., d_in]``, any floating dtype.
        need_clean: without it ``clean`` is ``out``, whatever hooks do.

    Returns:
        Out and clean reconstruction. With gradients enabled and a hook on the activations, the gradient of ``out``
        passes through the very tensor that the hook saw, so that its ``grad`` can be asked for.
    """
    x_clean = x.to(sae.dtype)
    x_in, edited_input = _offer(sae.hook_sae_input, x_clean, owned=False)
    acts, edited_pre = _encode(sae, x_in)
    through: SparseActs | Tensor = acts
    edited_post = False
    if is_hooked(sae.hook_sae_acts_post):
        dense = acts if isinstance(acts, Tensor) else acts.to_dense()
        seen, edited_post = _offer(sae.hook_sae_acts_post, dense, owned=True)
        if edited_post or torch.is_grad_enabled():
            through = seen
    decoded = decode_sparse(through, sae.W_dec, sae.b_dec)
    recons, edited_recons = _offer(sae.hook_sae_recons, decoded, owned=False)
    skipped = sae.skip(x_in)
    out = recons if skipped is None else recons + skipped
    if not need_clean or not (edited_input or edited_pre or edited_post or edited_recons):
        return HookedPass(out, out.detach())
    with torch.no_grad():
        if edited_input or edited_pre or isinstance(acts, Tensor):  # a dense tensor may have been written into
            acts = encode_sparse(x_clean, sae.W_enc, sae.b_enc, sae.threshold)
        only_recons = not (edited_input or edited_pre or edited_post)
        clean = decoded if only_recons else decode_sparse(acts, sae.W_dec, sae.b_dec)
        skipped = sae.skip(x_clean)
        return HookedPass(out, clean.detach() if skipped is None else clean + skipped)


def is_hooked(point: torch.nn.Module) -> bool:
    """Whether anything is attached to a hook point, by whichever way."""
    held = vars(point)  # torch has no public way to ask
    return any(held[f"_{kind}_hooks"] for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def _encode(sae: Any, x: Tensor) -> tuple[SparseActs | Tensor, bool]:
    """Activations, dense where a hook on the pre-activations may be asked for their gradient; and whether it edited."""
    point = sae.hook_sae_acts_pre
    if not is_hooked(point):
        return encode_sparse(x, sae.W_enc, sae.b_enc, sae.threshold), False
    pre, edited = _offer(point, x @ sae.W_enc + sae.b_enc, owned=True)
    if torch.is_grad_enabled() and pre.requires_grad:
        return torch.where(pre <= sae.threshold, 0.0, pre), edited
    return compact(pre, sae.threshold), edited


def _offer(point: torch.nn.Module, tensor: Tensor, owned: bool) -> tuple[Tensor, bool]:
    """A tensor after the hooks of a point, and whether they changed it.

    Args:
        point: the hook point.
        tensor: what hooks get to see.
        owned: whether nobody else needs the tensor as it is; a copy is offered otherwise, because hooks write in place.
    """
    if not is_hooked(point):
        return tensor, False
    offered = tensor if owned else tensor.clone()
    before = None if offered.is_inference() else offered._version
    result = point(offered)
    changed = result is not offered or before is None or offered._version != before
    return result, changed
