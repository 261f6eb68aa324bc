"""The plain Hugging Face model as a reference: every site's tensor, read with ordinary PyTorch hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

SiteKey = tuple[str, int | None]
Change = Callable[[SiteKey, torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Reference:
    """One forward pass of the plain model.

    Attributes:
        tokens: ``[batch, pos]`` ids.
        logits: ``[batch, pos, vocab]``.
        sites: tensors by ``(site, layer)``; ``("transcoder", L)`` is the transcoder's input.
    """

    tokens: Int[torch.Tensor, "batch pos"]
    logits: Float[torch.Tensor, "batch pos vocab"]
    sites: dict[SiteKey, torch.Tensor]


def _rms_normalized(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x)`` in float32, without a gain: the transcoder's input (paper, appendix B)."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class _Taps:
    """Hooks on the plain model: what passes a site is kept, and ``change`` may give what goes on in its place."""

    def __init__(self, change: Change | None) -> None:
        self.sites: dict[SiteKey, torch.Tensor] = {}
        self.handles: list[Any] = []
        self._change = change

    def _pass(self, key: SiteKey, value: torch.Tensor) -> torch.Tensor | None:
        self.sites[key] = value
        return self._change(key, value) if self._change is not None else None

    def output(self, module: Any, key: SiteKey) -> None:
        """Tap what ``module`` gives."""

        def hook(_module: Any, _args: Any, given: Any) -> Any:
            plain = not isinstance(given, tuple)  # older layers give a tuple
            changed = self._pass(key, given if plain else given[0])
            return changed if plain or changed is None else (changed, *given[1:])

        self.handles.append(module.register_forward_hook(hook))

    def input(self, module: Any, key: SiteKey) -> None:
        """Tap what ``module`` takes."""

        def hook(_module: Any, args: Any) -> Any:
            changed = self._pass(key, args[0])
            return None if changed is None else (changed, *args[1:])

        self.handles.append(module.register_forward_pre_hook(hook))

    def normalized_input(self, module: Any, key: SiteKey, eps: float) -> None:
        """Keep what ``module`` takes, normalised."""
        self.handles.append(
            module.register_forward_pre_hook(
                lambda _m, args: self.sites.__setitem__(key, _rms_normalized(args[0], eps))
            )
        )


@torch.no_grad()
def run_reference(
    hf_model: Any,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    change: Change | None = None,
    **kwargs: Any,
) -> Reference:
    """Run a plain ``Gemma2ForCausalLM`` and keep what passes through every Gemma Scope site.

    Args:
        hf_model: not wrapped by a bridge.
        tokens: ``[batch, pos]`` ids.
        attention_mask: ``[batch, pos]``, 1 at text.
        change: takes ``(site, layer)`` and the site's tensor, and returns what the pass goes on with, or None for the
            same; it is not asked about transcoder inputs.
        **kwargs: for the model.
    """
    taps = _Taps(change)
    eps = hf_model.config.rms_norm_eps
    decoder = hf_model.model
    taps.output(decoder.embed_tokens, ("embedding", None))
    for index, layer in enumerate(decoder.layers):
        taps.output(layer, ("res", index))
        taps.output(layer.post_feedforward_layernorm, ("mlp", index))
        taps.input(layer.self_attn.o_proj, ("att", index))
        taps.normalized_input(layer.pre_feedforward_layernorm, ("transcoder", index), eps)
    try:
        logits = hf_model(tokens, attention_mask=attention_mask, **{"use_cache": False, **kwargs}).logits
    finally:
        for handle in taps.handles:
            handle.remove()
    return Reference(tokens, logits, taps.sites)


def cache_keyword(hf_model: Any) -> str:
    """The name by which this version of transformers takes a key-value cache."""
    return "cache" if "cache" in inspect.signature(type(hf_model).forward).parameters else "past_key_values"


def probe_tokens(hf_model: Any, length: int = 12) -> Int[torch.Tensor, "1 pos"]:
    """BOS and ``length - 1`` fixed pseudo-random ids of ordinary tokens, fewer where the model's context is shorter."""
    config = hf_model.config
    length = min(length, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    given = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "eos", "bos")]
    special = [i for one in given for i in (one if isinstance(one, list) else [one]) if isinstance(i, int)]
    if (ordinary := max(special, default=-1) + 1) < config.vocab_size // 2:
        tokens = tokens.clamp_min(ordinary)  # padding would be masked
    tokens[0, 0] = config.bos_token_id if isinstance(config.bos_token_id, int) else 2 % config.vocab_size
    return tokens.to(hf_model.get_input_embeddings().weight.device)


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
