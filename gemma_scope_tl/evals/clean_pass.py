"""One clean forward pass that many measurements share, and passes that restart after a site.

The pass keeps the sites' tensors and the arguments of each block. A splice then runs again only the layers after the
site, which follow from how the site joins the residual stream (``Site.joins``):

- ``"embedding"``: all blocks, from the spliced embedding;
- ``"residual"``: the blocks after the site's block, from the spliced residual stream;
- ``"branch"`` (the MLP's output): the same blocks, from the residual stream before the MLP plus the spliced output;
- ``"attention"``: the site's block with the spliced heads, and the blocks after it.

The blocks are called with the arguments that the model gave them, so masks, rotary angles and hooks inside them are the
model's own; SAEs and hooks that ask for token ids, padding or positions get those of the clean pass. A restart from the
clean tensor gives the clean pass, to the bit where the device's kernels are deterministic. Hooks on the final norm see
a restart's tensors; hooks on the unembedding do not run here.

One loop over :func:`clean_batches` can share the pass among any number of statistics. Statistics of activations alone
need no restart: the passes of :func:`read_batches` end at the last place that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int

from gemma_scope_tl.errors import AdapterMismatch, unknown_name
from gemma_scope_tl.evals.metrics import scored_positions
from gemma_scope_tl.families import Family
from gemma_scope_tl.model.counted import CountedBatch
from gemma_scope_tl.model.finite import all_finite, check_finite, not_finite, visit_finite_places
from gemma_scope_tl.model.read import EndOfPass
from gemma_scope_tl.sites import Place, flatten_heads, unflatten_heads, with_targets
from gemma_scope_tl.text.tokens import TextRead

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

MEMORY_BUDGET = 1 << 30
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative differences up to these are attributed to rounding; 1e-2 for other dtypes."""


@dataclass
class CleanPass:
    """The tensors kept from a forward pass.

    Attributes:
        model: the hooked model.
        values: the tensor at each kept place, in the shape of the model's hook (with or without a heads dimension).
        final: the residual stream before the final norm, ``[batch, pos, d_model]``.
        read: the text of the pass, which hooks and SAEs in the part that is re-run ask for.
    """

    model: GemmaModel
    values: dict[Place, torch.Tensor] = field(default_factory=dict[Place, torch.Tensor])
    final: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    read: TextRead = field(default_factory=TextRead)
    _calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=dict[int, "tuple[tuple[Any, ...], dict[str, Any]]"]
    )
    _block_inputs: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    _before_mlp: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])

    @classmethod
    def run(cls, model: GemmaModel, tokens: Int[torch.Tensor, "batch pos"], places: Iterable[Place]) -> CleanPass:
        """Run ``model`` up to its final norm, and keep the tensors at ``places`` for restarts after each."""
        kept, family = cls(model), model.family
        with removed_after() as handles:
            joins: dict[str, set[int | None]] = {}
            for place in places:
                handles.append(hook_point(model, place).register_forward_hook(_output_keeper(kept.values, place)))
                joins.setdefault(family.site(place.site).joins, set()).add(place.layer)
            for layer, block in enumerate(model.blocks):
                keep = kept._called(layer, layer in joins.get("attention", ()))
                handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
                if layer in joins.get("branch", ()):
                    norm = getattr(block, family.norm_before_mlp)
                    handles.append(norm.register_forward_pre_hook(_input_keeper(kept._before_mlp, layer)))
            kept.final = run_to_final_norm(model, tokens)
        return kept

    def restart(self, place: Place, value: torch.Tensor) -> Float[torch.Tensor, "batch pos d_model"]:
        """The residual stream before the final norm when ``value`` replaces the tensor at ``place``.

        Args:
            place: the place that an SAE writes; for a transcoder, the MLP's output.
            value: the new tensor, of the shape of ``values[place]``.

        Raises:
            UnknownNameError: no SAE writes at the site.
        """
        with self.model.token_tracker.reading(self.read):
            return self._behind(place, value)

    def _behind(self, place: Place, value: torch.Tensor) -> torch.Tensor:
        family: Family = self.model.family
        layer = -1 if place.layer is None else place.layer
        match family.site(place.site).joins:
            case "embedding" | "residual":
                return self._from(layer + 1, value)
            case "branch":
                return self._from(layer + 1, self._block_output(layer, self._before_mlp[layer] + value))
            case "attention":
                with removed_after() as handles:
                    handles.append(hook_point(self.model, place).register_forward_hook(lambda _m, _a, _o: value))
                    args, kwargs = self._calls[layer]
                    out = _first(self.model.blocks[layer](self._block_inputs[layer], *args, **kwargs))
                return self._from(layer + 1, out)
            case _:
                written = [name for name, site in family.sites.items() if site.joins != "nowhere"]
                raise unknown_name("site to restart behind", place.site, written)

    def check(self, places: Iterable[Place]) -> None:
        """Check that restarting from the clean tensor gives the clean pass, at the first place of each site.

        Raises:
            AdapterMismatch: it does not; the message has the relative difference.
        """
        first: dict[str, Place] = {}
        for place in places:
            first.setdefault(place.site, place)
        tolerance = TOLERANCE.get(self.final.dtype, 1e-2)
        for place in first.values():
            again = self.restart(place, self.values[place])
            wanted = self.final.double()
            difference = float((again.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
            if not difference <= tolerance:
                raise AdapterMismatch(
                    f"A pass restarted behind {place.key} differs from the full pass by {difference:.1e} "
                    f"({tolerance:g} is tolerated), so losses behind a splice would be wrong. The cause is a hook that "
                    "returns different values when it runs twice, or an unknown version of TransformerLens."
                )

    def _from(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        for number in range(layer, len(self.model.blocks)):
            args, kwargs = self._calls[number]
            x = _first(self.model.blocks[number](x, *args, **kwargs))
        return x

    def _block_output(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        """Apply the hooks on a block's output to its residual stream."""
        for name, site in self.model.family.sites.items():
            if site.joins == "residual":
                residual = hook_point(self.model, Place(name, layer))(residual)
        return residual

    def _called(self, layer: int, keep_input: bool) -> Callable[..., None]:
        def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.read = self.model.token_tracker.read
            # Hugging Face's name of a block's input, and HookedTransformer's.
            rest = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "resid_pre")}
            self._calls[layer] = args[1:], rest
            if keep_input:
                self._block_inputs[layer] = args[0] if args else next(v for n, v in kwargs.items() if n not in rest)

        return keep


@dataclass
class ReadBatch:
    """Rows of the data and their activations.

    Attributes:
        start: number of rows in the batches before this one.
        rows: the number of each row in the data, on the CPU; texts of similar length share a batch.
        tokens: token ids ``[batch, pos]``, on the model's device, without columns that are padding in all rows.
        counted: ``[batch, pos]``, True at tokens that are measured and spliced.
        values: the tensor at each place, with heads flattened or not.
    """

    start: int
    rows: Int[torch.Tensor, " batch"]
    tokens: Int[torch.Tensor, "batch pos"]
    counted: Bool[torch.Tensor, "batch pos"]
    values: dict[Place, torch.Tensor]

    @property
    def done(self) -> int:
        """Number of rows in this batch and those before it, where an interrupted loop goes on."""
        return self.start + self.tokens.shape[0]

    def activations(self, place: Place) -> Float[torch.Tensor, "n d"]:
        """The counted tokens' activations at a place, with heads flattened."""
        return flatten_heads(self.values[place])[self.counted]


@dataclass
class CleanBatch(ReadBatch):
    """Rows of the data and their clean pass.

    Attributes:
        scored: ``[batch, pos - 1]``, True at predictions that count.
        clean: the clean pass of the rows, whose ``values`` are those of the batch.
    """

    scored: Bool[torch.Tensor, "batch pos-1"]
    clean: CleanPass

    def spliced(self, place: Place, rows: Float[torch.Tensor, "n d"]) -> Float[torch.Tensor, "batch pos d_model"]:
        """The residual stream before the final norm with ``rows`` at the counted tokens of a place."""
        value = self.clean.values[place]
        flat = flatten_heads(value).clone()
        flat[self.counted] = rows.to(flat.dtype)
        return self.clean.restart(place, unflatten_heads(flat, value))

    def targets(self) -> Int[torch.Tensor, " n"]:
        """The next token of each prediction that counts."""
        return self.tokens[:, 1:][self.scored]


@torch.no_grad()
def clean_batches(
    model: GemmaModel, text: CountedBatch, places: Iterable[Place], batch_size: int = 8, start: int = 0
) -> Generator[CleanBatch]:
    """The clean pass of each batch of rows. Targets of transcoders are kept too.

    Args:
        model: from ``load_model``.
        text: all rows, whose texts begin in column 0 (:func:`~gemma_scope_tl.model.counted.counted_rows`).
        places: the places whose tensors are kept.
        batch_size: rows in a pass; see :func:`rows_that_fit`.
        start: number of rows that earlier batches had (:attr:`ReadBatch.done`).

    Raises:
        GemmaScopeError: activations of tokens that count are not finite; the message says where first.
    """
    kept = with_targets(list(places))
    for first, rows, part in _parts(model, text, batch_size, start):
        clean = CleanPass.run(model, part.ids, kept)
        check_finite(model, part.ids, clean.values, part.counted, rows)
        if not all_finite(clean.final, part.counted):
            raise not_finite(model, part.ids, part.counted, numbers=rows)
        yield CleanBatch(first, rows, part.ids, part.counted, clean.values, scored_positions(part.counted), clean)


@torch.no_grad()
def read_batches(
    model: GemmaModel, text: CountedBatch, places: Iterable[Place], batch_size: int = 8, start: int = 0
) -> Generator[ReadBatch]:
    """The activations of each batch of rows, to the bit as in :func:`clean_batches`, which takes the same arguments.

    A pass ends at the last of ``places``, and targets of transcoders are not added to these.

    Raises:
        GemmaScopeError: activations of tokens that count are not finite; the message says where first.
    """
    kept = list(places)
    for first, rows, part in _parts(model, text, batch_size, start):
        values: dict[Place, torch.Tensor] = {}
        visit_finite_places(model, part.ids, kept, values.__setitem__, part.counted, numbers=rows)
        yield ReadBatch(first, rows, part.ids, part.counted, values)


def _parts(
    model: GemmaModel, text: CountedBatch, batch_size: int, start: int
) -> Generator[tuple[int, torch.Tensor, CountedBatch]]:
    """The number of rows before each batch, the numbers of its rows, and the rows on the model's device."""
    where = text.ids.device
    for rows, columns in text.parts(batch_size, start):
        # A column is a position in the text, so nothing is cut off in front.
        part = text.part(rows.to(where), slice(0, columns.stop))
        moved = CountedBatch(*(one.to(model.cfg.device) for one in (part.ids, part.mask, part.counted)))
        yield start, rows.cpu(), moved
        start += len(rows)


def rows_that_fit(model: GemmaModel, places: Iterable[Place], context: int, batch_size: int, memory: int) -> int:
    """The number of rows for which the tensors of a pass fit into ``memory`` bytes, at least 1 and at most a batch.

    The estimate counts the tensors kept, twelve residual streams, and three of a layer's attention patterns.
    """
    kept, dims = with_targets(list(places)), model.dims
    item = next(model.parameters()).element_size()
    sites = [model.family.site(place.site) for place in kept]
    # Behind attention and the MLP, a residual stream inside the block is kept beside the site's tensor.
    widths = sum(site.d_in(dims) + dims.d_model * (site.joins in ("attention", "branch")) for site in sites)
    mlp = int(getattr(model.cfg, "d_mlp", None) or 4 * dims.d_model)
    per_token = widths + 12 * dims.d_model + 3 * mlp + 3 * dims.n_heads * context
    return max(1, min(batch_size, memory // (per_token * context * item)))


def run_to_final_norm(model: GemmaModel, tokens: torch.Tensor) -> Float[torch.Tensor, "batch pos d_model"]:
    """The residual stream before the final norm; the unembedding does not run."""

    reached: list[torch.Tensor] = []

    def stop(_module: Any, args: tuple[Any, ...]) -> None:
        reached.append(args[0])
        raise EndOfPass

    options = {"use_cache": False} if model.backend == "bridge" else {}
    with removed_after() as handles, suppress(EndOfPass):
        handles.append(model.ln_final.register_forward_pre_hook(stop))
        model(tokens, **options)
    if not reached:
        raise AdapterMismatch("The model's forward pass did not reach its final norm.")
    return reached[0]


def hook_point(model: GemmaModel, place: Place) -> Any:
    """The hook point whose tensor an SAE at ``place`` reads."""
    return model.site_hook_point(model.family.site(place.site).hook_name(place.layer, model.backend))


def _output_keeper(values: dict[Place, torch.Tensor], place: Place) -> Callable[..., None]:
    def keep(_module: Any, _args: Any, out: torch.Tensor) -> None:
        values[place] = out

    return keep


def _input_keeper(values: dict[int, torch.Tensor], layer: int) -> Callable[..., None]:
    def keep(_module: Any, args: tuple[Any, ...]) -> None:
        values[layer] = args[0]

    return keep


def _first(value: Any) -> torch.Tensor:
    """The residual stream that a block returned, either alone or as the first item of a tuple."""
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def removed_after() -> Generator[list[Any]]:
    """Yield a list for handles of hooks, all of which are removed at the end of the context, also after an error."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
