"""Predicted against measured effects: interventions on the latents of a graph, in the frozen pass and in the model.

Scaling the activation of latent s by ``a`` changes what it writes by ``(a - 1) f_s W_dec_s``. Two things are predicted:

- *Direct*, for an edge to target t, with all other sources held: ``(a - 1) weights[t, s]``. It is measured by a second
  run of the frozen pass, forwards, with the changed source. Both are exact, so this checks the computation alone.
- *Total*, for any target: a change of a latent's pre-activation changes its activation by as much, and what it writes,
  and so on along all paths. With ``r_s = a - 1`` the relative change of the source, and of other latents ``r_u =
  delta_u / f_u``, the changes solve ``delta_t = sum_u weights[t, u] r_u``. It is measured twice. In the *replacement*,
  the frozen pass in which latents are computed anew, predictions fail only where a latent is switched on or off. In the
  *model* itself, the change is added to every tensor that the latent writes, as a splice with its error term adds it,
  and everything behind is computed anew, attention patterns, norms and MLPs included. This shows how far the graph is
  true of the model.

A latent of a layered coder writes later layers directly, and in the model their own MLPs react to its earlier writes as
well, so part of a change may be counted twice there.

A target that the measurement switches off has a measured activation of 0 only from its threshold on; pre-activations
are compared, which go on below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemma_scope_tl.attributions.assembling import numbers
from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.attributions.carrying import Added, added_by, added_by_all, arriving_at, carried, computed_anew
from gemma_scope_tl.attributions.making import Prepared, prepared_again, readout_again
from gemma_scope_tl.attributions.readout import Readout
from gemma_scope_tl.attributions.tracing import Targets, targets_of
from gemma_scope_tl.counts import checked_count, checked_real
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.sites import flatten_heads, unflatten_heads

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel

COLUMNS = ("measured_in", "source", "target", "source_kind", "target_kind", "predicted", "measured")
Numbers = npt.NDArray[np.float64]


def measured_effects(
    model: GemmaModel,
    graph: AttributionGraph,
    coders: Any,
    *,
    sources: Sequence[str] | int = 16,
    targets: int = 32,
    scale: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure what scaling latents changes, beside what the graph predicts.

    Args:
        model, coders: those that the graph was made of. The model is not changed.
        graph: from :func:`~gemma_scope_tl.attribution_graph`, not pruned: total effects need all paths.
        sources: the node ids of the latents to scale; or a number, to draw so many, each with a probability in
            proportion to its influence.
        targets: number of targets for each source: all logits, and latents drawn among those with an edge from it or,
            for total effects, with a path.
        scale: the factor; 0 ablates.
        seed: of what is drawn.

    Returns:
        A row for each intervention and target: ``measured_in`` (``"frozen"`` for direct effects in the frozen pass,
        ``"replacement"`` and ``"model"`` for total effects there), ``source, target`` (node ids), ``source_kind`` (the
        coder's kind: ``"res"``, ``"transcoder"``, ``"clt"`` and so on), ``target_kind`` (the same, or ``"logit"``), and
        the ``predicted`` and ``measured`` change of the target's pre-activation or logit.

    Raises:
        GemmaScopeError: a number is out of range, or the graph has no latents.
        UnknownNameError: for a node that is no latent of the graph.
    """
    import pandas as pd

    scale, targets = checked_real(scale, "scale"), checked_count(targets, "targets")
    ready = prepared_again(model, graph, coders)
    trial = _Trial(model, graph, ready, readout_again(ready, graph), scale)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for source in _drawn_sources(graph, sources, rng):
        direct, total = trial.predicted_direct(source), trial.predicted_total(source)
        near, far = (_drawn_targets(graph, predicted, targets, rng) for predicted in (direct, total))
        for place, predicted, chosen, measured in (
            ("frozen", direct, near, trial.direct(source, near)),
            ("replacement", total, far, trial.in_replacement(source, far)),
            ("model", total, far, trial.in_model(source, far)),
        ):
            for node, value in zip(chosen, measured, strict=True):
                about = {"source": graph.nodes["node_id"].iloc[source], "target": graph.nodes["node_id"].iloc[node]}
                kinds = {"source_kind": trial.kind_of(source), "target_kind": trial.kind_of(node)}
                rows.append({"measured_in": place, **about, **kinds, "predicted": predicted[node], "measured": value})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Agreement of predicted and measured effects, for each pass and kind of source and whether the target is a logit.

    Args:
        table: of :func:`measured_effects`, or several concatenated.

    Returns:
        ``measured_in, source_kind, target`` (``"latents"`` or ``"logits"``), ``n``, ``pearson``, ``slope`` of the
        measured on the predicted effects through the origin, and ``largest_error``, the largest difference as a share
        of the largest measured effect. NaN where effects do not vary.
    """
    import pandas as pd

    kinds = table["target_kind"].eq("logit").map({True: "logits", False: "latents"})
    rows: list[dict[str, Any]] = []
    for (place, source, target), group in table.groupby(["measured_in", "source_kind", kinds], sort=True):
        predicted, measured = (group[name].to_numpy(dtype=float) for name in ("predicted", "measured"))
        varies = len(group) > 1 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
        square, largest = float(predicted @ predicted), float(np.abs(measured).max())
        rows.append(
            {
                "measured_in": place,
                "source_kind": source,
                "target": target,
                "n": len(group),
                "pearson": float(np.corrcoef(predicted, measured)[0, 1]) if varies else float("nan"),
                "slope": float(predicted @ measured) / square if square > 0 else float("nan"),
                "largest_error": float(np.abs(predicted - measured).max()) / largest if largest > 0 else float("nan"),
            }
        )
    return pd.DataFrame(rows)


class _Trial:
    """Predictions and measurements for one graph and factor."""

    def __init__(
        self, model: GemmaModel, graph: AttributionGraph, ready: Prepared, read: Readout, scale: float
    ) -> None:
        self.model, self.graph, self.sources, self.read, self.scale = model, graph, ready.sources, read, scale
        self.ids = graph.nodes["node_id"].tolist()
        self.known = numbers(ready.sources, ready.prompt)
        self.token_ids = torch.tensor([graph.token_ids], device=model.device_of(None))
        self.weights: Any = graph.weights.astype(np.float64)
        latents = (graph.nodes["kind"] == "latent").to_numpy()
        activations = graph.nodes["activation"].to_numpy(dtype=float)
        self.inverse = np.where(latents, 1.0 / np.where(latents, activations, 1.0), 0.0)
        with torch.inference_mode(False), torch.no_grad():
            self.whole = added_by_all(ready.sources)
            self.clean_frozen = carried(ready.sources, self.whole)
            self.clean = self._seen_in_model(None)

    def kind_of(self, node: int) -> str:
        """The kind of a node's coder, or ``"logit"``."""
        row = self.graph.nodes.iloc[node]
        if row["kind"] != "latent":
            return str(row["kind"])
        for entries in self.sources.entries:
            if entries.reader.name == row["coder"]:
                return entries.reader.kind
        return str(row["site"])

    def predicted_direct(self, source: int) -> Numbers:
        """Of every node, with all other sources held."""
        return (self.scale - 1.0) * self.weights[:, [source]].toarray().ravel()

    def predicted_total(self, source: int) -> Numbers:
        """Of every node, along all paths."""
        relative = np.zeros(len(self.ids))
        relative[source] = self.scale - 1.0
        total = np.zeros(len(self.ids))
        for _ in range(len(self.ids) + 1):
            change = self.weights @ relative
            if not change.any():
                break
            total += change
            relative = change * self.inverse
        return total

    @torch.no_grad()
    def direct(self, source: int, nodes: Sequence[int]) -> list[float]:
        """Measured in the frozen pass."""
        change = added_by(self.sources, self.known[self.ids[source]])
        changed = Added(_plus(self.whole.written, change.written, self.scale - 1.0), self.whole.raw)
        with torch.inference_mode(False):
            return self._changes(carried(self.sources, changed), nodes)

    @torch.no_grad()
    def in_replacement(self, source: int, nodes: Sequence[int]) -> list[float]:
        """Measured in the frozen pass with latents computed anew."""
        with torch.inference_mode(False):
            return self._changes(computed_anew(self.sources, self.known[self.ids[source]], self.scale), nodes)

    def _changes(self, after: dict[int, Tensor], nodes: Sequence[int]) -> list[float]:
        return [
            float((arriving_at(targets, after) - arriving_at(targets, self.clean_frozen))[0])
            for targets in self._targets(nodes)
        ]

    @torch.no_grad()
    def in_model(self, source: int, nodes: Sequence[int]) -> list[float]:
        """Measured in the model."""
        with torch.inference_mode(False):
            after = self._seen_in_model(added_by(self.sources, self.known[self.ids[source]]))
        found: list[float] = []
        logits = (after[-1] - self.clean[-1]).double()
        for node, targets in zip(nodes, self._targets(nodes), strict=True):
            row = self.graph.nodes.iloc[node]
            if row["kind"] == "logit":
                change = logits[int(row["token_id"])]
                found.append(float(change - logits.mean() if self.graph.settings["centred"] else change))
            else:
                found.append(float((arriving_at(targets, after) - arriving_at(targets, self.clean))[0]))
        return found

    def _targets(self, nodes: Sequence[int]) -> list[Targets]:
        return targets_of(self.sources, self.read, [self.ids[node] for node in nodes], self.known)

    def _seen_in_model(self, change: Added | None) -> dict[int, Tensor]:
        """The tensors that coders read in a pass of the model, by their stage, and at -1 the logits at the position."""
        seen: dict[int, Tensor] = {}
        backend, like = self.model.backend, self.sources.frozen.embedding

        def visit(value: Tensor, hook: Any, stage: int, reads: bool) -> Tensor | None:
            flat = flatten_heads(value)
            if reads:
                seen[stage] = flat[0].to(like)
            if change is None or stage not in change.written:
                return None
            changed = flat + (self.scale - 1.0) * change.written[stage].to(flat)
            return unflatten_heads(changed, value)

        reads = {one.stage: one.site.hook_name(one.layer, backend) for one in self.sources.placed.readers}
        writes = {one.stage: one.site.hook_name(one.place.layer, backend) for one in self.sources.placed.written}
        hooks = [
            (name, lambda value, hook, stage=stage: visit(value, hook, stage, stage in reads))
            for stage, name in {**reads, **writes}.items()
        ]
        mask = torch.ones_like(self.token_ids)
        logits = self.model.run_with_hooks(self.token_ids, attention_mask=mask, fwd_hooks=hooks)
        seen[-1] = logits[0, self.sources.frozen.position]
        return seen


def _plus(tensors: dict[int, Tensor], change: dict[int, Tensor], factor: float) -> dict[int, Tensor]:
    return {**tensors, **{stage: tensors[stage] + factor * one for stage, one in change.items()}}


def _drawn_sources(graph: AttributionGraph, sources: Sequence[str] | int, rng: np.random.Generator) -> list[int]:
    latents = np.flatnonzero((graph.nodes["kind"] == "latent").to_numpy())
    if not isinstance(sources, int):
        chosen = [graph.number_of(one) for one in ([sources] if isinstance(sources, str) else sources)]
        for one in chosen:
            if one not in latents:
                ids = graph.nodes["node_id"]
                raise unknown_name("latent of the graph", ids.iloc[one], ids.iloc[latents])
        return chosen
    count = checked_count(sources, "sources")
    influence = graph.influence().to_numpy()[latents]
    if not influence.sum() > 0:
        raise GemmaScopeError("No latent of this graph has influence on its logits, so there is nothing to measure.")
    count = min(count, int((influence > 0).sum()))
    return sorted(int(one) for one in rng.choice(latents, count, replace=False, p=influence / influence.sum()))


def _drawn_targets(graph: AttributionGraph, predicted: Numbers, most: int, rng: np.random.Generator) -> list[int]:
    kinds = graph.nodes["kind"].to_numpy(dtype=object)
    reached = np.flatnonzero((kinds == "latent") & (predicted != 0))
    logits = np.flatnonzero(kinds == "logit")
    few = rng.choice(reached, min(most, len(reached)), replace=False) if len(reached) else reached
    return [int(one) for one in [*np.sort(few), *logits]]
