"""One SAE attached to one model, by a hook that replaces an activation by its reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.model.owners import Owner
from gemma_scope_tl.model.positions import chosen_columns, rows_of
from gemma_scope_tl.model.protocol import HasSites
from gemma_scope_tl.model.splice_options import SpliceOptions
from gemma_scope_tl.sae.access import decode_with_skip
from gemma_scope_tl.sae.base import GemmaScopeMixin
from gemma_scope_tl.sae.choices import bring
from gemma_scope_tl.sae.hooked_pass import hooked_pass, is_hooked
from gemma_scope_tl.sites import Site, flatten_heads, unflatten_heads

if TYPE_CHECKING:
    from sae_lens import SAE


class AttachedSAE:
    """One SAE attached to one model: the hooks that it reads and writes, and the replacement of the activation.

    Attributes:
        name: prefix of the names of the SAE's hook points, unique on the model.
        owner: the context whose passes may run through the SAE.
        options: the given options, which a copy of the model needs.
    """

    def __init__(
        self,
        sae: SAE[Any],
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
        self.error_term = bool(sae.use_error_term if options.error_term is None else options.error_term)
        self.positions = options.positions
        self.read_name = site.hook_name(layer, "hooked_transformer")
        self.write_name = site.hook_name_out(layer, "hooked_transformer")
        self.name = self.write_name + (f".{stage}" if stage else "")  # stage: the position in a chain, from 0
        self.hook_points = {f"{self.name}.{name}": point for name, point in sae.hook_dict.items()}
        self._read: torch.Tensor | None = None
        self._hooks: list[tuple[Any, Callable[..., torch.Tensor | None], Any]] = []  # point, function, handle
        self._before: list[Any] = []  # handles that were on the SAE's hook points before
        self._named = self._reshaping_off = self._heads_apart = False

    def attach(self, model: HasSites) -> None:
        """Add the hooks to the hook points of ``model``. :meth:`detach` removes exactly these."""
        self._tracker = model.token_tracker
        self._heads_apart = model.backend == "hooked_transformer"
        if self.site.is_transcoder:
            self._hook(model.site_hook_point(self.site.hook_name(self.layer, model.backend)), self._on_read)
        self._hook(model.site_hook_point(self.site.hook_name_out(self.layer, model.backend)), self._on_write)
        self.claim_names()
        stock = not isinstance(self.sae, GemmaScopeMixin)
        if stock and getattr(self.sae, "hook_z_reshaping_mode", False):  # heads are flattened here
            self.sae.turn_off_forward_pass_hook_z_reshaping()
            self._reshaping_off = True

    def detach(self) -> None:
        """Undo :meth:`attach`, starting with the model. It can be called again after an error."""
        self.unhook()
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
        """Remove the hooks from the model without changing the SAE."""
        while self._hooks:
            point, _, handle = self._hooks[-1]
            _remove(point.fwd_hooks, handle)
            self._hooks.pop()
        self._read = None

    def put_back(self) -> None:
        """Add the hooks again after all hooks of the model were removed, including permanent ones."""
        for i, (point, fn, handle) in enumerate(self._hooks):
            if all(held is not handle for held in point.fwd_hooks):
                point.add_hook(fn, is_permanent=True)
                self._hooks[i] = (point, fn, point.fwd_hooks[-1])

    def claim_names(self) -> None:
        """Name the SAE's hook points after the hook where it is attached."""
        points = self.hook_points.values()
        self._before = [handle for point in points for handle in (*point.fwd_hooks, *point.bwd_hooks)]
        names = _given_names(self.sae)
        names.append(self.name)
        _name_points(self.sae, names)
        self._named = True

    def _hook(self, point: Any, fn: Callable[..., torch.Tensor | None]) -> None:
        point.add_hook(fn, is_permanent=True)
        self._hooks.append((point, fn, point.fwd_hooks[-1]))

    def _on_read(self, value: torch.Tensor, hook: Any) -> None:
        self.owner.check(f"An SAE was attached at {self.write_name}")
        self._read = value

    def _on_write(self, value: torch.Tensor, hook: Any) -> torch.Tensor:
        self.owner.check(f"An SAE was attached at {self.write_name}")
        source = value
        if self.site.is_transcoder:
            if self._read is None:
                raise SpliceError(f"The transcoder at {self.read_name} read no input in this forward pass.")
            source, self._read = self._read, None
        return self.replace(source, value, self._untouched(value))

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
        bring(self.sae, target.device)
        wide = torch.promote_types(target.dtype, self.sae.dtype)  # so that kept activations do not change
        x, y = flatten_heads(source), flatten_heads(target).to(wide)
        out, clean = self._pass(x)
        if self.error_term:
            with torch.no_grad():
                error = y - clean
                error = error if mask is None else error.masked_fill(mask.unsqueeze(-1), 0.0)
                error = self.sae.hook_sae_error(self._shown(error, target))
            out = out + flatten_heads(error)
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), y, out)
        return unflatten_heads(self.sae.hook_sae_output(self._shown(out, target)).to(target.dtype), target)

    def _shown(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return unflatten_heads(x, like) if self._heads_apart else x

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
            _remove(held, handle)


def _remove(held: list[Any], handle: Any) -> None:
    handle.hook.remove()
    held[:] = [one for one in held if one is not handle]
