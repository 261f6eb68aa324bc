"""Fidelity of SAEs: against sparsity (section 4.1), uniformity of latent importance (C.3), and by dtype (4.7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.saes import subjects_of
from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.sae.choices import as_saes
from gemma_scope_tl.sae.suite import SAESuite

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from gemma_scope_tl.model.hooked import GemmaModel

NAMES = ["release", "id", "site", "layer", "d_sae"]
SKIP = "skip"
FIDELITY = ("delta_loss", "fvu")
COMPARED = ("l0", "fvu", "delta_loss", "loss_clean")


def sparsity_fidelity(model: GemmaModel, saes: Any, data: Sequence[str] | torch.Tensor, **options: Any) -> pd.DataFrame:
    """L0 against delta loss and FVU of SAEs on the same tokens, by site, layer and width (section 4.1).

    Args:
        model, saes, data, options: as for :func:`~gemma_scope_tl.evals.suite.evaluate`, without ``by_position``.

    Returns:
        The table of ``evaluate``, sorted by site, layer, width and L0, with three more columns: ``width``, and
        ``delta_loss_best`` and ``fvu_best``. The last two are True on the Pareto frontier of a site and layer, where no
        other SAE is as good in L0 and the metric and better in one of them. If a transcoder has a skip connection,
        there is a column ``skip`` that says which have one.
    """
    table = _with_skip(model, saes, data, **options)
    table.insert(table.columns.get_loc("d_sae"), "width", [width_label(int(d)) for d in table["d_sae"]])  # type: ignore[arg-type]
    for metric in FIDELITY:
        table[f"{metric}_best"] = on_frontier(table, metric)
    return table.sort_values(["site", "layer", *_skip(table), "d_sae", "l0"], ignore_index=True)


def importance_uniformity(
    model: GemmaModel, saes: Any, data: Sequence[str] | torch.Tensor, sampled: int = 8, **options: Any
) -> pd.DataFrame:
    """The uniformity r_L0 of active latent importance against L0 (appendix C.3).

    ``r_L0 = exp(S(p)) / L0``, where p are the normalised absolute effects of a token's active latents on the
    mean-centred logit of the correct next token, and S is their entropy: the effective number of latents as a share of
    the active latents.

    Args:
        model, saes, data, options: as :func:`~gemma_scope_tl.evals.suite.evaluate` takes them.
        sampled: number of positions of each row, drawn at random; each takes a backward pass of the model.

    Returns:
        A row per SAE, sorted by site, layer and L0: ``release, id, site, layer, d_sae, l0, uniformity, uniformity_low,
        uniformity_high, sequences``; low and high are the bounds of the confidence interval. If a transcoder has a skip
        connection, there is a column ``skip`` that says which have one.

    Raises:
        GemmaScopeError: ``sampled`` is below 1.
    """
    sampled = checked_count(sampled, "sampled")
    options = {"ablations": (), **options}
    table = _with_skip(model, saes, data, uniformity=sampled, **options)
    kept = table[[*NAMES, *_skip(table), "l0", "uniformity", "uniformity_low", "uniformity_high", "sequences"]]
    return kept.sort_values(["site", "layer", "l0"], ignore_index=True)


def _with_skip(model: GemmaModel, saes: Any, data: Sequence[str] | torch.Tensor, **options: Any) -> pd.DataFrame:
    """The table of ``evaluate``, with a column ``skip`` after ``d_sae`` if a transcoder has a skip connection.

    Transcoders with and without one are two series of SAEs, which one line of a figure must not join.
    """
    saes = saes if isinstance(saes, SAESuite) else as_saes(saes, whole=True)  # an iterator can be read once
    table = evaluate(model, saes, data, by_position=False, **options)
    skips = [subject.has_skip for subject in subjects_of(model, saes)]
    if any(skips):
        table.insert(table.columns.get_loc("d_sae") + 1, SKIP, skips)  # type: ignore[operator]
    return table


def _skip(table: pd.DataFrame) -> list[str]:
    return [SKIP] if SKIP in table else []


def by_dtype(
    load: Callable[[str], tuple[Any, Any]],
    data: Sequence[str] | torch.Tensor,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    **options: Any,
) -> pd.DataFrame:
    """The metrics with model and SAEs in each dtype (section 4.7); one dtype is in memory at a time.

    Args:
        load: a function from the name of a dtype to the model and the SAEs (always the same SAEs, in the same order).
        data: texts or token ids.
        dtypes: names of the dtypes; the others are compared with the first.
        options: arguments of :func:`~gemma_scope_tl.evals.suite.evaluate`.

    Returns:
        A row per dtype and SAE: ``dtype``, the columns of ``evaluate``, and ``l0_change``, ``fvu_change``,
        ``delta_loss_change`` and ``loss_clean_change``: the difference from the first dtype.

    Raises:
        GemmaScopeError: no dtype was given, or the SAEs of two dtypes differ.
    """
    import pandas as pd

    if not dtypes:
        raise GemmaScopeError("No dtype was given.")
    frames: list[pd.DataFrame] = []
    for dtype in dtypes:
        model, saes = load(dtype)
        table = evaluate(model, saes, data, by_position=False, **options)
        del model, saes
        table.insert(0, "dtype", dtype)
        first = frames[0] if frames else table
        if not table[NAMES].equals(first[NAMES]):
            raise GemmaScopeError(f"The SAEs in {dtype} are not those in {dtypes[0]}, or are in another order.")
        for metric in COMPARED:
            table[f"{metric}_change"] = table[metric] - first[metric]
        frames.append(table)
    return pd.concat(frames, ignore_index=True)


def on_frontier(table: pd.DataFrame, metric: str) -> list[bool]:
    """Which rows are on the Pareto frontier of ``l0`` and ``metric`` in their site and layer; lower is better in both.

    A row whose metric is NaN is not on the frontier.
    """
    best = dict.fromkeys(table.index, False)
    for _, rows in table.groupby(["site", "layer"], dropna=False, sort=False):
        l0, loss = rows["l0"].to_numpy(), rows[metric].to_numpy()
        for at, label in enumerate(rows.index):
            beaten = (l0 <= l0[at]) & (loss <= loss[at]) & ((l0 < l0[at]) | (loss < loss[at]))
            best[label] = not math.isnan(loss[at]) and not beaten.any()
    return [best[label] for label in table.index]
