"""Feature JSON in the format of Neuronpedia's tools.

The format follows the classes in ``sae_dashboard/neuronpedia/neuronpedia_dashboard.py`` of SAEDashboard, whose runner
makes the ``batch-N.json`` files of Neuronpedia's dashboards: ``model_id, layer, sae_set`` and a list of features with
the fields that :func:`_feature` fills in. ``topkCosSimIndices``, ``topkCosSimValues`` and ``maxActApprox`` are fields
of Neuronpedia's own exports. These files have not been tested with Neuronpedia's importer.

Differences: examples are this package's windows, without a quota by interval width; the ``correlated_*`` lists are
empty, since no correlations of latents with neurons or with each other are computed; in ``topkCosSimIndices`` the
latent itself comes first, as in the exports.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET, rows_that_fit
from gemma_scope_tl.evals.saes import Subject, latents_of, subjects_of
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.interp.examples import Examples, chosen_latents, passes, top_examples
from gemma_scope_tl.interp.sampling import Sampling
from gemma_scope_tl.latents.logit_lens import latent_logits
from gemma_scope_tl.model.counted import CountedBatch, counted_rows
from gemma_scope_tl.model.identity import digest_of, model_facts, refuse_hooks
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.text.rows import special_ids

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

BINS = 50
SETTINGS = "run_settings.json"


def export_neuronpedia(
    model: GemmaModel,
    sae: Any,
    data: Sequence[str] | torch.Tensor,
    folder: str | PathLike[str],
    context: int = 128,
    batch_size: int = 8,
    progress: bool = True,
    *,
    latents: Iterable[int] | None = None,
    features_per_batch: int = 128,
    sampling: Sampling | None = None,
    dataset: str = "",
    sae_set: str = "",
    memory_budget: int = MEMORY_BUDGET,
    positions: Positions = None,
) -> list[Path]:
    """Write the features of an SAE as ``batch-0.json``, ``batch-1.json``, … with the settings beside them.

    The model makes three passes over the corpus (two for :func:`~gemma_scope_tl.interp.top_examples`, one for
    histograms) for any number of features. Each file is written atomically. Existing files are kept, and if all of them
    exist, no pass is made.

    Args:
        model, data, context, batch_size, progress, memory_budget, positions: as
            :func:`~gemma_scope_tl.evals.suite.evaluate` takes them.
        sae: one SAE.
        folder: output folder, which is created if it does not exist.
        latents: indices of latents; None for all.
        features_per_batch: number of latents in a file.
        sampling: sampling of the examples; by default windows of ``context`` tokens.
        dataset: name of the corpus in the files.
        sae_set: ``sae_set`` in the files; by default the SAE's release.

    Returns:
        The paths of all batches.

    Raises:
        GemmaScopeError: the folder holds an export with other settings, more than one SAE was given,
            ``features_per_batch`` is below 1, or there are hooks on model or SAE, which the settings cannot describe.
    """
    subjects, text = subjects_of(model, sae), counted_rows(model, data, context, special_ids(model), positions)
    if len(subjects) != 1:
        raise GemmaScopeError("An export takes one SAE.")
    features_per_batch = checked_count(features_per_batch, "features_per_batch")
    subject, place = subjects[0], Path(folder)
    drawn = sampling or Sampling(window=min(64, text.ids.shape[1]))
    chosen = chosen_latents(subject, latents)
    parts = np.split(chosen, range(features_per_batch, len(chosen), features_per_batch))
    head: dict[str, Any] = {"model_id": _model_name(model, subject), "layer": subject.place.layer or 0}
    head["sae_set"] = sae_set or subject.release or ""
    facts = {"n_prompts_total": text.ids.shape[0], "n_tokens_in_prompt": text.ids.shape[1], "dataset": dataset}
    _check_settings(place, _settings(model, subject, text, chosen, features_per_batch, drawn) | head | facts)
    paths = [place / f"batch-{number}.json" for number in range(len(parts))]
    missing = {path: part for path, part in zip(paths, parts, strict=True) if not path.exists()}
    if missing:
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "memory_budget": memory_budget}
        _write(model, subject, text, missing, sampling=drawn, head=head, facts=facts, options=options)
    return paths


def _write(
    model: GemmaModel,
    subject: Subject,
    text: CountedBatch,
    missing: dict[Path, NDArray[np.int64]],
    *,
    sampling: Sampling,
    head: dict[str, Any],
    facts: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Write the latents of each path."""
    wanted = np.concatenate(list(missing.values())).tolist()
    options |= {"latents": wanted, "sampling": sampling, "positions": text.counted}
    (found,) = top_examples(model, subject.get(), text, **options)
    places, context = [subject.place], text.ids.shape[1]
    rows = rows_that_fit(model, places, context, options["batch_size"], options["memory_budget"])
    counts = _histograms(model, subject, text, found, rows, options["progress"])
    at = {int(latent): number for number, latent in enumerate(found.latents)}
    for path, part in missing.items():
        tables = _decoder_facts(model, subject.get(), part.tolist())
        features = [{**_feature(found, at[i], counts[at[i]], tables[i]), **facts} for i in part.tolist()]
        write_atomically(path, json.dumps({**head, "features": features}))


def _settings(
    model: GemmaModel,
    subject: Subject,
    text: CountedBatch,
    latents: NDArray[np.int64],
    features_per_batch: int,
    drawn: Sampling,
) -> dict[str, Any]:
    """The settings on which the content of the batches depends."""
    refuse_hooks(model, "remove them, as files of an earlier export are kept.")
    return {
        "sae_id": subject.id,
        "sae": digest_of(subject.facts()),
        "model": digest_of(model_facts(model)),
        "tokens": hashlib.sha256(text.ids.numpy().tobytes()).hexdigest(),
        "latents": hashlib.sha256(latents.tobytes()).hexdigest(),
        "n_features_per_batch": features_per_batch,
        "sampling": vars(drawn),
        **text.chosen(special_ids(model)),
    }


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise GemmaScopeError(f"{folder} holds an export with other settings ({SETTINGS}): choose another folder.")
    write_atomically(path, text)


def _model_name(model: GemmaModel, subject: Subject) -> str:
    row = getattr(subject.get(), "row", None)
    return str(getattr(row, "model", None) or getattr(model.cfg, "model_name", ""))


def _histograms(
    model: GemmaModel, subject: Subject, text: CountedBatch, found: Examples, rows: int, progress: bool
) -> NDArray[np.int64]:
    """Tokens by activation, in :data:`BINS` equal bins from 0 to each latent's largest, ``[n, BINS]``."""
    counts = np.zeros((len(found.latents), BINS), np.int64)
    index = np.full(subject.d_sae, -1, np.int64)
    index[found.latents] = np.arange(len(found.latents))
    for _, inputs in passes(model, [subject], text, rows, progress, "counting activations"):
        acts = latents_of(subject.get(), inputs[subject.place])
        where, values = index[acts.latents.cpu().numpy()], acts.values.float().cpu().numpy()
        where, values = where[(where >= 0) & (values != 0)], values[(where >= 0) & (values != 0)]
        share = values / np.maximum(found.maxima[where], 1e-30)
        np.add.at(counts, (where, (share * BINS).astype(np.int64).clip(0, BINS - 1)), 1)
    return counts


def _decoder_facts(
    model: GemmaModel, sae: Any, latents: list[int], k: int = 10, near: int = 6
) -> dict[int, dict[str, Any]]:
    """Facts from each latent's decoder row: logits, nearest rows by cosine, largest entries."""
    logits = latent_logits(model, sae, latents)
    rows = torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1)
    cosines, indices = (rows[latents] @ rows.T).topk(min(near, rows.shape[0]), dim=1)
    chosen = sae.W_dec.detach().float()[latents]
    sizes, dims = chosen.abs().topk(3, dim=1)
    shares = sizes / chosen.abs().sum(1, keepdim=True)
    found: dict[int, dict[str, Any]] = {}
    for number, latent in enumerate(latents):
        top, bottom = logits[number].topk(k), logits[number].topk(k, largest=False)
        heights, edges = np.histogram(logits[number].cpu().numpy(), BINS)
        found[latent] = {
            "neuron_alignment_indices": dims[number].tolist(),
            "neuron_alignment_values": _rounded(chosen[number][dims[number]]),
            "neuron_alignment_l1": _rounded(shares[number]),
            "neg_str": _words(model, bottom.indices),
            "neg_values": _rounded(bottom.values),
            "pos_str": _words(model, top.indices),
            "pos_values": _rounded(top.values),
            "logits_hist_data_bar_heights": heights.tolist(),
            "logits_hist_data_bar_values": _middles(edges),
            "topkCosSimIndices": indices[number].tolist(),
            "topkCosSimValues": _rounded(cosines[number]),
        }
    return found


def _feature(found: Examples, at: int, counts: NDArray[np.int64], table: dict[str, Any]) -> dict[str, Any]:
    latent, largest = int(found.latents[at]), float(found.maxima[at])
    fires = bool(found.fired[at])
    names = ("neurons_indices", "neurons_l1", "neurons_pearson", "features_indices", "features_l1", "features_pearson")
    return {
        "feature_index": latent,
        **table,
        **{f"correlated_{name}": [] for name in names},
        "frac_nonzero": float(found.fired[at]) / max(found.tokens, 1),
        "maxActApprox": round(largest, 3),
        "freq_hist_data_bar_values": _middles(np.linspace(0, largest, BINS + 1)) if fires else [],
        "freq_hist_data_bar_heights": counts.tolist() if fires else [],
        "decoder_weights_dist": [],
        "activations": _activations(found, latent, largest),
    }


def _activations(found: Examples, latent: int, largest: float) -> list[dict[str, Any]]:
    examples = found.of(latent, "top", "quantile")
    listed: list[dict[str, Any]] = []
    for one in examples:
        bin_min, bin_max, contains = -1.0, largest, -1.0
        if one.kind == "quantile":
            inside = [e.activation for e in examples if e.quantile == one.quantile]
            bin_min, bin_max, contains = min(inside), max(inside), 1 / found.sampling.quantiles
        bounds = {"bin_min": round(bin_min, 3), "bin_max": round(bin_max, 3), "bin_contains": contains}
        listed.append({**bounds, "tokens": list(one.tokens), "values": _rounded(one.values)})
    return listed


def _words(model: GemmaModel, ids: torch.Tensor) -> list[str]:
    return [model.tokenizer.decode([i]) if model.tokenizer else f"<{i}>" for i in ids.tolist()]


def _middles(edges: NDArray[Any]) -> list[float]:
    return _rounded((edges[1:] + edges[:-1]) / 2)


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]
