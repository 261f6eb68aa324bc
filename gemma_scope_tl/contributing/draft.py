"""Drafts of registry files from a folder or repository. Every value is read from the files or given as an option."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_scope_tl.contributing.folder_claims import KEYS, NAME, FolderMetadata
from gemma_scope_tl.contributing.folder_metadata import (
    layout_of,
    parse_setting,
    read_metadata,
)
from gemma_scope_tl.contributing.repositories import Repository, ask_each, open_source
from gemma_scope_tl.errors import GemmaScopeError, RegistryError
from gemma_scope_tl.families import (
    bare_name,
    depends_on_family,
    families,
    family_named,
    named_family,
    names_with,
    stated_family,
)
from gemma_scope_tl.files import write_atomically, write_new
from gemma_scope_tl.registry.catalog import natural_key
from gemma_scope_tl.registry.render import render_release
from gemma_scope_tl.registry.schema import LAYER_FILE, WEIGHTS_FILES, Format, ReleaseFile, parse_release
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.sites import LAYERED_SITES, get_site

CANONICAL_L0 = 100
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Values of a draft that the files do not hold.

    Attributes:
        release: name of the release; by default the last part of the name of the repository or folder.
        model, site, layer, l0: values for the folders whose files do not state them; a folder that states another value
            is an error.
        family: family of the model; by default the one that its name or the files state.
        license: SPDX identifier of the weights' licence.
        description: one line; by default made from the rows.
        revision: branch, tag or commit of the repository; the rows name its commit.
        format: the layout, for a source that has both.
        settings: texts ``FOLDER:KEY=VALUE``, which override all other values for the folder.
        unknown_l0: write null where no L0 is known, in place of an error.
        canonical: mark the SAE nearest to an L0 of 100 for every site, layer and width.
    """

    release: str | None = None
    model: str | None = None
    site: str | None = None
    layer: int | None = None
    l0: float | None = None
    license: str | None = None
    description: str | None = None
    revision: str | None = None
    format: Format | None = None
    settings: Sequence[str] = ()
    unknown_l0: bool = False
    canonical: bool = False
    family: str | None = None


@dataclass(frozen=True)
class Draft:
    """A drafted release: the content of the file, and remarks on what the author should check."""

    release: ReleaseFile
    remarks: list[str] = field(default_factory=list[str])


def draft_release(
    source: str, out: Path | None = None, options: Options | None = None, progress: bool = False
) -> Draft:
    """Draft the registry file of a release.

    Args:
        source: a folder, or a repository on the Hub.
        out: the file or folder to which the draft will be written, by default the working directory. A source below it
            is written as ``./…``, so that both can be moved together.
        options: see :class:`Options`.
        progress: show progress bars on standard error.

    Raises:
        RegistryError: values are missing, contradictory or wrong; the message lists all of them.
        GemmaScopeError: the folder or repository cannot be read.
    """
    options = options or Options()
    repository = open_source(source, options.revision)
    format_, names = layout_of(repository, options.format)

    def read(folder: str) -> FolderMetadata:
        return read_metadata(repository, folder, format_)

    answers = ask_each(names, read, "reading headers", repository.workers, progress)
    folders = [found for found in answers if isinstance(found, FolderMetadata)]  # all: read_metadata raises nothing
    folders.sort(key=lambda folder: natural_key(folder.path))
    problems = _apply(options, folders)
    name = options.release or Path(repository.name).resolve().name
    model, rows = _rows(folders, options, problems)
    sites = sorted({str(row["site"]) for row in rows} - {"None"})
    family = _family(folders, sites, options.family, model, problems)
    if options.license is None:
        problems.append("The licence of the weights is not known: give --license, such as CC-BY-4.0.")
    problems += [f"{folder.path or '(top)'}: {text}" for folder in folders for text in folder.problems]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise RegistryError(f"{repository.name} cannot be drafted yet. To settle ({len(problems)}):\n{listed}")
    remarks = _add_hashes(repository, rows, format_, progress) + _label_remarks(folders, rows)
    if options.canonical:
        remarks += mark_canonical(rows)
    head = {"release": name, "repo": _repo_text(source, repository, out), "model": model, "license": options.license}
    head |= {"family": family}
    text = options.description or _describe(str(model), rows)
    data = {**head, "description": text, "format": format_, "saes": rows}
    return Draft(parse_release(data, f"The draft of {name}"), remarks)


def write_draft(draft: Draft, out: Path | None = None, force: bool = False) -> Path:
    """Write a draft atomically.

    Args:
        draft: the draft.
        out: the file, whose stem must be the release's name, or a folder; by default the working directory.
        force: replace a file that exists.

    Raises:
        GemmaScopeError: the file exists and ``force`` is not given, or the file is not named after the release.
    """
    out = out or Path()
    file = out if out.suffix in (".yaml", ".yml") else out / f"{draft.release.release}.yaml"
    if file.name != f"{draft.release.release}.yaml":
        raise GemmaScopeError(f"{file} would hold {draft.release.release}: a registry file is named RELEASE.yaml.")
    if force:
        return write_atomically(file, render_release(draft.release))
    try:
        return write_new(file, render_release(draft.release))
    except FileExistsError:
        raise GemmaScopeError(f"{file} exists. Give --force to replace it, or another --out.") from None


def mark_canonical(rows: Sequence[Row]) -> list[str]:
    """Mark the row nearest to an L0 of 100 for each site, layer and width; of two equally near, the sparser one.

    Returns:
        A sentence for every tie.
    """
    remarks: list[str] = []
    places: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["l0"] is not None:
            places[(row["site"], row["layer"], row["d_sae"])].append(row)
    for here in places.values():
        ordered = sorted(here, key=lambda row: (abs(row["l0"] - CANONICAL_L0), row["l0"]))
        ordered[0]["canonical"] = True
        if len(ordered) > 1 and abs(ordered[1]["l0"] - CANONICAL_L0) == abs(ordered[0]["l0"] - CANONICAL_L0):
            remarks.append(
                f"{ordered[0]['id']} and {ordered[1]['id']} are as near to an L0 of 100; the first is marked."
            )
    return remarks


def _apply(options: Options, folders: Iterable[FolderMetadata]) -> list[str]:
    """Add the values of the options to the claims of the folders, and return the problems of the options."""
    by_path = {folder.path: folder for folder in folders}
    problems: list[str] = []
    for key in KEYS:
        value = getattr(options, key)
        if value is None:
            continue
        if key == "site":
            value = get_site(value).name
        for folder in by_path.values():
            # A release of one site may also contain SAEs of a site without layers (the embedding).
            # The same is true of coders of several layers.
            sites = [site for site in folder.claims["site"].values() if site not in LAYERED_SITES]
            single = folder.layers is not None or any(not get_site(site).per_layer for site in sites)
            if not (single and key in ("site", "layer")):
                folder.claims[key][f"--{key}"] = bare_name(value) if key == "model" else value
    for text in options.settings:
        path, key, value = parse_setting(text)
        if path in by_path:
            by_path[path].claims[key] = {"--set": value}
        else:
            problems.append(f"--set {text!r} names a folder without weights.")
    return problems


def _rows(folders: Sequence[FolderMetadata], options: Options, problems: list[str]) -> tuple[str | None, list[Row]]:
    """The model and the rows, with None for unknown values; missing values are added to ``problems``."""
    rows: list[Row] = []
    missing: defaultdict[str, list[str]] = defaultdict(list)
    models: set[str] = set()
    for folder in folders:
        site, layer, l0, model = (folder.value(key) for key in KEYS)
        if model is not None:
            models.add(model)
        if site is None:
            missing["site"].append(folder.path)
        elif layer is None and _has_layer(site):
            missing["layer"].append(folder.path)
        if l0 is None and not options.unknown_l0:
            missing["l0"].append(folder.path)
        crosses = site is not None and get_site(LAYERED_SITES.get(site, site)).is_transcoder
        if folder.d_in and site is not None and folder.d_in != folder.d_out and not crosses:
            folder.problems.append(f"The weights map {folder.d_in} to {folder.d_out} values, so site {site} is wrong.")
        sizes: Row = {"width": width_label(folder.d_sae or 1), "d_sae": folder.d_sae, "d_in": folder.d_in}
        if folder.d_out != folder.d_in:
            sizes["d_out"] = folder.d_out
        where: Row = {"site": site, "layer": layer if site is None or _has_layer(site) else None}
        if folder.layers is not None:
            where["layers"] = list(folder.layers)
            sizes["width"] = _nominal_width(folder)
        rows.append({"id": folder.path, **where, **sizes, "l0": l0, "path": folder.path})
        if crosses:
            rows[-1]["affine"] = folder.has_skip
        rows[-1] |= {key: value for key, value in folder.named.items() if value is not None}
    if len(models) != 1:
        found = f"is one of {', '.join(sorted(models))}: a release has one" if models else "is not known"
        problems.append(f"The model {found}. Give --model, such as gemma-2-2b.")
    for key, paths in missing.items():
        shown = ", ".join(paths[:3]) + (", …" if len(paths) > 3 else "")
        also = ", or --unknown-l0 to leave it open" if key == "l0" else ""
        problems.append(
            f"The {key} of {len(paths)} folders is not known ({shown}): give --{key} for all of them, "
            f"or --set FOLDER:{key}=VALUE for one{also}."
        )
    return next(iter(models), None), rows


def _family(
    folders: Sequence[FolderMetadata], sites: Sequence[str], given: str | None, model: str | None, problems: list[str]
) -> str | None:
    """What the draft must say about the family; None if it follows from the model's name or makes no difference."""
    if given is not None:
        return stated_family(family_named(given), model, *sites)
    said = [folder.families for folder in folders if folder.families is not None]
    common = frozenset.intersection(*said) if said else frozenset(family.name for family in families())
    if not common:
        problems.append("The folders are not of one family of models: a release has one. Draft each by itself.")
        return None
    fitting, named = [family for family in families() if family.name in common], named_family(model)
    if named in fitting:
        return None
    needed = {LAYERED_SITES.get(site, site) for site in sites}
    fitting = [family for family in fitting if family.sites.keys() >= needed] or fitting
    unclear = [site for site in sites if depends_on_family(site)]
    if named is None and model is not None and unclear and len(fitting) > 1:
        problems.append(
            f"The family of the model {model} is not known, and coders at {', '.join(unclear)} differ between "
            f"families. Give --family: {names_with(*sites)}."
        )
        return None
    return stated_family(fitting[0], model, *sites)


def _add_hashes(repository: Repository, rows: Sequence[Row], format_: Format, progress: bool) -> list[str]:
    names = {
        row["id"]: [LAYER_FILE.format(k) for k in range(len(row["layers"]))]
        if "layers" in row
        else [WEIGHTS_FILES[format_]]
        for row in rows
    }
    paths = [f"{row['path']}/{name}" for row in rows for name in names[row["id"]]]
    hashes = iter(ask_each(paths, repository.sha256, "hashing", repository.workers, progress))
    without: list[str] = []
    for row in rows:
        found = [next(hashes) for _ in names[row["id"]]]
        for digest in found:
            if isinstance(digest, GemmaScopeError):
                raise digest
        row["revision"] = repository.revision
        whole = None not in found
        row |= {"sha256s": found if whole else None} if "layers" in row else {"sha256": found[0]}
        without += [] if whole else [row["path"]]
    return [f"No sha256 for {len(without)} files that are not in LFS: {', '.join(without[:3])}."] if without else []


def _label_remarks(folders: Iterable[FolderMetadata], rows: Iterable[Row]) -> list[str]:
    """Remarks on folders whose names state a width other than that of the weights, which the row has."""
    remarks: list[str] = []
    for folder, row in zip(folders, rows, strict=True):
        if folder.layers is None and folder.width_label not in (None, folder.d_sae):
            row["note"] = f"the folder's name says {folder.width_label} latents, the weights have {folder.d_sae}"
            remarks.append(f"{folder.path}: {NAME} says {folder.width_label} latents, the weights have {folder.d_sae}.")
    return remarks


def _has_layer(site: str) -> bool:
    """Whether a row of a site, or of a kind of coders of several layers, has one layer."""
    return site not in LAYERED_SITES and get_site(site).per_layer


def _nominal_width(folder: FolderMetadata) -> str:
    """The width in the folder's name if the latents of all layers nearly fill it, as in Google's; else their number."""
    named = folder.width_label
    return width_label(named if named is not None and 0.99 * named <= folder.d_sae <= named else folder.d_sae or 1)


def _repo_text(source: str, repository: Repository, out: Path | None) -> str:
    """The registry file's ``repo``: a folder is written relative to the file where it lies below the file's folder."""
    if repository.revision is not None:
        return source
    root = Path(repository.name).resolve()
    out = out or Path()
    beside = (out.parent if out.suffix in (".yaml", ".yml") else out).resolve()
    if not root.is_relative_to(beside):
        return str(root)
    inner = root.relative_to(beside).as_posix()
    return "." if inner == "." else f"./{inner}"


def _describe(model: str, rows: Sequence[Row]) -> str:
    sites = dict.fromkeys(row["site"] for row in rows)
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    span = "" if not layers else f", layer {layers[0]}" if len(layers) == 1 else f", layers {layers[0]}-{layers[-1]}"
    if all(site in LAYERED_SITES for site in sites):
        words = {"crosscoder": "crosscoders", "clt": "cross-layer transcoders"}
        return f"{len(rows)} JumpReLU {' and '.join(words[site] for site in sites)} of {model}"
    crosses = all(get_site(LAYERED_SITES.get(site, site)).is_transcoder for site in sites)
    kind = "transcoders" if crosses else "SAEs"
    return f"{len(rows)} JumpReLU {kind} of {model}: {', '.join(sites)}{span}"
