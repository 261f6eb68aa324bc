"""From a model, a text and coders to an attribution graph: the pass, its sources, their effects, and the table."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.attributions.assembling import Prompt, assembled
from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.attributions.frozen import frozen_pass
from gemma_scope_tl.attributions.passes import one_prompt, token_row
from gemma_scope_tl.attributions.placing import placed_coders
from gemma_scope_tl.attributions.readout import Readout, readout
from gemma_scope_tl.attributions.sources import Sources, sources_of
from gemma_scope_tl.attributions.tracing import Progress, trace
from gemma_scope_tl.counts import checked_count, checked_flag, checked_real, checked_top, whole_number
from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.errors import GemmaScopeError, brief
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.text.tokenizing import decoded_ids
from gemma_scope_tl.text.tokens import ExcludeTokens

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

LARGEST_BATCH = 256
_PACKAGES = ("gemma-scope-tl", "torch", "transformer-lens", "transformers")
_COPIES = 4  # of a batch's largest gradient that a step of the walk holds at a time


@dataclass(frozen=True)
class Request:
    """What a graph is to show, and what making it may cost.

    Attributes:
        logits: the number of logits at most; or the tokens to explain, as words or ids.
        probability: the most probable tokens that have this probability together are taken, at most ``logits`` of them.
        position: whose logits are explained, from 0 or from the end of the text.
        centred: whether a logit node is the logit minus the mean of all, as in circuit-tracer, or the logit itself.
        soft_cap: for a model with a soft-cap of its logits, ``"ratio"`` freezes the ratio of the logit behind it to the
            one before it, ``"before"`` takes the logit before it.
        max_latent_nodes: the number of latents in the graph. If more are active, the most influential are taken, by the
            effects that are known when they are chosen; None takes all.
        smallest_edge: edges below this share of the sum of their target's absolute effects are left out; by default
            none is. ``checks`` are computed before.
        exclude_special_tokens, positions: where coders are applied, as in :func:`~gemma_scope_tl.splice`. Elsewhere
            the whole tensor is one error node.
        attention_mask: ``[1, pos]``, 1 at text; by default it follows from the text, or the padding of token ids.
        budget: bytes for gradients and decoder rows at a time, beside the model, the tensors of one pass, its attention
            patterns and the active latents. The effects themselves are in a temporary file if they need more.
        batch_size: number of targets in a backward walk; None for as many as the budget allows, at most 256.
        dtype: of the pass, float32 or float64; None for the model's, but at least float32.

    Raises:
        GemmaScopeError: for a value that is out of range.
    """

    logits: Any = 10
    probability: float = 0.95
    position: int = -1
    centred: bool = True
    soft_cap: str = "ratio"
    max_latent_nodes: int | None = 7500
    smallest_edge: float = 0.0
    exclude_special_tokens: ExcludeTokens = True
    positions: Positions = None
    attention_mask: Any = None
    budget: int = 2 << 30
    batch_size: int | None = None
    dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        if whole_number(self.position) is None:
            raise GemmaScopeError(f"position must be an integer, not {brief(self.position)}.")
        checked_flag(self.centred, "centred")
        checked_top(self.max_latent_nodes, "max_latent_nodes")
        if checked_real(self.smallest_edge, "smallest_edge", least=0.0) >= 1:
            raise GemmaScopeError(f"smallest_edge must be below 1, not {self.smallest_edge}: it is a share.")
        checked_count(self.budget, "budget")
        if self.batch_size is not None:
            checked_count(self.batch_size, "batch_size")
        if self.dtype is not None and parse_dtype(self.dtype).itemsize < 4:
            raise GemmaScopeError(f"A frozen pass is computed in float32 or float64, not in {self.dtype}.")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A frozen pass of a text with its sources.

    Attributes:
        sources: of the pass.
        prompt: the tokens.
        text: the prompt as text.
    """

    sources: Sources
    prompt: Prompt
    text: str


def prepared(model: GemmaModel, text: Text, coders: Any, request: Request) -> Prepared:
    """Run the frozen pass of a text, and find its sources.

    Raises:
        SpliceError, GemmaScopeError, UnknownNameError: as :func:`~gemma_scope_tl.attribution_graph`.
    """
    placed = placed_coders(model, coders)
    exclude, positions = request.exclude_special_tokens, request.positions
    spliced = one_prompt(model, text, exclude, request.attention_mask, positions, "An attribution graph is of")
    inside = spliced.mask[0]
    ids, applied = spliced.ids[0, inside], spliced.spliced[0, inside]
    at, length = request.position, int(spliced.length[0])
    if not -length <= at < length:
        raise GemmaScopeError(f"No position {at}: the text has 0..{length - 1}, and -1..-{length} from its end.")
    at = token_row(spliced, at % length) - int(spliced.start[0])
    dtype = None if request.dtype is None else parse_dtype(request.dtype)
    with torch.inference_mode(False):
        frozen = frozen_pass(model, ids, dtype, at)
        room = request.budget // (2 * frozen.dtype.itemsize)
        sources = sources_of(frozen, placed, applied.to(frozen.embedding.device), room)
    listed = tuple(ids.tolist())
    tokens = tuple(decoded_ids(model.tokenizer, list(listed)))
    return Prepared(sources, Prompt(listed, tokens), text if isinstance(text, str) else "".join(tokens))


def prepared_again(model: GemmaModel, graph: AttributionGraph, coders: Any) -> Prepared:
    """The pass and the sources of a graph.

    Raises:
        GemmaScopeError: the coders are not those of the graph, or it was made elsewhere and has no settings.
        SpliceError: as :func:`prepared`.
    """
    names = {name for name in Request.__dataclass_fields__ if name != "attention_mask"}
    if missing := names - set(graph.settings):
        raise GemmaScopeError(f"The graph's settings do not say {sorted(missing)}: it was not made by this package.")
    request = Request(**{name: graph.settings[name] for name in names})
    ids = torch.tensor(graph.token_ids, device=model.device_of(None))
    ready = prepared(model, ids, coders, request)
    if list(ready.sources.placed.names) != list(graph.settings["coders"]):
        raise GemmaScopeError(f"The graph has the coders {graph.settings['coders']}: give these.")
    return ready


def readout_again(ready: Prepared, graph: AttributionGraph) -> Readout:
    """The logits of a graph's nodes, in their order."""
    said, logits = graph.settings, graph.nodes[graph.nodes["kind"] == "logit"]
    ids = [int(one) for one in logits["token_id"]]
    with torch.inference_mode(False):
        return readout(ready.sources.frozen, ids, said["probability"], said["centred"], said["soft_cap"])


def attribution_graph(
    model: GemmaModel,
    text: Text,
    coders: Any,
    *,
    logits: int | str | Sequence[Any] = 10,
    probability: float = 0.95,
    position: int = -1,
    centred: bool = True,
    soft_cap: str = "ratio",
    max_latent_nodes: int | None = 7500,
    smallest_edge: float = 0.0,
    exclude_special_tokens: ExcludeTokens = True,
    positions: Positions = None,
    attention_mask: Any = None,
    budget: int = 2 << 30,
    batch_size: int | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool | Callable[[int, int], None] = False,
) -> AttributionGraph:
    """The attribution graph of one prompt: latents, errors and embeddings, and their direct effects up to the logits.

    Args:
        model: a model from ``load_model``, without attached SAEs and hooks. It is not changed.
        text: one text, token ids or messages, as for :func:`~gemma_scope_tl.attribute`.
        coders: SAEs, transcoders with or without skip connections, crosscoders and cross-layer transcoders in any
            mixture, at most one for each written tensor: one, several, a suite, or a mapping from names to coders. They
            stay on their device, and a decoder in a mapped file is read row by row.
        logits, probability, position, centred, soft_cap, max_latent_nodes, smallest_edge, exclude_special_tokens,
            positions, attention_mask, budget, batch_size, dtype: the attributes of
            :class:`~gemma_scope_tl.attributions.making.Request`.
        progress: True for a bar on standard error, or a function of the number of targets done and to do.

    Returns:
        The graph, not pruned. ``settings`` records the arguments, the number of active latents and of edges left out,
        the deviation of the frozen pass from the model, and the versions of the libraries.

    Raises:
        SpliceError: a coder does not fit the model, or two write one tensor; or the text lacks one of ``positions``.
        GemmaScopeError: several texts were given, or a value is out of range.
        UnknownNameError: for another ``soft_cap``.
    """
    given = locals()
    request = Request(**{name: given[name] for name in Request.__dataclass_fields__})
    return make_graph(model, text, coders, request, progress)


def make_graph(
    model: GemmaModel, text: Text, coders: Any, request: Request, progress: bool | Progress = False
) -> AttributionGraph:
    """The graph of a request (:func:`~gemma_scope_tl.attribution_graph`)."""
    ready = prepared(model, text, coders, request)
    sources = ready.sources
    with torch.inference_mode(False), _shown(progress) as report:
        read = readout(sources.frozen, request.logits, request.probability, request.centred, request.soft_cap)
        most = sources.n_latents if request.max_latent_nodes is None else request.max_latent_nodes
        batch = request.batch_size or _batch_of(sources, request.budget)
        traced = trace(sources, read, most, batch, request.budget, report)
        nodes, weights, checks, dropped = assembled(sources, read, traced, ready.prompt, request.smallest_edge)
    settings = {
        **{name: value for name, value in vars(request).items() if name not in ("dtype", "attention_mask")},
        "dtype": str(sources.frozen.dtype).removeprefix("torch."),
        "batch_size": batch,
        "coders": list(sources.placed.names),
        "backend": model.backend,
        "active_latents": sources.n_latents,
        "latents_left_out": sources.n_latents - len(traced.latents),
        "edges_left_out": dropped,
        "deviation": sources.frozen.deviation,
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    name = model.model_id or model.family.name
    ids, tokens = ready.prompt.ids, ready.prompt.tokens
    graph = AttributionGraph(name, ready.text, ids, tokens, nodes, weights, checks, settings)
    nodes["influence"] = graph.influence()
    return graph


def _batch_of(sources: Sources, budget: int) -> int:
    """Targets in a walk, so that its gradients and effects take half of the budget."""
    dims, frozen = sources.frozen.model.dims, sources.frozen
    widest = max(dims.d_model, dims.n_heads * dims.d_head)
    each = (_COPIES * frozen.length * widest + 2 * sources.count) * frozen.dtype.itemsize
    return max(1, min(LARGEST_BATCH, budget // 2 // each))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@contextmanager
def _shown(progress: bool | Progress) -> Generator[Progress | None]:
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tracing", total=None)
        report: Callable[[int, int], None] = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        yield report
