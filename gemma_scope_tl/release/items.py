"""What is to be published: SAEs from a folder, from the registry or from memory, each with its place and its name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry.widths import width_label

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

SUITE_FILE = "suite.json"
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
        model: the model's name, without its owner.
        row: where its files are; None for an SAE in memory.
        sae: the SAE in memory, or None.
    """

    site: str
    layer: int | None
    d_sae: int
    l0: float
    model: str
    row: SAERow | None = None
    sae: Any = None

    @property
    def inner(self) -> str:
        """Gemma Scope's folder, without the site's: ``layer_L/width_W/average_l0_N`` or ``embedding/width_W/…``."""
        head = "embedding" if self.layer is None else f"layer_{self.layer}"
        return f"{head}/width_{width_label(self.d_sae)}/average_l0_{_l0_label(self.l0)}"

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


def _l0_label(l0: float) -> str:
    """The L0 in a folder's name: rounded, and below one half, where that would say 0, with decimals."""
    return str(round(l0)) if round(l0) else f"{l0:.3f}"


def collect(source: Any, model: str | None = None, site: str | None = None) -> list[Item]:
    """The SAEs of a source, sorted by site, layer, width and L0.

    Args:
        source: a folder of SAEs in either layout; the name of a registered release; a suite of :func:`load_suite`; an
            SAE or several.
        model: the model's name, where the source does not say it.
        site: the site, for folders that do not say it.

    Raises:
        GemmaScopeError: with everything that is missing or contradictory; or when two SAEs would get one folder.
    """
    if isinstance(source, (str, PathLike)):
        items = _from_place(cast("str | PathLike[str]", source), model, site)
    else:
        several = list(source.values()) if isinstance(source, Mapping) else source
        saes: list[Any] = [several] if hasattr(several, "cfg") else list(cast("Iterable[Any]", several))
        items = [_from_memory(sae, model) for sae in saes]
    if not items:
        raise GemmaScopeError("There is no SAE to export.")
    models = sorted({item.model for item in items})
    if len(models) > 1:
        raise GemmaScopeError(f"The SAEs are of several models ({', '.join(models)}): export each model's alone.")
    seen: set[tuple[str, str]] = set()
    for item in items:
        if float(_l0_label(item.l0)) <= 0:
            raise GemmaScopeError(f"The {item.site} SAE of layer {item.layer} has an L0 of {item.l0:g}. {_DEAD}")
        if (item.site, item.inner) in seen:
            raise GemmaScopeError(f"Two SAEs of site {item.site} would both be {item.inner}. Export one of them.")
        seen.add((item.site, item.inner))
    return sorted(items, key=lambda i: (i.site, -1 if i.layer is None else i.layer, i.d_sae, i.l0))


def _from_place(source: str | PathLike[str], model: str | None, site: str | None) -> list[Item]:
    folder = Path(source).expanduser()
    if folder.is_dir():
        dead = sorted(str(path) for path in folder.rglob("average_l0_0") if path.is_dir())
        if dead:
            raise GemmaScopeError(f"{dead[0]} says that its SAE has an L0 of 0. {_DEAD}")
        from gemma_scope_tl.contributing.draft import Options, draft_release

        said = model or _model_of_suite(folder)
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
    from gemma_scope_tl.attached import locate

    site, layer = locate(sae)
    metadata = sae.cfg.metadata
    name = model or metadata.get("model_name")
    l0 = getattr(getattr(sae, "row", None), "l0", None) or metadata.get("l0")
    where = f"The SAE at {site.name}, layer {layer}"
    if not name:
        raise GemmaScopeError(f"{where} does not say of which model it is: give model=, such as gemma-2-2b.")
    if not isinstance(l0, (int, float)) or not (math.isfinite(l0) and l0 > 0):
        raise GemmaScopeError(f"{where} does not say its L0: set sae.cfg.metadata.l0 to the measured one.")
    return Item(site.name, layer, int(sae.cfg.d_sae), float(l0), str(name).rpartition("/")[2], sae=sae)


def _model_of_suite(folder: Path) -> str | None:
    """The model's name in a trained suite's ``suite.json``, None where it says nothing."""
    file = folder / SUITE_FILE
    if not file.is_file():
        return None
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GemmaScopeError(f"{file} is not JSON: {error}") from None
    name = cast("dict[str, Any]", data).get("model") if isinstance(data, dict) else None
    return name.rpartition("/")[2] if isinstance(name, str) and name else None
