"""One SAE on one model: a hook that puts its reconstruction in the place of an activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.positions import Positions, chosen_columns, rows_of
from gemma_scope_tl.sae.base import GemmaScopeMixin
from gemma_scope_tl.sae.hooked_pass import hooked_pass, is_hooked
from gemma_scope_tl.sites import Site, flatten_heads, get_site, site_of_hook, unflatten_heads

if TYPE_CHECKING:
    from sae_lens import SAE

    from gemma_scope_tl.adapters.base import GemmaModel

_names: WeakKeyDictionary[torch.nn.Module, list[str]] = WeakKeyDictionary()  # of hook points, from all models, in order


def locate(sae: SAE[Any]) -> tuple[Site, int | None]:
    """The site and layer that ``sae`` belongs to, from itself or from its SAELens metadata.

    Raises:
        SpliceError: when it does not say.
    """
    name = getattr(sae, "site", None)
    if name is not None:
        return get_site(name), getattr(sae, "layer", None)
    hook = sae.cfg.metadata.hook_name
    if hook is None:
        raise SpliceError("This SAE does not say where it belongs: load it with site= and layer=.")
    return site_of_hook(hook, sae.cfg.metadata.hook_name_out)


def decode_with_skip(sae: SAE[Any], acts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The whole output for latents ``acts`` of ``x``: of a skip transcoder, ``decode`` alone is only a part."""
    out = sae.decode(acts)
    w_skip = getattr(sae, "W_skip", None)
    return out if w_skip is None else out + x.to(out.dtype) @ w_skip.T


class AttachedSAE:
    """One SAE on one model: where it reads and writes, and how its output replaces the activation."""

    def __init__(
        self,
        sae: SAE[Any],
        site: Site,
        layer: int | None,
        error_term: bool,
        excluded: tuple[int, ...],
        positions: Positions = None,
        stage: int = 0,
    ) -> None:
        self.sae, self.site, self.layer = sae, site, layer
        self.error_term, self.excluded, self.positions = error_term, excluded, positions
        self.read_name = site.hook_name(layer, "hooked_transformer")
        self.write_name = site.hook_name_out(layer, "hooked_transformer")
        self.stage = stage  # 0, or the place in a chain of SAEs that write here
        self.name = self.write_name + (f".{stage}" if stage else "")
        self.hook_points = {f"{self.name}.{name}": point for name, point in sae.hook_dict.items()}
        self._read: torch.Tensor | None = None
        self._detachers: list[Callable[[], None]] = []
        self._hooks: list[tuple[Any, Callable[..., torch.Tensor | None], Any]] = []  # point, function, handle

    def attach(self, model: GemmaModel) -> None:
        """Put the hooks on ``model``'s hook points; :meth:`detach` takes back exactly these."""
        self._tracker, self._tokenizer = model.token_tracker, getattr(model, "tokenizer", None)
        if self.site.is_transcoder:
            self._hook(model.site_hook_point(self.site.hook_name(self.layer, model.backend)), self._on_read)
        self._hook(model.site_hook_point(self.site.hook_name_out(self.layer, model.backend)), self._on_write)
        for short_name, point in self.sae.hook_dict.items():
            before = {id(handle) for handle in (*point.fwd_hooks, *point.bwd_hooks)}
            self._detachers.append(partial(_end_blocks, point, before))
            self._detachers.append(_rename(point, f"{self.name}.{short_name}", short_name))
        stock = not isinstance(self.sae, GemmaScopeMixin)
        if stock and getattr(self.sae, "hook_z_reshaping_mode", False):  # heads are flattened here, stock SAEs are told
            self.sae.turn_off_forward_pass_hook_z_reshaping()
            self._detachers.append(self.sae.turn_on_forward_pass_hook_z_reshaping)

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        while self._detachers:
            self._detachers.pop()()
        for point, _, handle in self._hooks:
            _remove(point.fwd_hooks, handle)
        self._hooks.clear()
        self._read = None

    def put_back(self) -> None:
        """Hook the model again where something else removed these hooks, permanent ones included."""
        for i, (point, fn, handle) in enumerate(self._hooks):
            if all(held is not handle for held in point.fwd_hooks):
                point.add_hook(fn, is_permanent=True)
                self._hooks[i] = (point, fn, point.fwd_hooks[-1])

    def _hook(self, point: Any, fn: Callable[..., torch.Tensor | None]) -> None:
        point.add_hook(fn, is_permanent=True)
        self._hooks.append((point, fn, point.fwd_hooks[-1]))

    def _on_read(self, value: torch.Tensor, hook: Any) -> None:
        self._read = value

    def _on_write(self, value: torch.Tensor, hook: Any) -> torch.Tensor:
        source = value
        if self.site.is_transcoder:
            if self._read is None:
                raise SpliceError(f"The transcoder at {self.read_name} saw no input in this forward pass.")
            source, self._read = self._read, None
        return self.replace(source, value, self._untouched(value))

    def _untouched(self, value: torch.Tensor) -> torch.Tensor | None:
        """True at positions (``[batch, pos]``) that keep the model's activation; None when there are none."""
        keep = self._tracker.mask(value, self.excluded) if self.excluded else None
        if self.positions is None:
            return keep
        chosen = chosen_columns(self.positions, rows_of(value, self._tracker, self._tokenizer))
        outside = ~chosen[:, -value.shape[1] :]
        return outside if keep is None else keep | outside

    def replace(self, source: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Reconstruct ``target`` from ``source``, but keep ``target`` itself where ``mask`` (``[batch, pos]``) is True.

        With the error term the result is ``x̂ + (target - x̂_clean)``, where the clean reconstruction knows nothing of
        the hooks on the SAE; the error carries no gradient. It is computed in the wider of both dtypes, so that an
        unedited pass gives ``target`` to that dtype's rounding, and returned in ``target``'s.
        """
        wide = torch.promote_types(target.dtype, self.sae.dtype)  # so that what is kept is kept exactly
        x, y = flatten_heads(source), flatten_heads(target).to(wide)
        out, clean = self._pass(x)
        if self.error_term:
            with torch.no_grad():
                error = y - clean
                error = error if mask is None else error.masked_fill(mask.unsqueeze(-1), 0.0)
                error = self.sae.hook_sae_error(error)
            out = out + error
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), y, out)
        return unflatten_heads(self.sae.hook_sae_output(out).to(target.dtype), target)

    def _pass(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction with hooks, and without them where the error term asks for it."""
        if isinstance(self.sae, GemmaScopeMixin):
            done = hooked_pass(self.sae, x, need_clean=self.error_term)
            return done.out, done.clean
        x = x.to(self.sae.dtype)
        offered = x.clone() if is_hooked(self.sae.hook_sae_input) else x  # hooks write in place, and x is the model's
        out = decode_with_skip(self.sae, self.sae.encode(offered), x)
        if not self.error_term or not any(map(is_hooked, self.hook_points.values())):
            return out, out
        with torch.no_grad(), _disable_hooks(self.sae):
            return out, decode_with_skip(self.sae, self.sae.encode(x), x)


def _rename(point: Any, name: str, short_name: str) -> Callable[[], None]:
    """Name a hook point of an SAE; what is returned takes the name back, in whatever order models let go of the SAE."""
    names = _names.setdefault(point, [])
    names.append(name)
    vars(point)["name"] = name  # past torch's __setattr__, which would take a third of attaching's time

    def take_back() -> None:
        names.remove(name)
        vars(point)["name"] = names[-1] if names else short_name

    return take_back


def _end_blocks(point: Any, before: set[int]) -> None:
    """Remove what ``model.hooks`` blocks put on an SAE's hook point: once detached, the end of a block misses it."""
    for held in (point.fwd_hooks, point.bwd_hooks):
        for handle in [one for one in held if one.context_level is not None and id(one) not in before]:
            _remove(held, handle)


def _remove(held: list[Any], handle: Any) -> None:
    handle.hook.remove()
    if handle in held:
        held.remove(handle)
