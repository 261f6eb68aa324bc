"""What both backends share: site hook points, checked hook names, padding masks, generation that SAEs survive."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gemma_scope_tl.attached import AttachedSAE
from gemma_scope_tl.errors import unknown_name
from gemma_scope_tl.interventions import Intervention
from gemma_scope_tl.owners import OwnedHook, Owner, Turns
from gemma_scope_tl.sites import ModelDims
from gemma_scope_tl.splicing import SpliceMixin, translate_hook_name
from gemma_scope_tl.splicing.names import add_other_names, filter_of_both, other_names, positional_hooks
from gemma_scope_tl.tokens import TokenTracker, left_padding_mask

HookName = str | Callable[[str], bool]
Hooks = Iterable[tuple[HookName, Callable[..., Any]]]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


class GemmaModel(SpliceMixin):
    """A hooked Gemma 2 with the Gemma Scope sites; mixed into the backend's own model class.

    Attributes:
        backend: ``"bridge"`` or ``"hooked_transformer"``.
        dims: layers, widths and heads.
        model_id: the name that SAEs know this model by (``"gemma-2-2b"``), or None for one they cannot know.
        fixes: the defects of the installed TransformerLens that were found here and worked around.
    """

    model_id: str | None
    fixes: list[str]
    tokenizer: Any
    cfg: Any

    def prepare(self, dims: ModelDims, model_id: str | None) -> None:
        """Set up the state this class needs; the loader calls it once."""
        self.dims, self.model_id = dims, model_id
        self.fixes = []
        self._attached: dict[str, AttachedSAE] = {}
        self._turns = Turns()
        self.token_tracker = TokenTracker()
        self.embedding_module().register_forward_pre_hook(self.token_tracker.observe, with_kwargs=True)

    def embedding_module(self) -> torch.nn.Module:
        """The module that turns token ids into embeddings."""
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

    def _resolve_name(self, name: Any, valid: Any) -> Any:
        return translate_hook_name(name, valid, self.backend) if isinstance(name, str) else name

    def _resolve_hooks(self, hooks: Hooks, owner: Owner | None = None) -> list[tuple[HookName, Callable[..., Any]]]:
        """Hooks by the names that they have here, bound to the model; functions of an ``owner`` run for it alone."""
        valid = self.hook_dict  # pyright: ignore[reportAttributeAccessIssue]
        resolved: list[tuple[HookName, Callable[..., Any]]] = []
        for name, fn in hooks:
            bound = self._bound(fn)
            owned = bound if owner is None or isinstance(bound, OwnedHook) else OwnedHook(bound, owner)
            resolved.append((self._resolve_filter(name) if callable(name) else self._resolve_name(name, valid), owned))
        return resolved

    def _bound(self, fn: Any) -> Any:
        return fn.bound_to(self.token_tracker, self.tokenizer) if isinstance(fn, Intervention) else fn

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
        return other_names(self._attached.values(), self.dims, self.backend)

    def run_with_hooks(self, *model_args: Any, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **kwargs: Any) -> Any:
        """As in TransformerLens, but a hook name of either backend works and an unknown one raises.

        Hooks may follow the input as positional arguments, as in TransformerLens's bridge.
        """
        model_args, given = positional_hooks(model_args, fwd_hooks, bwd_hooks)
        with self._turns.scope() as owner:
            fwd, bwd = self._resolve_hooks(given[0], owner), self._resolve_hooks(given[1])
            return super().run_with_hooks(  # pyright: ignore[reportAttributeAccessIssue]
                *model_args, fwd_hooks=fwd, bwd_hooks=bwd, **kwargs
            )

    @contextmanager
    def hooks(self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), *args: Any, **kwargs: Any) -> Generator[Any]:
        """As in TransformerLens, but a hook name of either backend works and an unknown one raises."""
        with self._turns.scope() as owner:
            fwd, bwd = self._resolve_hooks(fwd_hooks, owner), self._resolve_hooks(bwd_hooks)
            with super().hooks(fwd, bwd, *args, **kwargs) as model:  # pyright: ignore[reportAttributeAccessIssue]
                yield model

    def run_with_cache(self, *model_args: Any, names_filter: NamesFilter = None, **kwargs: Any) -> Any:
        """As in TransformerLens, but an unknown name in ``names_filter`` raises.

        What is asked for by name is in the cache under the name that was asked for, either backend's; a function is
        asked about both. Without a filter, hook points of attached SAEs are there under both names.
        """
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
        resolved = self._resolve_filter(name)
        self._add_hook(resolved, self._bound(hook_fn), *args, **kwargs)

    def _add_hook(self, name: HookName, *args: Any, **kwargs: Any) -> None:
        super().add_hook(name, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    # -- tokens and padding -------------------------------------------------------------------------------------------

    def _derived_mask(self, tokens: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The attention mask of left-padded token ids, where the caller gave none and no cache is in play."""
        cached = any(
            kwargs.get(key) is not None for key in ("past_key_values", "cache", "past_kv_cache", "start_at_layer")
        )
        if cached or kwargs.get("attention_mask") is not None:
            return None
        if not isinstance(tokens, torch.Tensor) or tokens.is_floating_point() or self.tokenizer is None:
            return None
        return left_padding_mask(tokens, self.tokenizer)

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; left-padded token ids get their attention mask from the padding token."""
        if not args and (mask := self._derived_mask(input, kwargs)) is not None:
            kwargs["attention_mask"] = mask
        if isinstance(input, torch.Tensor) and input.is_floating_point() and not self.token_tracker.generating:
            self.token_tracker.clear()
        return super().forward(input, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
