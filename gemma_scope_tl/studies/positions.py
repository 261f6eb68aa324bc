"""The metrics of SAEs along the sequence (section 4.2)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.accumulators import TokenMean
from gemma_scope_tl.evals.suite import Evaluation, measure_suite

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel

SINGLE = 16
"""Each position before this one has its own bin, because the error rises fast there."""
GROWTH = 1.25
"""Ratio of the length of each later bin to the one before it."""


def binned_by_position(
    model: GemmaModel,
    saes: Any,
    data: Sequence[str] | torch.Tensor,
    edges: Sequence[int] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The metrics without the sum over positions, in bins of positions (section 4.2). Position 0 is a row's BOS.

    Args:
        model, saes, data, options: as :func:`~gemma_scope_tl.evals.suite.measure_suite` takes them.
        edges: first position of each bin, and the end of the last bin; by default :func:`position_edges`.

    Returns:
        A row per SAE and bin: ``release, id, site, layer, d_sae, start, stop`` (positions ``start`` to ``stop - 1``),
        ``l0, squared_error`` (mean ``‖x - x̂‖²``), ``fvu`` (the bin's error over the variance there, around the mean of
        the whole dataset), ``loss_clean, loss_spliced, delta_loss, kl`` (of the predictions made there, nats),
        ``tokens, predictions``. A bin without ordinary tokens, such as that of BOS, has no row.

    Raises:
        GemmaScopeError: the edges do not increase, or are outside the sequence.
    """
    import pandas as pd

    options = {"ablations": (), **options}
    found = measure_suite(model, saes, data, **options)
    length = int(found.sums.saes[0].l0.position_counts.shape[0])
    bins = _checked(edges, length)
    rows = [row for number in range(len(found.subjects)) for row in _rows(found, number, bins)]
    return pd.DataFrame(rows)


def position_edges(length: int, single: int = SINGLE, growth: float = GROWTH) -> list[int]:
    """Edges of bins over positions 0 to ``length - 1``: bins of one position first, then longer ones.

    >>> position_edges(24, single=4, growth=2)
    [0, 1, 2, 3, 4, 6, 10, 18, 24]
    """
    edges, size = list(range(min(single, length) + 1)), 1.0
    while edges[-1] < length:
        size = max(size * growth, 1.0)
        edges.append(min(length, edges[-1] + int(size)))
    return edges


def _checked(edges: Sequence[int] | None, length: int) -> list[int]:
    if edges is None:
        return position_edges(length)
    bounds = list(edges)
    increasing = all(a < b for a, b in itertools.pairwise(bounds))
    if len(bounds) < 2 or not increasing or bounds[0] < 0 or bounds[-1] > length:
        raise GemmaScopeError(f"Edges of bins must increase and be between 0 and {length}, but they are {bounds}.")
    return bounds


def _rows(found: Evaluation, number: int, edges: list[int]) -> list[dict[str, Any]]:
    sae = found.sums.saes[number]
    means = {
        "l0": sae.l0,
        "error": sae.error,
        "loss": sae.loss,
        "kl": sae.kl,
        "clean": found.sums.clean.loss,
        "deviation": found.sums.place_of(number).deviation.value,
    }
    sums = {name: _binned(mean, edges) for name, mean in means.items()}
    (error, tokens), (loss, predictions) = sums["error"], sums["loss"]
    with np.errstate(all="ignore"):
        columns = {
            "l0": sums["l0"][0] / tokens,
            "squared_error": error / tokens,
            "fvu": error / sums["deviation"][0],
            "loss_clean": sums["clean"][0] / predictions,
            "loss_spliced": loss / predictions,
            "delta_loss": (loss - sums["clean"][0]) / predictions,
            "kl": sums["kl"][0] / predictions,
            "tokens": tokens.astype(int),
            "predictions": predictions.astype(int),
        }
    return [
        {
            **found.subjects[number].columns,
            "start": edges[at],
            "stop": edges[at + 1],
            **{name: values[at].item() for name, values in columns.items()},
        }
        for at in range(len(edges) - 1)
        if tokens[at]
    ]


def _binned(mean: TokenMean, edges: list[int]) -> tuple[Any, Any]:
    """Sums and counts of each bin. A loss has one position fewer than the tokens, because none follows the last."""
    out: list[Any] = []
    for values in (mean.position_sums, mean.position_counts):
        running = np.concatenate([[0.0], np.cumsum(values.double().numpy())])
        ends = np.minimum(edges, running.shape[0] - 1)
        out.append(running[ends[1:]] - running[ends[:-1]])
    return out[0], out[1]
