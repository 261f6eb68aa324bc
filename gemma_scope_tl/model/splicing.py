"""The SAE methods of a hooked model, and ``splice``."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Self, Unpack

from gemma_scope_tl.counts import checked_flag
from gemma_scope_tl.errors import SpliceError, unknown_name
from gemma_scope_tl.model import copies
from gemma_scope_tl.model.attached import AttachedSAE
from gemma_scope_tl.model.attached_layer import AttachedLayer, Together
from gemma_scope_tl.model.attachment import Attachment
from gemma_scope_tl.model.fits import FitsMixin
from gemma_scope_tl.model.owners import ADVICE, Owner, Turns
from gemma_scope_tl.model.protocol import BindsToPass
from gemma_scope_tl.model.splice_options import SpliceKeywords, SpliceOptions, shows_options
from gemma_scope_tl.model.tracker import TokenTracker
from gemma_scope_tl.sae.access import locate, places_of
from gemma_scope_tl.sae.choices import as_saes, bring
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sites import Backend

if TYPE_CHECKING:
    from sae_lens import SAE

    Coder = SAE[Any] | LayeredCoder

_bookkeeping = threading.RLock()  # one lock for all models, which is held only while SAEs are attached or detached


class SpliceMixin(FitsMixin):
    """SAE methods of a hooked model, with the names and cache keys of SAELens's ``HookedSAETransformer``.

    The class with this mixin is :class:`~gemma_scope_tl.model.hooked.GemmaModel`.
    """

    backend: Backend
    token_tracker: TokenTracker
    _attached: dict[str, Attachment]
    _turns: Turns

    @property
    def acts_to_saes(self) -> dict[str, Coder]:
        """The attached SAEs by the HookedTransformer name of the hook that each reads.

        The names of later SAEs of a chain end with ``.1`` and so on.
        """
        named = ((one.read_name + (f".{one.stage}" if one.stage else ""), one.sae) for one in self._attached.values())
        return dict(named)

    @shows_options
    def add_sae(self, sae: Coder, *by_position: Any, **options: Unpack[SpliceKeywords]) -> None:
        """Attach ``sae`` until :meth:`reset_saes`, for passes of this thread.

        The SAE is moved in place to the device of the weights at its site, and again when the model moves.

        Args:
            sae: any SAELens SAE or transcoder at a site of the model's family, or a layered coder.
            *by_position: options in the order of :class:`~gemma_scope_tl.model.splice_options.SpliceKeywords`.
            **options: options by the names in that class.

        Raises:
            SpliceError: for an SAE of another model, width or layer, a site that already has an SAE, or an SAE that is
                attached already.
            TypeError: for another keyword, or different values under the two names of the error term.
        """
        chosen, owner = SpliceOptions.of("add_sae", options, by_position, ("sae",)), Owner(thread=True)
        try:
            self._attach(sae, chosen, owner)
        except BaseException:
            owner.release()
            raise

    def reset_saes(self, act_names: str | Iterable[str] | None = None) -> None:
        """Detach the SAEs that read these hooks (names of either backend), or all SAEs.

        Raises:
            UnknownNameError: when no SAE is attached there.
            SpliceError: when another thread attached one of them.
        """
        if act_names is None:
            names = list(dict.fromkeys(attached.read_name for attached in self._attached.values()))
        else:
            names = [act_names] if isinstance(act_names, str) else list(act_names)
        found = list({one.name: one for name in names for one in self._find(name)}.values())
        for one in found:
            if not one.owner.may_undo():
                raise SpliceError(
                    f"The SAE at {one.write_name} was attached by another thread, and must be detached there."
                )
        self._remove(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copies.deep_copy(self, memo)

    def __copy__(self) -> Any:
        return copies.shallow_copy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._attached:
            return copies.reduced(self)
        copies.check_picklable(self)
        return super().__reduce_ex__(protocol)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens.

        Raises:
            SpliceError: while another thread has a block of hooks on this model.
        """
        with self._turns.forward():
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Remove hooks as in TransformerLens; ``including_permanent=True`` removes all. Attached SAEs stay attached."""
        super().reset_hooks(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for attached in self._attached.values():
            attached.put_back()

    def get_sae_hook_name(self, sae: Coder, internal: str = "hook_sae_acts_post", layer: int | None = None) -> str:
        """Name of a hook point of ``sae`` while it is attached, which is its key in caches on both backends.

        Args:
            sae: an SAE, or a layered coder.
            internal: name of the hook point.
            layer: the model's layer, which a layered coder needs.

        Raises:
            SpliceError: for a layer that the coder does not have.
        """
        if isinstance(sae, LayeredCoder):
            if layer is None:
                raise SpliceError(f"A {sae.kind} has hook points in several layers: give layer=.")
            site, layer = places_of(sae, self.family)[sae.index_of(layer)]
        else:
            site, layer = locate(sae, self.family)
        for attached in self._attached.values():
            if attached.sae is sae and attached.layer == layer:
                return f"{attached.name}.{internal}"
        return f"{site.hook_name_out(layer, 'hooked_transformer')}.{internal}"

    @shows_options
    def saes(
        self,
        saes: Coder | Iterable[Coder] = (),
        reset_saes_end: bool = True,
        *by_position: Any,
        **options: Unpack[SpliceKeywords],
    ) -> AbstractContextManager[Self]:
        """Attach ``saes`` inside the block: all of them or, after an error, none.

        They are spliced into passes of this context. A pass of another thread raises, so it never runs silently with or
        without them.

        Args:
            saes: one, several, a mapping of them or a suite. A layered coder, which is attached in all its layers, may
                stand for an SAE.
            reset_saes_end: whether to detach the SAEs at the end of the block. False keeps them, as :meth:`add_sae`.
            *by_position, **options: as for :meth:`add_sae`.

        Raises:
            SpliceError, TypeError: as :meth:`add_sae`.
        """
        chosen = SpliceOptions.of("saes", options, by_position, ("saes", "reset_saes_end"))
        return self._spliced(saes, reset_saes_end, chosen)

    def run_with_saes(
        self,
        *model_args: Any,
        saes: Coder | Iterable[Coder] = (),
        reset_saes_end: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run one forward pass with ``saes`` attached. Keywords are those of :meth:`saes` and of the model's call."""
        with self._spliced(saes, reset_saes_end, SpliceOptions.taken_from(kwargs, "run_with_saes")):
            return self(*model_args, **kwargs)  # pyright: ignore[reportCallIssue]

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: Coder | Iterable[Coder] = (),
        reset_saes_end: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run ``run_with_cache`` with ``saes`` attached. Keywords are those of :meth:`saes` and of ``run_with_cache``.

        The cache has the activations of the latents under ``<hook>.hook_sae_acts_post``, with either backend's name of
        the hook.
        """
        options = SpliceOptions.taken_from(kwargs, "run_with_cache_with_saes")
        with self._spliced(saes, reset_saes_end, options):
            return self.run_with_cache(*model_args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: Coder | Iterable[Coder] = (),
        reset_saes_end: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run ``run_with_hooks`` with ``saes`` attached. Keywords are those of :meth:`saes` and of ``run_with_hooks``.

        Hooks may name the hook points of the SAEs.
        """
        options = SpliceOptions.taken_from(kwargs, "run_with_hooks_with_saes")
        with self._spliced(saes, reset_saes_end, options):
            return self.run_with_hooks(*model_args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def sae_hook_points(self) -> dict[str, Any]:
        """Hook points of all attached SAEs, by full name."""
        return {name: point for attached in self._attached.values() for name, point in attached.hook_points.items()}

    @contextmanager
    def _spliced(self, saes: Any, reset_at_end: bool, options: SpliceOptions) -> Generator[Self]:
        """Attach ``saes`` as :meth:`saes`, with checked options."""
        reset_at_end = checked_flag(reset_at_end, "reset_saes_end", error=SpliceError)
        added: list[Attachment] = []
        owner = Owner()
        try:
            for sae in as_saes(saes, empty=True, whole=True, layered=True):
                added += self._attach(sae, options, owner)
            yield self
        except BaseException:
            self._remove(added)
            owner.release()
            raise
        if reset_at_end:
            self._remove(added)
            owner.release()
        else:
            owner.keep()

    def _check_embedding_is_not_edited(self) -> None:
        """Check, for a pass that begins after the embedding, that it skips no SAE and no intervention there.

        Other functions that are hooked there are skipped as in TransformerLens, since they may only read.

        Raises:
            SpliceError: for an SAE or an intervention on the embedding.
        """
        for attached in self._attached.values():
            if attached.site.joins == "embedding":
                raise SpliceError("A pass from embeddings skips the SAE on the embedding: pass token ids.")
        for site in self.family.sites.values():
            if site.joins != "embedding":
                continue
            name = site.hook_name(None, self.backend)
            point: Any = self.site_hook_point(name)  # pyright: ignore[reportAttributeAccessIssue]
            for handle in point.fwd_hooks:
                edit = handle.user_hook
                if isinstance(getattr(edit, "fn", edit), BindsToPass):
                    raise SpliceError(f"A pass from embeddings skips the intervention on {name}: pass token ids.")

    def _attach(self, sae: Any, options: SpliceOptions, owner: Owner) -> list[Attachment]:
        with _bookkeeping:
            made = self._attachments(sae, options, owner)
            try:
                for attached in made:
                    attached.attach(self)  # pyright: ignore[reportArgumentType]
            except BaseException:
                for attached in made:
                    attached.detach()
                raise
            for attached in made:
                self._attached[attached.name] = attached
                self._after_attach(attached)
            return made

    def _attachments(self, sae: Any, options: SpliceOptions, owner: Owner) -> list[Attachment]:
        """The attachments of an SAE, or those of all layers of a layered coder, after all checks."""
        places = places_of(sae, self.family)
        for site, layer in places:
            self.check_fits(sae, site, layer)
        if any(attached.sae is sae for attached in self._attached.values()):
            raise SpliceError("This SAE is attached already. Detach it with reset_saes() first.")
        excluded = self.excluded_ids(options.exclude_special_tokens)
        stages = [
            self._next_stage(site.hook_name_out(layer, "hooked_transformer"), options.chain, site.is_transcoder)
            for site, layer in places
        ]
        if (device := self.device_of(places[0][1])).type != "meta":  # offloaded weights have no device before a pass
            bring(sae, device)
        common: dict[str, Any] = {"excluded": excluded, "owner": owner}
        if not isinstance(sae, LayeredCoder):
            return [AttachedSAE(sae, *places[0], options, stage=stages[0], **common)]
        together = Together(sae)
        numbered = enumerate(zip(places, stages, strict=True))
        return [AttachedLayer(together, k, *place, options, stage=stage, **common) for k, (place, stage) in numbered]

    def _next_stage(self, write_name: str, chain: bool, is_transcoder: bool) -> int:
        """The position in the chain of a new SAE that writes there: 0 for the first."""
        there = [attached for attached in self._attached.values() if attached.write_name == write_name]
        if there and not all(attached.owner.here() for attached in there):
            raise SpliceError(f"{write_name} is taken: another thread or task has attached an SAE there; {ADVICE}.")
        if there and not chain:
            raise SpliceError(
                f"{write_name} is taken: another SAE writes there. Detach it with reset_saes() first, or pass "
                "chain=True to read its output."
            )
        if there and is_transcoder:
            raise SpliceError(
                f"A transcoder reads another tensor and cannot follow the SAE at {write_name} in a chain."
            )
        return max((attached.stage for attached in there), default=-1) + 1

    def _find(self, name: str) -> list[Attachment]:
        """The SAEs that read a hook, including all SAEs of a chain, and all layers of a layered coder."""
        names = {id(one): (one.read_name, one.site.hook_name(one.layer, "bridge")) for one in self._attached.values()}
        found = [one for one in self._attached.values() if name in names[id(one)]]
        if not found:
            raise unknown_name("attached SAE", name, self.acts_to_saes)
        return [one for one in self._attached.values() if any(one.sae is other.sae for other in found)]

    def _remove(self, attached: list[Attachment]) -> None:
        """Detach in reverse order. An SAE that cannot be detached stays listed; the others are detached."""
        failed: list[Exception] = []
        with _bookkeeping:
            for one in reversed(attached):
                if self._attached.get(one.name) is not one:
                    continue
                try:
                    one.detach()
                except Exception as error:
                    failed.append(error)
                    continue
                del self._attached[one.name]
                self._after_detach(one)
                if all(other.owner is not one.owner for other in self._attached.values()):
                    one.owner.release()
        if failed:
            raise failed[0]

    def _after_attach(self, attached: Attachment) -> None:
        """For a backend that keeps its hook points in a plain dict."""

    def _after_detach(self, attached: Attachment) -> None:
        """For a backend that keeps its hook points in a plain dict."""


@shows_options
def splice(
    model: Any, saes: Coder | Iterable[Coder], *by_position: Any, **options: Unpack[SpliceKeywords]
) -> AbstractContextManager[Any]:
    """Attach ``saes`` to a model from :func:`~gemma_scope_tl.load_model` inside a ``with`` block.

    All passes of this context inside the block run through them: forward passes, caches, hooks and ``generate``. A pass
    of another thread raises. SAEs on another device are moved in place to that of the model.

    Args:
        model: from ``load_model``.
        saes: one, several, a mapping of them or a suite. Layered coders are attached in all their layers.
        *by_position: options in the order of :class:`~gemma_scope_tl.model.splice_options.SpliceKeywords`.
        **options: ``error_term``, ``exclude_special_tokens``, ``positions`` and ``chain`` of that class.

    Raises:
        SpliceError: when the model is not from ``load_model``, or an SAE does not fit.
        TypeError: for another keyword, or different values under the two names of the error term.
    """
    chosen = SpliceOptions.of("splice", options, by_position, ("saes",))
    if not isinstance(model, SpliceMixin):
        raise SpliceError("splice() needs a model from gemma_scope_tl.load_model(); wrap yours with hf_model=.")
    return model.saes(saes, True, **vars(chosen))
