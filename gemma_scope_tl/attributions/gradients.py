"""``attribute``: the contribution of every active latent to a metric of the logits, to first order or integrated.

At a site, an SAE writes the model's activation as a sum, ``x_t = sum_i f_{t,i} W_dec[i] + b_dec + e_t``. With the
gradient ``g_t`` of the metric m with respect to ``x_t``, the terms of ``x_t . g_t`` are

    a_{t,i} = f_{t,i} (g_t . W_dec[i])        b_dec . g_t        e_t . g_t

The first estimates how much m decreases when latent i is set to zero at token t: ``m(x) - m(x - f_{t,i} W_dec[i])``
to first order. This is attribution patching applied to latents, as in Sparse Feature Circuits (Marks et al., 2024);
Gemma Scope's appendix C.3 uses the same product.

Integrated gradients (Sundararajan et al., 2017) replace g by the mean gradient on the straight path from a baseline x',
computed by Gauss-Legendre quadrature: ``sum_k w_k g(x' + alpha_k (x - x'))``, exact for polynomials up to degree
``2 steps - 1`` in alpha. The attributions then add up to ``m(x) - m(x')`` up to the error of the quadrature
(completeness); ``attrs["gap"]`` is that error. The tensor of each SAE's site is changed by itself, at all tokens
together, which takes ``steps`` forward and backward passes and one forward pass per SAE. A path from zero passes
through the strong curvature of the next RMSNorm near zero, where a moderate number of steps is too few for the res, att
and embedding sites; paths from the other baselines are smooth. As all latents change at once, their joint effect is
shared among them: for the effect of ablating one latent alone, activation times gradient is the better estimate unless
the metric is far from linear.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemma_scope_tl.attributions.decomposition import (
    BASELINES,
    Change,
    Terms,
    change_from,
    decompose,
    strongest,
    table_of,
)
from gemma_scope_tl.attributions.passes import (
    PlacedSAE,
    ProbedPass,
    SplicedPrompt,
    differentiable,
    one_prompt,
    placed_saes,
    prompt_of,
    run_probed,
    token_row,
)
from gemma_scope_tl.attributions.targets import Metric, TargetMetric, Tokens, metric_on, metric_value
from gemma_scope_tl.counts import checked_count, checked_top
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, unknown_name
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.arguments import as_indices
from gemma_scope_tl.sites import flatten_heads
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.text.tokens import ExcludeTokens

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel

METHODS = ("gradient", "integrated")
BATCH_SIZE = 8
"""Texts in a pass, for metrics that are known to be sums over texts."""
WIDE_GAP = 0.1
"""The largest error of a quadrature without a warning, as a share of the difference of the metrics."""
_ROUNDINGS = 16  # gaps up to so many roundings of the metric are not the quadrature's


def attribute(
    model: GemmaModel,
    text: Text,
    saes: Any | Iterable[Any],
    metric: Metric | Tokens,
    method: str = "gradient",
    baseline: str | None = None,
    counterfactual: Text | None = None,
    steps: int = 32,
    top: int | None = None,
    exclude_special_tokens: ExcludeTokens = True,
    attention_mask: Any = None,
    positions: Positions = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Attribute ``metric`` on ``text`` to the latents, the error and the bias of SAEs, as the module explains.

    Args:
        model: a model from ``load_model``; it is not changed.
        text: text, token ids or messages as for :func:`~gemma_scope_tl.features`. Chat messages that do not end with a
            message of the model are followed by the opening of its answer, as in ``generate``.
        saes: SAEs or transcoders of any site (one, several, a mapping or a suite), each attributed as if it alone were
            spliced, with its error term.
        metric: a word that is one token (``" earth"``) or an id, for the logit of this token after each text; or a
            function of the logits ``[batch, pos, vocab]`` that returns one number, such as those of
            ``attributions.targets``.
        method: ``"gradient"``: one forward and backward pass for all SAEs. ``"integrated"``: the mean over a path.
        baseline: ``"zero"``: the whole tensor is zero. ``"bias"``: ``b_dec`` alone; latents, error and skip are zero.
            ``"latents"``: only the latents are zero, so that their attributions add up to the effect of ablating them
            all. By default ``"zero"`` for gradient (activation times gradient) and ``"latents"`` for integrated.
        counterfactual: another prompt of the same shape, whose activations at the site replace the baseline.
        steps: number of nodes of the quadrature.
        top: keep only the ``top`` strongest latents of each sequence, and all rows of other kinds. None keeps all.
        exclude_special_tokens, positions: where SAEs are applied, as in :func:`~gemma_scope_tl.splice`. Elsewhere the
            whole tensor has one row, of kind ``unspliced``.
        attention_mask: ``[batch, pos]``, 1 at text; by default it follows from the text, or the padding of token ids.
        batch_size: number of texts in a pass, which texts of similar length share. None is 8 for words, ids and the
            metrics of ``attributions.targets``, and all texts for a function of your own. With a number, that function
            gets the logits of some texts, without columns that are all padding, and has to be a sum over texts.

    Returns:
        A table, strongest first within a sequence: ``sequence, position, token, site, layer, kind, latent, activation,
        attribution``, the last in units of the metric. ``kind`` is ``latent``, ``error``, ``bias``, ``unspliced`` or
        ``skip`` (of skip transcoders); only a latent has ``latent`` and ``activation``. Positions count from 0 at the
        first token that is not padding; padding has no rows. ``attrs["metric"]`` is the metric on ``text``. For
        integrated gradients, ``attrs["baseline_metric"]`` lists the metric at each SAE's baseline, and ``attrs["gap"]``
        how much the attributions of each SAE exceed the difference of the two, with a warning from a tenth of it on.

    Raises:
        SpliceError: an SAE does not fit the model, or a text lacks one of the positions.
        UnknownNameError: the method or the baseline is unknown.
        GemmaScopeError: the metric is not one differentiable number, or the counterfactual or a number does not fit.
    """
    chosen = _checked(method, baseline, counterfactual, steps, top, batch_size)
    where: dict[str, Any] = {"exclude": exclude_special_tokens, "positions": positions}
    placed = placed_saes(model, saes, **where)
    prompt = prompt_of(model, text, attention_mask=attention_mask, **where)
    other = None if counterfactual is None else prompt_of(model, counterfactual, **where)
    inputs, nodes = (prompt, other, metric_on(model, metric, prompt)), steps if method == "integrated" else None
    return strongest(_attributed(model, placed, *inputs, batch_size, baseline=chosen, steps=nodes), top)


def _attributed(
    model: GemmaModel,
    placed: list[PlacedSAE],
    prompt: SplicedPrompt,
    other: SplicedPrompt | None,
    metric: Metric,
    batch_size: int | None,
    *,
    baseline: str,
    steps: int | None,
) -> pd.DataFrame:
    """The rows of every SAE and text, unsorted."""
    if other is not None:
        _check_alike(prompt, other)
    tables: list[pd.DataFrame] = []
    with differentiable(model, placed):
        for rows, part, against, its_metric in _parts(prompt, other, metric, batch_size):
            table = _attributions(model, part, against, its_metric, placed, baseline=baseline, steps=steps)
            table["sequence"] = rows.numpy()[table["sequence"]]
            tables.append(table)
    table = _joined(tables)
    if steps is not None:
        _warn_of_gaps(model, placed, table.attrs, steps)
    return table


def _parts(
    prompt: SplicedPrompt, other: SplicedPrompt | None, metric: Metric, batch_size: int | None
) -> Iterator[tuple[torch.Tensor, SplicedPrompt, SplicedPrompt | None, Metric]]:
    """The numbers of the texts of each pass, their prompt and counterfactual, and the metric of these texts."""
    count, known = len(prompt.ids), isinstance(metric, TargetMetric)
    size = batch_size or (BATCH_SIZE if known else count)
    parts = list(prompt.parts(size))
    if not parts or (size >= count and not known):  # a function of the user's own gets the padding too
        yield torch.arange(count), prompt, other, metric
        return
    for rows, columns in parts:
        part, numbers = prompt.part(rows, columns), rows.cpu()
        its_metric = metric.part(numbers, part) if isinstance(metric, TargetMetric) else metric
        yield numbers, part, None if other is None else other.part(rows, columns), its_metric


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """The tables of all parts in one. Metrics are sums over texts, and so are their differences."""
    import pandas as pd

    table, attrs = pd.concat(tables, ignore_index=True), [one.attrs for one in tables]
    table.attrs = {"metric": math.fsum(one["metric"] for one in attrs)}
    for name in ("baseline_metric", "gap"):
        if name in attrs[0]:
            table.attrs[name] = [math.fsum(values) for values in zip(*(one[name] for one in attrs), strict=True)]
    return table


def _warn_of_gaps(model: GemmaModel, placed: Sequence[PlacedSAE], attrs: Mapping[Any, Any], steps: int) -> None:
    rounding = torch.finfo(next(model.parameters()).dtype).eps
    for one, start, gap in zip(placed, attrs["baseline_metric"], attrs["gap"], strict=True):
        difference = attrs["metric"] - start
        rounded = _ROUNDINGS * rounding * (abs(attrs["metric"]) + abs(start))
        if abs(gap) > max(WIDE_GAP * abs(difference), rounded):
            warnings.warn(
                f"The attributions at {one.place.key} add up to {difference + gap:.3g}, but the metric differs from "
                f"that of the baseline by {difference:.3g}, so the mean gradient on the path is not accurate: give "
                f"more steps= (now {steps}).",
                stacklevel=4,  # the caller of attribute
            )


def _attributions(
    model: GemmaModel,
    prompt: SplicedPrompt,
    other: SplicedPrompt | None,
    metric: Metric,
    placed: list[PlacedSAE],
    *,
    baseline: str,
    steps: int | None,
) -> pd.DataFrame:
    """The rows of every SAE, unsorted; to first order if ``steps`` is None."""
    import pandas as pd

    clean = run_probed(model, prompt, placed)
    value = metric_value(metric, clean.logits)
    changes = _changes(model, prompt, other, placed, clean, baseline)
    attrs: dict[str, Any] = {"metric": float(value.detach())}
    if steps is None:
        at_hook = clean.gradients(value)
        gradients = [flatten_heads(at_hook[one.write]) for one in placed]
    else:
        ends = [clean.values[one.write].detach() for one in placed]
        del clean, value  # frees the graph before the next one is made
        both = [
            _mean_gradient(model, prompt, one, change, end, metric=metric, steps=steps)
            for one, change, end in zip(placed, changes, ends, strict=True)
        ]
        gradients, attrs["baseline_metric"] = [mean for mean, _ in both], [start for _, start in both]
    frames = [table_of(model, prompt, *one) for one in zip(placed, changes, gradients, strict=True)]
    if steps is not None:
        sums = [float(frame["attribution"].sum()) for frame in frames]
        starts = attrs["baseline_metric"]
        attrs["gap"] = [total - (attrs["metric"] - start) for total, start in zip(sums, starts, strict=True)]
    table = pd.concat(frames, ignore_index=True)
    table.attrs.update(attrs)
    return table


def _checked(
    method: str, baseline: str | None, counterfactual: Any, steps: int, top: int | None, batch_size: int | None
) -> str:
    """Check the options, and return the baseline."""
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if baseline is not None and baseline not in BASELINES:
        raise unknown_name("baseline", baseline, BASELINES)
    if baseline is not None and counterfactual is not None:
        raise GemmaScopeError("Give baseline= or counterfactual=, not both: activations are compared with one of them.")
    checked_count(steps, "steps")
    checked_top(top)
    if batch_size is not None:
        checked_count(batch_size, "batch_size")
    return baseline or ("zero" if method == "gradient" else "latents")


def _changes(
    model: GemmaModel,
    prompt: SplicedPrompt,
    other: SplicedPrompt | None,
    placed: list[PlacedSAE],
    clean: ProbedPass,
    baseline: str,
) -> list[Change]:
    def terms(one: PlacedSAE, run: ProbedPass) -> Terms:
        return decompose(one, run.values[one.read], run.values[one.write], prompt.spliced)

    with torch.no_grad():
        if other is None:
            return [change_from(terms(one, clean), baseline) for one in placed]
        reference = run_probed(model, other, placed)
        return [change_from(terms(one, clean), baseline, terms(one, reference)) for one in placed]


def _check_alike(prompt: SplicedPrompt, other: SplicedPrompt) -> None:
    if other.ids.shape != prompt.ids.shape:
        raise GemmaScopeError(
            f"The counterfactual's ids are {list(other.ids.shape)}, and those of the text {list(prompt.ids.shape)}: "
            "positions are compared one by one, so both need the same number of sequences and tokens."
        )
    if not torch.equal(other.mask, prompt.mask) or not torch.equal(other.spliced, prompt.spliced):
        raise GemmaScopeError("The counterfactual has padding or special tokens at other positions than the text.")


def _mean_gradient(
    model: GemmaModel,
    prompt: SplicedPrompt,
    placed: PlacedSAE,
    change: Change,
    value: torch.Tensor,
    *,
    metric: Metric,
    steps: int,
) -> tuple[torch.Tensor, float]:
    """The mean gradient on the path from the baseline to ``value``, and the metric at the baseline."""
    with torch.no_grad():
        end = flatten_heads(value)
        span = change.total(placed.sae.W_dec)
        start = end.to(span.dtype) - span
        logits = run_probed(model, prompt, [placed], replaced={placed.write: start}).logits
        at_start = float(metric(logits.to(torch.promote_types(logits.dtype, torch.float32))))
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    mean = torch.zeros_like(span)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        one = run_probed(model, prompt, [placed], replaced={placed.write: start + float(node) * span})
        found = one.gradients(metric_value(metric, one.logits))[placed.write]
        mean += float(weight) * flatten_heads(found).to(span.dtype)
    return mean, at_start


@torch.no_grad()
def ablation_effects(
    model: GemmaModel,
    text: Text,
    sae: Any,
    metric: Metric | Tokens,
    pairs: Sequence[tuple[int, int]],
    batch_size: int = 32,
    exclude_special_tokens: ExcludeTokens = True,
    attention_mask: Any = None,
    positions: Positions = None,
) -> list[float]:
    """Change of ``metric`` when each latent is set to zero at its position, one at a time: ``m(edited) - m(clean)``.

    The SAE is spliced with its error term, so the other terms of the tensor are unchanged. The attribution of a latent
    (:func:`~gemma_scope_tl.attribute`) estimates the negative of this number.

    Args:
        model, metric, exclude_special_tokens, attention_mask, positions: as for :func:`~gemma_scope_tl.attribute`. A
            latent has no effect at a position where its SAE is not applied.
        text: one text, or its ids.
        sae: an SAE or transcoder.
        pairs: pairs ``(position, latent)``; positions count from the first token that is not padding.
        batch_size: number of edits in a forward pass.

    Raises:
        SpliceError: the SAE does not fit the model or has no such latent, or the text lacks one of ``positions``.
        GemmaScopeError: several texts were given, or a position is beyond the end of the text.
    """
    placed_saes(model, sae, exclude_special_tokens, positions)
    prompt = one_prompt(model, text, exclude_special_tokens, attention_mask, positions, "Ablations are measured on")
    metric = metric_on(model, metric, prompt)
    wanted, batch_size = [as_indices(pair) for pair in pairs], checked_count(batch_size, "batch_size")
    wrong = [latent for _, latent in wanted if not 0 <= latent < sae.cfg.d_sae]
    if wrong:
        raise SpliceError(f"No latent {wrong[0]}: this SAE has latents 0..{sae.cfg.d_sae - 1}.")
    rows = [(token_row(prompt, position), latent) for position, latent in wanted]
    name = model.get_sae_hook_name(sae)
    effects: list[float] = []
    for start in range(0, len(rows), batch_size):
        some = torch.tensor(rows[start : start + batch_size], device=prompt.ids.device).T
        batch = some.shape[1] + 1  # the last row stays unedited, so that clean and edited rows round alike

        def edit(acts: torch.Tensor, hook: Any, some: torch.Tensor = some) -> torch.Tensor:
            acts = acts.clone()
            acts[torch.arange(some.shape[1], device=acts.device), some[0], some[1]] = 0
            return acts

        logits = model.run_with_hooks_with_saes(
            prompt.ids.expand(batch, -1),
            attention_mask=prompt.attention_mask.expand(batch, -1),
            saes=[sae],
            use_error_term=True,
            exclude_special_tokens=exclude_special_tokens,
            positions=positions,
            fwd_hooks=[(name, edit)],
        )
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        *edited, clean = [float(metric(row[None])) for row in wide]
        effects += [value - clean for value in edited]
    return effects
