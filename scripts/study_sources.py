"""Sums of metrics by source of the text, from which the page of the studies takes its conclusions.

Rows of one source depend on each other, so a difference is compared with how much it changes when other sources are
drawn: every resample draws, within each kind of text, as many sources as there are, with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from gemma_scope_tl.evals.suite import Evaluation, measure_suite
from gemma_scope_tl.text.documents import read_records
from gemma_scope_tl.text.rows import pack_texts

KEYS = ["domain", "source"]
RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 0


class SourceRows(NamedTuple):
    """Rows of token ids, each of one source: ids ``[rows, context]``, and kind of text and source of each row."""

    tokens: torch.Tensor
    domains: list[str]
    sources: list[str]

    def of(self, domain: str) -> torch.Tensor:
        """The rows of one kind of text."""
        return self.tokens[[number for number, name in enumerate(self.domains) if name == domain]]


def source_rows(model: Any, context: int, per_domain: int) -> SourceRows:
    """At most ``per_domain`` rows of each kind of text, at even distances, each row from one source.

    Sources that are shorter than a row are packed together, and count as one.
    """
    texts: dict[str, dict[str, list[str]]] = {}
    for record in read_records():
        texts.setdefault(record["domain"], {}).setdefault(record["source"], []).append(record["text"])
    rows: list[torch.Tensor] = []
    domains: list[str] = []
    sources: list[str] = []
    for domain, of_domain in texts.items():
        packed, names = _packed(model.tokenizer, of_domain, context)
        kept = np.unique(np.arange(min(per_domain, len(packed))) * len(packed) // min(per_domain, len(packed)))
        rows.append(packed[torch.from_numpy(kept)])
        domains += [domain] * len(kept)
        sources += [names[number] for number in kept.tolist()]
    return SourceRows(torch.cat(rows), domains, sources)


def _packed(tokenizer: Any, texts: dict[str, list[str]], context: int) -> tuple[torch.Tensor, list[str]]:
    found: list[torch.Tensor] = []
    names: list[str] = []
    waiting: list[str] = []
    together: list[str] = []
    for name, pieces in texts.items():
        waiting += pieces
        together.append(name)
        if sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in waiting) >= context:
            found.append(pack_texts(tokenizer, waiting, context))
            names += [" + ".join(together)] * len(found[-1])
            waiting, together = [], []
    return torch.cat(found), names


def position_sums(model: Any, saes: Sequence[Any], rows: SourceRows, places: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Sums of squared error and of delta loss by source, SAE and range of positions (first and last, BOS is 0)."""
    found: list[dict[str, Any]] = []
    for (domain, source), numbers in _by_source(rows):
        part = measure_suite(model, saes, rows.tokens[numbers], progress=False, ablations=())
        clean = part.sums.clean.loss
        for number, subject in enumerate(part.subjects):
            sums = part.sums.saes[number]
            for first, last in places:
                here = slice(first, last + 1)
                found.append(
                    {
                        "domain": domain,
                        "source": source,
                        **subject.columns,
                        "first": first,
                        "last": last,
                        "squared_error": float(sums.error.position_sums[here].sum()),
                        "tokens": int(sums.error.position_counts[here].sum()),
                        "delta_loss": float((sums.loss.position_sums - clean.position_sums)[here].sum()),
                        "predictions": int(clean.position_counts[here].sum()),
                    }
                )
    return pd.DataFrame(found)


def fidelity_sums(found: Evaluation, domain: str, sources: Sequence[str]) -> list[dict[str, Any]]:
    """Sums of error, deviation from the domain's mean and delta loss by source and SAE, of rows of one domain."""
    clean, out = found.sums.clean.loss, list[dict[str, Any]]()
    for number, subject in enumerate(found.subjects):
        sae, deviation = found.sums.saes[number], found.sums.place_of(number).deviation.value
        frame = pd.DataFrame(
            {
                "source": list(sources),
                "error": sae.error.sums.numpy(),
                "deviation": deviation.sums.numpy(),
                "delta_loss": (sae.loss.sums - clean.sums).numpy(),
                "predictions": clean.counts.numpy(),
            }
        )
        for sums in frame.groupby("source", sort=False).sum().reset_index().to_dict("records"):
            out.append({"domain": domain, **subject.columns, **{str(name): value for name, value in sums.items()}})
    return out


def uniformity_sums(found: Evaluation, rows: SourceRows) -> pd.DataFrame:
    """Sums and counts of uniformity by source and SAE."""
    out: list[dict[str, Any]] = []
    for number, subject in enumerate(found.subjects):
        mean = found.sums.uniformity[number].value
        frame = pd.DataFrame(
            {
                "domain": rows.domains,
                "source": rows.sources,
                "uniformity": mean.sums.numpy(),
                "tokens": mean.counts.numpy(),
            }
        )
        l0 = found.sums.saes[number].l0.value
        for sums in frame.groupby(KEYS, sort=False).sum().reset_index().to_dict("records"):
            out.append({**subject.columns, "l0": l0, **{str(name): value for name, value in sums.items()}})
    return pd.DataFrame(out)


def _by_source(rows: SourceRows) -> list[tuple[tuple[str, str], list[int]]]:
    numbers: dict[tuple[str, str], list[int]] = {}
    for number, key in enumerate(zip(rows.domains, rows.sources, strict=True)):
        numbers.setdefault(key, []).append(number)
    return list(numbers.items())


class Value(NamedTuple):
    """A number with the bounds of its interval."""

    value: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the interval is without zero."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 3, signed: bool = False) -> str:
        """``0.123 (0.120 to 0.130)``."""
        sign = "+" if signed else ""
        value, low, high = (f"{round(number, digits) + 0.0:{sign}.{digits}f}" for number in self)  # no minus zero
        return f"{value} ({low} to {high})".replace("-", "\u2212")


class Resampled:
    """Resamples of the sources of a table, the same for everything that is computed from it, so that differences are
    paired.

    Args:
        table: a table with the columns ``domain`` and ``source``.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self.keys = table[KEYS].drop_duplicates().reset_index(drop=True)
        generator = np.random.default_rng(SEED)
        self.weights = np.ones((RESAMPLES + 1, len(self.keys)))  # the first is the data themselves
        for _, members in self.keys.groupby("domain", sort=False):
            count = len(members)
            self.weights[1:, members.index] = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)

    def ratio(self, part: pd.DataFrame, over: str, under: str) -> np.ndarray:
        """``sum(over) / sum(under)`` of a part of the table, ``[1 + resamples]``; the data's own value is first."""
        sums = part.groupby(KEYS)[[over, under]].sum().reindex(pd.MultiIndex.from_frame(self.keys)).fillna(0.0)
        with np.errstate(all="ignore"):
            top, bottom = (self.weights @ sums[name].to_numpy(float) for name in (over, under))
            return top / bottom

    @staticmethod
    def value(values: np.ndarray) -> Value:
        """The number and its interval, from what :meth:`ratio` returns or differences and means of it."""
        drawn = values[1:][np.isfinite(values[1:])]
        if not len(drawn):
            return Value(float(values[0]), math.nan, math.nan)
        low, high = np.quantile(drawn, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        return Value(float(values[0]), float(low), float(high))


def mean_ratio(draws: Resampled, parts: Sequence[pd.DataFrame], over: str, under: str) -> np.ndarray:
    """The mean over parts of :meth:`Resampled.ratio`."""
    return np.mean([draws.ratio(part, over, under) for part in parts], axis=0)
