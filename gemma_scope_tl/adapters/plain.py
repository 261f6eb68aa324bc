"""What the self-check compares with: passes of the plain model, and how far rounding moves them.

Three rows of the same tokens go through the model together. Row 0 is left alone. In rows 1 and 2 every site's tensor is
replaced by another one, a quarter away from it, so that what each site shows follows from the replaced ones in front of
it alone: rounding does not add up over layers, and a hook that reads a copy, on which nothing depends, is seen. In row
2 queries and the final norm are also made louder, so that both soft-caps bend what they cap, however small it is.

How much difference is rounding is measured on the plain model too: in further passes the output of each of its modules
is moved by about one unit in the last place, and what this does to a site is that site's *spread*.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int

from gemma_scope_tl.adapters.reference import Reference, SiteKey, cache_keyword, probe_tokens, run_reference

LOGITS: SiteKey = ("logits", None)
ROWS = 3
NOISY = 2  # how often each row is moved; the largest difference is its spread
REPLACED = 0.25  # how far, relatively, the replaced tensors are from the model's own
LOUDER = 64.0  # a power of two: no rounding


@dataclass(frozen=True)
class Pass:
    """One pass of the three rows.

    Attributes:
        sites: ``[3, pos, …]`` by ``(site, layer)``, before anything is replaced; :data:`LOGITS` among them.
        replaced: ``[pos, …]``: what rows 1 and 2 went on with.
        spread: by site, the :func:`row_difference` that rounding makes in each row.
    """

    sites: dict[SiteKey, torch.Tensor]
    replaced: dict[SiteKey, torch.Tensor]
    spread: dict[SiteKey, list[float]]


@dataclass(frozen=True)
class PlainModel:
    """What the plain model computes on a few tokens.

    Attributes:
        tokens: ``[3, pos]``, all rows the same.
        whole: the pass of all positions, without a cache.
        prefix: the pass of all positions but the last, which fills a cache.
        cached: the pass of the last position, with that cache.
        dtype: of the logits.
        eight_bits: weights or activations are stored in fewer bits than ``dtype`` has.
    """

    tokens: Int[torch.Tensor, "3 pos"]
    whole: Pass
    prefix: Pass
    cached: Pass
    dtype: torch.dtype
    eight_bits: bool


def relative_difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """``‖got - wanted‖ / ‖wanted‖`` over all entries, in float64; NaN counts as infinite."""
    wanted = wanted.double()
    difference = (got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return float(torch.nan_to_num(difference, nan=float("inf")))


def row_difference(row: int, got: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far a row is from what it should be: over all positions, in row 2 at the median position.

    Attention of loud queries has ties, which rounding decides one way or the other at some position; a soft-cap that is
    missing changes most positions. A single position, as in a pass with a cache, says nothing there.

    Args:
        row: 0, 1 or 2.
        got: ``[pos, …]``.
        wanted: ``[pos, d]``.
    """
    got = got.reshape(wanted.shape)
    if row < ROWS - 1:
        return relative_difference(got, wanted)
    if len(wanted) == 1:
        return 0.0
    wanted = wanted.double()
    by_position = (got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
    return float(torch.nan_to_num(by_position, nan=float("inf")).median())


def with_replaced(value: torch.Tensor, replacement: torch.Tensor) -> torch.Tensor:
    """``value`` (``[3n, pos, …]``) with all rows but every third replaced."""
    changed = value.clone()
    for row in range(1, ROWS):
        changed[row::ROWS] = replacement.reshape(value.shape[1:]).to(value)
    return changed


def with_louder(value: torch.Tensor) -> torch.Tensor:
    """``value`` (``[3n, …]``) with row 2 of every three multiplied."""
    changed = value.clone()
    changed[2::ROWS] *= LOUDER
    return changed


def run_plain(hf_model: Any, length: int = 12) -> PlainModel:
    """Run the plain model, before a bridge wraps it, on ``length`` tokens with and without a cache.

    Args:
        hf_model: a ``Gemma2ForCausalLM``; it is not changed.
        length: number of tokens.
    """
    tokens = probe_tokens(hf_model, length).expand(ROWS, -1)
    with _hooked(_louder_modules(hf_model), lambda _module, _args, out: with_louder(out)):
        whole, prefix, cached = _three_passes(hf_model, tokens, None)
        with _rounding_noise(hf_model):
            noisy = _three_passes(hf_model, tokens.repeat(NOISY, 1), (whole, prefix, cached))
    passes = [
        Pass(exact.sites, exact.replaced, {key: _spread(moved.sites[key], exact.sites[key]) for key in exact.sites})
        for exact, moved in zip((whole, prefix, cached), noisy, strict=True)
    ]
    return PlainModel(tokens, *passes, dtype=whole.sites[LOGITS].dtype, eight_bits=is_quantized(hf_model))


def _three_passes(hf_model: Any, tokens: torch.Tensor, like: tuple[Pass, Pass, Pass] | None) -> tuple[Pass, Pass, Pass]:
    from transformers import DynamicCache

    def run(part: torch.Tensor, index: int, **kwargs: Any) -> Pass:
        replaced: dict[SiteKey, torch.Tensor] = {} if like is None else like[index].replaced

        def change(key: SiteKey, value: torch.Tensor) -> torch.Tensor:
            if like is None:
                replaced[key] = _moved(value[0], seed=len(replaced))
            return with_replaced(value, replaced[key])

        found: Reference = run_reference(hf_model, part, change=change, **kwargs)
        return Pass({**found.sites, LOGITS: found.logits}, replaced, {})

    cache = {cache_keyword(hf_model): DynamicCache(config=hf_model.config), "use_cache": True}
    return run(tokens, 0), run(tokens[:, :-1], 1, **cache), run(tokens[:, -1:], 2, **cache)


def _moved(value: torch.Tensor, seed: int) -> torch.Tensor:
    signs = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(seed)).to(value.device) * 2 - 1
    return (value.float() * (1 + REPLACED * signs)).to(value.dtype)


def _spread(moved: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """The largest :func:`row_difference` of the rows of ``moved`` from theirs of ``exact``, by row."""
    return [max(row_difference(row, one, exact[row]) for one in moved[row::ROWS]) for row in range(ROWS)]


@contextmanager
def _hooked(modules: list[Any], hook: Callable[[Any, Any, Any], Any]) -> Generator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _louder_modules(hf_model: Any) -> list[Any]:
    return [*(layer.self_attn.q_proj for layer in hf_model.model.layers), hf_model.model.norm]


@contextmanager
def _rounding_noise(hf_model: Any) -> Generator[None]:
    """Move what every module computes by about a unit in the last place, as another order of summation would.

    Half of the noise is shared by all entries of a position. For keys this is what the rounding of attention scores
    does: a relative error of each score, where independent errors of the keys' entries would average out.
    """
    generator = torch.Generator().manual_seed(0)

    def move(_module: Any, _args: Any, out: Any) -> Any:
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return None
        each = torch.randn(out.shape, generator=generator)
        shared = torch.randn((*out.shape[:-1], 1), generator=generator)
        wide = torch.promote_types(out.dtype, torch.float32)
        noise = (each + shared).to(out.device, wide) * (torch.finfo(out.dtype).eps / 2)
        return (out.to(wide) * (1 + noise)).to(out.dtype)

    modules = [hf_model.model.embed_tokens, hf_model.model.norm, hf_model.lm_head]
    modules += [m for layer in hf_model.model.layers for m in layer.modules() if not any(True for _ in m.children())]
    with _hooked(modules, move):
        yield


def is_quantized(hf_model: Any) -> bool:
    """Whether a projection of the model is anything else than a floating-point matrix."""
    return any(
        not isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        or not weight.is_floating_point()
        or weight.ndim != 2
        for layer in hf_model.model.layers
        for module in (
            *(getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"),
            *(getattr(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")),
        )
    )
