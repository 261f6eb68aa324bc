"""Models on ``TransformerBridge``, which adds hooks to Hugging Face's forward pass and has one copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

from gemma_scope_tl.families import Backend, Family, ModelDims
from gemma_scope_tl.model.generation import TrackedGenerate, fill_id, prompts_of, stop_ids
from gemma_scope_tl.model.hooked import GemmaModel, HookName
from gemma_scope_tl.model.keywords import cache_name, named, taken_input
from gemma_scope_tl.model.tokenizer import HasTokenizer
from gemma_scope_tl.text.tokens import attendable


class GemmaBridge(HasTokenizer, GemmaModel, TransformerBridge):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A ``TransformerBridge`` with the SAE methods of this package. Made by ``load_model``."""

    backend: Backend = "bridge"
    return_types = (*GemmaModel.return_types, "logits_and_cache")

    @property
    def hook_dict(self) -> dict[str, Any]:
        """Every hook point by its canonical and alias names, including those of attached SAEs."""
        held = self.__dict__.get("_held_hooks")
        return {**super().hook_dict, **self.sae_hook_points()} if held is None else held

    @contextmanager
    def _held_hook_names(self) -> Generator[None]:
        """Collect the names once for all hooks of a block.

        TransformerLens asks for them again for every hook that it adds, and to collect them takes 10 ms at 26 layers.
        """
        if "_held_hooks" in self.__dict__:
            yield
            return
        self.__dict__["_held_hooks"] = self.hook_dict
        try:
            yield
        finally:
            del self.__dict__["_held_hooks"]

    def site_hook_point(self, name: str) -> Any:
        """Return a hook point as in the base class, without collecting all aliases of all hooks."""
        return self.get_hook_point(name) or super().site_hook_point(name)

    def _add_hook(self, name: HookName, *args: Any, **kwargs: Any) -> None:
        if not isinstance(name, str):  # a filter
            super()._add_hook(name, *args, **kwargs)
            return
        self.check_hooks_to_add(name)
        self.hook_dict[name].add_hook(
            *args, **kwargs
        )  # TransformerBridge follows attributes, and SAEs are not attributes

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Any = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove the user's hooks, including those on the hook points of attached SAEs. The SAEs stay attached."""
        super().reset_hooks(clear_contexts, direction, including_permanent, level)
        for point in self.sae_hook_points().values():
            point.remove_hooks(direction, including_permanent, level)

    def _watch(self) -> None:
        """Read token ids at Hugging Face's decoder, where every pass begins, independently of the caller."""
        hf_model: Any = self.original_model
        decoder = hf_model.get_submodule(self.family.decoder)
        decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        decoder.register_forward_hook(self._after_decoder, with_kwargs=True, always_call=True)
        hf_model.generate = TrackedGenerate(hf_model, self)

    def _before_decoder(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.token_tracker.enter()  # the hook after the decoder calls leave(), also when the pass fails
        ids = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        seen = 0 if cache is None else int(cache.get_seq_length())
        if ids is None:
            self._check_embedding_is_not_edited()
            self.token_tracker.observe(None)
            return
        given = kwargs.get("attention_mask")
        if isinstance(given, torch.Tensor) and given.ndim == 2 and self.token_tracker.expected is None:
            mask = given.bool()
        else:
            mask = self.token_tracker.expected_mask(ids, self.tokenizer)
        self.token_tracker.observe(ids, mask, cache, seen, by_column=kwargs.get("position_ids") is None)

    def _after_decoder(self, _module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = getattr(output, "cache", getattr(output, "past_key_values", None))
        self.token_tracker.remember(kwargs.get("cache", kwargs.get("past_key_values")) if cache is None else cache)
        self.token_tracker.leave()

    def _named_cache(self, call: dict[str, Any]) -> dict[str, Any]:
        cache = call.pop("past_key_values", None)
        if cache is not None:
            call[cache_name(type(self.original_model))] = cache
        return call

    def _cache_of(self, call: dict[str, Any]) -> tuple[Any, int]:
        cache = call.get("cache", call.get("past_key_values"))
        return cache, 0 if cache is None else int(cache.get_seq_length())

    def _attend(self, call: dict[str, Any], mask: torch.Tensor, new: int, by_column: bool) -> None:
        call["attention_mask"] = mask.long()
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if by_column:  # without position_ids, Hugging Face counts padding too
            columns = torch.arange(mask.shape[1], device=mask.device).expand_as(positions)
            positions = torch.where(mask[:, :1], positions, columns)
        call["position_ids"] = positions[:, -new:]

    def hf_generate(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Run Hugging Face's ``generate`` on the hooked model. Attached SAEs have access to the token ids.

        Args:
            input: as for :meth:`generate`, also as ``input_ids=``.
            *args, **kwargs: the arguments of TransformerLens's ``hf_generate``, with its defaults (it samples), and all
                arguments of Hugging Face. Without ``eos_token_id`` it stops at the model's stop tokens.

        Returns:
            Text for texts, ids for ids, or the type that ``return_type`` names. Ids are in a ``ModelOutput`` if Hugging
            Face's options request one. A single text gives a text, or a list with ``num_return_sequences`` above 1.

        Raises:
            UnknownKeywordError: for a keyword that neither library accepts.
            GemmaScopeError: as :meth:`generate`.
        """
        call = self._named_cache(named(self, "hf_generate", args, kwargs))
        input = taken_input("hf_generate", input, call)
        single = isinstance(input, str) or getattr(input, "ndim", 1) == 0
        prompts = prompts_of(self, input, call)
        wanted = call.pop("return_type", "input")
        as_text = wanted == "str" or (wanted in ("input", None) and prompts.as_text)
        options, hf_model = self._hf_options(call), cast("Any", self.original_model)
        if prompts.mask is None:
            options["inputs_embeds"] = prompts.ids
        else:
            options |= {"input_ids": prompts.ids, "attention_mask": attendable(prompts.mask).long()}
        with self.token_tracker.running(prompts.generation(by_hugging_face=True)), torch.no_grad():
            output = hf_model.generate(**options)
        if not as_text:
            return output
        rows = getattr(output, "sequences", output)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return texts[0] if single and len(texts) == 1 else texts

    def _hf_options(self, call: dict[str, Any]) -> dict[str, Any]:
        """Convert arguments of TransformerLens's ``hf_generate`` to those of Hugging Face's ``generate``.

        A ``generation_config`` replaces the defaults of ``hf_generate``.
        """
        own = call.get("generation_config") is not None
        options: dict[str, Any] = {} if own else {"max_new_tokens": 10, "do_sample": True, "temperature": 1.0}
        options |= {name: value for name, value in call.items() if value is not None}
        stopping = options.pop("stop_at_eos", True)
        if not options.pop("use_past_kv_cache", True):
            options.setdefault("use_cache", False)
        if stopping and not own:
            options["eos_token_id"] = stop = stop_ids(self, call)
            options.setdefault("pad_token_id", fill_id(self.tokenizer, stop))
        elif not stopping and not own:
            endless = copy.deepcopy(cast("Any", self.original_model).generation_config)
            endless.eos_token_id = None
            options["generation_config"] = endless
        flags = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if any(options.get(flag) for flag in flags):
            options.setdefault("return_dict_in_generate", True)
        return options

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens, except that gains which a site has cannot be folded away.

        Raises:
            SpliceError: for a family with a site behind the gain of a norm, unless ``fold_ln=False`` or
                ``no_processing=True``.
            UnknownKeywordError: for a keyword that does not exist.
        """
        call = named(self, "enable_compatibility_mode", args, kwargs)
        folds = not call.get("no_processing") and call.get("fold_ln", True)
        self._check_keeps_gains("enable_compatibility_mode()", folds)
        super().enable_compatibility_mode(**call)

    def read_cache_kwarg(self) -> None:
        """Make attention accept its cache under the name of newer transformers versions.

        transformers 5.24 passes ``cache=`` to attention instead of ``past_key_values=``. An attention bridge that does
        not accept this name attends only to the new token. The workaround is applied to the blocks of this model, and
        only after the defect was detected there (:func:`~gemma_scope_tl.model.check.repair`).
        """
        for block in self.blocks:
            block.attn._update_kv_cache = partial(_update_kv_cache, block.attn)  # copied with the model
        self.fixes.append("attention reads its cache from the keyword `cache`")


def _update_kv_cache(attention: Any, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> Any:
    if kwargs.get("past_key_values") is None and kwargs.get("cache") is not None:
        kwargs["past_key_values"] = kwargs["cache"]
    return type(attention)._update_kv_cache(attention, k, v, **kwargs)


def build_bridge(hf_model: Any, tokenizer: Any, model_id: str | None, family: Family) -> GemmaBridge:
    """Wrap ``hf_model`` in place. Its weights are not copied, and its outputs do not change."""
    parameter = next(hf_model.parameters())
    config = build_bridge_config_from_hf(hf_model.config, family.architecture, model_id or family.name, parameter.dtype)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    adapter.cfg.device = str(parameter.device)
    adapter.cfg.default_prepend_bos = True  # some adapters say False, and both backends must read the same tokens
    adapter.prepare_model(hf_model)
    bridge = GemmaBridge(hf_model, adapter, tokenizer)
    bridge.prepare(ModelDims.from_config(hf_model.config), model_id, family)
    return bridge.eval()
