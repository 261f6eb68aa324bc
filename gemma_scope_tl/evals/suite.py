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
from gemma_scope_tl.evals.accumulators import CLEAN, LatentCounts, TokenMean, Unit
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET
from gemma_scope_tl.evals.metrics import Bootstrap, fvu, loss_recovered
from gemma_scope_tl.evals.run import ABLATIONS, Run, Settings
from gemma_scope_tl.evals.saes import Subject, subjects_of
from gemma_scope_tl.evals.store import Store
from gemma_scope_tl.sites import target_of
from gemma_scope_tl.text.batch import Text, TokenBatch
from gemma_scope_tl.text.rows import as_rows
from gemma_scope_tl.text.tokens import ExcludeTokens, excluded_ids

if TYPE_CHECKING:
    import pandas as pd


def summary_row(found: Evaluation, number: int, bootstrap: Bootstrap) -> dict[str, Any]:
    """All metrics of one SAE over the dataset, and their intervals."""
    unit, clean, place = found.units[f"sae {number}"], found.clean(), target_of(found.subjects[number].place).key
    loss, fired = unit.token_mean("loss"), found.latent_counts(number)
    ablated = {kind: found.units[f"{kind} {place}"].token_mean("value") for kind in found.ablations}
    losses = {kind: ablated[kind].value if kind in ablated else math.nan for kind in ("zero", "mean")}
    deviation = found.units[f"deviation {place}"].token_mean("value")
    row = {
        **_names(found, number),
        "l0": unit.token_mean("l0").value,
        "fvu": fvu(unit.token_mean("error").total, deviation.total),
        "loss_clean": clean.value,
        "loss_spliced": loss.value,
        "delta_loss": loss.value - clean.value,
        "loss_zero_ablated": losses["zero"],
        "loss_recovered": loss_recovered(clean.value, loss.value, losses["zero"]),
        "tokens": unit.token_mean("l0").count,
        "kl": unit.token_mean("kl").value,
        "loss_mean_ablated": losses["mean"],
        "loss_recovered_mean": loss_recovered(clean.value, loss.value, losses["mean"]),
        "dead": fired.dead,
        "dense": fired.dense,
        "uniformity": math.nan,
        "sequences": found.rows,
    }
    pairs = {"l0": unit.token_mean("l0"), "kl": unit.token_mean("kl")}
    if f"uniformity {number}" in found.units:
        pairs["uniformity"] = found.units[f"uniformity {number}"].token_mean("value")
        row["uniformity"] = pairs["uniformity"].value
    bounds = {name: bootstrap.interval(np.divide, mean.sums, mean.counts) for name, mean in pairs.items()}
    bounds["fvu"] = bootstrap.interval(np.divide, unit.token_mean("error").sums, deviation.sums)
    bounds["delta_loss"] = bootstrap.interval(np.divide, loss.sums - clean.sums, clean.counts)
    for kind, name in (("zero", "loss_recovered"), ("mean", "loss_recovered_mean")):
        if kind in ablated and not math.isnan(row[name]):
            bounds[name] = bootstrap.interval(_recovered, clean.sums, loss.sums, ablated[kind].sums)
    for name in ("l0", "fvu", "delta_loss", "loss_recovered", "kl", "loss_recovered_mean", "uniformity"):
        row[f"{name}_low"], row[f"{name}_high"] = bounds.get(name, (math.nan, math.nan))
    return row


def position_rows(found: Evaluation, number: int) -> list[dict[str, Any]]:
    """The metrics of one SAE at each position."""
    unit, clean = found.units[f"sae {number}"], found.clean()
    deviation = found.units[f"deviation {target_of(found.subjects[number].place).key}"].token_mean("value")
    means = {name: unit.token_mean(name) for name in ("l0", "error", "loss", "kl")}
    length = means["l0"].position_counts.shape[0]
    columns = {
        "position": torch.arange(length),
        "l0": means["l0"].by_position,
        "squared_error": means["error"].by_position,
        "fvu": means["error"].position_sums / deviation.position_sums,
        "loss_clean": _padded(clean.by_position, length),
        "loss_spliced": _padded(means["loss"].by_position, length),
        "delta_loss": _padded(means["loss"].by_position - clean.by_position, length),
        "kl": _padded(means["kl"].by_position, length),
        "tokens": means["l0"].position_counts,
    }
    listed = {name: values.tolist() for name, values in columns.items()}
    return [{**_names(found, number), **{name: listed[name][at] for name in listed}} for at in range(length)]


def _names(found: Evaluation, number: int) -> dict[str, Any]:
    subject = found.subjects[number]
    named = {"release": subject.release, "id": subject.id, "site": subject.place.site, "layer": subject.place.layer}
    return {**named, "d_sae": subject.d_sae}


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """Values of predictions, of which the last position has none, as long as those of tokens."""
    missing = torch.full((length - values.shape[0],), math.nan, dtype=values.dtype)
    return torch.cat([values, missing])


def _recovered(clean: Any, spliced: Any, ablated: Any) -> Any:
    return np.where(ablated > clean, (ablated - spliced) / (ablated - clean), np.nan)


@dataclass
class Evaluation:
    """What was measured, as sums by sequence and by position.

    Attributes:
        subjects: the SAEs, in the order given.
        units: the pieces, by name (``units.py``).
        rows: sequences in the data.
        ablations: what loss recovered is measured against.
    """

    subjects: list[Subject]
    units: dict[str, Unit]
    rows: int
    ablations: tuple[str, ...]

    def table(self, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """A row per SAE, as :func:`evaluate` returns."""
        import pandas as pd

        bootstrap = Bootstrap(self.rows, resamples, confidence, seed)
        return pd.DataFrame([summary_row(self, number, bootstrap) for number in range(len(self.subjects))])

    def by_position(self) -> pd.DataFrame:
        """A row per SAE and position (section 4.2): the metrics without the sum over positions.

        The losses and the KL divergence are those of the prediction made at the position; FVU is the error at the
        position over the variance there, around the mean of the whole dataset. NaN where no token counted, as at BOS.
        """
        import pandas as pd

        return pd.DataFrame([row for number in range(len(self.subjects)) for row in position_rows(self, number)])

    def latent_counts(self, number: int = 0) -> LatentCounts:
        """How often each latent of the SAE with this index fired (section 4.3)."""
        fired = self.units[f"sae {number}"].parts["fired"]
        if not isinstance(fired, LatentCounts):
            raise GemmaScopeError(f"Nothing was counted for SAE {number}.")
        return fired

    def clean(self) -> TokenMean:
        """The model's own loss."""
        return self.units[CLEAN].token_mean("loss")


def measure_suite(
    model: Any,
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
    rows = TokenBatch(rows.ids[held], rows.mask[held])  # a row of padding alone is no sequence
    settings = Settings(batch_size, tuple(ablations), uniformity, memory_budget, checkpoint_every, progress)
    special = excluded_ids(model.tokenizer, exclude_special_tokens, must_know=True)
    ordinary = rows.ordinary(special)
    if not bool((ordinary[:, :-1] & ordinary[:, 1:]).any()):
        raise GemmaScopeError(
            "There is nothing to measure: no row has an ordinary token that is predicted from an ordinary one. Give "
            "longer rows, or leave less out with exclude_special_tokens=."
        )
    run = Run(model, subjects, rows, special, settings, Store(cache))
    run.finish()
    return Evaluation(subjects, run.units, len(rows.ids), settings.ablations)


def evaluate(
    model: Any,
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

    An SAE re-runs only the layers behind its site, from one encoding that gives L0, FVU and the splice; ablations are
    shared by the SAEs of a place. BOS, EOS and padding are neither spliced, ablated nor counted. Losses are in nats,
    over predictions from an ordinary token to an ordinary token, in float32 whatever the model's dtype.

    Args:
        model: from ``load_model``.
        saes: one or several SAEs or transcoders, a mapping or a suite; a transcoder is measured against its true
            target, the MLP's output.
        data: texts, packed into rows of BOS and ``context - 1`` tokens; or token ids, a ``BatchEncoding`` or
            conversations, each a row. Padding, on either side, and rows of it alone count nothing.
        context: tokens in a row, when texts are given.
        batch_size: rows in a forward pass, fewer where the memory budget asks for it.
        progress: show a bar.
        by_position: return a row per SAE and position instead (:meth:`Evaluation.by_position`).
        ablations: ``"zero"``, ``"mean"``, both or none: what loss recovered is measured against.
        uniformity: positions of each row at which the uniformity of active latent importance is measured (appendix
            C.3): a backward pass of the model each; 0 for none.
        confidence, resamples, seed: of the intervals, made by resampling sequences.
        memory_budget: bytes that tensors may take beside the weights, 1 GiB by default (:class:`~run.Settings`).
        cache: a folder. What was measured before is read from it, and an evaluation that was stopped goes on, to the
            same bits; model, SAEs and tokens are told apart by their content.
        exclude_special_tokens: what is left alone: BOS, EOS and padding, or the given ids, or padding alone (False).
        attention_mask: of token ids, ``[rows, pos]``, 1 at text; by default it follows from their padding.

    Returns:
        A row per SAE: ``release, id, site, layer, d_sae, l0, fvu, loss_clean, loss_spliced, delta_loss,
        loss_zero_ablated, loss_recovered, tokens``; then ``kl`` (clean to spliced, nats), ``loss_mean_ablated``,
        ``loss_recovered_mean``, ``dead`` and ``dense`` (shares of latents), ``uniformity``, ``sequences``; and
        ``<metric>_low``, ``<metric>_high``, the confidence interval of each metric.

    Raises:
        SpliceError: when an SAE does not fit the model.
        GemmaScopeError: when there is less text than one row, no token to predict, or another argument makes no sense.
        AdapterMismatch: when re-running layers does not reproduce the full pass.
    """
    options: dict[str, Any] = {"ablations": ablations, "uniformity": uniformity, "memory_budget": memory_budget}
    options |= {"exclude_special_tokens": exclude_special_tokens, "attention_mask": attention_mask}
    found = measure_suite(model, saes, data, context, batch_size, progress, cache=cache, **options)
    return found.by_position() if by_position else found.table(confidence, resamples, seed)
