"""Circuits: edges between latents of SAEs at different sites, and the strongest nodes and edges behind a metric.

An edge is the same product as an attribution, with a downstream latent in place of the metric. For latent i at token s
of an SAE with output ``x_s``, and an active latent j at token t downstream with pre-activation ``z_{t,j}``,

    w = f_{s,i} (dz_{t,j}/dx_s . W_dec[i])

is, to first order, the decrease of ``z_{t,j}`` when i is set to zero at s (of ``f_{t,j}`` too: above its threshold
JumpReLU has slope 1). One backward pass gives all edges into a downstream latent. A downstream error has edges as well:
it is the function ``x - x_hat(x)`` of its input, projected on the gradient of the metric at its output.

In a circuit, gradients stop at every site that has an SAE, so an edge is the direct effect, without paths through a
site between the two. If all nodes are included, the chain rule holds exactly: a node's attribution is its direct effect
on the metric plus the effects through all its edges. Sparse Feature Circuits (Marks et al., 2024) draws graphs of this
kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from gemma_scope_tl.attributions.decomposition import (
    COLUMNS,
    Change,
    Terms,
    change_from,
    decompose,
    strongest,
    table_of,
    token_names,
)
from gemma_scope_tl.attributions.passes import (
    PlacedSAE,
    ProbedPass,
    SplicedPrompt,
    differentiable,
    one_prompt,
    placed_saes,
    run_probed,
    token_row,
)
from gemma_scope_tl.attributions.targets import Metric, Tokens, metric_on, metric_value
from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.arguments import as_indices
from gemma_scope_tl.sites import flatten_heads
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.text.tokens import ExcludeTokens

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


@dataclass(frozen=True)
class Circuit:
    """Nodes and edges behind a metric.

    Attributes:
        nodes: a row per node, indexed by the node's number: ``kind`` (``latent``, ``error``, ``skip``, ``unspliced``,
            and ``metric`` for the last), ``site, layer, position, token, latent, activation, attribution`` (along all
            paths to the metric), and ``rank``, the index of the site in the order of the forward pass, from 0.
        edges: ``source, target`` (numbers of nodes), ``weight`` (contribution to the target's activation), ``effect``
            (contribution to the metric through this edge); strongest effect first.
        tokens: the tokens of the prompt as text.
        metric: the value of the metric.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    tokens: list[str]
    metric: float


@dataclass(frozen=True)
class _CutPass:
    """A pass over a prompt whose gradients stop where SAEs write.

    Attributes:
        prompt: the token ids.
        placed: the SAEs.
        run: the probed pass.
        terms: the differentiable terms of the tensor that each SAE writes.
        changes: the detached differences of these terms from a baseline of zero.
    """

    prompt: SplicedPrompt
    placed: list[PlacedSAE]
    run: ProbedPass
    terms: list[Terms]
    changes: list[Change]

    def gradients(self, scalar: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of ``scalar`` at the output of each SAE."""
        found = self.run.gradients(scalar)
        return [flatten_heads(found[one.write]) for one in self.placed]


def circuit(
    model: GemmaModel,
    text: Text,
    saes: Any | Iterable[Any],
    metric: Metric | Tokens,
    nodes: int = 24,
    edges: int = 60,
    exclude_special_tokens: ExcludeTokens = True,
    attention_mask: Any = None,
    positions: Positions = None,
) -> Circuit:
    """The strongest latents behind a metric and the strongest direct edges between them.

    Nodes are latents at a token, and at each site and token the SAE's error (or the tensor, where it is not spliced).
    The nodes of largest attribution are kept. The function takes two forward passes, and a backward pass per node.

    Args:
        model: a model from ``load_model``; it is not changed.
        text: one text, or its ids; chat messages as for :func:`~gemma_scope_tl.attribute`.
        saes: SAEs or transcoders, at most one for each place in the model.
        metric: as for :func:`~gemma_scope_tl.attribute`.
        nodes: number of nodes, without that of the metric.
        edges: number of edges.
        exclude_special_tokens: as in :func:`~gemma_scope_tl.splice`.
        attention_mask: ``[1, pos]``, 1 at text; by default it follows from the text, or the padding of token ids.
        positions: the only positions at which SAEs are applied, as in :func:`~gemma_scope_tl.splice`; None for all.
            At all others the tensor of a site is one node.

    Raises:
        SpliceError: an SAE does not fit the model, two write at the same place, or the text lacks one of the positions.
        GemmaScopeError: several texts were given, the metric is not one differentiable number, or ``nodes`` or
            ``edges`` is below 1.
    """
    import pandas as pd

    nodes, edges = checked_count(nodes, "nodes"), checked_count(edges, "edges")
    placed, prompt = _checked_inputs(model, text, saes, exclude_special_tokens, attention_mask, positions)
    metric = metric_on(model, metric, prompt)
    with differentiable(model, placed):
        whole = run_probed(model, prompt, placed)
        value = metric_value(metric, whole.logits)
        gradients = {name: flatten_heads(g) for name, g in whole.gradients(value).items()}
        cut = _cut_pass(model, prompt, placed)
        frames: list[pd.DataFrame] = []
        order = [name for name in cut.run.values if name in cut.run.probes]
        for number, (one, change) in enumerate(zip(placed, cut.changes, strict=True)):
            frame = table_of(model, prompt, one, change, gradients[one.write])
            frames.append(frame[frame["kind"] != "bias"].assign(sae=number, rank=order.index(one.write)))
        ranked = strongest(pd.concat(frames, ignore_index=True), None).head(nodes).reset_index(drop=True)
        direct = metric_value(metric, cut.run.logits)
        found = _edges(cut, ranked, gradients, direct)
    kept = found.loc[found["effect"].abs().sort_values(ascending=False, kind="stable").index].head(edges)
    last = {"kind": "metric", "attribution": float(value.detach()), "position": int(prompt.length[0]) - 1}
    end = pd.DataFrame([{**last, "token": "", "site": "", "rank": len(order)}])
    table = pd.concat([ranked, end], ignore_index=True)[[*COLUMNS[1:], "rank"]]
    tokens = token_names(model, prompt.ids[prompt.mask][None])[0]
    return Circuit(table, kept.reset_index(drop=True), tokens, float(value.detach()))


def latent_edges(
    model: GemmaModel,
    text: Text,
    upstream: Any,
    downstream: Any,
    targets: Sequence[tuple[int, int]],
    top: int | None = None,
    exclude_special_tokens: ExcludeTokens = True,
    attention_mask: Any = None,
    positions: Positions = None,
) -> pd.DataFrame:
    """Attribute chosen latents of a downstream SAE to the terms of an upstream site, along every path.

    Args:
        model, text, exclude_special_tokens, attention_mask, positions: as for :func:`circuit`.
        upstream, downstream: the two SAEs or transcoders.
        targets: ``(position, latent)`` pairs of latents of ``downstream`` that are active; positions as in
            :func:`~gemma_scope_tl.features`.
        top: keep the ``top`` strongest upstream latents of each target.

    Returns:
        The columns of :func:`~gemma_scope_tl.attribute` for the upstream terms, with ``attribution`` in units of the
        target's activation, and ``target_position, target_latent, target_activation``.

    Raises:
        SpliceError: an SAE does not fit the model, ``upstream`` is not before ``downstream`` in the forward pass, or
            the text lacks one of ``positions``.
        GemmaScopeError: several texts or no targets were given, or a target is not active.
    """
    import pandas as pd

    if not targets:
        raise GemmaScopeError("No targets were given: name (position, latent) pairs of the downstream SAE.")
    saes = [upstream, downstream]
    placed, prompt = _checked_inputs(model, text, saes, exclude_special_tokens, attention_mask, positions)
    frames: list[pd.DataFrame] = []
    with differentiable(model, placed):
        cut = _cut_pass(model, prompt, placed)
        order = list(cut.run.values)
        if order.index(placed[0].write) >= order.index(placed[1].read):
            raise SpliceError(f"{placed[0].write} is not before {placed[1].read} in the forward pass: swap the two.")
        for position, latent in map(as_indices, targets):
            activation = cut.terms[1].acts[0, token_row(prompt, position), _checked_latent(downstream, latent)]
            if float(activation.detach()) == 0:
                raise GemmaScopeError(
                    f"Latent {latent} is not active at position {position}: features() lists the active latents."
                )
            gradient = cut.gradients(activation)[0]
            table = strongest(table_of(model, prompt, placed[0], cut.changes[0], gradient), top)
            target = {
                "target_position": position,
                "target_latent": latent,
                "target_activation": float(activation.detach()),
            }
            frames.append(table.assign(**target))
    return pd.concat(frames, ignore_index=True)


def _checked_inputs(
    model: GemmaModel, text: Text, saes: Any, exclude: ExcludeTokens, attention_mask: Any, positions: Positions
) -> tuple[list[PlacedSAE], SplicedPrompt]:
    placed = placed_saes(model, saes, exclude, positions)
    prompt = one_prompt(model, text, exclude, attention_mask, positions, "A circuit is of")
    writes = [one.write for one in placed]
    for name in writes:
        if writes.count(name) > 1:
            raise SpliceError(
                f"{name} is taken: {writes.count(name)} of the SAEs write there. Give each place one SAE."
            )
    return placed, prompt


def _checked_latent(sae: Any, latent: int) -> int:
    if not 0 <= latent < sae.cfg.d_sae:
        raise SpliceError(f"No latent {latent}: this SAE has latents 0..{sae.cfg.d_sae - 1}.")
    return latent


def _cut_pass(model: GemmaModel, prompt: SplicedPrompt, placed: list[PlacedSAE]) -> _CutPass:
    run = run_probed(model, prompt, placed, cut=True)
    terms = [decompose(one, run.values[one.read], run.values[one.write], prompt.spliced) for one in placed]
    detached = [Terms(one.acts.detach(), {k: v.detach() for k, v in one.vectors.items()}) for one in terms]
    return _CutPass(prompt, placed, run, terms, [change_from(one, "zero") for one in detached])


def _edges(cut: _CutPass, nodes: pd.DataFrame, total: dict[str, torch.Tensor], metric: torch.Tensor) -> pd.DataFrame:
    """All edges between ``nodes``, and from them to the metric, which has the number ``len(nodes)``.

    Args:
        cut: the pass with direct gradients.
        nodes: a table with one row per node.
        total: the gradient of the metric along all paths, at each write hook.
        metric: the metric as computed in the cut pass.
    """
    import pandas as pd

    rows: list[tuple[int, int, float, float]] = []
    sources = _source_vectors(cut, nodes)
    targets = [_target(cut, nodes.iloc[number], total) for number in range(len(nodes))]
    for target, (scalar, slope) in enumerate([*targets, (metric, 1.0)]):
        for number, gradient in enumerate(cut.gradients(scalar)):
            if number not in sources:
                continue
            which, positions, vectors = sources[number]
            weights = (vectors * gradient[0, positions].to(vectors.dtype)).sum(-1)
            rows += [(s, target, w, w * slope) for s, w in zip(which, weights.tolist(), strict=True) if w != 0.0]
    return pd.DataFrame(rows, columns=["source", "target", "weight", "effect"])


def _source_vectors(cut: _CutPass, nodes: pd.DataFrame) -> dict[int, tuple[list[int], torch.Tensor, torch.Tensor]]:
    """For each SAE, its nodes, their positions, and the vectors ``[n, d]`` that they add to the site."""
    found: dict[int, tuple[list[int], torch.Tensor, torch.Tensor]] = {}
    for number, group in nodes.groupby("sae"):
        sae, terms = cut.placed[cast(int, number)].sae, cut.terms[cast(int, number)]
        positions = [token_row(cut.prompt, int(p)) for p in group["position"]]
        vectors: list[torch.Tensor] = []
        for at, kind, latent in zip(positions, group["kind"], group["latent"], strict=True):
            if kind == "latent":
                vectors.append(terms.acts[0, at, int(latent)].detach() * sae.W_dec[int(latent)].detach())
            else:
                vectors.append(terms.vectors[kind][0, at].detach())
        device = vectors[0].device
        found[cast(int, number)] = (group.index.tolist(), torch.tensor(positions, device=device), torch.stack(vectors))
    return found


def _target(cut: _CutPass, node: Any, total: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The scalar that represents a node as the target of edges, and the change of the metric per unit of it."""
    placed, terms = cut.placed[int(node["sae"])], cut.terms[int(node["sae"])]
    at = token_row(cut.prompt, int(node["position"]))
    gradient = total[placed.write][0, at].to(terms.acts.dtype)
    if node["kind"] == "latent":
        row = placed.sae.W_dec[int(node["latent"])].detach()
        return terms.acts[0, at, int(node["latent"])], float(row.to(gradient.dtype) @ gradient)
    # The scalar of any other term is its product with the constant gradient, which is already in units of the metric.
    return terms.vectors[node["kind"]][0, at] @ gradient, 1.0
