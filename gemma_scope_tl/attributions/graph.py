"""Which latents drive which: edges between SAEs of different sites, and the small circuit behind a metric.

An edge is the same product as an attribution, with a downstream latent in the metric's place. For latent i at token s
of an SAE with output ``x_s``, and an active latent j at token t downstream with pre-activation ``z_{t,j}``,

    w = f_{s,i} (dz_{t,j}/dx_s . W_dec[i])

is to first order how much of ``z_{t,j}`` (of ``f_{t,j}`` too: above its threshold JumpReLU has slope 1) goes when i is
set to zero at s. One backward pass gives all edges into a downstream latent. Through the rest of the downstream tensor
the same holds for its error: the error is taken as the function ``x - x_hat(x)`` along the gradient at its output.

In a circuit, gradients stop at every site that has an SAE, so an edge is the direct effect, not through a site between.
With all nodes in, the chain rule then holds exactly: a node's attribution is its direct effect on the metric plus the
effects through all its edges. Sparse Feature Circuits (Marks et al., 2024) draws graphs of this kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from gemma_scope_tl.attributions.decomposition import (
    COLUMNS,
    Moves,
    Parts,
    decompose,
    moves_from,
    strongest,
    table_of,
    token_names,
)
from gemma_scope_tl.attributions.passes import (
    Pass,
    Place,
    Prompt,
    differentiable,
    one_prompt,
    places_of,
    run_probed,
    token_row,
)
from gemma_scope_tl.attributions.targets import Metric, Tokens, metric_on, metric_value
from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.sae.arguments import as_indices
from gemma_scope_tl.sites import flatten_heads
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.text.tokens import ExcludeTokens

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Circuit:
    """Nodes and edges behind a metric.

    Attributes:
        nodes: a row per node, the index is its number: ``kind`` (``latent``, ``error``, ``skip``, ``unspliced``, and
            ``metric`` for the last), ``site, layer, position, token, latent, activation, attribution`` (of the whole
            effect on the metric), and ``rank``, the place of its site in the order of the forward pass, from 0.
        edges: ``source, target`` (numbers of nodes), ``weight`` (in the target's units: how much of its activation),
            ``effect`` (how much of the metric, through this edge); strongest effect first.
        tokens: of the prompt.
        metric: its value.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    tokens: list[str]
    metric: float


@dataclass(frozen=True)
class _Scene:
    """A prompt with its pass cut at every place, and what is at each place, differentiable and not."""

    prompt: Prompt
    places: list[Place]
    cut: Pass
    parts: list[Parts]
    moves: list[Moves]


def circuit(
    model: Any,
    text: Text,
    saes: Any | Iterable[Any],
    metric: Metric | Tokens,
    nodes: int = 24,
    edges: int = 60,
    exclude_special_tokens: ExcludeTokens = True,
    attention_mask: Any = None,
) -> Circuit:
    """The strongest latents behind a metric and the strongest direct edges between them.

    Nodes are latents at a token, and at each site and token the SAE's error (and what is not spliced), which compete by
    the size of their attribution. Two forward passes, and a backward pass per node.

    Args:
        model: from ``load_model``; left as it was.
        text: one text, or its ids; chat messages as for :func:`~gemma_scope_tl.attribute`.
        saes: SAEs or transcoders, at most one for each place in the model.
        metric: as for :func:`~gemma_scope_tl.attribute`.
        nodes: how many, beside the metric's own.
        edges: how many.
        exclude_special_tokens: as in :func:`~gemma_scope_tl.splice`.
        attention_mask: ``[1, pos]``, 1 at text; by default it follows from the text, or the padding of token ids.

    Raises:
        SpliceError: an SAE that does not fit; two that write at the same place.
        GemmaScopeError: several texts; a metric that is not one differentiable number; no nodes or edges wanted.
    """
    import pandas as pd

    if nodes < 1 or edges < 1:
        raise GemmaScopeError(f"nodes={nodes}, edges={edges}: a circuit needs at least 1 of each.")
    places, prompt = _scenery(model, text, saes, exclude_special_tokens, attention_mask)
    metric = metric_on(model, metric, prompt)
    with differentiable(model, places):
        whole = run_probed(model, prompt, places)
        value = metric_value(metric, whole.logits)
        gradients = {name: flatten_heads(g) for name, g in whole.gradients(value).items()}
        scene = _scene(model, prompt, places)
        frames: list[pd.DataFrame] = []
        order = [name for name in scene.cut.values if name in scene.cut.probes]
        for number, (place, moves) in enumerate(zip(places, scene.moves, strict=True)):
            frame = table_of(model, prompt, place, moves, gradients[place.write])
            frames.append(frame[frame["kind"] != "bias"].assign(place=number, rank=order.index(place.write)))
        ranked = strongest(pd.concat(frames, ignore_index=True), None).head(nodes).reset_index(drop=True)
        direct = metric_value(metric, scene.cut.logits)
        found = _edges(scene, ranked, gradients, direct)
    kept = found.loc[found["effect"].abs().sort_values(ascending=False, kind="stable").index].head(edges)
    last = {"kind": "metric", "attribution": float(value.detach()), "position": int(prompt.length[0]) - 1}
    end = pd.DataFrame([{**last, "token": "", "site": "", "rank": len(order)}])
    table = pd.concat([ranked, end], ignore_index=True)[[*COLUMNS[1:], "rank"]]
    tokens = token_names(model, prompt.ids[prompt.mask][None])[0]
    return Circuit(table, kept.reset_index(drop=True), tokens, float(value.detach()))


def latent_edges(
    model: Any,
    text: Text,
    upstream: Any,
    downstream: Any,
    targets: Sequence[tuple[int, int]],
    top: int | None = None,
    exclude_special_tokens: ExcludeTokens = True,
    attention_mask: Any = None,
) -> pd.DataFrame:
    """What each part of an upstream site contributes to chosen latents of a downstream SAE, along every path.

    Args:
        model, text, exclude_special_tokens, attention_mask: as for :func:`circuit`.
        upstream, downstream: the two SAEs or transcoders.
        targets: ``(position, latent)`` pairs of latents of ``downstream`` that are active; positions as in
            :func:`~gemma_scope_tl.features`.
        top: keep the ``top`` strongest upstream latents of each target.

    Returns:
        The columns of :func:`~gemma_scope_tl.attribute` for the upstream parts, ``attribution`` being the edge in units
        of the target's activation, and ``target_position, target_latent, target_activation``.

    Raises:
        SpliceError: an SAE that does not fit, or ``upstream`` is not before ``downstream`` in the pass.
        GemmaScopeError: several texts; no targets; a target that is not active.
    """
    import pandas as pd

    if not targets:
        raise GemmaScopeError("No targets were given: name (position, latent) pairs of the downstream SAE.")
    places, prompt = _scenery(model, text, [upstream, downstream], exclude_special_tokens, attention_mask)
    frames: list[pd.DataFrame] = []
    with differentiable(model, places):
        scene = _scene(model, prompt, places)
        order = list(scene.cut.values)
        if order.index(places[0].write) >= order.index(places[1].read):
            raise SpliceError(f"{places[0].write} is not before {places[1].read} in the forward pass: swap the two.")
        for position, latent in map(as_indices, targets):
            activation = scene.parts[1].acts[0, token_row(prompt, position), _checked_latent(downstream, latent)]
            if float(activation.detach()) == 0:
                raise GemmaScopeError(
                    f"Latent {latent} is not active at position {position}: features() lists those that are."
                )
            gradient = flatten_heads(scene.cut.gradients(activation)[places[0].write])
            table = strongest(table_of(model, prompt, places[0], scene.moves[0], gradient), top)
            target = {
                "target_position": position,
                "target_latent": latent,
                "target_activation": float(activation.detach()),
            }
            frames.append(table.assign(**target))
    return pd.concat(frames, ignore_index=True)


def _scenery(
    model: Any, text: Text, saes: Any, exclude: ExcludeTokens, attention_mask: Any
) -> tuple[list[Place], Prompt]:
    places = places_of(model, saes, exclude)
    prompt = one_prompt(model, text, exclude, attention_mask, "A circuit is of")
    writes = [place.write for place in places]
    for name in writes:
        if writes.count(name) > 1:
            raise SpliceError(f"{name} is taken: {writes.count(name)} of the SAEs write there. Give one a place.")
    return places, prompt


def _checked_latent(sae: Any, latent: int) -> int:
    if not 0 <= latent < sae.cfg.d_sae:
        raise SpliceError(f"No latent {latent}: this SAE has latents 0..{sae.cfg.d_sae - 1}.")
    return latent


def _scene(model: Any, prompt: Prompt, places: list[Place]) -> _Scene:
    cut = run_probed(model, prompt, places, cut=True)
    parts = [decompose(p, cut.values[p.read], cut.values[p.write], prompt.spliced) for p in places]
    still = [Parts(one.acts.detach(), {k: v.detach() for k, v in one.vectors.items()}) for one in parts]
    return _Scene(prompt, places, cut, parts, [moves_from(one, "zero") for one in still])


def _edges(scene: _Scene, nodes: pd.DataFrame, whole: dict[str, torch.Tensor], metric: torch.Tensor) -> pd.DataFrame:
    """Every edge between ``nodes`` and from them to the metric, whose number is ``len(nodes)``."""
    import pandas as pd

    rows: list[tuple[int, int, float, float]] = []
    sources = _sources(scene, nodes)
    for target in range(len(nodes) + 1):
        if target == len(nodes):
            scalar, slope = metric, 1.0
        else:
            scalar, slope = _target(scene, nodes.iloc[target], whole)
        for number, gradient in enumerate(_by_place(scene, scalar)):
            if number not in sources:
                continue
            which, positions, vectors = sources[number]
            weights = (vectors * gradient[0, positions].to(vectors.dtype)).sum(-1)
            rows += [(s, target, w, w * slope) for s, w in zip(which, weights.tolist(), strict=True) if w != 0.0]
    return pd.DataFrame(rows, columns=["source", "target", "weight", "effect"])


def _by_place(scene: _Scene, scalar: torch.Tensor) -> list[torch.Tensor]:
    found = scene.cut.gradients(scalar)
    return [flatten_heads(found[place.write]) for place in scene.places]


def _sources(scene: _Scene, nodes: pd.DataFrame) -> dict[int, tuple[list[int], torch.Tensor, torch.Tensor]]:
    """For each place: its nodes, their positions, and the vector ``[n, d]`` that each adds to the site."""
    found: dict[int, tuple[list[int], torch.Tensor, torch.Tensor]] = {}
    for number, group in nodes.groupby("place"):
        place, parts = scene.places[cast(int, number)], scene.parts[cast(int, number)]
        positions = [token_row(scene.prompt, int(p)) for p in group["position"]]
        vectors: list[torch.Tensor] = []
        for at, kind, latent in zip(positions, group["kind"], group["latent"], strict=True):
            if kind == "latent":
                vectors.append(parts.acts[0, at, int(latent)].detach() * place.sae.W_dec[int(latent)].detach())
            else:
                vectors.append(parts.vectors[kind][0, at].detach())
        device = vectors[0].device
        found[cast(int, number)] = (group.index.tolist(), torch.tensor(positions, device=device), torch.stack(vectors))
    return found


def _target(scene: _Scene, node: Any, whole: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The scalar that a node is as a target, and how much of the metric a unit of it makes."""
    place, parts = scene.places[int(node["place"])], scene.parts[int(node["place"])]
    at = token_row(scene.prompt, int(node["position"]))
    gradient = whole[place.write][0, at].to(parts.acts.dtype)
    if node["kind"] == "latent":
        row = place.sae.W_dec[int(node["latent"])].detach()
        return parts.acts[0, at, int(node["latent"])], float(row.to(gradient.dtype) @ gradient)
    vector = parts.vectors[node["kind"]][0, at]
    return vector @ gradient, 1.0
