"""Lookup of registry rows, by release and id, or by model, site, layer, width and L0.

Only the registry files that a call needs are parsed, each of them once.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import cast

from gemma_scope_tl.errors import RegistryError, checked_text, unknown_name
from gemma_scope_tl.families import family_of_model, plain_name
from gemma_scope_tl.registry.choice import CANONICAL, checked_number, pick
from gemma_scope_tl.registry.hints import closest_numbers, folder_hint, nearest_ids, no_canonical_hint
from gemma_scope_tl.registry.index import forget_indexes, indexed
from gemma_scope_tl.registry.locate import forget_packages, is_registered, release_files
from gemma_scope_tl.registry.plain_yaml import load_yaml, read_text
from gemma_scope_tl.registry.schema import LABELS, SERIES, ReleaseFile, SAERow, read_release
from gemma_scope_tl.registry.widths import label_of
from gemma_scope_tl.sites import LAYERED_SITES, known_site


@dataclass(frozen=True)
class Header:
    """The fields of a registry file that precede its rows."""

    path: Path
    release: str
    canonical_release: str | None
    model: str
    series: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The name of the release, followed by its ``-canonical`` name if it has one."""
        return (self.release, self.canonical_release) if self.canonical_release else (self.release,)


def releases(canonical: bool = False) -> list[str]:
    """Names of all releases in natural order; with ``canonical``, SAELens's ``-canonical`` names too."""
    return [name for h in headers() for name in (h.names if canonical else h.names[:1])]


def load_release(name: str) -> ReleaseFile:
    """The content of the registry file of a release, by its name or its ``-canonical`` name. It is parsed once.

    Raises:
        UnknownNameError: with the five nearest names.
        RegistryError: with every problem of the file.
    """
    return _read(header_of(name).path)


def resolve(release: str, id: str) -> SAERow:
    """The row with SAELens's release and id strings. No weights are loaded.

    Args:
        release: ``gemma-scope-2b-pt-res`` or ``gemma-scope-2b-pt-res-canonical``.
        id: ``layer_20/width_16k/average_l0_71``, or ``layer_20/width_16k/canonical``; both in either release.

    Raises:
        UnknownNameError: with the five nearest names.

    >>> resolve("gemma-scope-2b-pt-res", "layer_20/width_16k/canonical").l0
    71.0
    """
    by_id = _by_id(header_of(release).path)
    id = checked_text(f"id in {release}", id, by_id)
    try:
        return by_id[id]
    except KeyError:
        raise unknown_name(f"id in {release}", id, nearest_ids(id, by_id), no_canonical_hint(id, by_id)) from None


def find(
    model: str,
    site: str,
    layer: int | None,
    width: str | int | None = None,
    l0: float | str = CANONICAL,
    *,
    affine: bool | None = None,
    seed: int | None = None,
    series: str | None = None,
    release: str | None = None,
) -> SAERow:
    """The row of one SAE, by its place in a model, width and L0.

    Args:
        model: ``gemma-2-2b`` or ``google/gemma-2-2b``; ``gemma-3-1b-pt`` is ``gemma-3-1b``. An instruction-tuned model
            has only SAEs trained on itself.
        site: a name of the site table, or a kind of coders of several layers (``"crosscoder"``, ``"clt"``).
        layer: counts from 0; None for the embedding, and for coders of several layers.
        width: ``"16k"``, or the number of latents; None for ``"16k"``.
        l0: ``"canonical"`` (SAELens's choice, nearest to 100), a label (``"small"``, ``"medium"`` or ``"big"``), a
            number (exactly that L0), or ``"closest:50"`` (the sparser of two at the same distance). Where no SAE is
            canonical but only one L0 exists, ``"canonical"`` is that one. Rows that are marked ``unverified`` are not
            counted for that, and ``"closest:50"`` takes one only where no other has an L0 from 25 to 100.
        affine: True for a transcoder with a skip connection, False for one without. None for either; if there are
            both, one has to be chosen.
        seed: the seed of a further training run of the same SAE; None for the SAE whose name has no seed.
        series: ``"subset"`` (a few layers, with more widths and L0s) or ``"all"`` (all layers), where a model has
            both. None for either. If an SAE of each series fits, it is the one of the subset.
        release: the only release to search.

    Raises:
        UnknownNameError: for a name or a place that does not exist; names valid ones.
        RegistryError: when several SAEs fit, as when two releases have such an SAE; names them and what chooses one.
    """
    model = checked_model(model)
    known_site(site)
    layer = None if layer is None else checked_number("layer", layer, least=None)
    seed = None if seed is None else checked_number("seed", seed)
    rows = [row for header in releases_of(model, release, series) for row in rows_of(header)]
    within = f"{release or model}{f' (series {series})' if series else ''}"
    found = _at_place(rows, within, _base_hint(model), (site, layer, width))
    return pick(found, l0, affine, seed, _label_hint(rows, found[0], l0))


def _at_place(
    rows: list[SAERow], within: str, hint: str, place: tuple[str, int | None, str | int | None]
) -> list[SAERow]:
    """The rows of a site, layer and width among those of ``within``; an error names the nearest that exist."""
    site, layer, width = place
    label = label_of(width)
    at_site = [row for row in rows if row.site == site]
    if not at_site:
        raise unknown_name(f"site of {within}", site, sorted({row.site for row in rows}), hint)
    at_layer = [row for row in at_site if row.layer == layer]
    if not at_layer:
        layers = closest_numbers(layer or 0, {row.layer for row in at_site if row.layer is not None})
        once = f"A {site} spans several layers" if site in LAYERED_SITES else f"The {site} exists once"
        hint = hint if layers else f"{once}: layer=None."
        raise unknown_name(f"layer of {within} at site {site}", layer, map(str, layers or [None]), hint)
    found = [row for row in at_layer if label in (row.width, str(row.d_sae))]
    if not found:
        where = site if layer is None else f"{site} layer {layer}"
        widths = [row.width for row in sorted(at_layer, key=lambda row: row.d_sae)]
        elsewhere = {row.layer for row in at_site if row.width == label and row.layer is not None}
        if width is None:
            hint = f"{label!r} is the default: give one of these as width=. {hint}"
        elif elsewhere:
            shown = ", ".join(map(str, closest_numbers(layer or 0, elsewhere)))
            hint = f"Layers with {label}, the nearest first: {shown}. {hint}".strip()
        raise unknown_name(f"width of {within} at {where}", label, dict.fromkeys(widths), hint)
    return found


def releases_of(model: str, release: str | None = None, series: str | None = None) -> list[Header]:
    """The headers of the releases of a model, or of one of them, or of one series.

    Raises:
        UnknownNameError: when none remains; names those that exist.
    """
    if series not in (None, *SERIES):
        raise unknown_name("series", series, SERIES)
    chosen = [h for h in headers() if h.model == model]
    if release:
        named = header_of(release)
        valid, chosen = chosen, [h for h in chosen if h == named]
        if not chosen:
            raise unknown_name(f"release of {model}", release, [name for h in valid for name in h.names])
    fitting = [h for h in chosen if series in (None, h.series)]
    if not fitting:
        known = sorted({h.series for h in chosen if h.series})
        hint = "" if known else "Its SAEs are not in series: omit series=."
        raise unknown_name(f"series of {release or model}", series, known, hint)
    return fitting


def rows_of(header: Header) -> tuple[SAERow, ...]:
    """The rows of a release, from the index if the file is in it."""
    return _rows(header.path)


def headers() -> tuple[Header, ...]:
    """The headers of all registry files, in natural order of their names.

    A file of ``register_release`` that was deleted or broken since is left out, with a warning.

    Raises:
        RegistryError: when two files have the same name of a release, or another file is not a registry file.
    """
    return _headers(release_files())


def header_of(release: str) -> Header:
    """The header of a release, by its name or its ``-canonical`` name.

    Raises:
        UnknownNameError: with the five nearest names.
    """
    for header in headers():
        if release in header.names:
            return header
    raise unknown_name("release", release, releases(canonical=True), "gemma_scope_tl.list_saes() lists all.")


def checked_model(model: str) -> str:
    """The registry's name of a model, without the publisher (``google/``). The model must have SAEs trained on it.

    Raises:
        UnknownNameError: with the nearest names. For an instruction-tuned model it also names the releases of the base
            model, and for a release or a folder of SAEs it says how to load from it.
    """
    known = dict.fromkeys(h.model for h in headers())
    name = plain_name(checked_text("model", model, known))
    if name not in known:
        raise unknown_name("model", model, known, _release_hint(model) or folder_hint(model) or _base_hint(name))
    return name


def clear_cache() -> None:
    """Clear the cache, so that changed files are read again. Registered files stay registered."""
    forget_packages()
    _headers.cache_clear()
    forget_indexes()
    _read.cache_clear()
    _rows.cache_clear()
    _by_id.cache_clear()


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts ``layer_2`` before ``layer_10``.

    >>> sorted(["layer_10", "layer_2"], key=natural_key)
    ['layer_2', 'layer_10']
    """
    runs = ("".join(run) for _, run in itertools.groupby(name, key=str.isdecimal))
    return [(int(run), "") if run.isdecimal() else (-1, run) for run in runs]


@lru_cache(maxsize=8)
def _headers(files: tuple[Path, ...]) -> tuple[Header, ...]:
    read = [header for path in files if (header := _usable_header(path)) is not None]
    found = sorted(read, key=lambda h: natural_key(h.release))
    clashes = clashing_names(found)
    if clashes:
        raise RegistryError(" ".join(clashes) + " Rename one.")
    return tuple(found)


_left_out: set[Path] = set()  # registered files about which a warning was given


def _usable_header(path: Path) -> Header | None:
    """The header of a registry file; None, with one warning, for a registered file that cannot be used any more.

    Registered files belong to a process that may outlive them, and must not disable all other releases. They are read
    whole, so that their rows are sound wherever their headers are.
    """
    if not is_registered(path):
        return read_header(path)
    try:
        if indexed(path) is None:
            _read(path)
        header = read_header(path)
    except RegistryError as error:
        if path not in _left_out:
            _left_out.add(path)
            what = "A registered release is left out: register its file again, or call unregister_release."
            warnings.warn(f"{what} {error}", stacklevel=2)
        return None
    _left_out.discard(path)
    return header


def clashing_names(found: Iterable[Header]) -> list[str]:
    """A sentence for every name that two files have, with both files."""
    owner: dict[str, Path] = {}
    clashes: list[str] = []
    for header in found:
        for name in header.names:
            first = owner.setdefault(name, header.path)
            if first != header.path:
                clashes.append(f"Two registry files claim {name!r}: {first} and {header.path}.")
    return clashes


def read_header(path: Path) -> Header:
    """The header of a registry file. The whole file is parsed only if its rows do not come last.

    Raises:
        RegistryError: when it is not a registry file.
    """
    if (entry := indexed(path)) is not None:
        known = entry.header
        return Header(path, known["release"], known["canonical_release"], known["model"], known["series"])
    try:
        head = load_yaml(read_text(path).partition("\nsaes:")[0], str(path))
    except RegistryError:
        head = None
    if isinstance(head, dict):
        fields = cast("dict[str, object]", head)
        release, model, canonical = fields.get("release"), fields.get("model"), fields.get("canonical_release")
        series = fields.get("series")
        if (
            release == path.stem
            and isinstance(model, str)
            and isinstance(canonical, str | None)
            and series in (None, *SERIES)
        ):
            return Header(path, path.stem, canonical, model, cast("str | None", series))
    whole = _read(path)
    return Header(path, whole.release, whole.canonical_release, whole.model, whole.series)


@cache
def _read(path: Path) -> ReleaseFile:
    return read_release(path)


@cache
def _rows(path: Path) -> tuple[SAERow, ...]:
    entry = indexed(path)
    return _read(path).rows if entry is None else entry.rows()


@cache
def _by_id(path: Path) -> dict[str, SAERow]:
    rows = _rows(path)
    return {row.id: row for row in rows} | {row.canonical_id: row for row in rows if row.canonical_id}


def _base_hint(model: str) -> str:
    """The hint for an instruction-tuned model: the releases of its base model, which are never used as a substitute."""
    base = model.removesuffix(family_of_model(model).tuned_suffix)
    found = [h.release for h in headers() if h.model == base]
    if base == model or not found:
        return ""
    return f"To use the SAEs of the base model, give model={base!r}: {', '.join(found)}."


def _label_hint(rows: Iterable[SAERow], wanted: SAERow, l0: float | str) -> str:
    """The hint for a label that a layer lacks: the nearest layers that have it at the same site and width."""
    place = (wanted.site, wanted.width, l0)
    layers = {row.layer for row in rows if row.layer is not None and (row.site, row.width, row.label) == place}
    if l0 not in LABELS or not layers or wanted.layer is None:
        return ""
    return f"Layers with it, the nearest first: {', '.join(map(str, closest_numbers(wanted.layer, layers)))}."


def _release_hint(name: str) -> str:
    """The hint for the name of a release given as a model."""
    header = next((h for h in headers() if name in h.names), None)
    if header is None:
        return ""
    return (
        f"This is a release, of SAEs of {header.model}: list_saes(release={name!r}) lists them, "
        f"JumpReLUSAE.from_pretrained({name!r}, id) loads one, "
        f"load_suite({header.model!r}, ..., release={name!r}) loads several."
    )
