"""The table of all SAEs. pandas is imported only when the table is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gemma_scope_tl.errors import RegistryError, checked_text, unknown_name
from gemma_scope_tl.registry.catalog import checked_model, header_of, headers, rows_of
from gemma_scope_tl.registry.choice import checked_affine, checked_number, several
from gemma_scope_tl.registry.locate import BUNDLED_DATA, bundle_folder
from gemma_scope_tl.registry.schema import LABELS, SERIES, SAERow
from gemma_scope_tl.registry.widths import label_of
from gemma_scope_tl.sites import LAYERED_SITES, SITES, known_site

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

COLUMNS = {
    "release": "string",
    "id": "string",
    "model": "string",
    "site": "string",
    "layer": "Int64",
    "width": "string",
    "d_sae": "int64",
    "d_in": "int64",
    "l0": "float64",
    "canonical": "bool",
    "canonical_id": "string",
    "neuronpedia": "string",
    "repo": "string",
    "path": "string",
    "format": "string",
    "revision": "string",
    "sha256": "string",
    "note": "string",
    "neuronpedia_warning": "string",
    "unverified": "bool",
    "label": "string",
    "affine": "boolean",
    "seed": "Int64",
    "series": "string",
    "layers": "object",
}
"""The columns of the table and their dtypes, which an empty table has too.

``layers`` has a tuple for each coder of several layers, and None for others.
"""

METRICS = {
    "l0_measured": "float64",
    **{
        name: "float64"
        for metric in ("fvu", "delta_loss", "loss_recovered", "kl")
        for name in (metric, f"{metric}_low", f"{metric}_high")
    },
    "loss_clean": "float64",
    "loss_spliced": "float64",
    "dead": "float64",
    "dense": "float64",
    "tokens": "Int64",
}
"""Columns that ``with_metrics`` adds, from the results in :data:`RESULTS`."""
_DIGEST = "digest"
RESULTS = BUNDLED_DATA / "results"
"""Folder with ``<release>.csv`` for each release that was measured, and the configuration of the measurement."""


def list_saes(
    model: str | Iterable[str] | None = None,
    site: str | Iterable[str] | None = None,
    layer: int | Iterable[int] | None = None,
    width: str | int | Iterable[str | int] | None = None,
    release: str | Iterable[str] | None = None,
    pattern: str | None = None,
    *,
    label: str | Iterable[str] | None = None,
    affine: bool | None = None,
    seed: int | Iterable[int] | None = None,
    series: str | None = None,
    with_metrics: bool = False,
) -> pd.DataFrame:
    """A table with one row per SAE that meets every condition, ordered by release, layer, site, width and L0.

    Args and errors are those of :func:`select_rows`, and:
        with_metrics: add the measured metrics that come with the package (:data:`METRICS`). They are missing where an
            SAE was not measured or its weights have changed since (results are found by the sha256 of the weights).

    Returns:
        A table with the columns of :data:`COLUMNS`. ``canonical`` marks the rows that have a canonical id as well;
        ``l0`` is from the registry, ``l0_measured`` from the results. If the conditions are valid and no SAE meets
        them, the table is empty and has the same columns.

    Raises:
        RegistryError: for a file of results that cannot be read, with ``with_metrics``.
    """
    rows = select_rows(
        model, site, layer, width, release, pattern, label=label, affine=affine, seed=seed, series=series
    )
    table = _table(rows)
    return _with_metrics(table, [row.digest for row in rows]) if with_metrics else table


def select_rows(
    model: str | Iterable[str] | None = None,
    site: str | Iterable[str] | None = None,
    layer: int | Iterable[int] | None = None,
    width: str | int | Iterable[str | int] | None = None,
    release: str | Iterable[str] | None = None,
    pattern: str | None = None,
    *,
    label: str | Iterable[str] | None = None,
    affine: bool | None = None,
    seed: int | Iterable[int] | None = None,
    series: str | None = None,
) -> list[SAERow]:
    """The registry rows that meet every condition, ordered by release, layer, site, width and L0. pandas is not needed.

    Args:
        model: a name such as ``gemma-2-2b``, or several.
        site: a name of the site table or a kind of coders of several layers (``crosscoder``, ``clt``), or several.
        layer: an index from 0, or several. The embedding and coders of several layers have no layer.
        width: ``"16k"`` or the number of latents, or several.
        release: a name, or several; a ``-canonical`` name selects only canonical rows.
        pattern: a glob over ``release/id`` or ``id``, such as ``*layer_20/width_16k*``. Canonical names match too.
        label: ``small``, ``medium`` or ``big``, or several.
        affine: whether transcoders, also cross-layer ones, have a skip connection. SAEs have none, and are not affine.
        seed: the seed of further training runs, or several.
        series: ``subset`` or ``all``; releases that are not divided into series are left out.

    Raises:
        UnknownNameError: for a model, site, width, release, label or series that does not exist; with the nearest.
    """
    models = None if model is None else {checked_model(name) for name in several(model)}
    sites = None if site is None else {known_site(name) for name in several(site)}
    layers = None if layer is None else {checked_number("layer", number) for number in several(layer)}
    names = None if release is None else set(several(release))
    for name in names or ():
        header_of(name)
    affine = checked_affine(affine)
    if pattern is not None:
        pattern = checked_text("pattern", pattern, ["*layer_20/width_16k*"])
    labels = None if label is None else {_one_of("label", name, LABELS) for name in several(label)}
    seeds = None if seed is None else {checked_number("seed", number) for number in several(seed)}
    wanted = None if series is None else _one_of("series", series, SERIES)
    rows = _of_releases(models, names, wanted)
    widths = None if width is None else _checked_widths(several(width), (row for _, row in rows))
    fitting = [
        row
        for canonical_release, row in rows
        if (sites is None or row.site in sites)
        and (layers is None or row.layer in layers)
        and (widths is None or row.width in widths)
        and (labels is None or row.label in labels)
        and affine in (None, bool(row.affine))
        and (seeds is None or row.seed in seeds)
        and (pattern is None or _matches(row, canonical_release, pattern))
    ]
    return sorted(fitting, key=_order())


def of_one_layer(rows: Iterable[SAERow], what: str) -> list[SAERow]:
    """The rows without those of coders that span several layers, for code that does not take such coders.

    Args:
        rows: selected rows.
        what: what takes rows of one layer only, for the message.

    Raises:
        RegistryError: when there are rows, and all of them span several layers.
    """
    selected = list(rows)
    kept = [row for row in selected if row.layers is None]
    if selected and not kept:
        kinds = " and ".join(sorted({f"{row.site}s" for row in selected}))
        raise RegistryError(f"{what} takes coders of one layer; only {kinds}, which span several, were selected.")
    return kept


def _of_releases(
    models: set[str] | None, names: set[str] | None, series: str | None
) -> list[tuple[str | None, SAERow]]:
    """The rows of releases of these models, names and series, each with the release's second name."""
    rows: list[tuple[str | None, SAERow]] = []
    for header in headers():
        of_model = models is None or header.model in models
        if of_model and (names is None or names & set(header.names)) and series in (None, header.series):
            only_canonical = names is not None and header.release not in names
            whole = rows_of(header)
            rows += [(header.canonical_release, row) for row in whole if row.canonical or not only_canonical]
    return rows


def _order() -> Callable[[SAERow], tuple[int, int, int, int, float, str]]:
    order = {header.release: i for i, header in enumerate(headers())}
    sites = {name: i for i, name in enumerate([*SITES, *LAYERED_SITES])}

    def key(row: SAERow) -> tuple[int, int, int, int, float, str]:
        layer = -1 if row.layer is None else row.layer
        return order[row.release], layer, sites[row.site], row.d_sae, row.l0 or 0.0, row.id

    return key


def _table(rows: Sequence[SAERow]) -> pd.DataFrame:
    import pandas as pd

    columns = {
        name: pd.Series([getattr(row, name) for row in rows], dtype=dtype)  # pyright: ignore
        for name, dtype in COLUMNS.items()
    }
    return pd.DataFrame(columns)


def _with_metrics(table: pd.DataFrame, digests: Sequence[str | None]) -> pd.DataFrame:
    """The table with the results of the same weights, whose files name them by :attr:`SAERow.digest` as ``sha256``."""
    import pandas as pd

    keys = ["release", "id", _DIGEST]
    empty = pd.DataFrame(
        {name: pd.Series(dtype=dtype) for name, dtype in {**dict.fromkeys(keys, "string"), **METRICS}.items()}
    )  # pyright: ignore
    owners = table[["release", "repo"]].drop_duplicates().itertuples(index=False)
    files = [results_folder(str(repo)) / f"{release}.csv" for release, repo in owners]
    frames = [empty, *(_results(path) for path in files if path.is_file())]
    measured = pd.concat([frame[[*keys, *METRICS]] for frame in frames if len(frame)] or [empty])
    named = table.assign(**{_DIGEST: pd.array(list(digests), dtype="string")})
    joined = named.merge(measured, on=keys, how="left", validate="one_to_one").drop(columns=_DIGEST)
    return joined.astype({**COLUMNS, **METRICS})  # pyright: ignore


def results_folder(repo: str) -> Path:
    """The folder of the results of a repository's releases: :data:`RESULTS`, but a bundled model may have its own."""
    bundle = bundle_folder(repo)
    return RESULTS if bundle in (None, BUNDLED_DATA) else bundle / RESULTS.name


def _results(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys(("release", "id", "sha256"), "string"))
        found = frame.rename(columns={"l0": "l0_measured", "sha256": _DIGEST})
        return found.astype(METRICS)  # pyright: ignore
    except OSError as error:
        raise RegistryError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    except (ValueError, KeyError) as error:  # pandas' parser errors are ValueErrors
        raise RegistryError(f"{path} does not hold results: {error} Install the package again.") from error


def _matches(row: SAERow, canonical_release: str | None, pattern: str) -> bool:
    names = [row.id, f"{row.release}/{row.id}"]
    if row.canonical_id:
        owners = [row.release, canonical_release] if canonical_release else [row.release]
        names += [row.canonical_id, *(f"{owner}/{row.canonical_id}" for owner in owners)]
    return any(fnmatchcase(name, pattern) for name in names)


def _one_of(what: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise unknown_name(what, name, known)
    return name


def _checked_widths(widths: Iterable[str | int], rows: Iterable[SAERow]) -> set[str]:
    """The labels of ``widths``. A width without a row among ``rows`` is valid if another release has it."""
    labels = {label_of(width) for width in widths}
    known = {row.width for row in rows}
    if not labels <= known:
        sizes = {row.width: row.d_sae for header in headers() for row in rows_of(header)}
        for label in sorted(labels - set(sizes)):
            raise unknown_name("width", label, sorted(sizes, key=sizes.__getitem__))
    return labels
