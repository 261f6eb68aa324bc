"""The plain Hugging Face model as a reference, with the tensors of all sites read by ordinary PyTorch hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int

from gemma_scope_tl.families import Family, ModelDims, Place, Site, family_of_config

Change = Callable[[Place, torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Reference:
    """One forward pass of the plain model.

    Attributes:
        tokens: ``[batch, pos]`` ids.
        logits: ``[batch, pos, vocab]``.
        sites: by place, the tensor that a coder reads, which is the input of a transcoder.
    """

    tokens: Int[torch.Tensor, "batch pos"]
    logits: Float[torch.Tensor, "batch pos vocab"]
    sites: dict[Place, torch.Tensor]


@torch.no_grad()
def run_reference(
    hf_model: Any,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    change: Change | None = None,
    **kwargs: Any,
) -> Reference:
    """Run a plain Hugging Face model and record the tensor of every site of its family.

    Args:
        hf_model: a model that is not wrapped by a bridge; also one whose text model is inside another Hugging Face
            model, which runs as it is.
        tokens: ``[batch, pos]`` ids.
        attention_mask: ``[batch, pos]``, 1 at text.
        change: function of a place and its tensor, which returns the tensor to continue with, or None for no change. It
            is not called for normalised inputs, because they are not tensors of the plain model.
        **kwargs: further arguments for the model.
    """
    family = family_of_config(hf_model.config, type(hf_model).__name__)
    config, decoder = family.text_config(hf_model.config), family.decoder_of(hf_model)
    taps = _Taps(change, config)
    for site in family.sites.values():
        for layer in range(ModelDims.from_config(config).n_layers) if site.per_layer else (None,):
            taps.tap(decoder.get_submodule(site.module_name(layer)), site, Place(site.name, layer))
    try:
        logits = hf_model(tokens, attention_mask=attention_mask, **{"use_cache": False, **kwargs}).logits
    finally:
        for handle in taps.handles:
            handle.remove()
    return Reference(tokens, logits, taps.sites)


class _Taps:
    """Hooks on the plain model that record the tensor of a site. ``change`` may replace it."""

    def __init__(self, change: Change | None, config: Any) -> None:
        self.sites: dict[Place, torch.Tensor] = {}
        self.handles: list[Any] = []
        self._change, self._config = change, config

    def tap(self, module: Any, site: Site, place: Place) -> None:
        """Hook the input or output of ``module`` that is the tensor of the site."""
        match site.side:
            case "output":
                self.handles.append(module.register_forward_hook(partial(self._output, place)))
            case "input":
                self.handles.append(module.register_forward_pre_hook(partial(self._input, place)))
            case "normalized_input":
                self.handles.append(module.register_forward_pre_hook(partial(self._normalized_input, place)))

    def _pass(self, place: Place, value: torch.Tensor) -> torch.Tensor | None:
        self.sites[place] = value
        return self._change(place, value) if self._change is not None else None

    def _output(self, place: Place, _module: Any, _args: Any, given: Any) -> Any:
        plain = not isinstance(given, tuple)  # older layers return a tuple
        changed = self._pass(place, given if plain else given[0])
        return changed if plain or changed is None else (changed, *given[1:])

    def _input(self, place: Place, _module: Any, args: Any) -> Any:
        changed = self._pass(place, args[0])
        return None if changed is None else (changed, *args[1:])

    def _normalized_input(self, place: Place, _module: Any, args: Any) -> None:
        x = args[0].float()
        self.sites[place] = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._config.rms_norm_eps)


def cache_keyword(hf_model: Any) -> str:
    """The name of the argument for a key-value cache in this version of transformers."""
    return "cache" if "cache" in inspect.signature(type(hf_model).forward).parameters else "past_key_values"


def probe_tokens(hf_model: Any, length: int = 12) -> Int[torch.Tensor, "1 pos"]:
    """BOS and ``length - 1`` fixed pseudo-random ids of ordinary tokens; fewer in a shorter context."""
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


LOGITS = Place("logits", None)
ROWS = 3
NOISY = 2  # runs of each row with noise; the largest difference is its spread
REPLACED = 0.25  # relative distance of the replaced tensors from the original ones
LOUDER = 64.0  # a power of two, so that the product is exact


@dataclass(frozen=True)
class PlainPass:
    """One pass with three rows: unchanged, with replaced tensors, and with replaced tensors and loud queries.

    Attributes:
        sites: ``[3, pos, …]`` by place, before the replacement, including :data:`LOGITS`.
        replaced: ``[pos, …]`` by place, the tensors with which rows 1 and 2 continued.
        spread: by place, the :func:`row_difference` in each row that rounding alone causes.
    """

    sites: dict[Place, torch.Tensor]
    replaced: dict[Place, torch.Tensor]
    spread: dict[Place, list[float]]


@dataclass(frozen=True)
class PlainModel:
    """The results of the plain model on a few tokens.

    Attributes:
        tokens: ``[3, pos]`` with equal rows.
        whole: the pass over all positions, without a cache.
        prefix: the pass over all positions but the last, which fills a cache.
        cached: the pass over the last position, with that cache.
        embedding: ``[pos, d_model]``, the embedding of the tokens as the first layer reads it.
        window: the sliding window during these passes if it was shortened (:func:`shortened_window`), with the model's
            own; else None.
        dtype: dtype of the logits.
        eight_bits: whether weights or activations are stored in fewer bits than ``dtype`` has.
    """

    tokens: Int[torch.Tensor, "3 pos"]
    whole: PlainPass
    prefix: PlainPass
    cached: PlainPass
    embedding: Float[torch.Tensor, "pos d_model"]
    window: tuple[int, int] | None
    dtype: torch.dtype
    eight_bits: bool


def relative_difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """``‖got - wanted‖ / ‖wanted‖`` over all entries, in float64; NaN counts as infinite."""
    got, wanted = got.detach(), wanted.detach().double()
    difference = (got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return float(torch.nan_to_num(difference, nan=float("inf")))


def row_difference(row: int, got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative difference of a row from that of the plain model: over all positions, or at the median in row 2.

    With loud queries, attention scores are nearly tied at some positions, where rounding decides between them, while a
    missing soft-cap changes most positions. A single position, as in a pass with a cache, is inconclusive in row 2.

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
    got, wanted = got.detach(), wanted.detach().double()
    by_position = (got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
    return float(torch.nan_to_num(by_position, nan=float("inf")).median())


def with_replaced(value: torch.Tensor, replacement: torch.Tensor) -> torch.Tensor:
    """``value`` (``[3n, pos, …]``) with all rows but every third replaced."""
    changed = value.clone()
    for row in range(1, ROWS):
        changed[row::ROWS] = replacement.reshape(value.shape[1:]).to(value)
    return changed


def with_louder(value: torch.Tensor) -> torch.Tensor:
    """``value`` (``[3n, …]``) with row 2 of every three rows multiplied by :data:`LOUDER`."""
    changed = value.clone()
    changed[2::ROWS] *= LOUDER
    return changed


def run_plain(hf_model: Any, length: int = 12) -> PlainModel:
    """Run the plain model, before a bridge wraps it, on ``length`` tokens with and without a cache.

    Args:
        hf_model: a model of a known family, which is not changed.
        length: number of tokens.
    """
    family = family_of_config(hf_model.config, type(hf_model).__name__)
    tokens = probe_tokens(hf_model, length).expand(ROWS, -1)
    window = _short_window(hf_model.config, tokens.shape[1])
    louder = _hooked(_louder_modules(hf_model, family), lambda _module, _args, out: with_louder(out))
    with louder, shortened_window([hf_model.config], "sliding_window", window):
        whole, prefix, cached = _three_passes(hf_model, tokens, None)
        with _rounding_noise(hf_model):
            noisy = _three_passes(hf_model, tokens.repeat(NOISY, 1), (whole, prefix, cached))
    with torch.no_grad():
        embedding = hf_model.get_input_embeddings()(tokens[:1])[0]
    passes = [
        PlainPass(
            exact.sites, exact.replaced, {key: _spread(moved.sites[key], exact.sites[key]) for key in exact.sites}
        )
        for exact, moved in zip((whole, prefix, cached), noisy, strict=True)
    ]
    dtype, quantized = whole.sites[LOGITS].dtype, is_quantized(hf_model, family)
    return PlainModel(tokens, *passes, embedding=embedding, window=window, dtype=dtype, eight_bits=quantized)


def _short_window(config: Any, length: int) -> tuple[int, int] | None:
    """A window that ``length`` tokens exceed and the one of the model; None for a model whose own is exceeded."""
    own = getattr(config, "sliding_window", None)
    return (length // 2 + 1, own) if isinstance(own, int) and own >= length > 2 else None


@contextmanager
def shortened_window(configs: Iterable[Any], name: str, window: tuple[int, int] | None) -> Generator[None]:
    """Give sliding attention a window that a few tokens exceed, so that they show which layers have one.

    Args:
        configs: the configurations that the attention reads when it runs. One that has another window than the model's
            keeps it, so that the difference shows.
        name: the attribute that contains the window.
        window: the short window and the model's; None for no change.
    """
    short, own = window or (None, None)
    changed = [one for one in {id(one): one for one in configs}.values() if window and getattr(one, name, None) == own]
    try:
        for config in changed:
            setattr(config, name, short)
        yield
    finally:
        for config in changed:
            setattr(config, name, own)


def _three_passes(
    hf_model: Any, tokens: torch.Tensor, like: tuple[PlainPass, PlainPass, PlainPass] | None
) -> tuple[PlainPass, PlainPass, PlainPass]:
    from transformers import DynamicCache

    def run(part: torch.Tensor, index: int, **kwargs: Any) -> PlainPass:
        replaced: dict[Place, torch.Tensor] = {} if like is None else like[index].replaced

        def change(key: Place, value: torch.Tensor) -> torch.Tensor:
            if like is None:
                replaced[key] = _moved(value[0], seed=len(replaced))
            return with_replaced(value, replaced[key])

        found: Reference = run_reference(hf_model, part, change=change, **kwargs)
        return PlainPass({**found.sites, LOGITS: found.logits}, replaced, {})

    cache = {cache_keyword(hf_model): DynamicCache(config=hf_model.config), "use_cache": True}
    return run(tokens, 0), run(tokens[:, :-1], 1, **cache), run(tokens[:, -1:], 2, **cache)


def _moved(value: torch.Tensor, seed: int) -> torch.Tensor:
    signs = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(seed)).to(value.device) * 2 - 1
    return (value.float() * (1 + REPLACED * signs)).to(value.dtype)


def _spread(moved: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """The largest :func:`row_difference` between ``moved`` and ``exact``, by row."""
    return [max(row_difference(row, one, exact[row]) for one in moved[row::ROWS]) for row in range(ROWS)]


@contextmanager
def _hooked(modules: list[Any], hook: Callable[[Any, Any, Any], Any]) -> Generator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _louder_modules(hf_model: Any, family: Family) -> list[Any]:
    """The modules before a soft-cap, whose output must be large to show it: queries and the unembedding's input."""
    decoder, layers = hf_model.get_submodule(family.decoder), range(ModelDims.from_config(hf_model.config).n_layers)
    queries = [decoder.get_submodule(family.query.format(layer=layer)) for layer in layers]
    return [*queries, decoder.get_submodule(family.final_norm)]


@contextmanager
def _rounding_noise(hf_model: Any) -> Generator[None]:
    """Change the output of every module by about a unit in the last place, like another order of summation.

    Half of the noise is the same for all entries of a position. For keys, this gives each attention score a relative
    error, as rounding does, while independent errors of the entries of a key would average out.
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

    with _hooked([module for module in hf_model.modules() if not any(True for _ in module.children())], move):
        yield


def is_quantized(hf_model: Any, family: Family) -> bool:
    """Whether a projection of the model is anything but a floating-point matrix."""
    decoder = hf_model.get_submodule(family.decoder)
    layers = range(ModelDims.from_config(hf_model.config).n_layers)
    weights = (
        getattr(decoder.get_submodule(path.format(layer=layer)), "weight", None)
        for layer in layers
        for path in family.projections
    )
    return any(
        not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.ndim != 2 for weight in weights
    )
