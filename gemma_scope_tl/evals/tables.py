"""Rows of the tables that an evaluation gives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemma_scope_tl.evals.intervals import Bootstrap
from gemma_scope_tl.evals.metrics import fvu, loss_recovered

if TYPE_CHECKING:
    from gemma_scope_tl.evals.suite import Evaluation


def summary_row(found: Evaluation, number: int, bootstrap: Bootstrap) -> dict[str, Any]:
    """All metrics of one SAE over the dataset, and their intervals."""
    unit, clean, place = found.units[f"sae {number}"], found.clean(), found.subjects[number].place.target.key
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
    deviation = found.units[f"deviation {found.subjects[number].place.target.key}"].token_mean("value")
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
