"""``evaluate``: the paper's metrics of SAEs on one fixed set of tokens, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.accumulators import LatentCounts
from gemma_scope_tl.evals.cache import MetricsCache
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET
from gemma_scope_tl.evals.metrics import Bootstrap, check_intervals, fvu, loss_recovered, scored_positions
from gemma_scope_tl.evals.run import ABLATIONS, EvaluationRun, Settings
from gemma_scope_tl.evals.saes import Subject, subjects_of
from gemma_scope_tl.evals.sums import Sums
from gemma_scope_tl.model.counted import CountedBatch, counted_rows
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.text.tokens import ExcludeTokens, excluded_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel

RECOVERED = {"zero": "loss_recovered", "mean": "loss_recovered_mean"}
WITH_INTERVAL = ("l0", "fvu", "delta_loss", "loss_recovered", "kl", "loss_recovered_mean", "uniformity")


def evaluate(
    model: GemmaModel,
    saes: Any | Iterable[Any],
    data: Text,
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
    *,
    by_position: bool = False,
    ablations: Sequence[str] = ABLATIONS,
    uniformity: int = 0,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
    cache: str | PathLike[str] | None = None,
    exclude_special_tokens: ExcludeTokens = True,
    attention_mask: Any = None,
    positions: Positions = None,
) -> pd.DataFrame:
    """Measure SAEs on a model (paper, section 4.1), on the same tokens and one clean pass.

    For each SAE only the layers after its site run again, and one encoding gives L0, FVU and the splice; the SAEs of
    a place share its ablations. BOS, EOS, padding and positions left out are neither spliced, ablated nor counted.
    Losses are in nats, over predictions from a counted token to a counted token, in float32 for any dtype of the model.

    Args:
        model: a model from ``load_model``.
        saes: one or several SAEs or transcoders, a mapping or a suite; a transcoder is measured against its target.
        data, context: texts, packed into rows of BOS and ``context - 1`` tokens; or token ids, a ``BatchEncoding`` or
            conversations, each a row. Padding on either side does not count, and rows of padding alone are left out.
        batch_size, progress: rows in a forward pass, fewer if the memory budget requires it; show a progress bar.
        by_position: return a row per SAE and position instead (:meth:`Evaluation.by_position`).
        ablations: the ablations relative to which loss recovered is measured: ``"zero"``, ``"mean"``, both or none.
        uniformity: positions of each row at which it is measured (appendix C.3), a backward pass each; 0 for none.
        confidence, resamples, seed: parameters of the confidence intervals, which resample sequences.
        memory_budget: bytes that tensors may take besides the weights, 1 GiB by default (:class:`~run.Settings`).
        cache: a folder. Earlier measurements are read from it, and an interrupted evaluation continues to the same
            bits; model, SAEs and tokens are identified by their content.
        exclude_special_tokens: leave out BOS, EOS and padding; the given ids; or padding alone (False).
        attention_mask: mask of token ids, ``[rows, pos]``, 1 at text; by default it follows from their padding.
        positions: leave out all but these positions of each row, as in :func:`~gemma_scope_tl.splice`; None for all.

    Returns:
        A row per SAE: ``release, id, site, layer, d_sae, l0, fvu, loss_clean, loss_spliced, delta_loss,
        loss_zero_ablated, loss_recovered, tokens, kl`` (clean to spliced, nats), ``loss_mean_ablated,
        loss_recovered_mean, dead, dense`` (shares of latents), ``uniformity, sequences``, intervals ``*_low, *_high``.

    Raises:
        SpliceError: an SAE does not fit the model, or a row lacks one of the positions.
        GemmaScopeError: there is less text than one row, no token to predict, or an invalid argument.
        AdapterMismatch: re-running layers does not reproduce the full pass.
    """
    check_intervals(resamples, confidence, seed)  # before the measurement, which may take hours
    found = measure_suite(
        model, saes, data, context, batch_size, progress, ablations=ablations, uniformity=uniformity, cache=cache,
        memory_budget=memory_budget, exclude_special_tokens=exclude_special_tokens, attention_mask=attention_mask,
        positions=positions,
    )  # fmt: skip
    return found.by_position() if by_position else found.table(confidence, resamples, seed)


def measure_suite(
    model: GemmaModel,
    saes: Any | Iterable[Any],
    data: Text,
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
    *,
    ablations: Sequence[str] = ABLATIONS,
    uniformity: int = 0,
    memory_budget: int = MEMORY_BUDGET,
    cache: str | PathLike[str] | None = None,
    checkpoint_every: int = 16,
    exclude_special_tokens: ExcludeTokens = True,
    attention_mask: Any = None,
    positions: Positions = None,
) -> Evaluation:
    """Measure as :func:`evaluate` does, and return all sums instead of one table."""
    subjects = subjects_of(model, saes)
    special = excluded_ids(model.tokenizer, exclude_special_tokens, must_know=True)
    rows = counted_rows(model, data, context, special, positions, attention_mask)
    held = rows.mask.any(-1)  # a row of padding alone is not a sequence
    rows = CountedBatch(rows.ids[held], rows.mask[held], rows.counted[held])
    settings = Settings(batch_size, tuple(ablations), uniformity, memory_budget, checkpoint_every, progress)
    if not bool(scored_positions(rows.counted).any()):
        raise GemmaScopeError(
            "There is nothing to measure: no row has an ordinary token that is predicted from an ordinary one. Give "
            "longer rows, exclude fewer tokens with exclude_special_tokens=, or choose neighbours with positions=."
        )
    sums = EvaluationRun(model, subjects, rows, special, settings, MetricsCache(cache)).finish()
    return Evaluation(subjects, sums, len(rows.ids))


@dataclass
class Evaluation:
    """The sums of an evaluation, and the tables made from them.

    Attributes:
        subjects: the SAEs, in the given order.
        sums: all sums, by SAE, by sequence and by position.
        rows: number of sequences in the data.
    """

    subjects: list[Subject]
    sums: Sums
    rows: int

    def table(self, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """A row per SAE, as :func:`evaluate` returns."""
        import pandas as pd

        bootstrap = Bootstrap(self.rows, resamples, confidence, seed)
        return pd.DataFrame([self._row(number, bootstrap) for number in range(len(self.subjects))])

    def by_position(self) -> pd.DataFrame:
        """A row per SAE and position (section 4.2): the metrics without the sum over positions.

        The losses and the KL divergence are those of the prediction made at the position; FVU is the error at the
        position over the variance there, around the mean of the whole dataset. Metrics are NaN where no token counted,
        as at BOS.
        """
        import pandas as pd

        return pd.DataFrame([row for number in range(len(self.subjects)) for row in self._position_rows(number)])

    def latent_counts(self, number: int = 0) -> LatentCounts:
        """How often each latent of the SAE with this index fired (section 4.3)."""
        return self.sums.saes[number].fired

    def _row(self, number: int, bootstrap: Bootstrap) -> dict[str, Any]:
        """All metrics of one SAE over the dataset, and their intervals."""
        sae, clean, place = self.sums.saes[number], self.sums.clean.loss, self.sums.place_of(number)
        deviation = place.deviation.value
        ablated = {kind: piece.value for kind, piece in place.ablated.items()}
        losses = {kind: ablated[kind].value if kind in ablated else math.nan for kind in ABLATIONS}
        recovered = {kind: loss_recovered(clean.value, sae.loss.value, loss) for kind, loss in losses.items()}
        row = {
            **self.subjects[number].columns,
            "l0": sae.l0.value,
            "fvu": fvu(sae.error.total, deviation.total),
            "loss_clean": clean.value,
            "loss_spliced": sae.loss.value,
            "delta_loss": sae.loss.value - clean.value,
            "loss_zero_ablated": losses["zero"],
            "loss_recovered": recovered["zero"],
            "tokens": sae.l0.count,
            "kl": sae.kl.value,
            "loss_mean_ablated": losses["mean"],
            "loss_recovered_mean": recovered["mean"],
            "dead": sae.fired.dead,
            "dense": sae.fired.dense,
            "uniformity": math.nan,
            "sequences": self.rows,
        }
        bounds = {
            "l0": bootstrap.interval(np.divide, sae.l0.sums, sae.l0.counts),
            "kl": bootstrap.interval(np.divide, sae.kl.sums, sae.kl.counts),
            "fvu": bootstrap.interval(np.divide, sae.error.sums, deviation.sums),
            "delta_loss": bootstrap.interval(np.divide, sae.loss.sums - clean.sums, clean.counts),
        }
        if self.sums.uniformity:
            mean = self.sums.uniformity[number].value
            row["uniformity"], bounds["uniformity"] = mean.value, bootstrap.interval(np.divide, mean.sums, mean.counts)
        for kind, loss in ablated.items():
            if not math.isnan(recovered[kind]):
                interval = bootstrap.interval(_recovered, clean.sums, sae.loss.sums, loss.sums)
                bounds[RECOVERED[kind]] = interval
        for name in WITH_INTERVAL:
            row[f"{name}_low"], row[f"{name}_high"] = bounds.get(name, (math.nan, math.nan))
        return row

    def _position_rows(self, number: int) -> list[dict[str, Any]]:
        """The metrics of one SAE at each position."""
        sae, clean, deviation = self.sums.saes[number], self.sums.clean.loss, self.sums.place_of(number).deviation.value
        length = sae.l0.position_counts.shape[0]
        columns = {
            "position": torch.arange(length),
            "l0": sae.l0.by_position,
            "squared_error": sae.error.by_position,
            "fvu": sae.error.position_sums / deviation.position_sums,
            "loss_clean": _padded(clean.by_position, length),
            "loss_spliced": _padded(sae.loss.by_position, length),
            "delta_loss": _padded(sae.loss.by_position - clean.by_position, length),
            "kl": _padded(sae.kl.by_position, length),
            "tokens": sae.l0.position_counts,
        }
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [{**self.subjects[number].columns, **dict(zip(columns, row, strict=True))} for row in rows]


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """Pad values of predictions with NaN to the number of tokens, since the last position predicts no token."""
    missing = torch.full((length - values.shape[0],), math.nan, dtype=values.dtype)
    return torch.cat([values, missing])


def _recovered(clean: Any, spliced: Any, ablated: Any) -> Any:
    """:func:`loss_recovered` of arrays of sums."""
    return np.where(ablated > clean, (ablated - spliced) / (ablated - clean), np.nan)
