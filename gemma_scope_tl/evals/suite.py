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
from gemma_scope_tl.evals.metrics import Bootstrap, fvu, loss_recovered
from gemma_scope_tl.evals.run import ABLATIONS, EvaluationRun, Settings
from gemma_scope_tl.evals.saes import Subject, subjects_of
from gemma_scope_tl.evals.sums import Sums
from gemma_scope_tl.text.batch import Text, TokenBatch
from gemma_scope_tl.text.rows import as_rows
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
) -> pd.DataFrame:
    """Measure SAEs on a model (paper, section 4.1), on the same tokens and one clean pass.

    For each SAE only the layers behind its site run again, and one encoding gives L0, FVU and the splice; the SAEs of
    a place share its ablations. BOS, EOS and padding are neither spliced, ablated nor counted. Losses are in nats,
    over predictions from an ordinary token to an ordinary token, in float32 whatever the model's dtype.

    Args:
        model: from ``load_model``.
        saes: one or several SAEs or transcoders, a mapping or a suite; a transcoder is measured against its target.
        data: texts, packed into rows of BOS and ``context - 1`` tokens; or token ids, a ``BatchEncoding`` or
            conversations, each a row. Padding, on either side, does not count, nor do rows that hold nothing else.
        context: tokens in a row, when texts are given.
        batch_size: rows in a forward pass, fewer where the memory budget asks for it.
        progress: show a bar.
        by_position: return a row per SAE and position instead (:meth:`Evaluation.by_position`).
        ablations: ``"zero"``, ``"mean"``, both or none: what loss recovered is measured against.
        uniformity: positions of each row at which the uniformity of active latent importance is measured (appendix
            C.3): a backward pass of the model each; 0 for none.
        confidence, resamples, seed: of the intervals, made by resampling sequences.
        memory_budget: bytes that tensors may take beside the weights, 1 GiB by default (:class:`~run.Settings`).
        cache: a folder. What was measured before is read from it, and an interrupted evaluation continues, to the
            same bits; model, SAEs and tokens are identified by their content.
        exclude_special_tokens: leave out BOS, EOS and padding; the given ids; or padding alone (False).
        attention_mask: of token ids, ``[rows, pos]``, 1 at text; by default it follows from their padding.

    Returns:
        A row per SAE: ``release, id, site, layer, d_sae, l0, fvu, loss_clean, loss_spliced, delta_loss,
        loss_zero_ablated, loss_recovered, tokens``; then ``kl`` (clean to spliced, nats), ``loss_mean_ablated``,
        ``loss_recovered_mean``, ``dead`` and ``dense`` (shares of latents), ``uniformity``, ``sequences``; and
        ``<metric>_low``, ``<metric>_high``, the confidence interval of each metric.

    Raises:
        SpliceError: when an SAE does not fit the model.
        GemmaScopeError: for less text than one row, no token to predict, or an invalid argument.
        AdapterMismatch: when re-running layers does not reproduce the full pass.
    """
    found = measure_suite(
        model, saes, data, context, batch_size, progress, ablations=ablations, uniformity=uniformity, cache=cache,
        memory_budget=memory_budget, exclude_special_tokens=exclude_special_tokens, attention_mask=attention_mask,
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
) -> Evaluation:
    """:func:`evaluate`, returning everything that was measured rather than one table."""
    subjects = subjects_of(model, saes)
    rows = as_rows(model, data, context, attention_mask)
    held = rows.mask.any(-1)
    rows = TokenBatch(rows.ids[held], rows.mask[held])  # a row of nothing but padding is not a sequence
    settings = Settings(batch_size, tuple(ablations), uniformity, memory_budget, checkpoint_every, progress)
    special = excluded_ids(model.tokenizer, exclude_special_tokens, must_know=True)
    ordinary = rows.ordinary(special)
    if not bool((ordinary[:, :-1] & ordinary[:, 1:]).any()):
        raise GemmaScopeError(
            "There is nothing to measure: no row has an ordinary token that is predicted from an ordinary one. Give "
            "longer rows, or exclude fewer tokens with exclude_special_tokens=."
        )
    sums = EvaluationRun(model, subjects, rows, special, settings, MetricsCache(cache)).finish()
    return Evaluation(subjects, sums, len(rows.ids))


@dataclass
class Evaluation:
    """The sums of an evaluation, and the tables made from them.

    Attributes:
        subjects: the SAEs, in the order given.
        sums: everything measured, by SAE, by sequence and by position.
        rows: sequences in the data.
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
        position over the variance there, around the mean of the whole dataset. NaN where no token counted, as at BOS.
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
    """Values of predictions, continued by NaN to the length of tokens: nothing is predicted at the last position."""
    missing = torch.full((length - values.shape[0],), math.nan, dtype=values.dtype)
    return torch.cat([values, missing])


def _recovered(clean: Any, spliced: Any, ablated: Any) -> Any:
    """:func:`loss_recovered` of arrays of sums."""
    return np.where(ablated > clean, (ablated - spliced) / (ablated - clean), np.nan)
