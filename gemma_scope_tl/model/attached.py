"""One SAE attached to one model."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.model.attachment import Attachment, remove_handle
from gemma_scope_tl.model.protocol import HasSites
from gemma_scope_tl.sae.access import decode_with_skip
from gemma_scope_tl.sae.base import GemmaScopeMixin
from gemma_scope_tl.sae.choices import bring
from gemma_scope_tl.sae.hooked_pass import hooked_pass, is_hooked


class AttachedSAE(Attachment):
    """One SAE or transcoder attached to one model. Its hook points are those of the SAE."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hook_points = {f"{self.name}.{name}": point for name, point in self.sae.hook_dict.items()}
        self._read: torch.Tensor | None = None
        self._before: list[Any] = []  # handles that were on the SAE's hook points before
        self._named = self._reshaping_off = False

    def attach(self, model: HasSites) -> None:
        """As in the base class."""
        super().attach(model)
        self.claim_names()
        stock = not isinstance(self.sae, GemmaScopeMixin)
        if stock and getattr(self.sae, "hook_z_reshaping_mode", False):  # heads are flattened here
            self.sae.turn_off_forward_pass_hook_z_reshaping()
            self._reshaping_off = True

    def detach(self) -> None:
        """As in the base class."""
        super().detach()
        if self._reshaping_off:
            self.sae.turn_on_forward_pass_hook_z_reshaping()
            self._reshaping_off = False
        if self._named:
            for point in self.hook_points.values():
                _end_blocks(point, self._before)
            names = _given_names(self.sae)
            names.remove(self.name)
            _name_points(self.sae, names)
            self._named = False

    def unhook(self) -> None:
        """As in the base class."""
        super().unhook()
        self._read = None

    def claim_names(self) -> None:
        """Name the SAE's hook points after the hook where it is attached."""
        points = self.hook_points.values()
        self._before = [handle for point in points for handle in (*point.fwd_hooks, *point.bwd_hooks)]
        names = _given_names(self.sae)
        names.append(self.name)
        _name_points(self.sae, names)
        self._named = True

    def _keep_read(self, value: torch.Tensor) -> None:
        self._read = value

    def _take_read(self) -> torch.Tensor:
        if self._read is None:
            raise SpliceError(f"The transcoder at {self.read_name} read no input in this forward pass.")
        source, self._read = self._read, None
        return source

    def _move_to(self, device: torch.device) -> None:
        bring(self.sae, device)

    def _pass(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The reconstruction with hooks, and without them if the error term needs it."""
        if isinstance(self.sae, GemmaScopeMixin):
            done = hooked_pass(self.sae, x, need_clean=self.error_term)
            return done.out, done.clean
        x = x.to(self.sae.dtype)
        offered = x.clone() if is_hooked(self.sae.hook_sae_input) else x  # hooks may write in place
        out = decode_with_skip(self.sae, self.sae.encode(offered), x)
        if not self.error_term or not any(map(is_hooked, self.hook_points.values())):
            return out, out
        with torch.no_grad(), _disable_hooks(self.sae):
            return out, decode_with_skip(self.sae, self.sae.encode(x), x)


class _GivenNames(list[str]):
    """The names under which an SAE is attached, oldest first. They are stored on the SAE but not copied with it."""

    def __deepcopy__(self, memo: Any) -> _GivenNames:
        return _GivenNames()

    def __reduce__(self) -> Any:
        return _GivenNames, ()


def _given_names(sae: Any) -> list[str]:
    return vars(sae).setdefault("_given_names", _GivenNames())


def _name_points(sae: Any, names: list[str]) -> None:
    """Name hook points after the latest attachment that still exists, since models may detach in any order."""
    for short_name, point in sae.hook_dict.items():
        # setattr of a torch module would take a third of the time for attaching
        vars(point)["name"] = f"{names[-1]}.{short_name}" if names else short_name


def _end_blocks(point: Any, before: list[Any]) -> None:
    """Remove hooks that ``model.hooks`` added to an SAE's hook point, which the end of its block no longer finds."""
    kept = {id(handle) for handle in before}
    for held in (point.fwd_hooks, point.bwd_hooks):
        for handle in [one for one in held if one.context_level is not None and id(one) not in kept]:
            remove_handle(held, handle)
