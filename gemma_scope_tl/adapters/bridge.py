"""Gemma 2 on ``TransformerBridge``: Hugging Face's own forward pass with hooks, one copy of the weights."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

from gemma_scope_tl.adapters.base import GemmaModel, HookName
from gemma_scope_tl.adapters.tokenizer import HasTokenizer
from gemma_scope_tl.sites import Backend, ModelDims

ARCHITECTURE = "Gemma2ForCausalLM"


class GemmaBridge(HasTokenizer, GemmaModel, TransformerBridge):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A Gemma 2 ``TransformerBridge`` with the SAE methods of this package. Made by ``load_model``."""

    backend: Backend = "bridge"

    @property
    def hook_dict(self) -> dict[str, Any]:
        """Every hook point, by canonical and by alias name; those of attached SAEs too."""
        return {**super().hook_dict, **self.sae_hook_points()}

    def site_hook_point(self, name: str) -> Any:
        """As in the base class, without putting together all aliases of all hooks."""
        return self.get_hook_point(name) or super().site_hook_point(name)

    def _add_hook(self, name: HookName, *args: Any, **kwargs: Any) -> None:
        if not isinstance(name, str):  # a filter
            super()._add_hook(name, *args, **kwargs)
            return
        self.check_hooks_to_add(name)
        self.hook_dict[name].add_hook(*args, **kwargs)  # TransformerBridge walks attributes, which SAEs are not

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Any = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove the user's hooks, also those on the hook points of attached SAEs; the SAEs stay."""
        super().reset_hooks(clear_contexts, direction, including_permanent, level)
        for point in self.sae_hook_points().values():
            point.remove_hooks(direction, including_permanent, level)

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; a key-value cache goes to Hugging Face under the name its version uses."""
        cache = kwargs.pop("past_key_values", None)
        if cache is not None:
            parameters = inspect.signature(type(self.original_model).forward).parameters
            kwargs["cache" if "cache" in parameters else "past_key_values"] = cache
        return super().forward(input, *args, **kwargs)

    def generate(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; a left-padded tensor of ids gets its mask, and attached SAEs know the token ids."""
        if not args and (mask := self._derived_mask(input, kwargs)) is not None:
            kwargs["attention_mask"] = mask
        kwargs.setdefault("verbose", False)
        with self.token_tracker.generation():
            return super().generate(input, *args, **kwargs)

    def hf_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``generate`` on the hooked model; attached SAEs know the token ids."""
        with self.token_tracker.generation():
            return super().hf_generate(*args, **kwargs)

    def read_cache_kwarg(self) -> None:
        """Make attention find its cache under the name that newer transformers versions give it.

        transformers 5.24 hands Gemma 2's attention ``cache=`` where it was ``past_key_values=``; an attention bridge
        that does not know the name attends to the new token alone. Applied to this model's own blocks, and only after
        the defect was seen there (``repairs.py``).
        """
        for block in self.blocks:
            block.attn._update_kv_cache = partial(_update_kv_cache, block.attn)  # a copy of a model copies it too
        self.fixes.append("attention reads its cache from the keyword `cache`")


def _update_kv_cache(attention: Any, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> Any:
    if kwargs.get("past_key_values") is None and kwargs.get("cache") is not None:
        kwargs["past_key_values"] = kwargs["cache"]
    return type(attention)._update_kv_cache(attention, k, v, **kwargs)


def build_bridge(hf_model: Any, tokenizer: Any, model_id: str | None) -> GemmaBridge:
    """Wrap ``hf_model`` in place: its weights are not copied, and it still computes the same."""
    parameter = next(hf_model.parameters())
    config = build_bridge_config_from_hf(hf_model.config, ARCHITECTURE, model_id or "gemma-2", parameter.dtype)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    adapter.cfg.device = str(parameter.device)
    adapter.prepare_model(hf_model)
    bridge = GemmaBridge(hf_model, adapter, tokenizer)
    bridge.prepare(ModelDims.from_config(hf_model.config), model_id)
    return bridge.eval()
