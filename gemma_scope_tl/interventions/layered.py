"""Hooks that steer and edit latents of crosscoders and cross-layer transcoders on a plain model.

A latent of layer j, written ``(model's layer, index)``, writes at layer j and at all later ones. On activations, an
edit reads ``f_i`` where the coder reads, at layer j, and changes what the latent contributes at every layer::

    y_k + sum_i (g_i(f_i) - f_i) W_dec_j[i, k]        k >= j, or the chosen layers

The change is the one at the same position of the same pass: it is kept in the pass's notes, so nothing of one pass, or
of a step of a generation, reaches another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.interventions.hooks import Intervention, LatentEdit, Steer, SteerLatents
from gemma_scope_tl.interventions.numbers import mean_norm_at, one_for_each
from gemma_scope_tl.sae.access import layered_hook_name, layered_latents
from gemma_scope_tl.sae.arguments import distinct_indices
from gemma_scope_tl.sae.choices import bring
from gemma_scope_tl.sae.layered import LayeredCoder

if TYPE_CHECKING:
    from gemma_scope_tl.sae.access import LatentNames

Pairs = list[tuple[str, Intervention]]


class LayeredLatents:
    """Chosen latents of a layered coder, and the layers at which they are to be changed.

    Args:
        coder: the coder.
        latents: a pair ``(model's layer, index)``, or several.
        layers: the model's layers; None for all that the latents write.

    Attributes:
        chosen: for each latent the coder's layer and the index there.
        written: the coder's layers to be changed, ascending.

    Raises:
        SpliceError: for a latent or a layer that does not exist, or a layer that none of the latents writes.
    """

    def __init__(self, coder: LayeredCoder, latents: LatentNames, layers: int | Iterable[int] | None = None) -> None:
        self.coder, self.chosen = coder, layered_latents(coder, latents)
        first = min(k for k, _ in self.chosen)
        if layers is None:
            self.written = list(range(first, len(coder.layers)))
            return
        self.written = sorted(coder.index_of(layer) for layer in distinct_indices(layers))
        if self.written[0] < first:
            raise SpliceError(
                f"layers= names layer {coder.layers[self.written[0]]}, but the given latents are of layer "
                f"{coder.layers[first]} and later ones, and latents write no earlier layer."
            )
        for k, index in self.chosen:
            if k > self.written[-1]:
                raise SpliceError(f"Latent ({coder.layers[k]}, {index}) writes none of the layers in layers=.")

    def by_layer(self) -> dict[int, list[int]]:
        """The numbers of the chosen latents, in their order, by the coder's layer to which they belong."""
        found: dict[int, list[int]] = {}
        for number, (k, _) in enumerate(self.chosen):
            found.setdefault(k, []).append(number)
        return found

    def indices(self, numbers: Iterable[int]) -> list[int]:
        """The indices, within their layers, of the latents with these numbers."""
        return [self.chosen[number][1] for number in numbers]

    def rows(self, number: int) -> Float[torch.Tensor, "layers d_out"]:
        """What a latent writes at those of :attr:`written` that it writes."""
        j, index = self.chosen[number]
        return self.coder.W_dec[j][index][[k - j for k in self.written if k >= j]]

    def rows_at(self, k: int, numbers: list[int]) -> Float[torch.Tensor, "n d_out"]:
        """What latents of one layer write at layer ``k``. Gradients flow through the rows."""
        j = self.chosen[numbers[0]][0]
        return self.coder.W_dec[j][self.indices(numbers), k - j]

    def hook_name(self, k: int, reads: bool = False) -> str:
        """The name of the hook that the coder writes, or reads, at one of its layers."""
        return layered_hook_name(self.coder, k, reads)


class SteerLayer(Steer):
    """Adds ``sum_i a_i W_dec_j[i, k]`` at one layer, with the current decoder rows in each pass.

    Args:
        latents: the latents.
        k: the coder's layer that is steered.
        amounts: ``[n]``, a for each latent; those of latents that do not write there are not used.
        by_norm: whether ``a_i`` is multiplied by the norm of the activation, and divided by that of the row.
        **where: ``positions`` and ``exclude_special_tokens``.
    """

    def __init__(
        self, latents: LayeredLatents, k: int, amounts: torch.Tensor, by_norm: bool = False, **where: Any
    ) -> None:
        Intervention.__init__(self, **where)
        self.latents, self.k, self.amounts, self.by_norm = latents, k, amounts, by_norm

    def _trained(self) -> LayeredCoder:
        return self.latents.coder

    @property
    def vector(self) -> Float[torch.Tensor, " d"]:
        """The sum, on the device and in the dtype of the decoder."""
        groups = [numbers for j, numbers in self.latents.by_layer().items() if j <= self.k]
        rows = torch.cat([self.latents.rows_at(self.k, numbers) for numbers in groups])
        amounts = self.amounts[[number for numbers in groups for number in numbers]].to(rows)
        return (amounts / rows.float().norm(dim=-1) if self.by_norm else amounts).to(rows) @ rows

    def vector_on(self, device: torch.device) -> Float[torch.Tensor, " d"]:
        """The sum on a device."""
        return self.vector.to(device)


class _Shared:
    """The key of the changes of one edit in the notes of a pass."""


class _WithNotes(Intervention):
    """A hook that takes changes from one layer to others."""

    def __init__(self, latents: LayeredLatents, shared: _Shared, **where: Any) -> None:
        super().__init__(**where)
        self.latents, self.shared = latents, shared

    def _trained(self) -> LayeredCoder:
        return self.latents.coder

    def changes(self) -> dict[int, torch.Tensor]:
        """The changes of the latents' activations in this pass, by the coder's layer.

        Raises:
            SpliceError: when the model does not say where a pass begins.
        """
        if self._tracker is None or self._tracker.notes is None:
            raise SpliceError(
                "An edit of a layered coder's latents takes them from one layer to others, so it needs a pass of a "
                "model from load_model, which says where the pass begins."
            )
        return self._tracker.notes.setdefault(self.shared, {})


class ReadLatents(_WithNotes):
    """Reads latents of one layer where the coder reads them, and keeps the changes of their activations.

    Args:
        latents: the latents.
        j: the coder's layer of the latents.
        edit: the edit of that layer's latents, in their order.
        shared: what the hooks of one edit share.
        **where: ``positions`` and ``exclude_special_tokens``.
    """

    def __init__(self, latents: LayeredLatents, j: int, edit: LatentEdit, shared: _Shared, **where: Any) -> None:
        super().__init__(latents, shared, **where)
        self.j, self.edit = j, edit

    def __call__(self, value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        """Read ``[batch, pos, d]``, which is returned.

        Raises:
            SpliceError: as :meth:`changes`.
        """
        coder, j, edit = bring(self.latents.coder, value.device), self.j, self.edit
        pre = value.to(coder.dtype) @ coder.W_enc[j][:, edit.latents] + coder.b_enc[j][edit.latents]
        acts = torch.where(pre <= coder.threshold[j][edit.latents], 0.0, pre)
        self.changes()[j] = edit.changed(acts) - acts
        return value


class EditLayer(_WithNotes):
    """Adds what the changes of :class:`ReadLatents` write at one layer; its arguments are those of that class."""

    def __init__(self, latents: LayeredLatents, k: int, shared: _Shared, **where: Any) -> None:
        super().__init__(latents, shared, **where)
        self.k = k

    def edited(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor after the edit.

        Raises:
            SpliceError: when the latents' layers did not run in this pass.
        """
        changes = self.changes()
        for j, numbers in self.latents.by_layer().items():
            if j > self.k:
                continue
            if j not in changes or changes[j].shape[:-1] != x.shape[:-1]:
                layers = self.latents.coder.layers
                raise SpliceError(
                    f"Layer {layers[self.k]} is to be changed by latents of layer {layers[j]}, which did not run in "
                    "this pass: start the pass there or before."
                )
            x = x + (changes[j] @ self.latents.rows_at(self.k, numbers)).to(x.device)
        return x


def edit_layers(latents: LayeredLatents, edits: Mapping[int, LatentEdit], where: dict[str, Any]) -> Pairs:
    """The hooks of an edit on activations, in the order in which they run.

    Args:
        latents: the latents.
        edits: the edit of the latents of each layer, by the coder's layer.
        where: ``positions`` and ``exclude_special_tokens``.
    """
    shared, pairs = _Shared(), []
    for k in range(max(latents.written) + 1):  # no later layer needs to be read
        if k in edits:  # before the change, so that all latents of a layer are read from what the model wrote
            pairs.append((latents.hook_name(k, reads=True), ReadLatents(latents, k, edits[k], shared, **where)))
        if k in latents.written:
            pairs.append((latents.hook_name(k), EditLayer(latents, k, shared, **where)))
    return pairs


def edit_layered(
    latents: LayeredLatents, kind: type[LatentEdit], numbers: torch.Tensor | None, on: str, where: dict[str, Any]
) -> Pairs:
    """The hooks of ``ablate``, ``clamp`` and ``scale``, and of ``steer`` on features.

    Args:
        latents: the latents.
        kind: the class of the edit.
        numbers: a number for each latent, for classes that take numbers.
        on: ``"activations"`` or ``"features"``.
        where: ``positions`` and ``exclude_special_tokens``.
    """
    coder: Any = latents.coder
    edits: dict[int, LatentEdit] = {}
    for k, chosen in latents.by_layer().items():
        several = () if numbers is None else (numbers[chosen],)
        edits[k] = kind(coder, latents.indices(chosen), *several, on_features=on == "features", **where)
    if on == "features":
        return [(f"{latents.hook_name(k)}.hook_sae_acts_post", edits[k]) for k in sorted(edits)]
    return edit_layers(latents, edits, where)


def steer_layered(
    latents: LayeredLatents, amounts: torch.Tensor, unit: str, mean_norm: Any, on: str, where: dict[str, Any]
) -> Pairs:
    """The hooks of ``steer``, whose arguments these are, after its checks.

    Raises:
        SpliceError: for ``unit="norm"`` at several layers, or a missing ``mean_norm``.
    """
    if unit == "norm" and len(latents.written) > 1:
        raise SpliceError(
            'unit="norm" is of one layer, and the norms at later layers are not known when the first one is changed: '
            'choose one with layers=, or use unit="mean_norm".'
        )
    if unit == "mean_norm":
        norms = torch.tensor([mean_norm_at(mean_norm, latents.hook_name(k)) for k in latents.written])
        for number, (j, _) in enumerate(latents.chosen):
            here = norms[[k >= j for k in latents.written]]
            factor = one_for_each(here.norm() / latents.rows(number).float().norm().cpu(), [number], "mean_norm")
            amounts = torch.cat([amounts[:number], amounts[number : number + 1] * factor, amounts[number + 1 :]])
    if on == "features":
        return edit_layered(latents, SteerLatents, amounts, on, where)
    by_norm = unit == "norm"
    return [(latents.hook_name(k), SteerLayer(latents, k, amounts, by_norm, **where)) for k in latents.written]
