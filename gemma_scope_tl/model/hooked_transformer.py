"""Models on ``HookedTransformer``, made from a Hugging Face model without weight processing.

TransformerLens 4 has no ``HookedTransformer``. Only this module imports it, and the module is imported only on request.
A ``HookedTransformer`` has a second copy of the weights (and unties the unembedding), and its results in bfloat16
differ from those of Hugging Face.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedTransformer import Output

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.families import Backend, Family, ModelDims
from gemma_scope_tl.model.attachment import Attachment
from gemma_scope_tl.model.generation import decoded
from gemma_scope_tl.model.hooked import GemmaModel
from gemma_scope_tl.model.tokenizer import HasTokenizer


class HookedGemma(  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    HasTokenizer, GemmaModel, HookedTransformer
):
    """A ``HookedTransformer`` with the SAE methods of this package. Made by ``load_model``."""

    backend: Backend = "hooked_transformer"

    def _watch(self) -> None:
        self.embed.register_forward_pre_hook(self._before_embedding)

    def _before_embedding(self, _module: Any, args: tuple[Any, ...]) -> None:
        self.token_tracker.observe_embedded(args[0], self.tokenizer)

    def _prepared(self, method: str, input: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prompts, call = super()._prepared(method, input, args, kwargs)
        total = prompts.ids.shape[1] + int(call.get("max_new_tokens", 10)) - 1  # the last token is not read again
        if total > int(self.cfg.n_ctx):
            raise GemmaScopeError(
                f"HookedTransformer has positions for {self.cfg.n_ctx} tokens, but {total} are needed: generate "
                'fewer tokens, or load with backend="bridge".'
            )
        return prompts, call

    def _stream(self, pieces: Iterator[Any], return_type: str) -> Iterator[Any]:
        return decoded(pieces, self.tokenizer) if return_type == "str" else pieces

    def _forward_embedded(self, embeddings: Any, call: dict[str, Any]) -> Any:
        call.setdefault("start_at_layer", 0)
        if self.token_tracker.growing_mask(embeddings.shape[1] + self._cache_of(call)[1]) is not None:
            # generate embeds the ids itself and leaves out this hook point. Positions are rotary, so the embedding of
            # the columns of this pass is its residual stream.
            with self.token_tracker.under_way():
                embeddings = self.hook_embed(embeddings)
        return super()._forward_embedded(embeddings, call)

    def _cache_of(self, call: dict[str, Any]) -> tuple[Any, int]:
        cache = call.get("past_kv_cache")
        return cache, 0 if cache is None else int(cache[0].past_keys.shape[1])

    def _attend(self, call: dict[str, Any], mask: torch.Tensor, new: int, by_column: bool) -> None:
        cache = call.get("past_kv_cache")
        if cache is not None:  # the cache has its own mask, in which a row of padding alone had to count as text
            cache.previous_attention_mask = mask[:, :-new].long()
        call["attention_mask"] = (mask if cache is None else mask[:, -new:]).long()

    def _both(self, logits: torch.Tensor, loss: torch.Tensor) -> Any:
        return Output(logits, loss)

    def _after_attach(self, attached: Attachment) -> None:
        self.hook_dict.update(attached.hook_points)
        self.mod_dict.update(attached.hook_points)

    def _after_detach(self, attached: Attachment) -> None:
        for name in attached.hook_points:
            self.hook_dict.pop(name, None)
            self.mod_dict.pop(name, None)

    def process_weights_(self, fold_ln: bool = True, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens, except that gains which a site has cannot be folded away.

        Raises:
            SpliceError: for a family with a site behind the gain of a norm, unless ``fold_ln=False``.
        """
        self._check_keeps_gains("process_weights_()", fold_ln)
        super().process_weights_(fold_ln, *args, **kwargs)

    def to_str_tokens(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Work as in TransformerLens, whose method fails on a text if "gemma" is in the name of the tokenizer."""
        if isinstance(input, str):
            input = self.to_tokens(input, *args, **kwargs)[0]
        return super().to_str_tokens(input, *args, **kwargs)


def _config(
    family: Family, hf_config: Any, dtype: torch.dtype, device: str, model_id: str | None
) -> HookedTransformerConfig:
    dims = ModelDims.from_config(hf_config)
    return HookedTransformerConfig(
        n_layers=dims.n_layers,
        d_model=dims.d_model,
        d_head=dims.d_head,
        n_heads=dims.n_heads,
        n_key_value_heads=hf_config.num_key_value_heads,
        n_ctx=hf_config.max_position_embeddings,
        d_mlp=hf_config.intermediate_size,
        d_vocab=hf_config.vocab_size,
        original_architecture=family.architecture,
        model_name=model_id or family.name,
        init_weights=False,
        dtype=dtype,
        device=device,
        default_prepend_bos=True,
        **family.hooked_transformer_config(hf_config, dims),
    )


def _converted(family: Family, hf_model: Any, config: HookedTransformerConfig) -> dict[str, torch.Tensor]:
    """The weights by their names in TransformerLens, converted by its function for the family."""
    module, _, function = family.hooked_transformer_weights.partition(":")
    return getattr(import_module(module), function)(hf_model, config)


def _through_hook_in(mlp: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (mlp.hook_in(args[0]), *args[1:])


def build_hooked_transformer(hf_model: Any, tokenizer: Any, model_id: str | None, family: Family) -> HookedGemma:
    """Copy the weights of ``hf_model`` into a :class:`HookedGemma`, unprocessed."""
    parameter = next(hf_model.parameters())
    config = _config(family, hf_model.config, parameter.dtype, str(parameter.device), model_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedGemma(config, tokenizer=tokenizer)
    for block in model.blocks:
        block.mlp.hook_in = HookPoint()  # as in HookedSAETransformer
        block.mlp.register_forward_pre_hook(_through_hook_in)
    model.setup()
    model.load_and_process_state_dict(
        _converted(family, hf_model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    model.prepare(ModelDims.from_config(hf_model.config), model_id, family)
    return model.eval()
