"""Results of probes: one row for each probe, and paired differences between kinds of features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.studies.probe_fits import Fitted, Resamples

if TYPE_CHECKING:
    import pandas as pd

DENSE, LATENTS, RANDOM = "dense", "latents", "random"


@dataclass
class Probes:
    """All probes of a study, with their values in the same resamples of test sources.

    Attributes:
        resamples: the resamples.
        rows: the columns of each probe, in the order of the table.
        fits: the fit of each row.
    """

    resamples: Resamples
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    fits: list[Fitted] = field(default_factory=list[Fitted], repr=False)

    def add(self, columns: Mapping[str, Any], fitted: Fitted) -> None:
        """Add a probe."""
        self.rows.append(dict(columns))
        self.fits.append(fitted)

    def table(self) -> pd.DataFrame:
        """A row per probe, as :func:`~gemma_scope_tl.studies.probe_concepts` returns."""
        import pandas as pd

        return pd.DataFrame([self._row(row, fitted) for row, fitted in zip(self.rows, self.fits, strict=True)])

    def contrasts(self, parts: Mapping[str, Sequence[str]] | None = None) -> pd.DataFrame:
        """Mean AUROC of latents, of random latents and of raw activations, and the differences between them.

        The means are over all SAEs and the concepts of a part. Differences are paired: each resample of the test
        sources gives the AUROC of both sides. The intervals hold what other test sources would change. They do not hold
        what other training text, another random SAE or other concepts would change.

        Args:
            parts: concepts of each part by its name; by default each concept is a part.

        Returns:
            A row per part and k: ``part, k, concepts, saes, latents, random, dense``, ``over_random`` (latents minus
            random) and ``over_dense`` (latents minus dense), each with ``_low`` and ``_high``, and ``resolved``:
            whether the interval of ``over_random`` is without zero.

        Raises:
            UnknownNameError: a part has an unknown concept.
            GemmaScopeError: a part has no concept.
        """
        import pandas as pd

        known = list(dict.fromkeys(row["concept"] for row in self.rows))
        sizes = sorted({row["k"] for row in self.rows if row["features"] == LATENTS})
        chosen = {name: [name] for name in known} if parts is None else parts
        for part, concepts in chosen.items():
            if not concepts:
                raise GemmaScopeError(f"The part {part!r} has no concept.")
            for name in concepts:
                if name not in known:
                    raise unknown_name("concept", name, known)
        found = [self._contrast(part, list(concepts), k) for part, concepts in chosen.items() for k in sizes]
        return pd.DataFrame(found)

    def _contrast(self, part: str, concepts: list[str], k: int) -> dict[str, Any]:
        means = {kind: self._mean(concepts, kind, 0 if kind == DENSE else k) for kind in (LATENTS, RANDOM, DENSE)}
        row: dict[str, Any] = {"part": part, "k": k, "concepts": len(concepts), "saes": self._saes()}
        row |= {kind: value for kind, (value, _) in means.items()}
        for kind in (RANDOM, DENSE):
            low, high = self.resamples.interval(means[LATENTS][1] - means[kind][1])
            row |= {f"over_{kind}": row[LATENTS] - row[kind], f"over_{kind}_low": low, f"over_{kind}_high": high}
        return row | {"resolved": bool(row["over_random_low"] > 0 or row["over_random_high"] < 0)}

    def _mean(self, concepts: list[str], kind: str, k: int) -> tuple[float, NDArray[Any]]:
        """Mean AUROC over concepts and SAEs, on the test data and in each resample."""
        numbers = [
            number
            for number, row in enumerate(self.rows)
            if row["concept"] in concepts and row["features"] == kind and row["k"] == k
        ]
        areas = np.stack([self.fits[number].areas for number in numbers])
        return float(np.mean([self.fits[number].auroc for number in numbers])), areas.mean(0)

    def _saes(self) -> int:
        return len({(row["release"], row["id"], row["site"], row["layer"]) for row in self.rows})

    def _row(self, row: dict[str, Any], fitted: Fitted) -> dict[str, Any]:
        low, high = self.resamples.interval(fitted.areas)
        found = {"auroc": fitted.auroc, "auroc_low": low, "auroc_high": high, "accuracy": fitted.accuracy}
        over = dict.fromkeys(("over_random", "over_random_low", "over_random_high"), math.nan)
        if row["features"] == LATENTS:
            same = ("release", "id", "site", "layer", "concept", "k")
            random = next(
                other
                for columns, other in zip(self.rows, self.fits, strict=True)
                if columns["features"] == RANDOM and all(columns[name] == row[name] for name in same)
            )
            bounds = self.resamples.interval(fitted.areas - random.areas)
            over = dict(zip(over, (fitted.auroc - random.auroc, *bounds), strict=True))
        first = ("release", "id", "site", "layer", "d_sae", "l0", "concept", "features", "k")
        rest = {name: value for name, value in row.items() if name not in first}
        return {**{name: row[name] for name in first}, **found, **over, **rest}
