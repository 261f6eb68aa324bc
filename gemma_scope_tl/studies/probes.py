"""Probes that measure how well single latents distinguish concepts, compared with random directions and activations.

The probes are k-sparse (Gurnee et al. 2023, arXiv 2305.01610, as SAEBench uses them on SAEs): on the training documents
the k latents of largest difference of means are chosen, and a logistic regression is fitted on them. There are two
controls: the same probe on a random SAE of equal shape and L0 (:func:`random_twin`), and a logistic regression on all
raw activations, with an L2 penalty chosen on a part of the training documents. The module needs scikit-learn (the extra
``probes``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.clean_pass import MEMORY_BUDGET, ReadBatch, read_batches, rows_that_fit
from gemma_scope_tl.evals.saes import Subject, latents_of, subjects_of
from gemma_scope_tl.sae.access import locate
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sites import Place
from gemma_scope_tl.studies.probe_data import Concept, LabelledRows
from gemma_scope_tl.studies.probe_fits import Fitted, Units, best_latent, dense_probe, sparse_probe
from gemma_scope_tl.text.rows import special_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel

TEST = 0.3  # share of the documents of each label that are test documents
SAMPLE = 4096  # tokens from which the thresholds of a random twin are computed
DENSE, LATENTS, RANDOM = "dense", "latents", "random"
_CHUNK = 1024  # latents whose pre-activations are sorted at once


def probe_concepts(
    model: GemmaModel,
    saes: Any,
    data: LabelledRows,
    k: Sequence[int] = (1, 2, 5, 20),
    batch_size: int = 8,
    progress: bool = True,
    *,
    most: int = 2000,
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
) -> pd.DataFrame:
    """Probe each SAE's latents, a random twin's and the raw activations for each concept.

    A probe of rows reads the mean over the ordinary tokens of a row; a probe of tokens reads the activations of each
    token. No document is in both training and test data; three tenths of each label's documents are test documents.

    Args:
        model, saes, batch_size, progress, memory_budget: as :func:`~gemma_scope_tl.evals.suite.evaluate` takes them.
        data: :func:`~gemma_scope_tl.studies.bundled_concepts`, or
            :func:`~gemma_scope_tl.studies.probe_data.labelled_rows`.
        k: numbers of latents that a probe reads.
        most: maximum number of tokens for a concept of tokens, half of them of each label if there are enough.
            Memory: ``8 * d_sae`` bytes for each row and each such token, for an SAE and its twin.
        confidence, resamples, seed: parameters of the confidence intervals, which resample test documents. The seed
            also determines the split.

    Returns:
        A row per SAE, concept, kind of features (``latents``, ``random``, ``dense``) and k (0 for dense): ``release,
        id, site, layer, d_sae, l0, concept, features, k, auroc, auroc_low, auroc_high, accuracy`` (balanced),
        ``train, test`` (numbers of units), ``best_latent`` and ``best_auroc``: the latent that best orders the training
        units, and its AUROC on the test units.

    Raises:
        GemmaScopeError: scikit-learn is not installed, or a label has fewer than four documents.
    """
    import pandas as pd

    _need_sklearn()
    if not k or min(k) < 1:
        raise GemmaScopeError(f"A probe reads 1 latent or more, not {list(k)}.")
    special = special_ids(model)
    asked = [_units(concept, data, special, most, seed) for concept in data.concepts]
    subjects = subjects_of(model, saes)
    options: dict[str, Any] = {"seed": seed, "confidence": confidence, "resamples": resamples}
    rows: list[dict[str, Any]] = []
    for place in _shown(list(dict.fromkeys(subject.place for subject in subjects)), progress):
        fit = rows_that_fit(model, [place], data.tokens.shape[1], batch_size, memory_budget)
        passes = partial(read_batches, model, places=[place], special=special, batch_size=fit)
        rows += _of_place([one for one in subjects if one.place == place], data, asked, k, passes, options)
    return pd.DataFrame(rows)


@torch.no_grad()
def random_twin(sae: Any, x: Float[torch.Tensor, "n d_in"], seed: int = 0) -> Any:
    """An SAE of the same shape with random weights, whose thresholds give the same L0 on ``x``.

    Encoder columns and decoder rows are random unit vectors; ``b_enc`` subtracts the mean of ``x``; each latent's
    threshold is the quantile of its pre-activations above which it fires on a share ``L0 / d_sae`` of the tokens. All
    latents of the twin therefore fire equally often, unlike those of the SAE.

    Args:
        sae: an SAE or transcoder.
        x: activations that the SAE reads, of a few thousand tokens.
        seed: seed of the weights.

    Raises:
        GemmaScopeError: ``x`` is empty.
    """
    if not x.shape[0]:
        raise GemmaScopeError("A random twin needs activations, from which its thresholds are computed.")
    site, layer = locate(sae)
    generator = torch.Generator().manual_seed(seed)
    d_sae, d_out = sae.W_dec.shape
    x = x.float().cpu()
    w_enc = torch.nn.functional.normalize(torch.randn(x.shape[1], d_sae, generator=generator), dim=0)
    w_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_out, generator=generator), dim=1)
    b_enc = -x.mean(0) @ w_enc
    share = min(1.0, latents_of(sae, x.to(sae.device)).l0 / d_sae)
    fires = round(share * x.shape[0])
    thresholds: list[torch.Tensor] = []
    for columns, bias in zip(w_enc.split(_CHUNK, dim=1), b_enc.split(_CHUNK), strict=True):
        z = (x @ columns + bias).sort(dim=0, descending=True).values
        thresholds.append(z[min(fires, x.shape[0] - 1)].clamp_min(1e-6))
    arrays = {"W_enc": w_enc, "W_dec": w_dec, "b_enc": b_enc, "b_dec": torch.zeros(d_out)}
    arrays["threshold"] = torch.cat(thresholds)
    return JumpReLUSAE.from_arrays(arrays, site=site.name, layer=layer, device=sae.device)


@dataclass(frozen=True)
class _Asked:
    """The rows or tokens of a concept: row, position, label and document of each, and whether it is a test unit."""

    concept: Concept
    row: NDArray[np.int64]
    position: NDArray[np.int64]
    label: NDArray[np.int64]
    document: NDArray[np.int64]
    test: NDArray[np.bool_]


def _of_place(
    subjects: Sequence[Subject],
    data: LabelledRows,
    asked: Sequence[_Asked],
    k: Sequence[int],
    passes: Callable[..., Iterator[ReadBatch]],
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """All probes of the SAEs of one place; ``passes(tokens=…)`` iterates over the clean batches of the tokens."""
    place, seed = subjects[0].place, options["seed"]
    training = torch.from_numpy(~_is_test(data, seed)[data.documents.numpy()])
    sample = _sample(passes(tokens=data.tokens[training]), place)
    rows: list[dict[str, Any]] = []
    dense: list[Fitted] = []
    for subject in subjects:
        sae = subject.get()
        encoders = [sae, random_twin(sae, sample, seed), *([] if dense else [None])]
        found = _features(encoders, passes(tokens=data.tokens), place, asked)
        dense = dense or [dense_probe(raw, **options) for raw in found[-1]]
        for kind, encoder, features in zip((LATENTS, RANDOM), encoders, found, strict=False):
            rows += _rows(subject, kind, latents_of(encoder, sample).l0, asked, features, k=k, options=options)
        rows += [_row(subject, DENSE, float("nan"), a, d, k=0, best=None) for a, d in zip(asked, dense, strict=True)]
    return rows


def _rows(
    subject: Subject,
    kind: str,
    l0: float,
    asked: Sequence[_Asked],
    units: Sequence[Units],
    *,
    k: Sequence[int],
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for one, features in zip(asked, units, strict=True):
        best = best_latent(features)
        rows += [_row(subject, kind, l0, one, sparse_probe(features, n, **options), k=n, best=best) for n in k]
    return rows


def _row(
    subject: Subject, kind: str, l0: float, asked: _Asked, fitted: Fitted, *, k: int, best: tuple[int, float] | None
) -> dict[str, Any]:
    return {
        **subject.columns,
        "l0": l0,
        "concept": asked.concept.name,
        "features": kind,
        "k": k,
        "auroc": fitted.auroc,
        "auroc_low": fitted.low,
        "auroc_high": fitted.high,
        "accuracy": fitted.accuracy,
        "train": int((~asked.test).sum()),
        "test": int(asked.test.sum()),
        "best_latent": best[0] if best else None,
        "best_auroc": best[1] if best else float("nan"),
    }


def _is_test(data: LabelledRows, seed: int) -> NDArray[np.bool_]:
    """Choose the test documents: three tenths of each label's documents, and at least two."""
    is_test = np.zeros(len(data.kinds), bool)
    kinds = np.asarray(data.kinds)
    generator = np.random.default_rng(seed)
    for kind in dict.fromkeys(data.kinds):
        members = np.flatnonzero(kinds == kind)
        if len(members) < 4:
            raise GemmaScopeError(
                f"Label {kind!r} has {len(members)} documents; a probe needs four, two of them to test it. Give more, "
                "or leave the label out."
            )
        drawn = generator.permutation(members)
        is_test[drawn[: max(2, round(TEST * len(members)))]] = True
    return is_test


def _units(concept: Concept, data: LabelledRows, special: Sequence[int], most: int, seed: int) -> _Asked:
    is_test = _is_test(data, seed)
    documents = data.documents.numpy()
    labels = concept.labels.numpy()
    if concept.of_tokens:
        labels = np.where(np.isin(data.tokens.numpy(), list(special)), -1, labels)
        row, position = np.nonzero(labels >= 0)
        label = labels[row, position]
        kept = _balanced(label, most, seed)
        row, position, label = row[kept], position[kept], label[kept]
    else:
        row = np.flatnonzero(labels >= 0)
        position, label = np.zeros(len(row), np.int64), labels[row]
    test = is_test[documents[row]]
    for part, name in ((~test, "train on"), (test, "test")):
        if len(np.unique(label[part])) < 2:
            raise GemmaScopeError(f"Concept {concept.name!r} has only one label in the documents to {name}.")
    return _Asked(concept, row, position, label.astype(np.int64), documents[row], test)


def _balanced(label: NDArray[Any], most: int, seed: int) -> NDArray[np.int64]:
    """Ascending indices of at most ``most`` units, half of them of each label if there are enough."""
    generator = np.random.default_rng(seed)
    yes, no = (generator.permutation(np.flatnonzero(label == value)) for value in (1, 0))
    half = most // 2
    taken = min(len(yes), max(half, most - len(no)))
    return np.sort(np.concatenate([yes[:taken], no[: most - taken]]))


def _sample(batches: Iterator[ReadBatch], place: Place) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    held = 0
    for batch in batches:
        parts.append(batch.activations(place))
        held += parts[-1].shape[0]
        if held >= SAMPLE:
            break
    return torch.cat(parts)[:SAMPLE]


@torch.no_grad()
def _features(
    encoders: Sequence[Any], batches: Iterator[ReadBatch], place: Place, asked: Sequence[_Asked]
) -> list[list[Units]]:
    """For each encoder, the latents (for None, the raw activations) of each concept's units, from one pass."""
    held: list[list[list[NDArray[np.float32]]]] = [[[] for _ in asked] for _ in encoders]
    for batch in batches:
        raw, (count, width) = batch.activations(place), batch.tokens.shape
        lengths = batch.ordinary.sum(1, keepdim=True).clamp_min(1)
        for encoder, parts in zip(encoders, held, strict=True):
            values = raw.float() if encoder is None else latents_of(encoder, raw).to_dense().float()
            full = values.new_zeros(count, width, values.shape[1])
            full[batch.ordinary] = values
            means = (full.sum(1) / lengths).cpu().numpy()
            for one, kept in zip(asked, parts, strict=True):
                mine = (one.row >= batch.start) & (one.row < batch.start + count)
                rows = one.row[mine] - batch.start
                at = torch.from_numpy(rows), torch.from_numpy(one.position[mine])
                kept.append(full[at].cpu().numpy() if one.concept.of_tokens else means[rows])
    return [
        [Units(np.concatenate(k), one.label, one.document, one.test) for one, k in zip(asked, parts, strict=True)]
        for parts in held
    ]


def _shown(places: list[Place], progress: bool) -> Iterator[Place]:
    from rich.progress import track

    yield from track(places, "probing", len(places), transient=True, disable=not progress)


def _need_sklearn() -> None:
    import importlib.util

    if importlib.util.find_spec("sklearn") is None:
        raise GemmaScopeError("Probes need scikit-learn: pip install 'gemma-scope-tl[probes]'.")
