"""A coder attached to one place of one model, by hooks that replace an activation by its reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gemma_scope_tl.model.owners import Owner
from gemma_scope_tl.model.positions import chosen_columns, rows_of
from gemma_scope_tl.model.protocol import HasSites
from gemma_scope_tl.model.splice_options import SpliceOptions
from gemma_scope_tl.sites import Site, flatten_heads, unflatten_heads


class Attachment:
    """A coder at one place of one model: the hooks that it reads and writes, and the replacement of the activation.

    Subclasses define what the coder does with the activation.

    Attributes:
        sae: the SAE, transcoder or layered coder.
        name: prefix of the names of the hook points, unique on the model.
        owner: the context whose passes may run through the coder.
        options: the given options, which a copy of the model needs.
        hook_points: the hook points by their full names.
    """

    what = "An SAE"
    hook_points: dict[str, Any]

    def __init__(
        self,
        sae: Any,
        site: Site,
        layer: int | None,
        options: SpliceOptions,
        *,
        excluded: tuple[int, ...],
        stage: int,
        owner: Owner,
    ) -> None:
        self.sae, self.site, self.layer = sae, site, layer
        self.options, self.excluded, self.stage, self.owner = options, excluded, stage, owner
        wanted = getattr(sae, "use_error_term", False) if options.error_term is None else options.error_term
        self.error_term = bool(wanted)
        self.positions = options.positions
        self.read_name = site.hook_name(layer, "hooked_transformer")
        self.write_name = site.hook_name_out(layer, "hooked_transformer")
        self.name = self.write_name + (f".{stage}" if stage else "")  # stage: the position in a chain, from 0
        self._hooks: list[tuple[Any, Callable[..., torch.Tensor | None], Any]] = []  # point, function, handle
        self._heads_apart = False

    def attach(self, model: HasSites) -> None:
        """Add the hooks to the hook points of ``model``. :meth:`detach` removes exactly these."""
        self._tracker = model.token_tracker
        self._heads_apart = model.backend == "hooked_transformer"
        if self.site.is_transcoder:
            self._hook(model.site_hook_point(self.site.hook_name(self.layer, model.backend)), self._on_read)
        self._hook(model.site_hook_point(self.site.hook_name_out(self.layer, model.backend)), self._on_write)

    def detach(self) -> None:
        """Undo :meth:`attach`, starting with the model. It can be called again after an error."""
        self.unhook()

    def unhook(self) -> None:
        """Remove the hooks from the model without changing the coder."""
        while self._hooks:
            point, _, handle = self._hooks[-1]
            remove_handle(point.fwd_hooks, handle)
            self._hooks.pop()

    def put_back(self) -> None:
        """Add the hooks again after all hooks of the model were removed, including permanent ones."""
        for i, (point, fn, handle) in enumerate(self._hooks):
            if all(held is not handle for held in point.fwd_hooks):
                point.add_hook(fn, is_permanent=True)
                self._hooks[i] = (point, fn, point.fwd_hooks[-1])

    def claim_names(self) -> None:
        """Name the hook points after the hook where the coder is attached, also in a copy of the model."""

    def _hook(self, point: Any, fn: Callable[..., torch.Tensor | None]) -> None:
        point.add_hook(fn, is_permanent=True)
        self._hooks.append((point, fn, point.fwd_hooks[-1]))

    def _on_read(self, value: torch.Tensor, hook: Any) -> None:
        self.owner.check(f"{self.what} was attached at {self.write_name}")
        self._keep_read(value)

    def _on_write(self, value: torch.Tensor, hook: Any) -> torch.Tensor:
        self.owner.check(f"{self.what} was attached at {self.write_name}")
        source = self._take_read() if self.site.is_transcoder else value
        return self.replace(source, value, self._untouched(value))

    def _keep_read(self, value: torch.Tensor) -> None:
        """Keep the input of a transcoder until its output is written."""
        raise NotImplementedError  # pragma: no cover - an abstract method

    def _take_read(self) -> torch.Tensor:
        """The input of a transcoder, which is forgotten."""
        raise NotImplementedError  # pragma: no cover - an abstract method

    def _untouched(self, value: torch.Tensor) -> torch.Tensor | None:
        """True at positions (``[batch, pos]``) that keep the model's activation; None if there are none.

        It is computed once in a pass for all SAEs that were attached with the same options.
        """
        padding = self.options.exclude_special_tokens is True
        keep = self._tracker.mask(value, self.excluded, padding) if self.excluded else None
        positions = self.positions
        if positions is None:
            return keep

        def outside() -> torch.Tensor:
            chosen = chosen_columns(positions, rows_of(value, self._tracker))
            beyond = ~chosen[:, -value.shape[1] :]
            return beyond if keep is None else keep | beyond

        key = (id(positions), self.excluded, padding, value.shape[:2], value.device)
        return self._tracker.once(key, positions, outside)

    def replace(self, source: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Reconstruct ``target`` from ``source``, but keep ``target`` where ``mask`` (``[batch, pos]``) is True.

        With the error term the result is ``x̂ + (target - x̂_clean)``, where x̂_clean is the reconstruction without the
        hooks on the SAE, and the error has no gradient. It is computed in the wider of the two dtypes, so that an
        unedited pass gives ``target`` up to rounding in that dtype, and returned in the dtype of ``target``.

        Hooks on ``hook_sae_error`` and ``hook_sae_output`` receive a dimension of heads on HookedTransformer, as in
        SAELens's models. All other hook points of the SAE are flat. An SAE on another device than ``target`` is moved
        there permanently.
        """
        self._move_to(target.device)
        wide = torch.promote_types(target.dtype, self.sae.dtype)  # so that kept activations do not change
        x, y = flatten_heads(source), flatten_heads(target).to(wide)
        out, clean = self._pass(x)
        if self.error_term:
            with torch.no_grad():
                error = y - clean
                error = error if mask is None else error.masked_fill(mask.unsqueeze(-1), 0.0)
                error = self._point("hook_sae_error")(self._shown(error, target))
            out = out + flatten_heads(error)
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), y, out)
        return unflatten_heads(self._point("hook_sae_output")(self._shown(out, target)).to(target.dtype), target)

    def _shown(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return unflatten_heads(x, like) if self._heads_apart else x

    def _point(self, name: str) -> Any:
        return self.hook_points[f"{self.name}.{name}"]

    def _move_to(self, device: torch.device) -> None:
        """Move the coder to the device of the model's tensors."""
        raise NotImplementedError  # pragma: no cover - an abstract method

    def _pass(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The reconstruction with hooks, and without them if the error term needs it."""
        raise NotImplementedError  # pragma: no cover - an abstract method


def remove_handle(held: list[Any], handle: Any) -> None:
    """Remove one hook from a hook point, whose list of hooks is ``held``."""
    handle.hook.remove()
    held[:] = [one for one in held if one is not handle]
