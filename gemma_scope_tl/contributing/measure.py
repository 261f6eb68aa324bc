"""The last check of a release: the L0 of some of its SAEs on held-out text, compared with that of their rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from gemma_scope_tl.contributing.check import Finding
from gemma_scope_tl.contributing.repositories import is_remote
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.registry.locate import HELD_OUT_TEXT, is_bundled
from gemma_scope_tl.registry.schema import SAERow

if TYPE_CHECKING:
    import torch

    from gemma_scope_tl.model.hooked import GemmaModel

TOLERANCE = 0.25
"""Tolerated difference between a measured L0 and the row's, as a share of the row's. :func:`tolerated` adds 1 to it,
for rounding and for the sparsest SAEs.

On new text the L0s of the released SAEs differ from their labels by about a tenth; a wrong site, layer or scale of the
input changes the L0 far more.
"""
CONTEXT, ROWS, BATCH = 256, 16, 2  # at a width of a million a batch of two rows has 2 GB of latents


def measure_l0(
    rows: Sequence[SAERow],
    count: int,
    model_path: str | None = None,
    remote: bool = False,
    progress: bool = False,
    *,
    backend: str = "bridge",
    device: str | None = None,
    dtype: str = "float32",
) -> list[Finding]:
    """Run ``count`` SAEs, spread evenly over the rows, on 4,080 tokens of the bundled held-out text (EOS left out).

    Args:
        rows: the rows of one release.
        count: number of SAEs to run; 0 runs none.
        model_path: folder or name of the model; not needed for SAEs of a bundled model.
        remote: download SAEs that are on the Hub.
        progress: show a progress bar on standard error.
        backend, device, dtype: as for ``load_model``; the SAEs have the same dtype.

    Returns:
        A finding for each SAE that was run or could not be run. For a row without an L0, the text states the measured
        L0.
    """
    chosen = spread([row for row in rows if row.layers is None], count)
    if not chosen:
        several = spread(rows, count)
        return [Finding("l0", row.id, None, f"a {row.site} spans several layers and is not run") for row in several]
    if not remote and is_remote(chosen[0].repo):
        return [Finding("l0", "", False, f"The SAEs to run are in {chosen[0].repo} on the Hub: give --remote.")]
    if model_path is None and not is_bundled(chosen[0].model):
        text = f"{chosen[0].model} is not at hand: give --model."
        return [Finding("l0", "", False, text)]
    from gemma_scope_tl.model.loading import load_model
    from gemma_scope_tl.sae.loading import load_row

    loaded: list[tuple[SAERow, Any]] = []
    findings: list[Finding] = []
    try:
        model = load_model(model_path or chosen[0].model, backend=backend, device=device, dtype=dtype)
    except GemmaScopeError as error:
        return [Finding("l0", "", False, str(error))]
    for row in chosen:
        try:
            loaded.append((row, load_row(row, device=model.cfg.device, dtype=dtype)))
        except GemmaScopeError as error:
            findings.append(Finding("l0", row.id, False, str(error)))
    measured = l0_of(model, [sae for _, sae in loaded], held_out_tokens(model), progress)
    return findings + [_compared(row, l0) for (row, _), l0 in zip(loaded, measured, strict=True)]


def results_l0(rows: Sequence[SAERow], results: str | Path) -> list[Finding]:
    """Compare the L0 of each row with the measured one in a table that ``evaluate`` returned.

    Args:
        rows: the rows of one release.
        results: a ``.csv``, ``.json`` (a list of rows) or ``.parquet`` file with columns ``release``, ``id``, ``l0``.

    Returns:
        A finding per row: not checked if the table lacks the row, and failed if it has several L0s of the row. If the
        table has none of the rows, one failed finding for all of them.

    Raises:
        GemmaScopeError: the file cannot be read or lacks a column.
    """
    measured: dict[tuple[str, str], list[float]] = {}
    for release, id_, l0 in _results(Path(results)):
        measured.setdefault((release, id_), []).append(l0)
    if not any((row.release, row.id) in measured for row in rows):
        return [Finding("l0", "", False, _none_fits(rows, results, measured))]
    findings: list[Finding] = []
    for row in rows:
        found = measured.get((row.release, row.id), [])
        if not found:
            findings.append(Finding("l0", row.id, None, "not in the results"))
        elif len(set(found)) > 1:
            findings.append(Finding("l0", row.id, False, f"the results hold {len(found)} different L0s"))
        else:
            findings.append(_compared(row, found[0]))
    return findings


def _none_fits(rows: Sequence[SAERow], results: str | Path, measured: Collection[tuple[str, str]]) -> str:
    """The sentence for a table that has none of the rows, with examples of both."""
    here = f"{rows[0].release}/{rows[0].id}" if rows else "no valid row"
    there = next((f"{release}/{id_}" for release, id_ in measured), "no row")
    return (
        f"{results} has none of the {len(rows)} SAEs: the file names {here}, the table {there}. Give the table that "
        "`gemma-scope eval --release RELEASE --out results.csv` wrote for this release, with the same names and ids."
    )


def _results(path: Path) -> list[tuple[str, str, float]]:
    import pandas as pd

    readers: dict[str, Any] = {".csv": pd.read_csv, ".json": pd.read_json, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise unknown_name("format of results", path.suffix, readers)
    try:
        table = readers[path.suffix](path)
        return [(str(r), str(i), float(v)) for r, i, v in zip(table["release"], table["id"], table["l0"], strict=True)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GemmaScopeError(f"Cannot read results with release, id and l0 from {path}: {error!r}") from error


def l0_of(
    model: GemmaModel, saes: Sequence[Any], tokens: torch.Tensor, progress: bool = False
) -> list[float | GemmaScopeError]:
    """Mean number of active latents of each SAE over the ordinary tokens, from one pass of the model for all.

    The result equals the ``l0`` of ``evaluate``, without passes for the losses. For an SAE that does not fit the model
    the list contains the error.
    """
    from gemma_scope_tl.evals.accumulators import Mean
    from gemma_scope_tl.evals.metrics import l0
    from gemma_scope_tl.model.read import read_places
    from gemma_scope_tl.sae.access import locate
    from gemma_scope_tl.sae.choices import bring
    from gemma_scope_tl.sites import Place
    from gemma_scope_tl.text.tokens import special_mask, special_token_ids

    means = [Mean() for _ in saes]
    places: dict[int, Place] = {}
    errors: dict[int, GemmaScopeError] = {}
    for number, sae in enumerate(saes):
        try:
            site, layer = locate(sae, model.family)
            site.check_layer(layer, model.dims)
            places[number] = Place(site.name, layer)
        except GemmaScopeError as error:
            errors[number] = error
    batches = tokens.split(BATCH)
    for batch in track(batches, "measuring L0", disable=not progress, transient=True, console=Console(stderr=True)):
        tensors = read_places(model, batch.to(model.cfg.device), places.values())
        ordinary = ~special_mask(batch, special_token_ids(model.tokenizer))
        for number in places.keys() - errors.keys():
            try:
                x = tensors[places[number]][ordinary]
                means[number].update(l0(bring(saes[number], x.device).encode(x)))
            except GemmaScopeError as error:
                errors[number] = error
    return [errors.get(number, mean.value) for number, mean in enumerate(means)]


def held_out_tokens(model: GemmaModel) -> torch.Tensor:
    """Token ids ``[16, 256]`` of held-out text; each row begins with BOS."""
    from gemma_scope_tl.text.rows import pack_texts

    texts = [json.loads(line)["text"] for line in HELD_OUT_TEXT.read_text(encoding="utf-8").splitlines()]
    return pack_texts(model.tokenizer, texts[:: max(len(texts) // ROWS, 1)], CONTEXT)[:ROWS]


def spread(rows: Sequence[SAERow], count: int) -> list[SAERow]:
    """``count`` evenly spaced rows, beginning with the first; all rows if there are fewer."""
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def tolerated(l0: float) -> float:
    """The tolerated difference between a measured L0 and ``l0``.

    >>> tolerated(100)
    26.0
    """
    return 1 + TOLERANCE * l0


def _compared(row: SAERow, measured: float | GemmaScopeError) -> Finding:
    if isinstance(measured, GemmaScopeError):
        return Finding("l0", row.id, False, str(measured))
    if row.l0 is None:
        return Finding("l0", row.id, None, f"measured {measured:.1f}, the row has none")
    ok, limit = abs(measured - row.l0) <= tolerated(row.l0), tolerated(row.l0)
    text = f"measured {measured:.1f}, the row says {row.l0:g}" + ("" if ok else f"; {limit:g} off is tolerated.")
    return Finding("l0", row.id, ok, text)
