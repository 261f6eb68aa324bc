"""What the files of a release cannot say about it. What is not given is left out of the card, and the card says so."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.files import checked_path, is_file, is_folder
from gemma_scope_tl.registry.schema import parse_release, read_release
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.release.metrics import with_l0
from gemma_scope_tl.sae.choices import as_saes
from gemma_scope_tl.sae.provenance import still_said
from gemma_scope_tl.weights.checks import PARAMS_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.registry.schema import ReleaseFile, SAERow


@dataclass(frozen=True)
class About:
    """Facts for a model card.

    Attributes:
        license: SPDX identifier of the weights' licence, in the Hub's spelling (``mit``, ``cc-by-4.0``).
        base_model: the model on the Hub, ``owner/name``.
        description: what these SAEs are, in a sentence or more.
        data: what they were trained on, and its licence.
        evaluated_on: the text behind the metrics.
        recipe: hyper-parameters by name; those of the paper's recipe stand beside the paper's values.
        searched: names of ``recipe`` whose values were searched for; all others were set beforehand.
        notes: what users should know.
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
_JOBS = "jobs/"  # where the jobs of a run on Ray keep their own suites
_COLUMNS = ("id", "site", "layer", "width", "d_sae", "d_in", "l0", "path", "sha256")
_DECIMALS = 3
_DEAD = (
    "No latent of it fires, and a registry file cannot hold it: leave it out, or name the folder average_l0_N with its "
    "measured L0."
)


@dataclass(frozen=True)
class Item:
    """One SAE to be published.

    Attributes:
        site, layer: where it belongs; no layer for the embedding.
        d_sae: its latents.
        l0: mean number of active latents; its rounded value is in the folder's name.
        decimals: of it in the name, as many as tell it from the other SAEs of its place and width.
        model: the model's name, without its owner.
        row: where its files are; None for an SAE in memory.
        sae: the SAE in memory, or None.
        named: release and id of an SAE in memory, as the registry has them.
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

    @property
    def inner(self) -> str:
        """Gemma Scope's folder, without the site's: ``layer_L/width_W/average_l0_N`` or ``embedding/width_W/…``."""
        head = "embedding" if self.layer is None else f"layer_{self.layer}"
        return f"{head}/width_{width_label(self.d_sae)}/average_l0_{_l0_label(self.l0, self.decimals)}"

    def load(self) -> Any:
        """The SAE, checked."""
        if self.sae is not None:
            return self.sae
        from gemma_scope_tl.sae.loading import load_row

        return load_row(cast("SAERow", self.row))

    def params_file(self) -> Path | None:
        """The checked ``params.npz`` that can be copied as it is, or None where there is none."""
        if self.row is None or self.row.format != "gemma-scope":
            return None
        from gemma_scope_tl.weights.fetch import fetch

        self.load()
        return fetch(self.row)


def _l0_label(l0: float, decimals: int = 0) -> str:
    """The L0 in a folder's name: rounded, and below one half, where that would say 0, with decimals."""
    return f"{l0:.{decimals if round(l0) else _DECIMALS}f}"


def collect(
    source: Any, model: str | None = None, site: str | None = None, metrics: pd.DataFrame | None = None
) -> list[Item]:
    """The SAEs of a source, sorted by site, layer, width and L0.

    Args:
        source: a folder of SAEs in either layout; the name of a registered release; a suite of :func:`load_suite`; an
            SAE or several.
        model: the model's name, where the source does not say it.
        site: the site, for folders that do not say it.
        metrics: ``evaluate``'s table, for the L0 of SAEs that do not say it, such as fine-tuned ones.

    Raises:
        GemmaScopeError: with everything that is missing or contradictory; or when two SAEs would get one folder.
    """
    if isinstance(source, (str, PathLike)):
        items = _from_place(cast("str | PathLike[str]", source), model, site)
    else:
        items = with_l0([_from_memory(sae, model) for sae in as_saes(source, empty=True, whole=True)], metrics)
    if not items:
        raise GemmaScopeError("There is no SAE to export.")
    models = sorted({item.model for item in items})
    if len(models) > 1:
        raise GemmaScopeError(f"The SAEs are of several models ({', '.join(models)}): export each model's alone.")
    for decimals in range(1, _DECIMALS + 1):  # as training names its folders
        count = Counter((item.site, item.inner) for item in items)
        items = [replace(item, decimals=decimals) if count[item.site, item.inner] > 1 else item for item in items]
    seen: set[tuple[str, str]] = set()
    for item in items:
        if float(_l0_label(item.l0)) <= 0:
            raise GemmaScopeError(f"The {item.site} SAE of layer {item.layer} has an L0 of {item.l0:g}. {_DEAD}")
        if (item.site, item.inner) in seen:
            raise GemmaScopeError(f"Two SAEs of site {item.site} would both be {item.inner}. Export one of them.")
        seen.add((item.site, item.inner))
    return sorted(items, key=lambda i: (i.site, -1 if i.layer is None else i.layer, i.d_sae, i.l0))


def folder_of(source: str | PathLike[str]) -> Path | None:
    """The folder that a source is; None where it is the name of a release, which a folder called so does not hide."""
    from gemma_scope_tl.registry.catalog import releases

    if isinstance(source, str) and source in releases(canonical=True):
        return None
    folder = checked_path(source)
    return folder if is_folder(folder) else None


def _from_place(source: str | PathLike[str], model: str | None, site: str | None) -> list[Item]:
    folder = folder_of(source)
    said, listed = (model, None) if folder is None else _trained_suite(folder, model)
    if folder is not None and listed is None:
        said, listed = _exported(folder, said, site)
    if listed is not None:
        rows = listed
    elif folder is not None:
        dead = sorted(str(path) for path in folder.rglob("average_l0_0") if path.is_dir())
        if dead:
            raise GemmaScopeError(f"{dead[0]} says that its SAE has an L0 of 0. {_DEAD}")
        from gemma_scope_tl.contributing.draft import Options, draft_release

        options = Options(release="draft", model=said, site=site, license="unknown")
        release = draft_release(str(folder.resolve()), folder.resolve().parent, options).release
        rows = release.at(folder.resolve().parent).rows
    else:
        from gemma_scope_tl.registry.catalog import load_release

        rows = load_release(str(source)).rows
    return [_from_row(row) for row in rows]


def _from_row(row: SAERow) -> Item:
    if row.l0 is None:
        raise GemmaScopeError(f"{row.release}/{row.id} has no L0, which the exported folder's name needs.")
    return Item(row.site, row.layer, row.d_sae, row.l0, row.model, row=row)


def _from_memory(sae: Any, model: str | None) -> Item:
    from gemma_scope_tl.sae.access import locate

    site, layer = locate(sae)
    row = getattr(sae, "row", None)
    name = model or sae.cfg.metadata.get("model_name")
    l0 = getattr(row, "l0", None) or still_said(sae, "l0")
    where = f"The SAE at {site.name}, layer {layer}"
    if not name:
        raise GemmaScopeError(f"{where} does not say of which model it is: give model=, such as gemma-2-2b.")
    if l0 is None:
        l0 = math.nan  # with_l0 looks it up
    elif not isinstance(l0, (int, float)) or not (math.isfinite(l0) and l0 > 0):
        raise GemmaScopeError(f"{where} says an L0 of {l0!r}: set sae.cfg.metadata.l0 to the measured one.")
    named = None if row is None else (str(row.release), str(row.id))
    return Item(site.name, layer, int(sae.cfg.d_sae), float(l0), str(name).rpartition("/")[2], sae=sae, named=named)


def _trained_suite(folder: Path, model: str | None) -> tuple[str | None, Sequence[SAERow] | None]:
    """The model's name according to a trained suite's ``suite.json``, and the suite's SAEs.

    No SAEs where that file does not list those that are there: some were taken out, or put in, by hand.
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
    if name is None or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return name, None
    listed = cast("list[dict[str, Any]]", rows)
    there = {file.parent.relative_to(folder).as_posix() for file in folder.rglob(PARAMS_NAME)}
    if {row.get("path") for row in listed} != {path for path in there if not path.startswith(_JOBS)}:
        return name, None
    for row in listed:
        if row.get("l0") == 0:
            raise GemmaScopeError(f"{folder / str(row['path'])}: its SAE has an L0 of 0. {_DEAD}")
    saes = [{key: row.get(key) for key in _COLUMNS} for row in listed]
    head = {"release": "draft", "repo": str(folder.resolve()), "model": name, "license": "unknown", "description": "-"}
    return name, parse_release({**head, "saes": saes}, str(file)).rows


def _exported(folder: Path, model: str | None, site: str | None) -> tuple[str | None, Sequence[SAERow] | None]:
    """As :func:`_trained_suite`, according to the registry file that an export puts into its folder."""
    own: list[ReleaseFile] = []
    for path in sorted(folder.glob("*.yaml")):
        with suppress(GemmaScopeError):  # another YAML file
            release = read_release(path)
            if release.repo.startswith(".") and Path(release.rows[0].repo) == folder.resolve():
                own.append(release)
    if len(own) != 1:
        return model, None
    rows = own[0].rows
    said, kinds = model or own[0].model, {row.format for row in rows}
    name = PARAMS_NAME if kinds == {"gemma-scope"} else WEIGHTS_NAME
    there = {file.parent.relative_to(folder).as_posix() for file in folder.rglob(name)}
    whole = len(kinds) == 1 and there == {row.path for row in rows}
    return said, rows if whole and said == own[0].model and site in (None, *(row.site for row in rows)) else None


def _model_of(facts: Mapping[str, Any]) -> str | None:
    """The model's name without its owner or folder; ``train_suite`` keeps it with the configuration."""
    config = facts.get("config")
    section = config.get("model") if isinstance(config, dict) else None
    said = facts.get("model", section.get("name") if isinstance(section, dict) else None)
    return (str(said).rstrip("/").rpartition("/")[2] or None) if isinstance(said, str) else None
