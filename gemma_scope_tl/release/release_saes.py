"""The SAEs of a release, from a folder, the registry or memory, and the facts that their files do not hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gemma_scope_tl.contributing.coder_paths import coder_path, parse_coder_path
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.families import Family, bare_name, named_family
from gemma_scope_tl.files import checked_path, is_file, is_folder
from gemma_scope_tl.registry.schema import WEIGHTS_FILES, parse_release, read_release
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.sae.choices import as_saes
from gemma_scope_tl.sae.config import FAMILY
from gemma_scope_tl.sae.provenance import still_said
from gemma_scope_tl.weights.checks import PARAMS_NAME, SKIP_KEYS

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import ReleaseFile, SAERow


@dataclass(frozen=True)
class About:
    """Facts for a model card. The card states which of them were not given.

    Attributes:
        license: SPDX identifier of the weights' licence, in the Hub's spelling (``mit``, ``cc-by-4.0``).
        base_model: the model on the Hub, ``owner/name``.
        description: description of the SAEs in one or more sentences.
        data: the training data and their licence.
        evaluated_on: the text on which the metrics were measured.
        recipe: hyper-parameters by name; the card shows the paper's values beside them. Of a trained suite they are
            read from the suite, unless some are given.
        searched: names of ``recipe`` whose values were searched for; all others were set beforehand.
        notes: further information for users.
    """

    license: str
    base_model: str | None = None
    description: str | None = None
    data: str | None = None
    evaluated_on: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    searched: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.license, str) or not self.license.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GemmaScopeError("The licence of the weights is not known: give license, such as cc-by-4.0.")
        for name in self.searched:
            if name not in self.recipe:
                raise unknown_name("searched hyper-parameter", name, self.recipe)
        if self.base_model is not None and self.base_model.count("/") != 1:
            raise GemmaScopeError(f"base_model is OWNER/NAME on the Hub, not {self.base_model!r}.")


SUITE_FILE = "suite.json"
_JOBS = "jobs/"  # the folder in which the jobs of a run on Ray have their suites
_COLUMNS = ("id", "site", "layer", "width", "d_sae", "d_in", "l0", "affine", "path", "sha256")
DECIMALS = 3
DEAD = (
    "No latent of it fires, and a registry file cannot hold it: leave it out, or name the folder average_l0_N with its "
    "measured L0."
)


@dataclass(frozen=True)
class ReleaseSAE:
    """An SAE to be published.

    Attributes:
        site, layer: the place that the SAE reads; the layer is None for a site that exists once.
        d_sae: number of latents.
        l0: mean number of active latents; NaN if it is not known. The folder's name contains the rounded value.
        decimals: number of decimals of the L0 in the folder's name, enough to make the name unique.
        model: the model's name, without its owner.
        row: the registry row of the SAE's files; None for an SAE in memory.
        sae: the SAE in memory, or None.
        named: release and id of an SAE in memory that was loaded from the registry.
        recipe: the hyper-parameters that a trained suite has recorded; empty where none are known.
    """

    site: str
    layer: int | None
    d_sae: int
    l0: float
    model: str
    row: SAERow | None = None
    sae: Any = None
    decimals: int = 0
    named: tuple[str, str] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def family(self) -> Family:
        """The family of the model, which the row or the SAE states, or its name."""
        if self.row is not None:
            return self.row.model_family
        from gemma_scope_tl.sae.access import trained_family

        named = named_family(self.model) if self.sae.cfg.metadata.get(FAMILY) is None else None
        return named or trained_family(self.sae)

    @property
    def is_transcoder(self) -> bool:
        """Whether the SAE reconstructs a tensor other than its input."""
        return self.family.site(self.site).is_transcoder

    @property
    def affine(self) -> bool:
        """Whether the coder has a skip connection, from the registry or from its weights."""
        if self.row is None:
            return getattr(self.sae, "W_skip", None) is not None
        if self.row.affine is not None or not self.is_transcoder:
            return bool(self.row.affine)
        from gemma_scope_tl.weights.fetch import fetch
        from gemma_scope_tl.weights.load import inspect

        return any(name in SKIP_KEYS for name in inspect(fetch(self.row)))

    @property
    def coder_folder(self) -> str:
        """Gemma Scope 2's folder, with the site's: the released one, or one with the L0 in place of a label.

        Raises:
            GemmaScopeError: the site exists once, which this layout has no name for.
        """
        if self.row is not None and self.row.format == "gemma_scope_2" and parse_coder_path(self.row.path):
            return self.row.path
        if self.layer is None:
            raise GemmaScopeError(f"Gemma Scope 2's layout has no folder for site {self.site!r}: give another layout.")
        label = getattr(self.row, "label", None) or l0_label(self.l0, self.decimals)
        return coder_path(self.site, self.layer, self.d_sae, label, self.affine, getattr(self.row, "seed", None))

    @property
    def folder(self) -> str:
        """Gemma Scope's folder, without the site's: ``layer_L/width_W/average_l0_N`` or ``embedding/width_W/…``.

        The names of transcoders that are known to have a skip connection end in ``_affine``.
        """
        head = self.site if self.layer is None else f"layer_{self.layer}"
        skip = getattr(self.sae, "W_skip", None) is not None if self.row is None else bool(self.row.affine)
        tail = "_affine" if skip else ""
        return f"{head}/width_{width_label(self.d_sae)}/average_l0_{l0_label(self.l0, self.decimals)}{tail}"

    def load(self) -> Any:
        """Load the SAE, or return the one in memory, and check its weights."""
        if self.sae is not None:
            return self.sae
        from gemma_scope_tl.sae.loading import load_row

        return load_row(cast("SAERow", self.row))

    def released_file(self, format: str) -> Path | None:
        """Check and return the weights file in this format; None for an SAE in another format or in memory."""
        if self.row is None or self.row.format != format:
            return None
        from gemma_scope_tl.weights.fetch import fetch

        self.load()
        return fetch(self.row)


def l0_label(l0: float, decimals: int = 0) -> str:
    """The L0 in a folder's name, rounded to ``decimals``; values below one half get more, so as not to become 0."""
    return f"{l0:.{decimals if round(l0) else DECIMALS}f}"


def read_saes(
    source: Any, model: str | None = None, site: str | None = None, family: str | None = None
) -> list[ReleaseSAE]:
    """The SAEs of a source; see :func:`~gemma_scope_tl.release.export.collect`. An unknown L0 is NaN."""
    if isinstance(source, (str, PathLike)):
        return _from_files(cast("str | PathLike[str]", source), model, site, family)
    return [_from_memory(sae, model) for sae in as_saes(source, empty=True, whole=True)]


def folder_of(source: str | PathLike[str]) -> Path | None:
    """The folder that a source names; None for the name of a release, even if a folder has the same name."""
    from gemma_scope_tl.registry.catalog import releases

    if isinstance(source, str) and source in releases(canonical=True):
        return None
    folder = checked_path(source)
    return folder if is_folder(folder) else None


def _from_files(
    source: str | PathLike[str], model: str | None, site: str | None, family: str | None
) -> list[ReleaseSAE]:
    folder = folder_of(source)
    recipes: dict[str, dict[str, Any]] = {}
    said, listed = (model, None) if folder is None else _trained_suite(folder, model, recipes)
    if folder is not None and listed is None:
        said, listed = _exported(folder, said, site)
    if listed is not None:
        rows = listed
    elif folder is not None:
        dead = sorted(str(path) for path in folder.rglob("average_l0_0") if path.is_dir())
        if dead:
            raise GemmaScopeError(f"{dead[0]} says that its SAE has an L0 of 0. {DEAD}")
        from gemma_scope_tl.contributing.draft import Options, draft_release

        options = Options(release="draft", model=said, site=site, license="unknown", family=family)
        release = draft_release(str(folder.resolve()), folder.resolve().parent, options).release
        rows = release.at(folder.resolve().parent).rows
    else:
        from gemma_scope_tl.registry.catalog import load_release

        rows = load_release(str(source)).rows
    return [_from_row(row, recipes.get(row.id, {})) for row in rows]


def _from_row(row: SAERow, recipe: Mapping[str, Any]) -> ReleaseSAE:
    if row.l0 is None:
        raise GemmaScopeError(f"{row.release}/{row.id} has no L0, which the exported folder's name needs.")
    return ReleaseSAE(row.site, row.layer, row.d_sae, row.l0, row.model, row=row, recipe=recipe)


def _from_memory(sae: Any, model: str | None) -> ReleaseSAE:
    from gemma_scope_tl.sae.access import locate

    site, layer = locate(sae)
    row = getattr(sae, "row", None)
    name = model or sae.cfg.metadata.get("model_name")
    l0 = getattr(row, "l0", None) or still_said(sae, "l0")
    where = f"The SAE at {site.name}, layer {layer}"
    if not name:
        raise GemmaScopeError(f"{where} does not name its model: give model=, such as gemma-2-2b.")
    if l0 is None:
        l0 = math.nan  # metrics.with_l0 replaces it
    elif not isinstance(l0, (int, float)) or not (math.isfinite(l0) and l0 > 0):
        raise GemmaScopeError(f"{where} states an L0 of {l0!r}: set sae.cfg.metadata.l0 to the measured one.")
    named = None if row is None else (str(row.release), str(row.id))
    model = bare_name(str(name))
    return ReleaseSAE(site.name, layer, int(sae.cfg.d_sae), float(l0), model, sae=sae, named=named)


def _trained_suite(
    folder: Path, model: str | None, recipes: dict[str, dict[str, Any]]
) -> tuple[str | None, Sequence[SAERow] | None]:
    """The model's name and the SAEs according to a trained suite's ``suite.json``; their recipes go into ``recipes``.

    The SAEs are None in a folder without that file, and where it states no model, or no SAEs.

    Raises:
        GemmaScopeError: the file cannot be read, or does not list exactly the SAEs of the folder.
    """
    file = folder / SUITE_FILE
    if not is_file(file):
        return model, None
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise GemmaScopeError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise GemmaScopeError(f"{file} is not JSON: {error}") from None
    facts: dict[str, Any] = data if isinstance(data, dict) else {}
    name = model or _model_of(facts)
    rows = facts.get("saes")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return name, None
    listed = cast("list[dict[str, Any]]", rows)
    several = next((row for row in listed if row.get("layers")), None)
    if several is not None:
        raise GemmaScopeError(
            f"{file} lists {several.get('path')}, a coder over several layers. Its folder is in Gemma Scope 2's layout "
            "already, and is published as it is. To export the SAEs of single layers beside it, copy their folders "
            "without suite.json and give model=."
        )
    _check_listed(folder, {str(row.get("path")) for row in listed})
    if name is None:
        return None, None
    for row in listed:
        if row.get("l0") == 0:
            raise GemmaScopeError(f"{folder / str(row['path'])}: its SAE has an L0 of 0. {DEAD}")
    recipes |= {str(row["path"]): _recipe_of(row) for row in listed}
    # The ids there lack the site, so SAEs of two sites may share one; their paths are unique.
    saes = [{**{key: row.get(key) for key in _COLUMNS}, "id": row["path"]} for row in listed]
    head = {"release": "draft", "repo": str(folder.resolve()), "model": name, "license": "unknown", "description": "-"}
    head |= {"family": facts.get("family")}
    return name, parse_release({**head, "saes": saes}, str(file)).rows


def _check_listed(folder: Path, listed: set[str]) -> None:
    """Raise unless a trained suite's folder holds the SAEs that its ``suite.json`` lists, and no others.

    Others may be those of an earlier run, which must not be published under the facts of this one.
    """
    files = [file.parent.relative_to(folder).as_posix() for file in folder.rglob(PARAMS_NAME)]
    there = {path for path in files if not path.startswith((_JOBS, "."))}
    for problem, paths in (("lacks", listed - there), ("does not list", there - listed)):
        if paths:
            shown, more = sorted(paths)[:3], f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            where = f"{folder} {problem}" if problem == "lacks" else f"{folder / SUITE_FILE} {problem}"
            what = "which its suite.json lists" if problem == "lacks" else "which the folder holds"
            raise GemmaScopeError(
                f"{where} {', '.join(shown)}{more}, {what}. Make them agree: restore, move or delete the folders, or "
                "change the list. To publish a part of a suite, copy the wanted folders without suite.json and give "
                "model=."
            )


def _recipe_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """How an SAE was trained; nothing in the records of versions that did not write recipes."""
    recipe = row.get("recipe")
    if not isinstance(recipe, dict):
        return {}
    head = {key: row[key] for key in ("steps", "target_l0") if row.get(key) is not None}
    return {**head, **cast("dict[str, Any]", recipe)}


def _exported(folder: Path, model: str | None, site: str | None) -> tuple[str | None, Sequence[SAERow] | None]:
    """Like :func:`_trained_suite`, according to the registry file that an export writes into its folder."""
    own: list[ReleaseFile] = []
    for path in sorted(folder.glob("*.yaml")):
        with suppress(GemmaScopeError):  # a YAML file that is not a registry file
            release = read_release(path)
            if release.repo.startswith(".") and Path(release.rows[0].repo) == folder.resolve():
                own.append(release)
    if len(own) != 1:
        return model, None
    rows = own[0].rows
    said, kinds = model or own[0].model, {row.format for row in rows}
    name = WEIGHTS_FILES[rows[0].format]
    there = {file.parent.relative_to(folder).as_posix() for file in folder.rglob(name)}
    whole = len(kinds) == 1 and there == {row.path for row in rows}
    return said, rows if whole and said == own[0].model and site in (None, *(row.site for row in rows)) else None


def _model_of(facts: Mapping[str, Any]) -> str | None:
    """The model's name without its owner or folder; ``train_suite`` keeps it with the configuration."""
    config = facts.get("config")
    section = config.get("model") if isinstance(config, dict) else None
    said = facts.get("model", section.get("name") if isinstance(section, dict) else None)
    return (str(said).rstrip("/").rpartition("/")[2] or None) if isinstance(said, str) else None
