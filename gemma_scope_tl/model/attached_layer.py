"""A layered coder attached to one model: an attachment for each of its layers, which share the state of a pass.

At its first layer the coder begins a :class:`~gemma_scope_tl.sae.layered_pass.LayeredPass`. It is kept in the notes of
the model's current pass (:attr:`~gemma_scope_tl.model.tracker.TokenTracker.notes`), which end with that pass, also when
it fails. So nothing of one pass, of a step of a generation, or of a pass inside a hook reaches another one, and a pass
that begins behind the first layer raises. A pass may stop inside the coder: the layers that ran are right.

Positions that a mask excludes keep the model's activation at every layer. A latent writes only at its own position, so
latents of excluded positions contribute nothing anywhere. Hooks see them, as with SAEs.
"""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.model.attachment import Attachment
from gemma_scope_tl.model.tracker import TokenTracker
from gemma_scope_tl.sae.choices import bring
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sae.layered_pass import LayeredPass

POINTS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)


class LayerPoints:
    """One layer of a layered coder with the hook points that an SAE has.

    Attributes:
        coder: the coder.
        k: which of its layers.
        hook_dict: the hook points by name; they are attributes, too.
    """

    hook_sae_input: HookPoint
    hook_sae_acts_pre: HookPoint
    hook_sae_acts_post: HookPoint
    hook_sae_recons: HookPoint

    def __init__(self, coder: LayeredCoder, k: int, prefix: str) -> None:
        self.coder, self.k = coder, k
        self.hook_dict = {name: HookPoint() for name in POINTS}
        for name, point in self.hook_dict.items():
            point.name = f"{prefix}.{name}"
            setattr(self, name, point)

    @property
    def W_enc(self) -> torch.Tensor:
        """``[d_in, m]``."""
        return self.coder.W_enc[self.k]

    @property
    def b_enc(self) -> torch.Tensor:
        """``[m]``."""
        return self.coder.b_enc[self.k]

    @property
    def threshold(self) -> torch.Tensor:
        """``[m]``."""
        return self.coder.threshold[self.k]


class Together:
    """What the attachments of one coder share. It is the key of the coder's state in the notes of a pass."""

    def __init__(self, coder: LayeredCoder) -> None:
        self.coder = coder

    def notes(self, tracker: TokenTracker, k: int) -> dict[Any, Any]:
        """The notes of the current pass.

        Raises:
            SpliceError: outside of a pass.
        """
        if tracker.notes is None:
            raise SpliceError(
                f"Layer {self.coder.layers[k]} of the model ran by itself, outside of a forward pass, but the "
                f"{self.coder.kind} there needs the layers before it: run the model, without recomputing its layers "
                "for gradients."
            )
        return tracker.notes

    def begun(self, tracker: TokenTracker, k: int, x: torch.Tensor) -> LayeredPass:
        """The state of the current pass before layer ``k``.

        Raises:
            SpliceError: when the earlier layers did not run in this pass.
        """
        notes, layers = self.notes(tracker, k), self.coder.layers
        if k == 0:
            notes[self] = LayeredPass(self.coder), x.shape[:-1]
        state, shape = notes.get(self, (None, None))
        if state is None or state.done != k or shape != x.shape[:-1]:
            raise SpliceError(
                f"The {self.coder.kind} writes layer {layers[k]} with the latents of the layers {list(layers[:k])}, "
                f"too, which did not run in this pass: start it at layer {layers[0]} or before, or detach the coder."
            )
        return state


class AttachedLayer(Attachment):
    """One layer of a layered coder attached to one model. Its hook points exist while it is attached."""

    what = "A layered coder"

    def __init__(self, together: Together, k: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(together.coder, *args, **kwargs)
        self.together, self.k = together, k
        self.points = LayerPoints(together.coder, k, self.name)
        self.hook_points = {f"{self.name}.{name}": point for name, point in self.points.hook_dict.items()}

    def _keep_read(self, value: torch.Tensor) -> None:
        self.together.notes(self._tracker, self.k)[self] = value

    def _take_read(self) -> torch.Tensor:
        found = self.together.notes(self._tracker, self.k).pop(self, None)
        if found is None:
            raise SpliceError(f"The {self.sae.kind} at {self.read_name} read no input in this forward pass.")
        return found

    def _move_to(self, device: torch.device) -> None:
        if self.k == 0:  # with the layers of a model on several devices, the coder stays where its first layer is
            bring(self.sae, device)

    def _pass(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.together.begun(self._tracker, self.k, x)
        done = state.layer(self.points, x.to(self.sae.device), self.error_term)
        return done.out.to(x.device), done.clean.to(x.device)
