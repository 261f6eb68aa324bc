"""The check after loading, which compares the hooked and the plain model hook by hook on a dozen tokens.

Known defects of the installed libraries are repaired first, each only after it was detected on the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch

from gemma_scope_tl.errors import AdapterMismatch
from gemma_scope_tl.families import Place
from gemma_scope_tl.model.hooked import GemmaModel
from gemma_scope_tl.model.plain import (
    LOGITS,
    ROWS,
    PlainModel,
    PlainPass,
    cache_keyword,
    probe_tokens,
    relative_difference,
    row_difference,
    shortened_window,
    with_louder,
    with_replaced,
)

# Relative L2 differences up to these always count as rounding. Norms are computed in float32 or wider. Eight-bit
# arithmetic has a step of 2^-8 in every dtype, and a difference of one step is so rare that the spread of the plain
# model may not show it.
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EIGHT_BITS = 3e-2
# A difference up to this multiple of the plain model's spread counts as rounding, by row. The largest multiple measured
# is 2.3, on HookedTransformer, whose rounding differs most, in all dtypes and with models whose rounding errors grow a
# thousandfold. In row 0 errors add up over layers, which varies more.
SPREADS = (10.0, 4.0, 4.0)
# A spread is the larger of two tries and is sometimes small by chance, so it counts as at least this fraction of the
# largest spread of the same site in any layer.
OF_LARGEST = 0.25
# The input of the unembedding, up to a gain. On the bridge, an edit at hook_normalized does not change Hugging Face's
# own norm.
FINAL = {"bridge": "ln_final.hook_out", "hooked_transformer": "ln_final.hook_normalized"}


@dataclass(frozen=True)
class Difference:
    """The difference between the hooked and the plain model at one hook.

    Attributes:
        rows: :func:`row_difference` in each of the three rows of :class:`PlainModel`.
        allowed: the largest difference in each row that counts as rounding.
    """

    rows: list[float]
    allowed: list[float]

    @property
    def wrong(self) -> bool:
        """Whether a difference is more than rounding, or NaN."""
        return any(not row <= allowed for row, allowed in zip(self.rows, self.allowed, strict=True))

    def __str__(self) -> str:
        row = max(range(ROWS), key=lambda i: self.rows[i] / max(self.allowed[i], 1e-30))
        return f"{self.rows[row]:.2e} (rounding: {self.allowed[row]:.1e})"


def site_hooks(model: GemmaModel, places: Iterable[Place]) -> dict[Place, str]:
    """The name of the hook of each place in the model. The logits have no hook."""
    return {
        place: model.family.site(place.site).hook_name(place.layer, model.backend)
        for place in places
        if place != LOGITS
    }


class _Recorder:
    """Hooks that record the tensors of a pass of the hooked model, and edit its rows like those of the plain model."""

    def __init__(self, model: GemmaModel, plain: PlainPass) -> None:
        self._plain, self._final = plain, FINAL[model.backend]
        self._names = site_hooks(model, plain.sites)
        self._layers = range(model.dims.n_layers)
        self._seen: dict[Place, torch.Tensor] = {}
        self._embed = model.family.embedding_hooks[model.backend]
        self.embedding: torch.Tensor | None = None

    def hooks(self) -> list[tuple[str, Any]]:
        """The hooks for ``model.hooks(fwd_hooks=…)``."""

        def keep(value: torch.Tensor, key: Place) -> torch.Tensor | None:
            self._seen[key] = value
            replacement = self._plain.replaced.get(key)
            return None if replacement is None else with_replaced(value, replacement)

        def embed(value: torch.Tensor, hook: Any) -> None:
            self.embedding = value[0]

        kept: list[tuple[str, Any]] = [(self._embed, embed)]
        kept += [(name, lambda value, hook, key=key: keep(value, key)) for key, name in self._names.items()]
        queries = [f"blocks.{layer}.attn.hook_q" for layer in self._layers]
        return [*kept, *((name, lambda value, hook: with_louder(value)) for name in (*queries, self._final))]

    def differences(self, logits: torch.Tensor, floor: float) -> dict[str, Difference]:
        """The differences by hook name, and by ``"logits"``."""
        largest: dict[str, list[float]] = {}
        for (site, _), spread in self._plain.spread.items():
            largest[site] = [max(pair) for pair in zip(spread, largest.get(site, spread), strict=True)]
        found: dict[str, Difference] = {}
        for key, wanted in self._plain.sites.items():
            got = logits if key == LOGITS else self._seen.get(key)
            rows = [row_difference(row, got[row], wanted[row]) if got is not None else torch.inf for row in range(ROWS)]
            spreads = zip(SPREADS, self._plain.spread[key], largest[key[0]], strict=True)
            allowed = [max(floor, times * max(own, OF_LARGEST * most)) for times, own, most in spreads]
            name = "logits" if key == LOGITS else self._names[key]
            found[name] = Difference(rows, allowed)
        return found


@torch.no_grad()
def differences(model: GemmaModel, plain: PlainModel) -> dict[str, Difference]:
    """The differences of the hooked and plain model by hook name, with prefix ``"cached "`` for the cached pass.

    The embedding has to be the plain one to the bit, since it is one product of two numbers: its scale rounded to
    another dtype is less than the rounding of everything that follows.
    """
    tokens, call = plain.tokens, cast(Any, model)
    floor = max(FLOOR.get(plain.dtype, EIGHT_BITS), EIGHT_BITS if plain.eight_bits else 0.0)
    whole, prefix, cached = (_Recorder(model, one) for one in (plain.whole, plain.prefix, plain.cached))
    with _shortened(model, plain):
        with model.hooks(fwd_hooks=whole.hooks()):
            logits = call(tokens, attention_mask=torch.ones_like(tokens))
        last_logits = cached_logits(model, tokens, prefix.hooks(), cached.hooks())
    embedded = torch.inf if whole.embedding is None else relative_difference(whole.embedding, plain.embedding)
    return {
        **whole.differences(logits, floor),
        model.family.embedding_hooks[model.backend]: Difference([embedded, 0.0, 0.0], [0.0] * ROWS),
        **{f"cached {name}": value for name, value in cached.differences(last_logits, floor).items()},
    }


def _shortened(model: GemmaModel, plain: PlainModel) -> AbstractContextManager[None]:
    """The window of the plain passes, in those of the hooked model."""
    if model.backend == "hooked_transformer":
        return shortened_window([block.attn.cfg for block in model.blocks], "window_size", plain.window)
    return shortened_window([cast(Any, model).original_model.config], "sliding_window", plain.window)


@torch.no_grad()
def cached_logits(model: GemmaModel, tokens: torch.Tensor, prefix_hooks: Any = (), hooks: Any = ()) -> torch.Tensor:
    """Logits at the last position, computed with a key-value cache of the positions before it: ``[batch, 1, vocab]``.

    Args:
        model: from ``load_model``.
        tokens: ``[batch, pos]`` ids without padding.
        prefix_hooks, hooks: hooks for the pass that fills the cache, and for the pass that uses it.
    """
    prefix, last = tokens[:, :-1], tokens[:, -1:]
    call: Any = model
    if model.backend == "hooked_transformer":
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, tokens.shape[0])
        with model.hooks(fwd_hooks=prefix_hooks):
            call(prefix, past_kv_cache=cache, attention_mask=torch.ones_like(prefix))
        with model.hooks(fwd_hooks=hooks):
            return call(last, past_kv_cache=cache, attention_mask=torch.ones_like(last))
    with model.hooks(fwd_hooks=prefix_hooks):
        _, cache = call(prefix, return_type="logits_and_cache", use_cache=True)
    positions = torch.full_like(last, tokens.shape[1] - 1)
    mask = torch.ones_like(tokens)
    with model.hooks(fwd_hooks=hooks):
        return call(last, past_key_values=cache, use_cache=True, position_ids=positions, attention_mask=mask)


def self_check(model: GemmaModel, plain: PlainModel) -> dict[str, float]:
    """Compare ``model`` with the plain model, with a key-value cache and without, in the dtype of the model.

    Returns:
        Relative L2 differences by hook name and ``"logits"``, each the largest of three rows
        (:class:`~gemma_scope_tl.model.plain.PlainModel`). Names of the pass with a cache begin with ``"cached "``.

    Raises:
        AdapterMismatch: with the numbers, when a difference is more than rounding.
    """
    found = differences(model, plain)
    wrong = {name: value for name, value in found.items() if value.wrong}
    if wrong:
        shown = [f"{name} {value}" for name, value in list(wrong.items())[:8]]
        more = f", and {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else ""
        raise AdapterMismatch(
            f"The hooked model differs from the plain model ({model.backend}, {plain.dtype}; relative differences): "
            f"{', '.join(shown)}{more}. These activations and all results from them would be wrong, so the "
            "model was not loaded. Install the versions of torch, transformers and transformer-lens that "
            "`gemma-scope doctor` names as tested, try the other backend, or report the output of doctor. "
            "(check=False skips this comparison and changes nothing else; use it to examine the difference.)"
        )
    return {name: max(value.rows) for name, value in found.items()}


def repair(model: GemmaModel) -> None:
    """Work around known defects of the installed libraries. ``model.fixes`` lists the defects that were found.

    Raises:
        AdapterMismatch: when a workaround does not help.
    """
    read_cache_kwarg = getattr(model, "read_cache_kwarg", None)
    if read_cache_kwarg is None or attention_fills_cache(model):
        return
    read_cache_kwarg()
    if not attention_fills_cache(model):
        raise AdapterMismatch(
            "The installed transformer-lens and transformers use different names for the cache argument of attention, "
            "so generation would be wrong. Install the versions that `gemma-scope doctor` names as tested."
        )


@torch.no_grad()
def attention_fills_cache(model: Any) -> bool:
    """Whether the attention of every layer adds a token to the key-value cache that the model receives.

    One token is passed through the wrapped Hugging Face model, as in its own ``generate``.
    """
    from transformers import DynamicCache

    hf_model = model.original_model
    cache = DynamicCache(config=hf_model.config)
    hf_model(probe_tokens(hf_model, 1), **{cache_keyword(hf_model): cache, "use_cache": True})
    model.token_tracker.clear()
    return all(cache.get_seq_length(layer) == 1 for layer in range(model.dims.n_layers))
