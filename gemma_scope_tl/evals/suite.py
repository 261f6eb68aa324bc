"""``evaluate``: the paper's metrics of SAEs on one fixed set of tokens, with confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.accumulators import LatentCounts
from gemma_scope_tl.evals.cache import MetricsCache
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET
from gemma_scope_tl.evals.columns import Measured
from gemma_scope_tl.evals.layered import LayeredRun
from gemma_scope_tl.evals.layered_table import measured_layers
from gemma_scope_tl.evals.metrics import Bootstrap, check_intervals, scored_positions
from gemma_scope_tl.evals.run import ABLATIONS, EvaluationRun, Settings
from gemma_scope_tl.evals.saes import Subject, subjects_of
from gemma_scope_tl.evals.sums import Sums
from gemma_scope_tl.model.counted import CountedBatch, counted_rows
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.choices import as_saes
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sae.suite import SAESuite
from gemma_scope_tl.text.batch import Text
from gemma_scope_tl.text.tokens import ExcludeTokens, excluded_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


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
        saes: one or several SAEs, transcoders, crosscoders or CLTs, a mapping or a suite; targets are what they write.
        data, context: texts, packed into rows of BOS and ``context - 1`` tokens; or token ids, a ``BatchEncoding`` or
            conversations, each a row. Padding on either side does not count, and rows of padding alone are left out.
        batch_size, progress: rows in a forward pass, fewer if the memory budget requires it; show a progress bar.
        by_position: return a row per SAE and position instead (:meth:`Evaluation.by_position`).
        ablations: the ablations relative to which loss recovered is measured: ``"zero"``, ``"mean"``, both or none.
        uniformity: positions of each row at which it is measured (appendix C.3), a backward pass each; 0 for none.
        confidence, resamples, seed: parameters of the confidence intervals, which resample sequences.
        memory_budget: bytes that tensors may take besides the weights, 1 GiB by default (:class:`~run.Settings`).
        cache: a folder of measurements, by the content of model, SAEs and tokens; interrupted ones go on, bit by bit.
        exclude_special_tokens: leave out BOS, EOS and padding; the given ids; or padding alone (False).
        attention_mask: mask of token ids, ``[rows, pos]``, 1 at text; by default it follows from their padding.
        positions: leave out all but these positions of each row, as in :func:`~gemma_scope_tl.splice`; None for all.

    Returns:
        A row per SAE (one for all layers and one a layer of a crosscoder or CLT, :mod:`gemma_scope_tl.evals.layered`):
        ``release, id, site, layer, d_sae, l0, fvu, loss_clean, loss_spliced, delta_loss, loss_zero_ablated,
        loss_recovered, tokens, kl`` (clean to spliced, nats), ``loss_mean_ablated, loss_recovered_mean, dead, dense``
        (shares of latents), ``uniformity, sequences``, intervals ``*_low, *_high``.

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
    saes = saes if isinstance(saes, SAESuite) else as_saes(saes, whole=True, layered=True)
    subjects, coders = subjects_of(model, saes, skip_layered=True), _layered(saes)
    if coders and uniformity:
        raise GemmaScopeError("uniformity= is of SAEs: a latent of a layered coder has a gradient in every layer.")
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
    common = rows, special, settings, MetricsCache(cache)
    runs = {number: LayeredRun(model, coder, *common) for number, coder in coders.items()}
    for run in runs.values():
        run.finish()
    sums = EvaluationRun(model, subjects, *common).finish()
    return Evaluation(subjects, sums, len(rows.ids), runs)


def _layered(saes: SAESuite | list[Any]) -> dict[int, LayeredCoder]:
    """The layered coders by their number among all that are given. Those of a suite are loaded."""
    if isinstance(saes, SAESuite):
        return {number: saes[key] for number, key in enumerate(saes) if saes.rows[key].layers}
    return {number: one for number, one in enumerate(saes) if isinstance(one, LayeredCoder)}


@dataclass
class Evaluation:
    """The sums of an evaluation, and the tables made from them.

    Attributes:
        subjects: the SAEs, in the given order.
        sums: all sums, by SAE, by sequence and by position.
        rows: number of sequences in the data.
        layered: the measured layered coders, by their number among all that was given.
    """

    subjects: list[Subject]
    sums: Sums
    rows: int
    layered: Mapping[int, LayeredRun] = field(default_factory=dict[int, LayeredRun])

    def table(self, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """A row per SAE, as :func:`evaluate` returns."""
        import pandas as pd

        bootstrap = Bootstrap(self.rows, resamples, confidence, seed)
        return pd.DataFrame([one.row(bootstrap, self.rows) for one in self._all_measured()])

    def by_position(self) -> pd.DataFrame:
        """A row per SAE and position (section 4.2): the metrics without the sum over positions.

        The losses and the KL divergence are those of the prediction made at the position; FVU is the error at the
        position over the variance there, around the mean of the whole dataset. Metrics are NaN where no token counted,
        as at BOS.
        """
        import pandas as pd

        return pd.DataFrame([row for one in self._all_measured() for row in one.position_rows()])

    def latent_counts(self, number: int = 0) -> LatentCounts:
        """How often each latent of the SAE with this index fired (section 4.3)."""
        return self.sums.saes[number].fired

    def _all_measured(self) -> list[Measured]:
        """What each row of the table is made of, in the given order."""
        found: list[Measured] = []
        saes = iter(range(len(self.subjects)))
        for number in range(len(self.subjects) + len(self.layered)):
            found += measured_layers(self.layered[number]) if number in self.layered else [self._measured(next(saes))]
        return found

    def _measured(self, number: int) -> Measured:
        sae, place = self.sums.saes[number], self.sums.place_of(number)
        return Measured(
            self.subjects[number].columns,
            sae.l0,
            sae.fired,
            error=[sae.error],
            deviation=[place.deviation.value],
            clean=self.sums.clean.loss,
            loss=sae.loss,
            kl=sae.kl,
            ablated={kind: piece.value for kind, piece in place.ablated.items()},
            uniformity=self.sums.uniformity[number].value if self.sums.uniformity else None,
        )
