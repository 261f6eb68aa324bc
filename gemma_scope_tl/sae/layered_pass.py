"""One forward pass of a model through a layered coder, layer by layer.

At each of its layers the coder encodes what it reads. What the latents write at this and all later layers is added to
running sums at once, so that the decoder of a layer is read once in a pass, and a latent's planes, which lie side by
side in the file, together. With few tokens that is one sum for each layer, where adding up at the written layers would
take one for each pair of layers. The sums of large batches would need more memory than the latents; there the latents
are kept, and summed at each written layer.

A pass belongs to one run of the model. Whoever runs it makes a new one at the coder's first layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.sae.hooked_pass import HookedPass, clean_latents, hooked_latents, is_hooked, offered
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sae.planes import written_planes
from gemma_scope_tl.sae.routes import kernels_apply
from gemma_scope_tl.sae.sparse import SparseActs

SUMS_BYTES = 256 << 20
"""Memory of the running sums of a pass, above which the latents are kept instead."""


class LayeredPass:
    """The latents of a layered coder in one run of a model, and what they write.

    Attributes:
        done: number of the coder's layers that have run.
    """

    def __init__(self, coder: LayeredCoder) -> None:
        self.coder, self.done = coder, 0
        self._sums = _Sums(coder)
        self._clean: _Sums | None = None  # the sums without the changes of hooks, after the first change

    def layer(self, points: Any, x: Tensor, need_clean: bool) -> HookedPass:
        """The output at the next layer.

        Args:
            points: the next layer: its number ``k``, ``W_enc``, ``b_enc``, ``threshold``, and hook points with the
                names of an SAE's, also in its ``hook_dict``.
            x: ``[..., d_in]``, what the layer reads, in any floating dtype.
            need_clean: whether ``clean`` of the result is needed, the output if no hook had changed anything at this
                or an earlier layer of the coder. The model's own changes after such an edit stay in it.
        """
        k, x_clean = points.k, x.to(self.coder.dtype)
        if not kernels_apply(x_clean, points.W_enc) and not any(map(is_hooked, points.hook_dict.values())):
            pre = x_clean @ points.W_enc + points.b_enc  # inside PyTorch's transforms
            self._sums.add(k, torch.where(pre <= points.threshold, 0.0, pre))
            return self._output(points, x_clean, x_clean, False)
        found = hooked_latents(points, x_clean)
        if need_clean and found.edited and self._clean is None:
            self._clean = self._sums.copy()
        if self._clean is not None:
            with torch.no_grad():
                self._clean.add(k, clean_latents(points, x_clean, found))
        self._sums.add(k, found.through)
        return self._output(points, x_clean, found.x, need_clean)

    def _output(self, points: Any, x_clean: Tensor, x_in: Tensor, need_clean: bool) -> HookedPass:
        coder, k = self.coder, points.k
        self.done = k + 1
        decoded = self._sums.at(k) + coder.b_dec[k]
        recons, edited = offered(points.hook_sae_recons, decoded)
        skip = None if coder.W_skip is None else coder.W_skip[k]
        out = recons if skip is None else recons + x_in @ skip
        if not need_clean or not (edited or self._clean is not None):
            return HookedPass(out, out.detach())
        with torch.no_grad():
            clean = decoded.detach() if self._clean is None else self._clean.at(k) + coder.b_dec[k]
            return HookedPass(out, clean if skip is None else clean + x_clean @ skip)


class _Sums:
    """What latents write at the layers that have not been written yet."""

    def __init__(self, coder: LayeredCoder) -> None:
        self._coder = coder
        self._kept: list[tuple[int, SparseActs | Tensor]] = []
        self._sums: Tensor | None = None  # [layers from the last one on, ..., d_out]

    def add(self, k: int, acts: SparseActs | Tensor) -> None:
        """Add the latents of the next layer."""
        coder = self._coder
        tokens = acts.n_tokens if isinstance(acts, SparseActs) else acts.numel() // acts.shape[-1]
        layers = len(coder.layers)
        if tokens * layers * coder.d_out * coder.dtype.itemsize > SUMS_BYTES:
            self._kept.append((k, acts))
            return
        written = written_planes(acts, coder.W_dec[k])
        if self._sums is None:
            self._sums = written
            return
        before = self._sums[1:]
        in_place = kernels_apply(before, written) and not (before.requires_grad or written.requires_grad)
        self._sums = before.add_(written) if in_place else before + written

    def at(self, k: int) -> Tensor:
        """``[..., d_out]``: the sum at layer ``k``, the last one whose latents were added."""
        if self._sums is not None:
            return self._sums[0]
        parts = [written_planes(acts, self._coder.W_dec[j], k - j, k - j + 1)[0] for j, acts in self._kept]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def copy(self) -> _Sums:
        """Sums without gradient that go on by themselves."""
        twin = _Sums(self._coder)
        twin._sums = None if self._sums is None else self._sums.detach().clone()
        twin._kept = [(j, _detached(acts)) for j, acts in self._kept]
        return twin


def _detached(acts: SparseActs | Tensor) -> Any:
    return acts.detach() if isinstance(acts, Tensor) else acts.with_values(acts.values.detach())
