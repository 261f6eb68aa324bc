"""What the page of an attribution graph says of latents: promoted tokens, examples, and how often they fire.

One pass over the text serves all latents of all coders. Of a layered coder, promoted tokens are those of each layer
that the latent writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.attributions.placing import Reader, placed_coders
from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError, unknown_name
from gemma_scope_tl.latents.logit_lens import written_logits
from gemma_scope_tl.model.read import visit_places
from gemma_scope_tl.registry.catalog import resolve
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.tokenizing import decoded_ids
from gemma_scope_tl.viz.latent_facts import NEURONPEDIA, PageText, excerpts

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

_ROWS = 64  # decoder rows whose logits are held at once

LatentKey = tuple[str, int | None, int]
"""The coder as the graph names it, the layer, and the latent's index within the layer."""


@dataclass(frozen=True)
class Plane:
    """The tokens that a latent promotes and suppresses most by what it writes at one layer.

    Attributes:
        layer: the layer that is written, or None.
        promoted, suppressed: tokens with the change of their logits per unit of activation, strongest first.
    """

    layer: int | None
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


@dataclass(frozen=True)
class LatentNote:
    """What is known of a latent.

    Attributes:
        label: a short explanation, or an empty text.
        planes: a :class:`Plane` for each written layer.
        fired, tokens, maximum: on how many of how many tokens it fires, and at most how strongly; None if unknown.
        examples: ``tokens, activations, peak`` of each excerpt, strongest first.
        neuronpedia, neuronpedia_warning: as in :class:`~gemma_scope_tl.viz.latent_facts.LatentFacts`.
    """

    label: str = ""
    planes: list[Plane] = field(default_factory=list[Plane])
    fired: int | None = None
    tokens: int | None = None
    maximum: float | None = None
    examples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    neuronpedia: str | None = None
    neuronpedia_warning: str | None = None

    def as_data(self) -> dict[str, Any]:
        """The note as plain values."""
        return asdict(self)


def graph_notes(
    graph: AttributionGraph,
    model: GemmaModel,
    coders: Any,
    text: PageText | None = None,
    *,
    latents: int | Iterable[str] = 150,
    labels: Mapping[LatentKey, str] | None = None,
    examples: int = 4,
    around: int = 10,
    k: int = 8,
) -> dict[LatentKey, LatentNote]:
    """Collect notes on latents of a graph, for :func:`~gemma_scope_tl.viz.graph_page.write_graph_page`.

    It runs the model once over the text, which takes minutes for a large model on a CPU. With ``examples=0`` it does
    not, and only promoted tokens are collected.

    Args:
        graph: a graph of ``model`` and ``coders``.
        model: the model, without attached SAEs.
        coders: as for :func:`~gemma_scope_tl.attribution_graph`.
        text: where examples come from; by default the held-out text in the package.
        latents: the number of latents, the most influential ones; or their ``node_id`` values.
        labels: explanations of latents.
        examples, around: number of examples, and of tokens on each side of the strongest.
        k: number of promoted tokens, and of suppressed tokens.

    Raises:
        UnknownNameError: for a node that does not exist, or a graph with another coder.
        SpliceError: for a coder that does not fit the model.
        GemmaScopeError: for a node that is no latent, or a number out of range.
    """
    examples, around = (checked_count(n, name, least=0) for n, name in ((examples, "examples"), (around, "around")))
    k, wanted = checked_count(k, "k"), _wanted(graph, latents)
    readers = {(one.name, one.layer): one for one in placed_coders(model, coders).readers}
    by_reader: dict[tuple[str, int | None], list[int]] = {}
    for coder, layer, latent in wanted:
        if (coder, layer) not in readers:
            names = sorted({name for name, _ in readers})
            raise unknown_name("coder of the graph", coder, names, f"It reads layer {layer}.")
        if not 0 <= latent < readers[coder, layer].W_enc.shape[1]:
            raise SpliceError(f"{coder} has no latent {latent} at layer {layer}.")
        by_reader.setdefault((coder, layer), []).append(latent)
    facts: dict[LatentKey, dict[str, Any]] = {key: {"label": (labels or {}).get(key, "")} for key in wanted}
    for name, chosen in by_reader.items():
        for latent, planes in zip(chosen, _planes(model, readers[name], chosen, k), strict=True):
            facts[*name, latent] |= {"planes": planes, **_dashboard(name[0], latent)}
    if examples:
        text = PageText(model) if text is None else text
        used = {name: (readers[name], chosen) for name, chosen in by_reader.items()}
        for name, acts in _activations(text, used).items():
            for n, latent in enumerate(by_reader[name]):
                facts[*name, latent] |= _firing(text, acts[..., n], examples, around)
    return {key: LatentNote(**values) for key, values in facts.items()}


def _wanted(graph: AttributionGraph, latents: int | Iterable[str]) -> list[LatentKey]:
    nodes = graph.nodes[graph.nodes["kind"] == "latent"]
    if isinstance(latents, int) and not isinstance(latents, bool):
        most = checked_count(latents, "latents")
        order = graph.influence()[nodes.index].sort_values(ascending=False, kind="stable").index
        chosen = graph.nodes.loc[order]
    else:
        given = [latents] if isinstance(latents, str) else list(latents)  # type: ignore[arg-type]
        chosen = graph.nodes.iloc[[graph.number_of(one) for one in given]]
        most = len(chosen)
        if stray := chosen["node_id"][chosen["kind"] != "latent"].tolist():
            raise GemmaScopeError(f"Node {stray[0]!r} is no latent.")
    known = chosen[chosen["coder"].notna() & chosen["latent"].notna()]
    triples = zip(known["coder"], known["layer"], known["latent"], strict=True)
    return list(dict.fromkeys(latent_key(*one) for one in triples))[:most]


def latent_key(coder: str, layer: Any, latent: Any) -> LatentKey:
    """The key of a latent in a row of a graph's nodes."""
    return coder, None if layer is None or type(layer).__name__ == "NAType" else int(layer), int(latent)


@torch.no_grad()
def _planes(model: GemmaModel, reader: Reader, latents: list[int], k: int) -> list[list[Plane]]:
    """For each latent its planes."""
    found: list[list[Plane]] = [[] for _ in latents]
    like = torch.zeros(0, dtype=torch.float32, device=model.W_U.device)
    for plane, place in enumerate(reader.planes):
        for start in range(0, len(latents), _ROWS):
            some = latents[start : start + _ROWS]
            logits = written_logits(model, place, reader.rows(plane, torch.tensor(some), like))
            sides = [logits.topk(min(k, logits.shape[1]), largest=largest) for largest in (True, False)]
            texts = [decoded_ids(model.tokenizer, ids.flatten().tolist()) for _, ids in sides]
            for n in range(len(some)):
                up, down = (
                    [(text[n * len(row) + i], round(float(v), 4)) for i, v in enumerate(row)]
                    for text, row in ((texts[j], sides[j][0][n]) for j in (0, 1))
                )
                found[start + n].append(Plane(place.layer, up, down))
    return found


def _dashboard(coder: str, latent: int) -> dict[str, Any]:
    """The latent's dashboard on Neuronpedia, if the coder is in the registry and has one."""
    release, slash, name = coder.partition("/")
    try:
        row = resolve(release, name) if slash else None
    except UnknownNameError:
        row = None
    if row is None or not row.neuronpedia:
        return {}
    return {
        "neuronpedia": f"{NEURONPEDIA}/{row.neuronpedia}/{latent}",
        "neuronpedia_warning": row.neuronpedia_warning,
    }


@torch.no_grad()
def _activations(
    text: PageText, used: Mapping[tuple[str, int | None], tuple[Reader, list[int]]]
) -> dict[tuple[str, int | None], torch.Tensor]:
    """``[rows, pos, latents]`` of each reader's chosen latents, on the CPU; 0 where a token does not count."""
    found = {name: torch.zeros(*text.tokens.shape, len(chosen)) for name, (_, chosen) in used.items()}
    matrices = {
        name: (
            one.W_enc[:, chosen].float(),
            one.b_enc[chosen].float(),
            one.threshold[chosen].float(),
        )
        for name, (one, chosen) in used.items()
    }
    at: dict[Place, list[tuple[str, int | None]]] = {}
    for name, (one, _) in used.items():
        at.setdefault(Place(one.site.name, one.layer), []).append(name)
    for rows, columns in text.parts():

        def visit(place: Place, x: torch.Tensor, rows: torch.Tensor = rows, columns: slice = columns) -> None:
            for name in at[place]:
                W, b, threshold = matrices[name]
                z = x.to(W) @ W + b
                found[name][rows, columns] = (z * (z > threshold)).cpu()

        visit_places(text.model, text.tokens[rows, columns].to(text.model.cfg.device), at, visit)
    for acts in found.values():
        acts *= text.counted[..., None]
    return found


def _firing(text: PageText, acts: torch.Tensor, examples: int, around: int) -> dict[str, Any]:
    shown = [
        {"tokens": one.tokens, "activations": [round(a, 3) for a in one.activations], "peak": one.peak}
        for one in excerpts(text, acts, examples, around)
    ]
    fired = int((acts > 0).sum())
    return {
        "fired": fired,
        "tokens": int(text.counted.sum()),
        "maximum": float(acts.max()) if fired else 0.0,
        "examples": shown,
    }
