"""The self-check on load: a dozen tokens decide whether the hooked model is the plain model, hook by hook."""

from __future__ import annotations

from typing import Any

import torch

from gemma_scope_tl.adapters.base import GemmaModel
from gemma_scope_tl.adapters.reference import Reference
from gemma_scope_tl.errors import AdapterMismatch
from gemma_scope_tl.sites import get_site

# Largest relative L2 difference from the plain model that rounding explains. float32 measures below 3e-6 on both
# backends; HookedTransformer in half precision rounds in other places than Hugging Face (up to 3% in bfloat16). A wrong
# tensor differs by about 1, and attention without its cache by more than 0.3.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def relative_difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """``‖got - wanted‖ / ‖wanted‖`` over all entries, in float64; NaN counts as infinite."""
    wanted = wanted.double()
    difference = (got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return float(torch.nan_to_num(difference, nan=float("inf")))


def site_differences(model: GemmaModel, reference: Reference) -> dict[str, float]:
    """Relative difference of the logits and of every site and layer, by hook name."""
    names = {key: get_site(key[0]).hook_name(key[1], model.backend) for key in reference.sites}
    seen: dict[str, torch.Tensor] = {}
    handles = [(name, lambda value, hook, name=name: seen.__setitem__(name, value)) for name in names.values()]
    with torch.no_grad():
        logits = model.run_with_hooks(reference.tokens, fwd_hooks=handles)
    differences = {"logits": relative_difference(logits, reference.logits)}
    for key, name in names.items():
        wanted = reference.sites[key]
        differences[name] = (
            relative_difference(seen[name].reshape(wanted.shape), wanted) if name in seen else float("inf")
        )
    return differences


@torch.no_grad()
def cached_logits(model: GemmaModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits at the last position, computed with a key-value cache of the positions before it: ``[batch, vocab]``."""
    prefix, last = tokens[:, :-1], tokens[:, -1:]
    call: Any = model
    if model.backend == "hooked_transformer":
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, tokens.shape[0])
        call(prefix, past_kv_cache=cache, attention_mask=torch.ones_like(prefix))
        return call(last, past_kv_cache=cache, attention_mask=torch.ones_like(last))[:, -1]
    _, cache = call(prefix, return_type="logits_and_cache", use_cache=True)
    positions = torch.full_like(last, tokens.shape[1] - 1)
    mask = torch.ones_like(tokens)
    return call(last, past_key_values=cache, use_cache=True, position_ids=positions, attention_mask=mask)[:, -1]


def self_check(model: GemmaModel, reference: Reference) -> dict[str, float]:
    """Compare ``model`` with the plain model; work around a cache that is not read.

    Returns:
        Relative L2 differences: ``"logits"``, ``"cached logits"`` and each site's hook name.

    Raises:
        AdapterMismatch: with the numbers, when a difference is more than rounding.
    """
    dtype = reference.logits.dtype
    tolerance = TOLERANCE[dtype]
    differences = site_differences(model, reference)
    wanted = reference.logits[:, -1]
    cached = relative_difference(cached_logits(model, reference.tokens), wanted)
    repair = getattr(model, "read_cache_kwarg", None)
    if cached > tolerance and repair is not None:
        repair()
        cached = relative_difference(cached_logits(model, reference.tokens), wanted)
    differences["cached logits"] = cached
    wrong = {name: value for name, value in differences.items() if not value <= tolerance}
    if wrong:
        listed = ", ".join(f"{name} {value:.2e}" for name, value in wrong.items())
        raise AdapterMismatch(
            f"The hooked model is not the plain model ({model.backend}, {dtype}; relative differences above "
            f"{tolerance:g}): {listed}. Nothing read at these hooks could be trusted. Please report the versions that "
            "`gemma-scope doctor` prints, or load with check=False to look into it."
        )
    return differences
