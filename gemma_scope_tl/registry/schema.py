"""The schema of registry files: one YAML file per release with explicit rows. All errors of a file are reported
together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gemma_scope_tl.errors import RegistryError, UnknownNameError
from gemma_scope_tl.families import Family, family_named, family_of_model
from gemma_scope_tl.registry.fields import (
    REPO,
    Hashes,
    LayerNumbers,
    Name,
    RelativePath,
    Sha256,
    checked_repo,
    resolved_repo,
)
from gemma_scope_tl.registry.locate import inside
from gemma_scope_tl.registry.plain_yaml import load_yaml, read_text
from gemma_scope_tl.registry.problems import Problem, broken_file, canonical_id, cross_row_problems, problem_of
from gemma_scope_tl.registry.widths import parse_width, width_label
from gemma_scope_tl.sites import LAYERED_SITES, SITES, get_site, known_site

Format = Literal["gemma-scope", "sae-lens", "gemma_scope_2"]
WEIGHTS_FILES: Mapping[Format, str] = {
    "gemma-scope": "params.npz",
    "sae-lens": "sae_weights.safetensors",
    "gemma_scope_2": "params.safetensors",
}
LAYER_FILE = "params_layer_{}.safetensors"
"""The file of one of several layers, counted among the coder's layers, in the layout ``gemma_scope_2``."""
CFG_FILE = "cfg.json"
_OF_NAMED_WIDTH = 0.99  # latents are divided over the layers, in blocks
_ONE_LAYER = "An SAE or transcoder of one layer is needed here."
Label = Literal["small", "medium", "big"]
LABELS: tuple[Label, ...] = get_args(Label)
"""The labels of target L0s, ascending."""
Series = Literal["subset", "all"]
SERIES: tuple[Series, ...] = get_args(Series)
"""The series of a release, in the order in which a look-up prefers them."""
CROSS_ROWS = "cross_rows"


class SAEEntry(BaseModel):
    """One row of a release file: one SAE.

    Attributes:
        id: name within the release; the same as SAELens's if SAELens has the release.
        site: a name of the site table.
        layer: counts from 0; null for the embedding, which exists once, and for coders of several layers.
        layers: the layers of a crosscoder or cross-layer transcoder, ascending; null for a coder of one layer.
        width: label of ``d_sae``, such as ``16k``. The latents of several layers may be a few less than it says.
        d_sae: number of latents, of all layers together.
        d_in: dimension of the activations that the SAE reads, heads flattened.
        d_out: dimension of the activations that the SAE writes; null if it equals ``d_in``.
        l0: mean number of active latents, from the folder name, or the target of a labelled SAE; null when it is not
            known.
        label: ``small``, ``medium`` or ``big``, where the release names its target L0s in this way.
        affine: whether a transcoder has a skip connection, an affine map from its input to its output; null where the
            release does not say, and for SAEs.
        seed: the seed in the name of a further training run of the same SAE; null for the SAE without one.
        path: folder inside the repository that holds the weights file.
        neuronpedia: ``model/layer-source`` where Neuronpedia has a dashboard.
        neuronpedia_warning: why that dashboard does not show this SAE's latents correctly. It is shown with every link.
        canonical: whether ``…/canonical`` names this row. At most one for each site, layer and width.
        revision: commit of the repository to read; null for its main branch.
        sha256: hash of the weights file.
        sha256s: hashes of the files of several layers, in their order.
        note: a remark about this SAE.
        unverified: whether the file is known by name only, from a listing that may be out of date. ``gemma-scope
            verify`` and ``gemma-scope registry check --remote`` look for it (:mod:`gemma_scope_tl.weights.seen`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: RelativePath
    site: Annotated[str, WithJsonSchema({"enum": [*SITES, *LAYERED_SITES], "type": "string"})]
    layer: Annotated[int, Field(ge=0)] | None
    layers: LayerNumbers = None
    width: str
    d_sae: Annotated[int, Field(gt=0)]
    d_in: Annotated[int, Field(gt=0)]
    d_out: Annotated[int, Field(gt=0)] | None = None
    l0: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    label: Label | None = None
    affine: bool | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    path: RelativePath
    neuronpedia: RelativePath | None = None
    neuronpedia_warning: Annotated[str, Field(min_length=1)] | None = None
    canonical: bool = False
    revision: Name | None = None
    sha256: Sha256 | None = None
    sha256s: Hashes = None
    note: Annotated[str, Field(min_length=1)] | None = None
    unverified: bool = False

    @property
    def canonical_id(self) -> str | None:
        """SAELens's ``…/canonical`` name of a canonical row, else None."""
        return canonical_id(self.id) if self.canonical else None

    @field_validator("site", mode="before")
    @classmethod
    def _site_is_known(cls, site: object) -> object:
        try:
            return known_site(str(site))
        except UnknownNameError as error:
            raise ValueError(str(error)) from None

    @field_validator("neuronpedia_warning", mode="after")
    @classmethod
    def _warning_has_a_link(cls, warning: str | None, info: ValidationInfo) -> str | None:
        if warning is not None and info.data.get("neuronpedia") is None:
            raise ValueError("a warning about a dashboard needs the dashboard: give neuronpedia too")
        return warning

    @field_validator("layer", mode="after")
    @classmethod
    def _layer_suits_site(cls, layer: int | None, info: ValidationInfo) -> int | None:
        site = info.data.get("site")
        if site in LAYERED_SITES:
            if layer is not None:
                raise ValueError(f"a {site} spans several layers: its layer is null, and layers lists them")
        elif site is not None and get_site(site).per_layer != (layer is not None):
            needs = "needs a layer" if layer is None else f"exists once: its layer is null, not {layer}"
            raise ValueError(f"site {site!r} {needs}")
        return layer

    @field_validator("layers", mode="after")
    @classmethod
    def _layers_suit_site(cls, layers: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if layers is not None and info.data.get("site") not in (None, *LAYERED_SITES):
            raise ValueError(f"site {info.data['site']!r} belongs to one layer: omit layers")
        return layers

    @field_validator("sha256", "sha256s", mode="after")
    @classmethod
    def _hashes_suit_files(cls, hashes: Any, info: ValidationInfo) -> Any:
        layers, several = info.data.get("layers"), isinstance(hashes, tuple)
        if hashes is not None and info.data.get("site") is not None and several != (layers is not None):
            raise ValueError("one file has sha256, and the files of several layers have sha256s, in their order")
        if several and layers is not None and len(hashes or ()) != len(layers):
            raise ValueError(f"{len(layers)} layers have as many files, but there are {len(hashes or ())} hashes")
        return hashes

    @field_validator("d_out", mode="after")
    @classmethod
    def _d_out_suits_site(cls, d_out: int | None, info: ValidationInfo) -> int | None:
        site, d_in = info.data.get("site"), info.data.get("d_in")
        if d_out not in (None, d_in) and d_in is not None and site is not None and not _is_transcoder(site):
            raise ValueError(f"an SAE of site {site!r} writes what it reads, {d_in} values, not {d_out}")
        return d_out

    @field_validator("affine", mode="after")
    @classmethod
    def _affine_suits_site(cls, affine: bool | None, info: ValidationInfo) -> bool | None:
        site = info.data.get("site")
        if affine and site is not None and not _is_transcoder(site):
            raise ValueError(f"an SAE of site {site!r} has no skip connection: only transcoders are affine")
        return affine

    @field_validator("l0", mode="after")
    @classmethod
    def _l0_fits_d_sae(cls, l0: float | None, info: ValidationInfo) -> float | None:
        d_sae = info.data.get("d_sae")
        if l0 is not None and d_sae is not None and l0 > d_sae:
            raise ValueError(f"{l0:g} latents cannot be active of {d_sae}")
        return l0

    @field_validator("width", mode="before")
    @classmethod
    def _width_is_a_label(cls, width: object) -> object:
        label = str(width) if isinstance(width, int) and not isinstance(width, bool) else width
        if isinstance(label, str):
            parse_width(label)
        return label

    @field_validator("d_sae", mode="after")
    @classmethod
    def _d_sae_is_the_width(cls, d_sae: int, info: ValidationInfo) -> int:
        width = info.data.get("width")
        if width is None or width_label(d_sae) == width:
            return d_sae
        named = parse_width(width)
        if info.data.get("layers") is None or not named * _OF_NAMED_WIDTH <= d_sae <= named:
            raise ValueError(
                f"width {width!r} is {parse_width(width)} latents; write {width_label(d_sae)!r} for {d_sae}"
            )
        return d_sae


class SAERow(SAEEntry):
    """One released SAE: an entry with the fields of its release, enough to find, check and splice the SAE.

    ``repo`` is a Hugging Face repository, a folder's absolute path, or, for files inside this package, the name of a
    bundled model: ``"bundled"``.
    """

    release: str
    model: str
    repo: str
    format: Format = "gemma-scope"
    family: str | None = None
    series: Series | None = None

    @property
    def model_family(self) -> Family:
        """The family of the model: the release's ``family``, or the family that the name of the model belongs to."""
        return family_of_model(self.model, self.site) if self.family is None else family_named(self.family)

    @property
    def weights_paths(self) -> tuple[str, ...]:
        """The paths of the weights files inside the repository: one, or one for each of several layers."""
        if self.layers is None:
            return (f"{self.path}/{WEIGHTS_FILES[self.format]}",)
        return tuple(f"{self.path}/{LAYER_FILE.format(number)}" for number in range(len(self.layers)))

    @property
    def weights_path(self) -> str:
        """The path of the weights file inside the repository.

        Raises:
            RegistryError: for a coder of several layers, which has several files.
        """
        if self.layers is not None:
            raise RegistryError(f"{self.release}/{self.id} is a {self.site} with a file for each layer. {_ONE_LAYER}")
        return self.weights_paths[0]

    @property
    def hashes(self) -> tuple[str | None, ...]:
        """The hashes of :attr:`weights_paths`, each None if it is not known."""
        if self.layers is None:
            return (self.sha256,)
        return self.sha256s or (None,) * len(self.layers)

    @property
    def digest(self) -> str | None:
        """A hash of all weights: that of the one file, or the sha256 of those of several files; None if unknown."""
        if self.layers is None or self.sha256s is None:
            return self.sha256
        return hashlib.sha256("".join(self.sha256s).encode()).hexdigest()

    @property
    def base_site(self) -> str:
        """The site whose tensors the coder reads: the row's, or for several layers the one of each of them."""
        return LAYERED_SITES.get(self.site, self.site)


class ReleaseFile(BaseModel):
    """A registry file: the fields of a release and its rows.

    Attributes:
        release: the stem of the file and the name of the release; the same as SAELens's if SAELens has the release.
        canonical_release: SAELens's second name, for which only the canonical ids exist, or null.
        repo: ``owner/name`` on Hugging Face; ``./folder`` (or ``.``) next to this file; ``/a/folder``; or ``bundled``.
        model: the model the SAEs read, without its owner: ``gemma-2-2b``.
        family: the family of the model, such as ``gemma2``, which defines the sites. Null for the family that the name
            of the model belongs to, or the first family if it belongs to none, which warns where families differ.
        license: SPDX identifier of the weights' licence.
        description: one line of text.
        notes: remarks about the release, such as where and why it differs from other catalogues.
        format: layout of each row's folder.
        series: ``subset`` or ``all``, for one of two releases of the same site: SAEs of a few layers with more widths
            and L0s, and SAEs of all layers. Null for a release without such a sibling.
        saes: the rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, title="Gemma Scope release")

    release: Name
    canonical_release: Name | None = None
    repo: Annotated[str, AfterValidator(checked_repo), Field(json_schema_extra={"pattern": f"^{REPO}$"})]
    model: Name
    family: Name | None = None
    license: Annotated[str, Field(min_length=1)]
    description: Annotated[str, Field(min_length=1)]
    notes: list[str] = Field(default_factory=list[str])
    format: Format = "gemma-scope"
    series: Series | None = None
    saes: Annotated[list[SAEEntry], Field(min_length=1)]
    _folder: Path | None = PrivateAttr(None)

    @cached_property
    def rows(self) -> tuple[SAERow, ...]:
        """The rows in the order of the file, each with the fields of the release. A folder in ``repo`` is absolute.

        Raises:
            RegistryError: when ``repo`` is a relative folder and the release was not read from a file.
        """
        shared: dict[str, Any] = {key: getattr(self, key) for key in ("release", "model", "format", "family", "series")}
        shared["repo"] = resolved_repo(self.repo, self._folder)
        return tuple(SAERow.model_construct(**dict(entry), **shared) for entry in self.saes)  # checked already

    def at(self, folder: Path | None) -> ReleaseFile:
        """Set the folder of the registry file, to which ``./`` refers, and return this object."""
        self._folder = folder
        return self

    @field_validator("family", mode="after")
    @classmethod
    def _family_is_known(cls, family: str | None) -> str | None:
        try:
            return None if family is None else family_named(family).name
        except UnknownNameError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _rows_agree(self) -> ReleaseFile:
        problems = cross_row_problems(self.model_dump())
        if problems:
            raise PydanticCustomError(CROSS_ROWS, "{text}", {"text": "; ".join(map(str, problems))})
        return self


def _is_transcoder(site: str) -> bool:
    return get_site(LAYERED_SITES.get(site, site)).is_transcoder


def parse_release(data: object, source: str) -> ReleaseFile:
    """Check the content of a registry file.

    Args:
        data: the content of the YAML file.
        source: the file's name, for the message.

    Raises:
        RegistryError: with every problem of the file, each with its row id and field.
    """
    release, problems = validate_release(data)
    if release is None:
        raise broken_file(source, problems)
    return release


def validate_release(data: object) -> tuple[ReleaseFile | None, list[Problem]]:
    """Return the release that the content of a registry file describes, or None with every problem of the content."""
    try:
        return ReleaseFile.model_validate(data), []
    except ValidationError as error:
        details = [d for d in error.errors(include_url=False) if d["type"] != CROSS_ROWS]
    problems = [problem_of(detail, data, SAEEntry.model_fields, ReleaseFile.model_fields) for detail in details]
    if isinstance(data, Mapping):
        problems += cross_row_problems(cast("Mapping[str, object]", data))
    return None, problems


def read_release(path: str | Path) -> ReleaseFile:
    """Read and check one registry file, whose stem must be the release's name.

    Raises:
        RegistryError: when there is no such file, or with all problems of the file.
    """
    path = Path(path)
    release = parse_release(load_yaml(read_text(path), str(path)), str(path)).at(path.resolve().parent)
    if release.release != path.stem:
        raise RegistryError(f"{path} holds release {release.release!r}: name the file {release.release}.yaml.")
    try:
        escapes = escaping_rows(release.rows)
    except RegistryError as error:  # repo itself leads out of the folder
        raise RegistryError(f"{path}: {error}") from None
    if escapes:
        raise broken_file(str(path), escapes)
    return release


def escaping_rows(rows: Iterable[SAERow]) -> list[Problem]:
    """Problems of rows of a local folder whose files are outside of it, through symbolic links."""
    problems: list[Problem] = []
    for row in rows:
        if row.repo.startswith("/"):
            try:
                for path in (*row.weights_paths, f"{row.path}/{CFG_FILE}"):
                    inside(Path(row.repo), path)
            except RegistryError as error:
                problems.append(Problem(row.id, "path", str(error)))
    return problems
