"""``export_suite``: SAEs as one or several repositories, ready to be uploaded."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from gemma_scope_tl.errors import GemmaScopeError, known_name, unknown_name
from gemma_scope_tl.families import stated_family
from gemma_scope_tl.files import checked_path, make_folder, replace_files, write_atomically
from gemma_scope_tl.registry.fields import NAME
from gemma_scope_tl.registry.schema import WEIGHTS_FILES
from gemma_scope_tl.release.card import CIRCUIT_TRACER_FOLDER, SAE_LENS_FOLDER, render_card
from gemma_scope_tl.release.metrics import match_metrics, with_l0
from gemma_scope_tl.release.release_saes import DEAD, DECIMALS, About, ReleaseSAE, folder_of, l0_label, read_saes
from gemma_scope_tl.sae.arguments import shown
from gemma_scope_tl.weights.checks import CONFIG_NAME

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.sae.save import Format

_LONGEST_NAME = 200  # a site and an ending follow
Layout = Literal["gemma-scope", "sae-lens", "gemma_scope_2", "both"]
Repos = Literal["one", "site"]


def export_suite(
    source: Any,
    out: str | PathLike[str],
    about: About,
    *,
    name: str | None = None,
    layout: Layout = "gemma-scope",
    repos: Repos = "one",
    circuit_tracer: bool = False,
    model: str | None = None,
    site: str | None = None,
    metrics: pd.DataFrame | None = None,
    canonical: bool = False,
    progress: bool = True,
    family: str | None = None,
) -> list[Path]:
    """Write SAEs as repositories: weights, model card and registry file.

    Files of the same layout are copied byte for byte; others are written by :func:`save_sae`. Running an interrupted
    export again completes it.

    Args:
        source: a folder of SAEs, such as an export; a registered release's name (write ``./NAME`` for a folder of this
            name); a suite of ``load_suite``; or one or several SAEs.
        out: the folder of the repository; with ``repos="site"`` the folder that holds one repository per site.
        about: facts that the files do not hold; only the licence is required.
        name: name of the release; by default the name of ``out``.
        layout: ``"gemma-scope"`` writes ``params.npz`` as released, below a folder for the site if there are several
            sites; ``"sae-lens"`` writes SAELens's two files below ``sae_lens/``; ``"both"`` writes these two.
            ``"gemma_scope_2"`` writes ``params.safetensors`` and ``config.json`` in Gemma Scope 2's folders.
        repos: ``"one"``, or ``"site"`` for one repository per site, named ``<name>-<site>`` as Google's are.
        circuit_tracer: also write transcoders for circuit-tracer (``circuit_tracer/width_W/``).
        model, site, family: the model's name, the site and the model's family, for a source that does not state them.
        metrics: the table that ``evaluate`` returned; it provides the L0 of SAEs that were fine-tuned after loading.
        canonical: mark the SAE nearest to an L0 of 100 for every site, layer and width.
        progress: show a progress bar on standard error.

    Returns:
        The folders of the repositories.

    Raises:
        GemmaScopeError: a fact is missing, two SAEs would get the same folder, or a folder already holds other SAEs.
        WeightsError: a file of the source fails a check.
    """
    layout = cast("Layout", known_name("layout", layout, get_args(Layout)))
    _check_choices(repos, circuit_tracer, about)
    root = checked_path(out)
    title = name or root.resolve().name
    saes = collect(source, model, site, metrics, coders=layout == "gemma_scope_2", family=family)
    _check_out(root, source, title)
    groups, layouts = _groups(saes, repos, title, root), ["gemma-scope", "sae-lens"] if layout == "both" else [layout]
    matched = dict(zip(map(id, saes), match_metrics(saes, metrics), strict=True))
    with _bar(len(saes), progress) as step:
        for release, (folder, here) in groups.items():
            paths = _write_weights(folder, here, layouts, step)
            more = _write_transcoders(folder, here, about.base_model or "") if circuit_tracer else []
            card = render_card(release, here, paths, [matched[id(sae)] for sae in here], about, [*layouts, *more])
            write_atomically(folder / "README.md", card)
            _write_registry(folder, release, here, about, layouts[0], canonical)
    return [folder for folder, _ in groups.values()]


def collect(
    source: Any,
    model: str | None = None,
    site: str | None = None,
    metrics: pd.DataFrame | None = None,
    coders: bool = False,
    family: str | None = None,
) -> list[ReleaseSAE]:
    """The SAEs of a source, sorted by site, layer, width and L0.

    Args:
        source: a folder of SAEs in either layout; the name of a registered release; a suite of :func:`load_suite`; or
            one or several SAEs.
        model: the model's name, for a source that does not state it.
        site: the site, for folders that do not state it.
        metrics: the table of ``evaluate``, for the L0 of SAEs that do not state it, such as fine-tuned ones.
        coders: whether folders are named as in Gemma Scope 2.
        family: the model's family, for folders that do not state it.

    Raises:
        GemmaScopeError: facts are missing or contradictory (the message lists them), or two SAEs would get the same
            folder.
    """
    saes = with_l0(read_saes(source, model, site, family), metrics)
    if not saes:
        raise GemmaScopeError("There is no SAE to export.")
    models = sorted({sae.model for sae in saes})
    if len(models) > 1:
        raise GemmaScopeError(
            f"The SAEs are of several models ({', '.join(models)}): export those of one model at a time."
        )
    for decimals in range(1, DECIMALS + 1):  # as training names its folders
        count = Counter(_place(sae, coders) for sae in saes)
        saes = [replace(sae, decimals=decimals) if count[_place(sae, coders)] > 1 else sae for sae in saes]
    taken: set[tuple[str, str]] = set()
    for sae in saes:
        if float(l0_label(sae.l0)) <= 0:
            raise GemmaScopeError(f"The {sae.site} SAE of layer {sae.layer} has an L0 of {sae.l0:g}. {DEAD}")
        place = _place(sae, coders)
        if place in taken:
            raise GemmaScopeError(f"Two SAEs of site {sae.site} would both be in {place[1]}. Export one of them.")
        taken.add(place)
    return sorted(saes, key=lambda sae: (sae.site, -1 if sae.layer is None else sae.layer, sae.d_sae, sae.l0))


def _place(sae: ReleaseSAE, coders: bool) -> tuple[str, str]:
    return sae.site, sae.coder_folder if coders else sae.folder


def _check_choices(repos: str, circuit_tracer: bool, about: About) -> None:
    if repos not in get_args(Repos):
        raise unknown_name("choice of repositories", repos, get_args(Repos))
    if not isinstance(about, About):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GemmaScopeError(
            f"about holds facts for the model card: give gs.About('mit') or the like, not {shown(about)}."
        )
    if circuit_tracer and not about.base_model:
        raise GemmaScopeError("circuit-tracer's config.yaml names the model on the Hub: give about.base_model.")


def _check_title(title: str) -> None:
    """Raise unless the title can be the name of a registry file."""
    if not re.fullmatch(NAME, title) or len(title) > _LONGEST_NAME:
        what = f"A release's name has at most {_LONGEST_NAME} letters, digits, '.', '_' and '-', unlike {title[:80]!r}"
        raise GemmaScopeError(f"{what}: give another name.")


def _check_out(root: Path, source: Any, title: str) -> None:
    """Check the name, and that the output and the source are not inside each other, before writing."""
    _check_title(title)
    if isinstance(source, (str, PathLike)) and (place := folder_of(source)) is not None:
        inner, outer = root.resolve(), place.resolve()
        if inner == outer or outer in inner.parents or inner in outer.parents:
            raise GemmaScopeError(f"{root} or the source {source} is inside the other: export to another folder.")


def _groups(
    saes: Sequence[ReleaseSAE], repos: Repos, title: str, root: Path
) -> dict[str, tuple[Path, list[ReleaseSAE]]]:
    """Folder and SAEs of each repository, by release name."""
    if repos == "one":
        return {title: (root, list(saes))}
    groups: dict[str, tuple[Path, list[ReleaseSAE]]] = {}
    for sae in saes:
        residual = next(site.name for site in sae.family.sites.values() if site.joins == "residual")
        site = sae.site if sae.family.site(sae.site).per_layer else residual
        release = f"{title}-{site}"
        groups.setdefault(release, (root / release, []))[1].append(sae)
    return groups


def _write_weights(folder: Path, saes: Sequence[ReleaseSAE], layouts: Sequence[str], step: Any) -> list[str]:
    """Write the SAEs of a repository, and return the folders of the first layout."""
    from gemma_scope_tl.sae.save import save_sae

    several = len(_layered_sites(saes)) > 1  # with one site, its folder is left out, as in Google's repositories
    inner = [f"{sae.site}/{sae.folder}" if several and sae.layer is not None else sae.folder for sae in saes]
    if "gemma_scope_2" in layouts:
        inner = [sae.coder_folder for sae in saes]
    make_folder(folder)
    _refuse_strangers(folder, {f"{prefix}{path}" for path in inner for prefix in ("", f"{SAE_LENS_FOLDER}/")})
    for sae, path in zip(saes, inner, strict=True):
        for layout in {"gemma-scope", "gemma_scope_2"}.intersection(layouts):
            files = _to_copy(sae, layout)
            if files:
                copies = {file.name: lambda to, file=file: shutil.copyfile(file, to) for file in files}
                replace_files(folder / path, copies)
            else:
                save_sae(sae.load(), folder / path, format=cast("Format", layout))
        if "sae-lens" in layouts:
            save_sae(sae.load(), folder / SAE_LENS_FOLDER / path, format="sae-lens")
        step()
    return inner if layouts[0] != "sae-lens" else [f"{SAE_LENS_FOLDER}/{path}" for path in inner]


def _to_copy(sae: ReleaseSAE, layout: str) -> list[Path]:
    """The files of a layout, if the SAE has them, to be copied as they are."""
    file = sae.released_file(layout)
    if file is None or layout == "gemma-scope":
        return [] if file is None else [file]
    config = file.with_name(CONFIG_NAME)
    return [file, config] if config.is_file() else []  # without one it is written, so that it describes itself


def _refuse_strangers(folder: Path, expected: set[str]) -> None:
    """Raise if a folder holds weights of another export, which would be published together with the new ones."""
    names = WEIGHTS_FILES.values()
    there = {file.parent.relative_to(folder).as_posix() for name in names for file in folder.rglob(name)}
    strangers = sorted(there - expected)
    if strangers:
        raise GemmaScopeError(f"{folder} holds SAEs of another export, such as {strangers[0]}. Empty the folder.")


def _write_transcoders(folder: Path, saes: Sequence[ReleaseSAE], base_model: str) -> list[str]:
    """Write the sets of a repository's transcoders, if there are any, and return the layouts that were added."""
    from gemma_scope_tl.release.circuit_tracer import transcoder_sets, write_transcoder_set

    if not any(sae.is_transcoder for sae in saes):
        return []
    for width, chosen in transcoder_sets(saes).items():
        write_transcoder_set(folder / CIRCUIT_TRACER_FOLDER / width, chosen, base_model)
    return ["circuit-tracer"]


def _write_registry(
    folder: Path, release: str, saes: Sequence[ReleaseSAE], about: About, layout: str, canonical: bool
) -> None:
    """Write the registry file of a repository, which names its own folder. The upload writes one that names the Hub."""
    from gemma_scope_tl.contributing.draft import Options, draft_release, write_draft
    from gemma_scope_tl.contributing.folder_metadata import checked_format

    sites = _layered_sites(saes)
    options = Options(
        release=release,
        model=saes[0].model,
        family=stated_family(saes[0].family, saes[0].model, *sorted({sae.site for sae in saes})),
        site=next(iter(sites)) if len(sites) == 1 else None,
        license=about.license,
        description=about.description,
        format=checked_format(layout),
        canonical=canonical,
    )
    write_draft(draft_release(str(folder), folder, options), folder / f"{release}.yaml", force=True)


def _layered_sites(saes: Sequence[ReleaseSAE]) -> set[str]:
    """The sites of SAEs, without those that exist once."""
    return {sae.site for sae in saes if sae.family.site(sae.site).per_layer}


@contextmanager
def _bar(total: int, progress: bool) -> Generator[Any]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("exporting", total=total)
        yield lambda: bar.advance(task)
