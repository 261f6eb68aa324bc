"""The tables and figures of docs/studies.md: the paper's studies and the probes, on the bundled suite and its text.

    python -m scripts.study_page              # all, some ten minutes on one core
    python -m scripts.study_page probes       # one or several
    python -m scripts.study_page tables       # none: only write the page's tables from the stored ones

A study's rows are kept in ``docs/studies/NAME.csv``, its figure in ``docs/studies/NAME.png``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

import gemma_scope_tl as gs
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.studies import (
    binned_by_position,
    bundled_concepts,
    by_domain,
    by_dtype,
    firing_frequencies,
    importance_uniformity,
    labelled_texts,
    probe_concepts,
)
from gemma_scope_tl.viz import study_figures
from gemma_scope_tl.viz.figures import save_figure
from scripts.bundled_results import spread_rows
from scripts.page_tables import table as markdown
from scripts.page_tables import with_tables

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "studies.md"
FOLDER = ROOT / "docs" / "studies"
MODEL, LAYER, WIDTH = "bundled", 2, 1024
SITES = ("res", "mlp", "att")
CONTEXT, ROWS, DOMAIN_ROWS, UNIFORMITY_ROWS, POSITIONS, PROBE_K = 256, 64, 12, 32, 8, (1, 5, 20)
PLACES = ((0, 1), (8, 16), (128, 256))
"""Positions of a row whose means the page shows: the first after BOS, some early ones, and the second half."""


def saes(dtype: str = "float32", **wanted: Any) -> list[Any]:
    """The bundled SAEs with these values of ``site``, ``layer``, ``d_sae`` and ``canonical``."""
    rows = [row for row in select_rows(MODEL) if all(_fits(row, *pair) for pair in wanted.items())]
    return [load_row(row, dtype=dtype) for row in rows]


def _fits(row: Any, name: str, value: Any) -> bool:
    return getattr(row, name) in (value if isinstance(value, tuple) else (value,))


def position(model: Any) -> pd.DataFrame:
    """Section 4.2: the canonical SAEs of 1,024 latents of one layer."""
    return binned_by_position(
        model, saes(site=SITES, layer=LAYER, d_sae=WIDTH, canonical=True), spread_rows(model, None, CONTEXT, ROWS)
    )


def frequency(model: Any) -> pd.DataFrame:
    """Section 4.3: all SAEs of one layer."""
    return firing_frequencies(model, saes(site=SITES, layer=LAYER), spread_rows(model, None, CONTEXT, ROWS))


def domains(model: Any) -> pd.DataFrame:
    """Section 4.6: the canonical SAEs of 1,024 latents of one layer, on equally many rows of each kind of text."""
    chosen = saes(site=SITES, layer=LAYER, d_sae=WIDTH, canonical=True)
    return by_domain(model, chosen, labelled_texts(), DOMAIN_ROWS, CONTEXT)


def precision(model: Any) -> pd.DataFrame:
    """Section 4.7: all canonical SAEs of 1,024 latents."""

    def load(dtype: str) -> tuple[Any, Any]:
        loaded = model if dtype == "float32" else gs.load_model(MODEL, dtype=dtype)
        return loaded, saes(dtype, site=SITES, d_sae=WIDTH, canonical=True)

    return by_dtype(load, spread_rows(model, None, CONTEXT, ROWS))


def uniformity(model: Any) -> pd.DataFrame:
    """Appendix C.3: all SAEs of one layer."""
    return importance_uniformity(
        model, saes(site=SITES, layer=LAYER), spread_rows(model, None, CONTEXT, UNIFORMITY_ROWS), POSITIONS
    )


def probes(model: Any) -> pd.DataFrame:
    """Probes: the three residual SAEs of 1,024 latents of one layer."""
    data = bundled_concepts(model.tokenizer)
    return probe_concepts(model, saes(site="res", layer=LAYER, d_sae=WIDTH), data, PROBE_K, batch_size=32)


def _position(rows: pd.DataFrame) -> str:
    lines: list[list[str]] = []
    for (site, id_), group in rows.groupby(["site", "id"], sort=False):
        for start, stop in PLACES:
            part = group[(group["start"] > start) & (group["start"] <= stop)]
            metrics = [f"{part[name].mean():.3f}" for name in ("squared_error", "fvu", "delta_loss")]
            lines.append([f"{site} {id_}", f"{start + 1}–{stop}" if stop - start > 1 else str(stop), *metrics])
    return markdown(["SAE", "positions", "squared error", "FVU", "delta loss"], lines)


def _frequency(rows: pd.DataFrame) -> str:
    first = rows.groupby(["site", "id"], sort=False).first().reset_index()
    lines = [
        [f"{r.site} {r.id}", f"{r.l0:.1f}", f"{r.dead:.1%}", f"{r.dense:.1%}", f"{10.0**r.median:.2%}"]
        for r in first.itertuples()
    ]
    return markdown(["SAE", "L0", "dead", "on more than 10 % of tokens", "median latent"], lines)


def _domains(rows: pd.DataFrame) -> str:
    means = rows.groupby(["domain", "site"])[["delta_loss", "fvu"]].mean().unstack()
    order = means["delta_loss"].mean(axis=1).sort_values().index
    columns = [(metric, site) for site in SITES for metric in ("delta_loss", "fvu")]
    lines = [[str(name), *(f"{means.loc[name, column]:.3f}" for column in columns)] for name in order]
    head = ["text", *(f"{site} {word}" for site in SITES for word in ("delta loss", "FVU"))]
    return markdown(head, lines)


def _precision(rows: pd.DataFrame) -> str:
    changed = rows[rows["dtype"] == "bfloat16"]
    lines: list[list[str]] = []
    for site, group in changed.groupby("site", sort=False):
        largest = [group[f"{name}_change"].abs().max() for name in ("l0", "fvu", "delta_loss", "loss_clean")]
        lines.append([str(site), *(f"{value:.4f}" for value in largest)])
    return markdown(["site", "L0", "FVU", "delta loss", "clean loss"], lines)


def _uniformity(rows: pd.DataFrame) -> str:
    lines = [
        [f"{r.site} {r.id}", f"{r.l0:.1f}", f"{r.uniformity:.3f}", f"{r.uniformity_low:.3f}–{r.uniformity_high:.3f}"]
        for r in rows.itertuples()
    ]
    return markdown(["SAE", "L0", "uniformity", "95 % interval"], lines)


def _probes(rows: pd.DataFrame) -> str:
    columns = [(kind, k) for k in PROBE_K for kind in ("latents", "random")] + [("dense", 0)]
    head = ["concept", *(f"{kind}, k = {k}" if k else kind for kind, k in columns)]
    means = rows.groupby(["concept", "features", "k"])["auroc"].mean()
    lines: list[list[str]] = []
    for concept in dict.fromkeys(rows["concept"]):
        lines.append([str(concept), *(f"{means[concept, kind, k]:.3f}" for kind, k in columns)])
    for name, tokens in (("mean of rows", False), ("mean of tokens", True)):
        part = rows[rows["concept"].map(of_tokens) == tokens].groupby(["features", "k"])["auroc"].mean()
        lines.append([f"**{name}**", *(f"**{part[kind, k]:.3f}**" for kind, k in columns)])
    return markdown(head, lines)


def of_tokens(concept: str) -> bool:
    """Whether a concept of the bundled text is a property of tokens rather than rows."""
    return concept.startswith(("code: ", "sentence: "))


class Study(NamedTuple):
    """The functions that run a study, draw it (from ``viz.study_figures``) and show it on the page."""

    run: Callable[[Any], pd.DataFrame]
    figure: str
    table: Callable[[pd.DataFrame], str]


STUDIES = {
    "position": Study(position, "position_figure", _position),
    "frequency": Study(frequency, "frequency_figure", _frequency),
    "domains": Study(domains, "domain_figure", _domains),
    "precision": Study(precision, "precision_figure", _precision),
    "uniformity": Study(uniformity, "uniformity_figure", _uniformity),
    "probes": Study(probes, "probe_figure", _probes),
}


def stored(name: str) -> pd.DataFrame:
    """The stored rows of a study."""
    return pd.read_csv(FOLDER / f"{name}.csv", dtype={"id": str})


def with_all_tables(page: str) -> str:
    """``page`` with new tables; errors are those of :func:`scripts.page_tables.with_tables`."""
    return with_tables(page, {name: study.table(stored(name)) for name, study in STUDIES.items()})


def main(names: list[str]) -> None:
    """Run the named studies, or all, and write the figures and the page."""
    model = None
    for name, study in STUDIES.items():
        if names and name not in names:
            continue
        model = model or gs.load_model(MODEL)
        found = study.run(model)
        text = found.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        write_atomically(FOLDER / f"{name}.csv", text)
        save_figure(getattr(study_figures, study.figure)(stored(name)), FOLDER / f"{name}.png")
        print(name, len(found), "rows", flush=True)
    write_atomically(PAGE, with_all_tables(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1:])
