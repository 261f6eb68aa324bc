"""The tables, conclusions and figures of docs/studies.md: the paper's studies and the probes, on the bundled suite.

    python -m scripts.study_page              # all, some ten minutes on one core
    python -m scripts.study_page probes       # one or several
    python -m scripts.study_page tables       # none: only draw the figures and write the page from the stored rows

A study's rows are kept in ``docs/studies/NAME.csv``, what its conclusions are made from in ``docs/studies/NAME_*.csv``,
its figure in ``docs/studies/NAME.png``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

import gemma_scope_tl as gs
from gemma_scope_tl.evals.suite import measure_suite
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.studies import (
    binned_by_position,
    bundled_concepts,
    by_domain,
    by_dtype,
    firing_frequencies,
    measure_probes,
    position_edges,
)
from gemma_scope_tl.viz import study_figures
from gemma_scope_tl.viz.figures import save_figure
from scripts import study_claims
from scripts.bundled_results import spread_rows
from scripts.page_tables import table as markdown
from scripts.page_tables import with_tables
from scripts.study_sources import KEYS, Resampled, fidelity_sums, position_sums, source_rows, uniformity_sums

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "studies.md"
FOLDER = ROOT / "docs" / "studies"
MODEL, LAYER, WIDTH = "bundled", 2, 1024
SITES = ("res", "mlp", "att")
CONTEXT, ROWS, DOMAIN_ROWS, UNIFORMITY_ROWS, POSITIONS, PROBE_K = 256, 64, 12, 4, 8, (1, 5, 20)
"""Rows of token ids: in all, of each kind of text, of each kind for uniformity; positions of a row for uniformity."""
PLACES = ((1, 1), (9, 16), (129, 255))
"""First and last positions of the ranges that the page compares, the last of them with the others; BOS is 0."""
Tables = dict[str, pd.DataFrame]
"""The rows of a study under the empty name, and others by the end of their file's name."""


def saes(dtype: str = "float32", **wanted: Any) -> list[Any]:
    """The bundled SAEs with these values of ``site``, ``layer``, ``d_sae`` and ``canonical``."""
    rows = [row for row in select_rows(MODEL) if all(_fits(row, *pair) for pair in wanted.items())]
    return [load_row(row, dtype=dtype) for row in rows]


def _fits(row: Any, name: str, value: Any) -> bool:
    return getattr(row, name) in (value if isinstance(value, tuple) else (value,))


def position(model: Any) -> Tables:
    """Section 4.2: the canonical SAEs of 1,024 latents of one layer."""
    chosen = saes(site=SITES, layer=LAYER, d_sae=WIDTH, canonical=True)
    rows = source_rows(model, CONTEXT, DOMAIN_ROWS)
    edges = sorted({*position_edges(CONTEXT), *(edge for first, last in PLACES for edge in (first, last + 1))})
    table = binned_by_position(model, chosen, rows.tokens, edges)
    return {"": table, "sources": position_sums(model, chosen, rows, PLACES)}


def frequency(model: Any) -> Tables:
    """Section 4.3: all SAEs of one layer."""
    return {"": firing_frequencies(model, saes(site=SITES, layer=LAYER), spread_rows(model, None, CONTEXT, ROWS))}


def domains(model: Any) -> Tables:
    """Section 4.6: the canonical SAEs of 1,024 latents of one layer, on similar numbers of rows of each kind."""
    chosen = saes(site=SITES, layer=LAYER, d_sae=WIDTH, canonical=True)
    rows = source_rows(model, CONTEXT, DOMAIN_ROWS)
    texts = {name: rows.of(name) for name in dict.fromkeys(rows.domains)}
    sums: list[dict[str, Any]] = []
    for name, tokens in texts.items():
        own = [source for domain, source in zip(rows.domains, rows.sources, strict=True) if domain == name]
        sums += fidelity_sums(measure_suite(model, chosen, tokens, progress=False, ablations=()), name, own)
    return {"": by_domain(model, chosen, texts, ablations=()), "sources": pd.DataFrame(sums)}


def precision(model: Any) -> Tables:
    """Section 4.7: all canonical SAEs of 1,024 latents."""

    def load(dtype: str) -> tuple[Any, Any]:
        loaded = model if dtype == "float32" else gs.load_model(MODEL, dtype=dtype)
        return loaded, saes(dtype, site=SITES, d_sae=WIDTH, canonical=True)

    return {"": by_dtype(load, spread_rows(model, None, CONTEXT, ROWS))}


def uniformity(model: Any) -> Tables:
    """Appendix C.3: all SAEs of one layer; intervals resample sources."""
    rows = source_rows(model, CONTEXT, UNIFORMITY_ROWS)
    chosen = saes(site=SITES, layer=LAYER)
    found = measure_suite(model, chosen, rows.tokens, progress=False, ablations=(), uniformity=POSITIONS)
    sums = uniformity_sums(found, rows)
    draws, lines = Resampled(sums), list[dict[str, Any]]()
    for _, part in sums.groupby(["site", "d_sae", "l0"], sort=False):
        value = draws.value(draws.ratio(part, "uniformity", "tokens"))
        columns = {name: part[name].iloc[0] for name in ("release", "id", "site", "layer", "d_sae", "l0")}
        lines.append({**columns, **dict(zip(("uniformity", "uniformity_low", "uniformity_high"), value, strict=True))})
    return {"": pd.DataFrame(lines).sort_values(["site", "layer", "l0"], ignore_index=True), "sources": sums}


def probes(model: Any) -> Tables:
    """Probes: the three residual SAEs of 1,024 latents of one layer."""
    data = bundled_concepts(model.tokenizer)
    found = measure_probes(model, saes(site="res", layer=LAYER, d_sae=WIDTH), data, PROBE_K, batch_size=32)
    table = found.table()
    parts = concepts_by_kind(table)
    single = {name: [name] for names in parts.values() for name in names}
    return {"": table, "contrasts": found.contrasts({**parts, **single})}


def concepts_by_kind(table: pd.DataFrame) -> dict[str, list[str]]:
    """The concepts of rows and those of tokens."""
    names = list(dict.fromkeys(table["concept"]))
    return {
        "Concepts of rows": [name for name in names if not of_tokens(name)],
        "Concepts of tokens": [name for name in names if of_tokens(name)],
    }


def of_tokens(concept: str) -> bool:
    """Whether a concept of the bundled text is a property of tokens rather than rows."""
    return concept.startswith(("code: ", "sentence: "))


def _position(tables: Tables) -> dict[str, str]:
    rows, sums = tables[""], tables["sources"]
    lines: list[list[str]] = []
    for (site, id_), group in rows.groupby(["site", "id"], sort=False):
        for first, last in PLACES:
            part = group[(group["start"] >= first) & (group["stop"] <= last + 1)]
            weight = part["tokens"] / part["tokens"].sum()
            metrics = [f"{(part[name] * weight).sum():.3f}" for name in ("squared_error", "fvu", "delta_loss")]
            lines.append([f"{site} {id_}", f"{first}–{last}" if last > first else str(last), *metrics])
    shown = markdown(["SAE", "positions", "squared error", "FVU", "delta loss"], lines)
    return {"position": shown, "position_claims": study_claims.position_claims(sums, PLACES)}


def _frequency(tables: Tables) -> dict[str, str]:
    first = tables[""].groupby(["site", "id"], sort=False).first().reset_index()
    lines = [
        [f"{r.site} {r.id}", f"{r.l0:.1f}", f"{r.dead:.1%}", f"{r.dense:.1%}", f"{10.0 ** float(r.median):.2%}"]  # type: ignore[arg-type]
        for r in first.itertuples()
    ]
    shown = markdown(["SAE", "L0", "dead", "on more than 10 % of tokens", "median latent"], lines)
    return {"frequency": shown, "frequency_claims": study_claims.frequency_claims(tables[""])}


def _domains(tables: Tables) -> dict[str, str]:
    means: Any = tables[""].groupby(["domain", "site"])[["delta_loss", "fvu"]].mean().unstack()
    order = means["delta_loss"].mean(axis="columns").sort_values().index
    columns = [(metric, site) for site in SITES for metric in ("delta_loss", "fvu")]
    lines = [[str(name), *(f"{means.loc[name, column]:.3f}" for column in columns)] for name in order]
    head = ["text", *(f"{site} {word}" for site in SITES for word in ("delta loss", "FVU"))]
    return {
        "domains": markdown(head, lines),
        "domain_means": study_claims.domain_table(tables["sources"]),
        "domain_claims": study_claims.domain_claims(tables["sources"]),
    }


def _precision(tables: Tables) -> dict[str, str]:
    changed = tables[""][tables[""]["dtype"] == "bfloat16"]
    lines: list[list[str]] = []
    for site, group in changed.groupby("site", sort=False):
        largest = [group[f"{name}_change"].abs().max() for name in ("l0", "fvu", "delta_loss", "loss_clean")]
        lines.append([str(site), *(f"{value:.4f}" for value in largest)])
    shown = markdown(["site", "L0", "FVU", "delta loss", "clean loss"], lines)
    return {"precision": shown, "precision_claims": study_claims.precision_claims(tables[""])}


def _uniformity(tables: Tables) -> dict[str, str]:
    lines = [
        [f"{r.site} {r.id}", f"{r.l0:.1f}", f"{r.uniformity:.3f}", f"{r.uniformity_low:.3f}–{r.uniformity_high:.3f}"]
        for r in tables[""].itertuples()
    ]
    shown = markdown(["SAE", "L0", "uniformity", "95 % interval"], lines)
    return {"uniformity": shown, "uniformity_claims": study_claims.uniformity_claims(tables["sources"])}


def _probes(tables: Tables) -> dict[str, str]:
    rows, contrasts = tables[""], tables["contrasts"]
    parts = concepts_by_kind(rows)
    sparse = rows.dropna(subset=["l0"]).groupby(["id", "features"], sort=False)["l0"].first().unstack()
    l0 = [[f"res {id_}", f"{one.latents:.1f}", f"{one.random:.1f}"] for id_, one in sparse.iterrows()]
    return {
        "probes": study_claims.probe_table(contrasts, rows.groupby("concept", sort=False).first()),
        "probe_l0": markdown(["SAE", "L0", "of the random SAE"], l0),
        "probe_claims": study_claims.probe_claims(contrasts, parts),
        "probe_split": study_claims.probe_split(rows),
    }


class Study(NamedTuple):
    """The functions that run a study, draw it (from ``viz.study_figures``) and show it on the page."""

    run: Callable[[Any], Tables]
    figure: str
    shown: Callable[[Tables], dict[str, str]]
    more: tuple[str, ...] = ()


STUDIES = {
    "position": Study(position, "position_figure", _position, ("sources",)),
    "frequency": Study(frequency, "frequency_figure", _frequency),
    "domains": Study(domains, "domain_figure", _domains, ("sources",)),
    "precision": Study(precision, "precision_figure", _precision),
    "uniformity": Study(uniformity, "uniformity_figure", _uniformity, ("sources",)),
    "probes": Study(probes, "probe_figure", _probes, ("contrasts",)),
}


def file_of(name: str, more: str = "") -> Path:
    """The file of a study's rows, or of another of its tables."""
    return FOLDER / (f"{name}_{more}.csv" if more else f"{name}.csv")


def stored(name: str, more: str = "") -> pd.DataFrame:
    """The stored rows of a study, or another of its tables."""
    return pd.read_csv(file_of(name, more), dtype={"id": str, **dict.fromkeys(KEYS, str)})


def with_all_tables(page: str) -> str:
    """``page`` with new tables; errors are those of :func:`scripts.page_tables.with_tables`."""
    made: dict[str, str] = {}
    for name, study in STUDIES.items():
        made |= study.shown({more: stored(name, more) for more in ("", *study.more)})
    return with_tables(page, made)


def main(names: list[str]) -> None:
    """Run the named studies, or all, and write the figures and the page."""
    model = None
    for name, study in STUDIES.items():
        if not names or name in names:
            model = model or gs.load_model(MODEL)
            for more, found in study.run(model).items():
                text = found.to_csv(index=False, float_format="%.6g", lineterminator="\n")
                write_atomically(file_of(name, more), text)
                print(name, more, len(found), "rows", flush=True)
        elif names != ["tables"]:
            continue
        save_figure(getattr(study_figures, study.figure)(stored(name)), FOLDER / f"{name}.png")
    write_atomically(PAGE, with_all_tables(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1:])
