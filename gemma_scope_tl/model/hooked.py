"""The common part of both backends: hook points of sites, checked hook names, and padding masks of passes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import KeywordError, SpliceError, unknown_name
from gemma_scope_tl.families import Family, ModelDims, families
from gemma_scope_tl.model.attachment import Attachment
from gemma_scope_tl.model.generation import Generates
from gemma_scope_tl.model.hook_names import (
    add_other_names,
    filter_of_both,
    listed_hooks,
    other_names,
    positional_hooks,
    translate_hook_name,
)
from gemma_scope_tl.model.keywords import check_keywords, check_layers, named, taken_input
from gemma_scope_tl.model.owners import OwnedHook, Owner, Turns
from gemma_scope_tl.model.protocol import BindsToPass
from gemma_scope_tl.model.splicing import SpliceMixin
from gemma_scope_tl.model.tracker import TokenTracker
from gemma_scope_tl.sites import check_hook_is_not_refused
from gemma_scope_tl.text.batch import as_batch
from gemma_scope_tl.text.tokenizing import text_ids
from gemma_scope_tl.text.tokens import TextRead, attendable, continued_mask, text_mask

HookName = str | Callable[[str], bool]
Hooks = Iterable[tuple[HookName, Callable[..., Any]]]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None

# For type checkers GemmaModel is a module. At run time the backend's class, which it is mixed into, makes it one.
_Module = torch.nn.Module if TYPE_CHECKING else object


class GemmaModel(Generates, SpliceMixin, _Module):
    """A hooked model with the sites of its family, as a mixin for the model class of the backend.

    Attributes:
        backend: ``"bridge"`` or ``"hooked_transformer"``.
        family: the sites, modules and norms of the model.
        dims: layers, widths and heads.
        model_id: the name of the model in SAEs (``"gemma-2-2b"``), or None for an unknown model.
        fixes: the defects of the installed libraries that were found in this model and worked around.
        stop_token_ids: the tokens at which generation stops.
        return_types: the return types of ``forward``.
    """

    return_types: tuple[str | None, ...] = ("logits", "loss", "both", None)
    stop_token_ids: tuple[int, ...] = ()
    family: Family
    model_id: str | None
    fixes: list[str]
    tokenizer: Any
    cfg: Any

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Blocks, norms and matrices, which the backend's class has."""
            ...

    def prepare(self, dims: ModelDims, model_id: str | None, family: Family) -> None:
        """Set up the state of this class. The loader calls it once."""
        self.dims, self.model_id, self.family = dims, model_id, family
        self.fixes = []
        self._attached: dict[str, Attachment] = {}
        self._turns = Turns()
        self.token_tracker = TokenTracker()
        self._watch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore[reportAttributeAccessIssue]
        if "family" not in vars(self):  # pickled before there were families: of the one that was known then
            self.family = families()[0]

    def _check_keeps_gains(self, method: str, folds: bool) -> None:
        """Raise when the weights are to be processed so that a site's tensor would lose the gain of its norm.

        Raises:
            SpliceError: when ``folds`` and the family has such a site.
        """
        sites = [site.name for site in self.family.sites.values() if site.folded_gain]
        if folds and sites:
            raise SpliceError(
                f"{method} would fold the gains of norms into the next matrices, but site {sites[0]!r} of "
                f"{self.family.title} is the output of a norm with its gain. Give fold_ln=False."
            )

    def _watch(self) -> None:
        """Report the inputs of the model to the token tracker."""
        raise NotImplementedError  # pragma: no cover - an abstract method

    def embedding_module(self) -> torch.nn.Module:
        """The module that converts token ids to embeddings."""
        return self.embed  # pyright: ignore[reportAttributeAccessIssue]

    def site_hook_point(self, name: str) -> Any:
        """The ``HookPoint`` with this backend's canonical ``name``.

        Raises:
            UnknownNameError: with the nearest names.
        """
        hooks = self.hook_dict  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return hooks[name]
        except KeyError:
            raise unknown_name("hook", name, hooks) from None

    # -- hook names ---------------------------------------------------------------------------------------------------

    def _check_asked(self, names: Any, fn: Any = None) -> None:
        """Raise for a hook that is mistaken for a site, unless it is asked for by TransformerLens, which caches all."""
        held = fn.fn if isinstance(fn, OwnedHook) else fn
        held = getattr(held, "func", held)  # a partial function
        if str(getattr(held, "__module__", "")).startswith("transformer_lens."):
            return
        for name in [names] if isinstance(names, str) or callable(names) else names or ():
            if isinstance(name, str):
                check_hook_is_not_refused(name, self.family)

    def _resolve_name(self, name: Any, valid: Any) -> Any:
        return translate_hook_name(name, valid, self.backend, self.family) if isinstance(name, str) else name

    def _resolve_hooks(self, hooks: Hooks, owner: Owner | None = None) -> list[tuple[HookName, Callable[..., Any]]]:
        """Hooks with this backend's names, bound to the model. Those of an ``owner`` run only in its passes."""
        listed = listed_hooks(hooks)
        if not listed:
            return []
        valid = self.hook_dict  # pyright: ignore[reportAttributeAccessIssue]
        resolved: list[tuple[HookName, Callable[..., Any]]] = []
        for name, fn in listed:
            self._check_asked(name, fn)
            bound = self._bound(fn)
            owned = bound if owner is None or isinstance(bound, OwnedHook) else OwnedHook(bound, owner)
            resolved.append((self._resolve_filter(name) if callable(name) else self._resolve_name(name, valid), owned))
        return resolved

    def _bound(self, fn: Any) -> Any:
        return fn.bound_to(self) if isinstance(fn, BindsToPass) else fn

    def _resolve_filter(self, names: Any) -> Any:
        if names is None:
            return None
        if callable(names):
            return filter_of_both(names, self._other_names())  # pyright: ignore[reportArgumentType]
        valid = self.hook_dict  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(names, str):
            return self._resolve_name(names, valid)
        return [self._resolve_name(name, valid) for name in names]

    def _other_names(self) -> dict[str, str]:
        return other_names(self._attached.values(), self.family, self.dims, self.backend)

    def run_with_hooks(self, *model_args: Any, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **kwargs: Any) -> Any:
        """Run with hooks as in TransformerLens. Hook names of either backend are accepted, and unknown ones raise.

        Hooks may follow the input as positional arguments, as in TransformerLens's bridge.
        """
        check_keywords(self, "run_with_hooks", kwargs)
        model_args = model_args or (taken_input("run_with_hooks", None, kwargs),)
        model_args, given = positional_hooks(model_args, fwd_hooks, bwd_hooks)
        if len(model_args) > 1:  # arguments after the input and the hooks belong to forward
            kwargs = named(self, "forward", model_args[1:], kwargs)
            model_args = model_args[:1]
        with self._turns.scope() as owner:
            fwd, bwd = self._resolve_hooks(given[0], owner), self._resolve_hooks(given[1])
            if not kwargs.get("reset_hooks_end", True):
                owner.keep()
            return super().run_with_hooks(  # pyright: ignore[reportAttributeAccessIssue]
                *model_args, fwd_hooks=fwd, bwd_hooks=bwd, **kwargs
            )

    def hooks(
        self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), *args: Any, **kwargs: Any
    ) -> AbstractContextManager[Any]:
        """As in TransformerLens, but a hook name of either backend works and an unknown one raises."""
        fwd, bwd = listed_hooks(fwd_hooks), listed_hooks(bwd_hooks)
        self._resolve_hooks([*fwd, *bwd])  # raise for an unknown name here, and not when the block begins
        return self._hooks_block(fwd, bwd, *args, **kwargs)

    @contextmanager
    def _hooks_block(self, fwd_hooks: Hooks, bwd_hooks: Hooks, *args: Any, **kwargs: Any) -> Generator[Any]:
        with self._turns.scope() as owner:
            with self._held_hook_names():
                fwd, bwd = self._resolve_hooks(fwd_hooks, owner), self._resolve_hooks(bwd_hooks)
            if not kwargs.get("reset_hooks_end", args[0] if args else True):
                owner.keep()
            with ExitStack() as stack:
                with self._held_hook_names():
                    block = super().hooks(fwd, bwd, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
                    model = stack.enter_context(block)
                yield model

    def _held_hook_names(self) -> AbstractContextManager[Any]:
        """A block in which the hook points do not change, so that a backend may collect their names once."""
        return nullcontext()

    def run_with_cache(self, *model_args: Any, names_filter: NamesFilter = None, **kwargs: Any) -> Any:
        """Run with a cache as in TransformerLens. An unknown name in ``names_filter`` raises.

        A tensor that is requested by name, of either backend, is in the cache under that name. A filter function is
        called with both names. Without a filter, hook points of attached SAEs are in the cache under both names.
        """
        check_keywords(self, "run_with_cache", kwargs)
        if self.backend == "bridge" and len(model_args) > 1 and not isinstance(model_args[1], bool):
            raise KeywordError(
                "run_with_cache() takes return_cache_object (a bool) after the input on the bridge: give saes=, "
                "names_filter= and return_type= by name."
            )
        model_args = model_args or (taken_input("run_with_cache", None, kwargs),)
        if self.tokenizer is None and model_args and isinstance(model_args[0], str):
            text_ids(None, model_args[:1])  # raises a better error than the bridge's assertion
        self._check_asked(names_filter)
        resolved = self._resolve_filter(names_filter)
        with self._turns.scope():
            output, cache = super().run_with_cache(  # pyright: ignore[reportAttributeAccessIssue]
                *model_args, names_filter=resolved, **kwargs
            )
        stored = getattr(cache, "cache_dict", cache)
        if names_filter is None or callable(names_filter):
            add_other_names(stored, names_filter, self._other_names())
            return output, cache
        if isinstance(names_filter, str):
            names_filter, resolved = [names_filter], [str(resolved)]
        for asked, name in zip(names_filter, resolved, strict=True):
            if asked not in stored and name in stored:
                stored[asked] = stored[name]
        return output, cache

    def add_hook(self, name: HookName, hook_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens, but a hook name of either backend works and an unknown one raises."""
        self._check_asked(name, hook_fn)
        resolved = self._resolve_filter(name)
        self._add_hook(resolved, self._bound(hook_fn), *args, **kwargs)

    def _add_hook(self, name: HookName, *args: Any, **kwargs: Any) -> None:
        super().add_hook(name, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    # -- passes -------------------------------------------------------------------------------------------------------

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass as in TransformerLens, from texts in any form. Padding has no effect.

        Args:
            input: a text, several, token ids, a ``BatchEncoding`` or chat messages, as for
                :func:`~gemma_scope_tl.text.batch.as_batch`; or embeddings ``[batch, pos, d_model]``. Padding on either
                side is masked, unless ``attention_mask=`` is given. The loss is the mean over predictions of text
                tokens from text tokens.
            *args, **kwargs: arguments of the backend's ``forward``.

        Raises:
            UnknownKeywordError: for a keyword that ``forward`` does not accept.
            UnknownNameError: for a return type that does not exist.
        """
        call = self._named_cache(named(self, "forward", args, kwargs))
        input = taken_input("forward", input, call)
        if call.get("return_type", "logits") not in self.return_types:
            given, hint = call["return_type"], "It follows the input; SAEs and hooks are given by name (saes=)."
            shown = given if isinstance(given, str) else f"a {type(given).__name__}"
            raise unknown_name("return_type", shown, map(str, self.return_types), "" if given is shown else hint)
        embedded = isinstance(input, torch.Tensor) and input.is_floating_point() and input.ndim == 3
        check_layers(self, call, embedded)
        if embedded:
            return self._forward_embedded(input, call)
        cache, seen = self._cache_of(call)
        covered = getattr(call.get("attention_mask"), "shape", (0, 0))[-1]
        if cache is not None and isinstance(input, torch.Tensor) and covered > input.shape[-1]:
            seen = max(seen, covered - input.shape[-1])  # a cache may contain more than this model has read
        ids = input[None] if isinstance(input, torch.Tensor) and input.ndim == 1 else input
        own = not seen and isinstance(ids, torch.Tensor) and ids.ndim == 2 and self.token_tracker.goes_on(ids)
        if seen or own:
            return self._forward_on(ids, call, cache, seen, own)
        return self._forward_text(input, call, cache)

    def _forward_text(self, input: Any, call: dict[str, Any], cache: Any) -> Any:
        """Run a pass that begins a text."""
        how = {name: call.pop(name) for name in ("attention_mask", "prepend_bos", "padding_side") if name in call}
        pattern = how.pop("attention_mask") if getattr(how.get("attention_mask"), "ndim", 2) > 2 else None
        batch = as_batch(self, input, **how)
        unpadded = bool(batch.mask.all())
        if pattern is not None:
            call["attention_mask"] = pattern  # a mask of every query, which is the caller's
        elif not unpadded or self.backend == "hooked_transformer":  # which would use the tokenizer otherwise
            call["attention_mask"] = attendable(batch.mask).long()
        wanted = call.get("return_type", "logits")
        ours = wanted in ("loss", "both") and not unpadded
        ours = ours and call.get("labels") is None and call.get("stop_at_layer") is None
        with self.token_tracker.expecting(batch.mask, cache, 0):
            if not ours:
                return super().forward(batch.ids, **call)  # pyright: ignore[reportAttributeAccessIssue]
            per_token = call.pop("loss_per_token", False)
            call["return_type"] = "logits"
            logits = super().forward(batch.ids, **call)  # pyright: ignore[reportAttributeAccessIssue]
        loss = self.loss_fn(logits, batch.ids, attention_mask=batch.mask, per_token=per_token)
        return loss if wanted == "loss" else self._both(logits, loss)

    def _forward_on(self, input: Any, call: dict[str, Any], cache: Any, seen: int, own: bool) -> Any:
        """Run a pass that continues a text, after a key-value cache or as a generation's ``own`` pass."""
        ids = input if isinstance(input, torch.Tensor) else as_batch(self, input, prepend_bos=False).ids
        before, given = self.token_tracker.history(ids, cache, seen, own), call.get("attention_mask")
        pattern = given is not None and given.ndim > 2  # a mask of every query, which is the caller's
        mask = self._mask_behind(before, ids, seen, None if pattern else given)
        if mask is None and given is None and self.token_tracker.holds_padding(cache):
            raise SpliceError(
                "The rows of this key-value cache were reordered or selected, and some have padding: pass "
                "attention_mask= over the whole text."
            )
        if mask is not None and not pattern:
            self._attend(call, attendable(mask), ids.shape[1], before.by_column)
        with self.token_tracker.expecting(mask, cache, seen, own):
            return super().forward(ids, **call)  # pyright: ignore[reportAttributeAccessIssue]

    def _mask_behind(
        self, before: TextRead, ids: torch.Tensor, seen: int, given: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The mask over a text and the ``ids`` after it, from the known mask and the caller's, or None."""
        total, ours = seen + ids.shape[1], before.growing and self.token_tracker.generating
        known = before.mask_over(total, ids.shape[0])
        if given is not None and given.shape[1] >= total and not ours:
            return given[:, -total:].bool().to(ids.device)
        if known is None:
            return None
        known = known.to(ids.device)
        if ours:  # a mask made by the backend
            return known
        if given is None:
            return continued_mask(known, ids, self.tokenizer)
        return torch.cat([known[:, : total - given.shape[1]], given.bool().to(ids.device)], dim=1)

    def _forward_embedded(self, embeddings: Any, call: dict[str, Any]) -> Any:
        """Run a pass from embeddings, or from the residual stream before a layer.

        Raises:
            SpliceError: with an SAE or an intervention on the embedding, which such a pass skips.
        """
        total = embeddings.shape[1] + self._cache_of(call)[1]
        mask = self.token_tracker.growing_mask(total)
        if mask is not None:  # HookedTransformer embeds the ids itself during generation
            call["attention_mask"] = attendable(mask).long()
            with self.token_tracker.under_way():
                return super().forward(embeddings, **call)  # pyright: ignore[reportAttributeAccessIssue]
        if not call.get("start_at_layer"):
            self._check_embedding_is_not_edited()
        with self.token_tracker.expecting(None, None, 0):
            self.token_tracker.clear()
            return super().forward(embeddings, **call)  # pyright: ignore[reportAttributeAccessIssue]

    def loss_fn(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        per_token: bool = False,
    ) -> torch.Tensor:
        """The mean loss of predicting each token from the tokens before it, or the loss of each, as in TransformerLens.

        Args:
            logits: ``[batch, pos, vocab]``.
            tokens: ids ``[batch, pos]``.
            attention_mask: ``[batch, pos]``; by default False at the tokenizer's padding id.
            per_token: whether to return ``[batch, pos - 1]``, zero where a token or its predecessor is padding.
        """
        if attention_mask is None and tokens.ndim == 2:
            mask = text_mask(tokens, self.tokenizer)
            attention_mask = None if bool(mask.all()) else mask
        return super().loss_fn(  # pyright: ignore[reportAttributeAccessIssue]
            logits, tokens, attention_mask, per_token
        )

    def _named_cache(self, call: dict[str, Any]) -> dict[str, Any]:
        """``call`` with its key-value cache under the name in the installed libraries."""
        return call

    def _cache_of(self, call: dict[str, Any]) -> tuple[Any, int]:
        """The key-value cache of a pass (None without a cache), and its number of positions."""
        raise NotImplementedError  # pragma: no cover - an abstract method

    def _attend(self, call: dict[str, Any], mask: torch.Tensor, new: int, by_column: bool) -> None:
        """Set the attention mask and the position ids of a pass over the last ``new`` columns of ``mask``.

        ``by_column`` numbers positions by column, including padding
        (:class:`~gemma_scope_tl.text.tokens.TextRead`).
        """
        raise NotImplementedError  # pragma: no cover - an abstract method

    def _both(self, logits: torch.Tensor, loss: torch.Tensor) -> Any:
        return logits, loss
