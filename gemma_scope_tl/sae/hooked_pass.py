"""One pass through a JumpReLU SAE that makes dense tensors only for hooks that look at them.

Between its steps an SAE offers tensors to hooks: its input, pre-activations, activations ``[..., d_sae]`` and
reconstruction. Without hooks nothing dense is made beyond blocks of pre-activations. A hook gets the dense tensor.
The later steps and the clean reconstruction cost more only if it changed something: gave another tensor back, or wrote
into the one it got. A hook that only reads, as a cache does, leaves the sparse pass as it is.

Whether a tensor was written into is seen from its entries. Autograd's version counter would miss writes through
``.data`` or NumPy, and tensors of inference mode have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.sae.sparse import SparseActs, compact, decode_sparse, encode_sparse


@dataclass
class HookedPass:
    """The results of a pass.

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
    x_in, edited_input = _offer(sae.hook_sae_input, x_clean)
    given, acts, dense = _encode(sae, x_in)
    edited_acts = given is not acts and not _same(given, acts)
    through = acts if dense is None else dense
    if is_hooked(sae.hook_sae_acts_post):
        offered = acts.to_dense() if dense is None else dense
        seen = sae.hook_sae_acts_post(offered)
        edited_post = seen is not offered or not _holds(offered, acts)
        edited_acts |= edited_post
        if edited_post or torch.is_grad_enabled():
            through = seen
    decoded = decode_sparse(through, sae.W_dec, sae.b_dec)
    recons, edited_recons = _offer(sae.hook_sae_recons, decoded)
    skipped = sae.skip(x_in)
    out = recons if skipped is None else recons + skipped
    if not need_clean or not (edited_input or edited_acts or edited_recons):
        return HookedPass(out, out.detach())
    with torch.no_grad():
        if edited_input:
            given = encode_sparse(x_clean, sae.W_enc, sae.b_enc, sae.threshold)
        clean = decode_sparse(given, sae.W_dec, sae.b_dec) if edited_input or edited_acts else decoded
        skipped = sae.skip(x_clean)
        return HookedPass(out, clean.detach() if skipped is None else clean + skipped)


def is_hooked(point: torch.nn.Module) -> bool:
    """Whether a hook of any kind is attached to a hook point."""
    held = vars(point)  # torch has no public way to ask
    return any(held[f"_{kind}_hooks"] for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def _encode(sae: Any, x: Tensor) -> tuple[SparseActs, SparseActs, Tensor | None]:
    """Activations of ``x`` before and after hooks on the pre-activations; and after them dense, where these hooks may
    ask for a gradient."""
    point = sae.hook_sae_acts_pre
    if not is_hooked(point):
        acts = encode_sparse(x, sae.W_enc, sae.b_enc, sae.threshold)
        return acts, acts, None
    pre = x @ sae.W_enc + sae.b_enc
    given = compact(pre, sae.threshold)
    pre = point(pre)
    dense = torch.where(pre <= sae.threshold, 0.0, pre) if torch.is_grad_enabled() and pre.requires_grad else None
    return given, compact(pre, sae.threshold), dense


def _offer(point: torch.nn.Module, tensor: Tensor) -> tuple[Tensor, bool]:
    """A tensor after the hooks of a point, and whether they changed it. Hooks get a copy: they may write in place."""
    if not is_hooked(point):
        return tensor, False
    offered = tensor.clone()
    result = point(offered)
    return result, result is not offered or not torch.equal(offered, tensor)


def _same(one: SparseActs, other: SparseActs) -> bool:
    """Whether the entries are equal; NaN equals nothing, which costs time and no correctness."""
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("offsets", "latents", "values"))


def _holds(dense: Tensor, acts: SparseActs) -> bool:
    """Whether a dense tensor is these activations: the same entries, and zeros elsewhere."""
    flat = dense.detach().reshape(-1)
    entries = flat.index_select(0, acts.tokens() * acts.d_sae + acts.latents)
    return torch.equal(entries, acts.values) and bool(flat.count_nonzero() == acts.values.count_nonzero())
