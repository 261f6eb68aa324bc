"""A pass through a JumpReLU SAE that creates dense tensors only for hooks.

Between its steps an SAE passes tensors to hooks: its input, pre-activations, activations ``[..., d_sae]`` and
reconstruction. Without hooks, no dense tensor is made apart from blocks of pre-activations. A hook gets the dense
tensor. Later steps and the clean reconstruction take more time only if the hook changed something, by returning another
tensor or by writing into its argument. After a hook that only reads, such as a cache, the sparse pass continues.

Writes are detected by comparing the entries of the tensor. Autograd's version counter would miss writes through
``.data`` or NumPy, and tensors of inference mode have no counter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.sae.few_tokens import is_few, reconstruct_few
from gemma_scope_tl.sae.routes import dense_is_faster, kernels_apply
from gemma_scope_tl.sae.sparse import SparseActs, compact, decode_sparse, encode_sparse


@dataclass
class HookedPass:
    """The results of a pass.

    Attributes:
        out: ``[..., d_out]``, flat and in the SAE's dtype, with the changes of hooks and the skip path.
        clean: the output without hooks, and without gradient; ``out`` itself if no hook changed anything.
    """

    out: Tensor
    clean: Tensor


def hooked_pass(sae: Any, x: Tensor, need_clean: bool) -> HookedPass:
    """Reconstruct flat activations through an SAE's hook points.

    Args:
        sae: an SAE of this package.
        x: ``[..., d_in]``, any floating dtype.
        need_clean: whether ``clean`` is needed; if not, it is ``out``.

    Returns:
        The output and the clean reconstruction. With gradients enabled and a hook on the activations, the gradient of
        ``out`` passes through the tensor that the hook received, so that its ``grad`` is available.
    """
    if _goes_few(sae, x):
        out, skipped = reconstruct_few(x, *_weights(sae)), sae.skip(x)
        out = out if skipped is None else out + skipped
        return HookedPass(out, out)
    x_clean = x.to(sae.dtype)
    if _goes_dense(sae, x_clean):
        return _dense_pass(sae, x_clean)
    found = hooked_latents(sae, x_clean)
    decoded = decode_sparse(found.through, sae.W_dec, sae.b_dec)
    recons, edited_recons = offered(sae.hook_sae_recons, decoded)
    skipped = sae.skip(found.x)
    out = recons if skipped is None else recons + skipped
    if not need_clean or not (found.edited or edited_recons):
        return HookedPass(out, out.detach())
    with torch.no_grad():
        clean = decode_sparse(clean_latents(sae, x_clean, found), sae.W_dec, sae.b_dec) if found.edited else decoded
        skipped = sae.skip(x_clean)
        return HookedPass(out, clean.detach() if skipped is None else clean + skipped)


@dataclass
class HookedLatents:
    """Latents with the changes of hooks.

    Attributes:
        x: the input after its hooks.
        through: the latents that are decoded. They are dense after an edit, or if a hook may need their gradient.
        given: the latents of ``x`` without hooks on them.
        edited_input: whether hooks changed the input.
        edited: whether hooks changed the input or the latents.
    """

    x: Tensor
    through: SparseActs | Tensor
    given: SparseActs
    edited_input: bool
    edited: bool


def hooked_latents(encoder: Any, x: Tensor) -> HookedLatents:
    """The latents of ``x [..., d_in]`` through the hook points of an encoder, and whether hooks changed anything.

    Args:
        encoder: an SAE, or anything with ``W_enc``, ``b_enc``, ``threshold`` and the hook points of an SAE.
        x: in the dtype of the encoder.
    """
    x_in, edited_input = offered(encoder.hook_sae_input, x)
    given, acts, dense = _encode(encoder, x_in)
    edited = edited_input or (given is not acts and not _same(given, acts))
    through = acts if dense is None else dense
    if is_hooked(encoder.hook_sae_acts_post):
        shown = acts.to_dense() if dense is None else dense
        seen = encoder.hook_sae_acts_post(shown)
        edited_post = seen is not shown or not _holds(shown, acts)
        edited |= edited_post
        if edited_post or torch.is_grad_enabled():
            through = seen
    return HookedLatents(x_in, through, given, edited_input, edited)


def clean_latents(encoder: Any, x: Tensor, found: HookedLatents) -> SparseActs:
    """The latents of ``x`` without hooks, given those with hooks."""
    return encode_sparse(x, encoder.W_enc, encoder.b_enc, encoder.threshold) if found.edited_input else found.given


def _points(sae: Any) -> tuple[torch.nn.Module, ...]:
    """The hook points inside the pass."""
    return sae.hook_sae_input, sae.hook_sae_acts_pre, sae.hook_sae_acts_post, sae.hook_sae_recons


def is_hooked(point: torch.nn.Module) -> bool:
    """Whether a hook of any kind is attached to a hook point."""
    held = vars(point)  # torch has no public function for this
    return any(held[f"_{kind}_hooks"] for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def _weights(sae: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec


def _goes_few(sae: Any, x: Tensor) -> bool:
    """Whether a pass is that of a few tokens: without hooks inside it, and outside PyTorch's transforms."""
    if not is_few(x, sae.W_enc.shape[0]) or any(map(is_hooked, _points(sae))):
        return False
    return kernels_apply(x, *_weights(sae))


def _goes_dense(sae: Any, x: Tensor) -> bool:
    """Whether a pass without hooks is dense: inside PyTorch's transforms, and with few tokens on a GPU.

    On a processor the kernels' start costs little beside the model's pass, so that splices of all sizes take them.
    """
    if any(map(is_hooked, sae.hook_dict.values())):
        return False
    if x.is_cuda and dense_is_faster(x, sae.dtype, *sae.W_dec.shape, tracked=False):
        return True
    return not kernels_apply(x, *_weights(sae))


def _dense_pass(sae: Any, x: Tensor) -> HookedPass:
    pre = x @ sae.W_enc + sae.b_enc
    out = torch.where(pre <= sae.threshold, 0.0, pre) @ sae.W_dec + sae.b_dec
    skipped = sae.skip(x)
    out = out if skipped is None else out + skipped
    return HookedPass(out, out.detach())


def _encode(sae: Any, x: Tensor) -> tuple[SparseActs, SparseActs, Tensor | None]:
    """Activations of ``x`` before and after hooks on the pre-activations. The third result is dense, if hooks may need
    a gradient."""
    point = sae.hook_sae_acts_pre
    if not is_hooked(point):
        acts = encode_sparse(x, sae.W_enc, sae.b_enc, sae.threshold)
        return acts, acts, None
    pre = x @ sae.W_enc + sae.b_enc
    given = compact(pre, sae.threshold)
    pre = point(pre)
    dense = torch.where(pre <= sae.threshold, 0.0, pre) if torch.is_grad_enabled() and pre.requires_grad else None
    return given, compact(pre, sae.threshold), dense


def offered(point: torch.nn.Module, tensor: Tensor) -> tuple[Tensor, bool]:
    """A tensor after the hooks of a point, and whether they changed it. Hooks get a copy: they may write to it."""
    if not is_hooked(point):
        return tensor, False
    shown = tensor.clone()
    result = point(shown)
    return result, result is not shown or not torch.equal(shown, tensor)


def _same(one: SparseActs, other: SparseActs) -> bool:
    """Whether the entries are equal. NaN counts as unequal, which only takes more time."""
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("offsets", "latents", "values"))


def _holds(dense: Tensor, acts: SparseActs) -> bool:
    """Whether a dense tensor has the entries of these activations, and zeros elsewhere."""
    flat = dense.detach().reshape(-1)
    entries = flat.index_select(0, acts.tokens() * acts.d_sae + acts.latents)
    return torch.equal(entries, acts.values) and bool(flat.count_nonzero() == acts.values.count_nonzero())
