"""SAEs inside hooked forward passes: replace an activation by its reconstruction, with or without the error term.

An SAE is attached as an ordinary hook on the site's own ``HookPoint``. Nothing is swapped in the model, so detaching
restores it exactly, the user's own hooks stay where they are and keep firing, and both backends behave the same.

While attached, the SAE's hook points answer to ``<site's HookedTransformer hook>.hook_sae_acts_post`` and the like, on
both backends: these are the cache keys of SAELens. A hook on one of them edits the features.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.attached import AttachedSAE, locate
from gemma_scope_tl.errors import SpliceError, UnknownNameError, unknown_name
from gemma_scope_tl.positions import Positions
from gemma_scope_tl.sites import Backend, ModelDims, Site, site_of_hook
from gemma_scope_tl.tokens import ExcludeTokens, TokenTracker, excluded_ids

if TYPE_CHECKING:
    from sae_lens import SAE


class SpliceMixin:
    """SAE methods of a hooked model, with the names and cache keys of SAELens's ``HookedSAETransformer``.

    The class that mixes this in is a :class:`~gemma_scope_tl.adapters.base.GemmaModel`.
    """

    backend: Backend
    dims: ModelDims
    token_tracker: TokenTracker
    _attached: dict[str, AttachedSAE]

    @property
    def acts_to_saes(self) -> dict[str, SAE[Any]]:
        """The attached SAEs, by the HookedTransformer name of the hook that each reads; later ones of a chain with
        ``.1`` and so on behind it."""
        named = ((one.read_name + (f".{one.stage}" if one.stage else ""), one.sae) for one in self._attached.values())
        return dict(named)

    def add_sae(
        self,
        sae: SAE[Any],
        use_error_term: bool | None = None,
        exclude_special_tokens: ExcludeTokens = True,
        positions: Positions = None,
        chain: bool = False,
    ) -> None:
        """Attach ``sae`` until :meth:`reset_saes`.

        Args:
            sae: any SAELens SAE or transcoder at a Gemma Scope site.
            use_error_term: add what the SAE misses, so that the pass is unchanged until a feature is edited. None keeps
                the SAE's own setting.
            exclude_special_tokens: leave BOS, EOS and padding alone (default), or the given token ids, or none.
            positions: splice only there; they count in the text (``positions.py``), through padding and in every step
                of generation. None for all.
            chain: where another SAE writes already, read that SAE's output and write after it, under the hook names
                ``<hook>.1.hook_sae_acts_post`` and so on.

        Raises:
            SpliceError: another model, width or layer; a site that is taken; an SAE that is attached already.
        """
        site, layer = locate(sae)
        self._check_fits(sae, site, layer)
        if any(attached.sae is sae for attached in self._attached.values()):
            raise SpliceError("This SAE is attached already. Detach it with reset_saes() first.")
        excluded = self.excluded_ids(exclude_special_tokens)
        error_term = bool(sae.use_error_term if use_error_term is None else use_error_term)
        stage = self._next_stage(site.hook_name_out(layer, "hooked_transformer"), chain, site.is_transcoder)
        attached = AttachedSAE(sae, site, layer, error_term, excluded, positions, stage)
        try:
            attached.attach(self)  # pyright: ignore[reportArgumentType]
        except BaseException:
            attached.detach()
            raise
        self._attached[attached.name] = attached
        self._after_attach(attached)

    def reset_saes(self, act_names: str | Iterable[str] | None = None) -> None:
        """Detach the SAEs that read these hooks (either backend's names), or all of them.

        Raises:
            UnknownNameError: when no SAE is attached there.
        """
        if act_names is None:
            names = list(dict.fromkeys(attached.read_name for attached in self._attached.values()))
        else:
            names = [act_names] if isinstance(act_names, str) else list(act_names)
        for name in names:
            self._remove(self._find(name))

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens: remove hooks, with ``including_permanent=True`` all of them; attached SAEs stay."""
        super().reset_hooks(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for attached in self._attached.values():
            attached.put_back()

    def get_sae_hook_name(self, sae: SAE[Any], internal: str = "hook_sae_acts_post") -> str:
        """Name of a hook point of ``sae`` while it is attached: the key in caches, on both backends."""
        for attached in self._attached.values():
            if attached.sae is sae:
                return f"{attached.name}.{internal}"
        site, layer = locate(sae)
        return f"{site.hook_name_out(layer, 'hooked_transformer')}.{internal}"

    @contextmanager
    def saes(
        self,
        saes: SAE[Any] | Iterable[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: ExcludeTokens = True,
        positions: Positions = None,
        chain: bool = False,
    ) -> Generator[SpliceMixin]:
        """Attach ``saes`` inside the block; all of them or, on an error, none."""
        added: list[AttachedSAE] = []
        try:
            for sae in _as_list(saes):
                self.add_sae(sae, use_error_term, exclude_special_tokens, positions, chain)
                added.append(next(reversed(self._attached.values())))
            yield self
        except BaseException:
            self._remove(added)
            raise
        if reset_saes_end:
            self._remove(added)

    def run_with_saes(
        self,
        *model_args: Any,
        saes: SAE[Any] | Iterable[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: ExcludeTokens = True,
        positions: Positions = None,
        chain: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """One forward pass with ``saes`` attached."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens, positions, chain):
            return self(*model_args, **model_kwargs)  # pyright: ignore[reportCallIssue]

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: SAE[Any] | Iterable[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: ExcludeTokens = True,
        positions: Positions = None,
        chain: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """``run_with_cache`` with ``saes`` attached; features under ``<hook>.hook_sae_acts_post``."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens, positions, chain):
            return self.run_with_cache(*model_args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: SAE[Any] | Iterable[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: ExcludeTokens = True,
        positions: Positions = None,
        chain: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``run_with_hooks`` with ``saes`` attached; hooks may name the SAEs' own hook points."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens, positions, chain):
            return self.run_with_hooks(*model_args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def sae_hook_points(self) -> dict[str, Any]:
        """Hook points of all attached SAEs, by full name."""
        return {name: point for attached in self._attached.values() for name, point in attached.hook_points.items()}

    def _check_fits(self, sae: SAE[Any], site: Site, layer: int | None) -> None:
        site.check_layer(layer, self.dims)
        d_in = site.d_in(self.dims)
        if sae.cfg.d_in != d_in:
            raise SpliceError(
                f"The SAE reads {sae.cfg.d_in} dimensions, but site {site.name!r} of this model has {d_in}: "
                "it belongs to another model."
            )
        theirs = getattr(sae, "model_name", None) or sae.cfg.metadata.model_name
        ours = getattr(self, "model_id", None)
        if theirs and ours and _family(theirs) != _family(ours):
            raise SpliceError(f"The SAE was trained on {theirs!r}; this model is {ours!r}.")

    def excluded_ids(self, exclude: ExcludeTokens = True) -> tuple[int, ...]:
        """The token ids that ``exclude_special_tokens`` names (:func:`~gemma_scope_tl.tokens.excluded_ids`).

        Raises:
            SpliceError: for True where no tokenizer says which ids are special; for what is no choice of ids.
        """
        return excluded_ids(getattr(self, "tokenizer", None), exclude, must_know=True)

    def _next_stage(self, write_name: str, chain: bool, is_transcoder: bool) -> int:
        """The place of one more SAE that writes there: 0 where there is none."""
        stages = [attached.stage for attached in self._attached.values() if attached.write_name == write_name]
        if stages and not chain:
            raise SpliceError(
                f"{write_name} is taken: another SAE writes there. Detach that with reset_saes() first, or pass "
                "chain=True to read its output."
            )
        if stages and is_transcoder:
            raise SpliceError(f"A transcoder reads elsewhere, so it cannot follow the SAE at {write_name} in a chain.")
        return max(stages, default=-1) + 1

    def _find(self, name: str) -> list[AttachedSAE]:
        """The SAEs that read a hook, all of a chain."""
        names = {id(one): (one.read_name, one.site.hook_name(one.layer, "bridge")) for one in self._attached.values()}
        found = [one for one in self._attached.values() if name in names[id(one)]]
        if not found:
            raise unknown_name("attached SAE", name, self.acts_to_saes)
        return found

    def _remove(self, attached: list[AttachedSAE]) -> None:
        for one in reversed(attached):
            if self._attached.get(one.name) is one:
                del self._attached[one.name]
                self._after_detach(one)
            one.detach()

    def _after_attach(self, attached: AttachedSAE) -> None:
        """For a backend that keeps its hook points in a plain dict."""

    def _after_detach(self, attached: AttachedSAE) -> None:
        """For a backend that keeps its hook points in a plain dict."""


def splice(
    model: Any,
    saes: SAE[Any] | Iterable[SAE[Any]],
    error_term: bool | None = None,
    exclude_special_tokens: ExcludeTokens = True,
    positions: Positions = None,
    chain: bool = False,
) -> AbstractContextManager[Any]:
    """Attach ``saes`` to a model from :func:`~gemma_scope_tl.load_model` inside a ``with`` block.

    Everything inside runs through them: forward passes, caches, hooks and ``generate``. Arguments as
    :meth:`SpliceMixin.add_sae`, ``error_term`` being its ``use_error_term``.

    Raises:
        SpliceError: when the model does not come from ``load_model``, or an SAE does not fit.
    """
    if not isinstance(model, SpliceMixin):
        raise SpliceError("splice() needs a model from gemma_scope_tl.load_model(); wrap yours with hf_model=.")
    return model.saes(
        saes,
        use_error_term=error_term,
        exclude_special_tokens=exclude_special_tokens,
        positions=positions,
        chain=chain,
    )


def translate_hook_name(name: str, valid: Iterable[str], backend: Backend) -> str:
    """``name`` if the model has it, else the other backend's name for the same site, also below attached SAEs.

    Raises:
        UnknownNameError: when there is no such hook, with the nearest names.
    """
    names = valid if isinstance(valid, (set, dict, frozenset)) else set(valid)
    if name in names:
        return name
    base, dot, internal = name.partition(".hook_sae_")
    try:
        site, layer = site_of_hook(base)
        inside = f"{site.hook_name_out(layer, 'hooked_transformer')}{dot}{internal}"
        translated = inside if dot else site.hook_name(layer, backend)
    except (UnknownNameError, SpliceError):
        translated = None
    if translated is not None and translated in names:
        return translated
    hint = "No SAE with that hook is attached." if dot else ""
    raise unknown_name("hook", name, names, hint)


def _as_list(saes: SAE[Any] | Iterable[SAE[Any]]) -> list[SAE[Any]]:
    return [saes] if isinstance(saes, torch.nn.Module) else list(saes)


def _family(model_name: str) -> str:
    """Name without owner, and without ``-it``: SAEs of a base model may be spliced into its IT model (section 4.5)."""
    return model_name.split("/")[-1].lower().removesuffix("-it")
