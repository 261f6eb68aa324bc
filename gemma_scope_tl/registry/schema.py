"""What a registry file may say: one YAML a release, explicit rows, every error of a file reported at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from gemma_scope_tl.errors import RegistryError, UnknownNameError, unknown_name
from gemma_scope_tl.registry.widths import parse_width, width_label
from gemma_scope_tl.sites import SiteName, get_site

Format = Literal["gemma-scope", "sae-lens"]
WEIGHTS_FILES: Mapping[Format, str] = {"gemma-scope": "params.npz", "sae-lens": "sae_weights.safetensors"}
CROSS_ROWS = "cross_rows"


def _relative(text: str) -> str:
    """A relative POSIX path that stays below its root."""
    if not text or any(c.isspace() or c in "\\:" or ord(c) < 32 for c in text):
        raise ValueError(f"{text!r} is not a relative path with '/' between its parts and no spaces, ':' or '\\'")
    if any(part in ("", ".", "..") for part in text.split("/")):
        raise ValueError(f"{text!r} is not a relative path: no leading or double '/', no '.' and no '..'")
    return text


RelativePath = Annotated[str, AfterValidator(_relative)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SAEEntry(BaseModel):
    """One row of a release file: one SAE.

    Attributes:
        id: name within the release; SAELens's, where SAELens has the release.
        site: a name of the site table.
        layer: counts from 0; null for the embedding, which exists once.
        width: label of ``d_sae``, such as ``16k``.
        d_sae: number of latents.
        d_in: width of the site's flattened activations.
        l0: mean number of active latents, from the folder name; null when it is not known.
        path: folder inside the repository that holds the weights file.
        neuronpedia: ``model/layer-source`` where Neuronpedia has a dashboard.
        canonical: whether ``…/canonical`` names this row. At most one for each site, layer and width.
        revision: commit of the repository to read; null for its main branch.
        sha256: hash of the weights file.
        note: what a user should know about this one SAE.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: RelativePath
    site: SiteName
    layer: Annotated[int, Field(ge=0)] | None
    width: str
    d_sae: Annotated[int, Field(gt=0)]
    d_in: Annotated[int, Field(gt=0)]
    l0: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    path: RelativePath
    neuronpedia: RelativePath | None = None
    canonical: bool = False
    revision: Name | None = None
    sha256: Sha256 | None = None
    note: Annotated[str, Field(min_length=1)] | None = None

    @property
    def canonical_id(self) -> str | None:
        """SAELens's ``…/canonical`` name of a canonical row, else None."""
        return _canonical_id(self.id) if self.canonical else None

    @field_validator("site", mode="before")
    @classmethod
    def _site_is_known(cls, site: object) -> object:
        try:
            return get_site(str(site)).name
        except UnknownNameError as error:
            raise ValueError(str(error)) from None

    @field_validator("layer", mode="after")
    @classmethod
    def _layer_suits_site(cls, layer: int | None, info: ValidationInfo) -> int | None:
        site = info.data.get("site")
        if site is not None and get_site(site).per_layer != (layer is not None):
            needs = "needs a layer" if layer is None else f"exists once: its layer is null, not {layer}"
            raise ValueError(f"site {site!r} {needs}")
        return layer

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
        if width is not None and width_label(d_sae) != width:
            raise ValueError(
                f"width {width!r} is {parse_width(width)} latents; write {width_label(d_sae)!r} for {d_sae}"
            )
        return d_sae


class SAERow(SAEEntry):
    """One released SAE with all that is needed to find it, check it and splice it: an entry and its release's fields.

    ``repo`` is a Hugging Face repository, or ``"bundled"`` for files inside this package.
    """

    release: str
    model: str
    repo: str
    format: Format = "gemma-scope"

    @property
    def weights_path(self) -> str:
        """The weights file's path inside the repository."""
        return f"{self.path}/{WEIGHTS_FILES[self.format]}"


class ReleaseFile(BaseModel):
    """A registry file: the fields that all rows of a release share, and the rows.

    Attributes:
        release: the file's stem and the release's name; SAELens's, where SAELens has it.
        canonical_release: SAELens's second name, under which only the canonical ids exist, or null.
        repo: ``owner/name`` on Hugging Face, or ``bundled``.
        model: the model the SAEs read, without its owner: ``gemma-2-2b``.
        license: SPDX identifier of the weights' licence.
        description: one line for people.
        notes: what a user should know about the release; where it differs from other catalogues, and why.
        format: layout of each row's folder.
        saes: the rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, title="Gemma Scope release")

    release: Name
    canonical_release: Name | None = None
    repo: Annotated[str, Field(pattern=r"^(bundled|[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)$")]
    model: Name
    license: Annotated[str, Field(min_length=1)]
    description: Annotated[str, Field(min_length=1)]
    notes: list[str] = Field(default_factory=list[str])
    format: Format = "gemma-scope"
    saes: Annotated[list[SAEEntry], Field(min_length=1)]

    @cached_property
    def rows(self) -> tuple[SAERow, ...]:
        """The rows, each with the release's fields, in the order of the file."""
        shared: dict[str, Any] = {key: getattr(self, key) for key in ("release", "model", "repo", "format")}
        return tuple(SAERow.model_construct(**dict(entry), **shared) for entry in self.saes)  # checked already

    @model_validator(mode="after")
    def _rows_agree(self) -> ReleaseFile:
        problems = _cross_row_problems(self.model_dump())
        if problems:
            raise PydanticCustomError(CROSS_ROWS, "{text}", {"text": "; ".join(map(str, problems))})
        return self


class Problem(NamedTuple):
    """One error of a registry file."""

    row: str
    field: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


def parse_release(data: object, source: str) -> ReleaseFile:
    """Check the content of a registry file.

    Args:
        data: what the YAML holds.
        source: the file's name, for the message.

    Raises:
        RegistryError: with every problem of the file, each with its row id and field.
    """
    try:
        return ReleaseFile.model_validate(data)
    except ValidationError as error:
        details = [d for d in error.errors(include_url=False) if d["type"] != CROSS_ROWS]
    problems = [_problem(detail, data) for detail in details]
    if isinstance(data, Mapping):
        problems += _cross_row_problems(cast("Mapping[str, object]", data))
    listed = "\n".join(f"  {problem}" for problem in problems)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise RegistryError(f"{source} breaks the registry schema in {count}:\n{listed}")


def load_yaml(text: str, source: str) -> object:
    """Parse YAML with the C loader where there is one; plain data only.

    Raises:
        RegistryError: with the line, when the text is not YAML.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise RegistryError(f"{source} is not YAML: {error}") from None


def read_release(path: str | Path) -> ReleaseFile:
    """Read and check one registry file, whose stem must be the release's name.

    Raises:
        RegistryError: when there is no such file, or with all of its problems.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RegistryError(f"{path} cannot be read: {error}") from None
    release = parse_release(load_yaml(text, str(path)), str(path))
    if release.release != path.stem:
        raise RegistryError(f"{path} holds release {release.release!r}: name the file {release.release}.yaml.")
    return release


def _canonical_id(id_: str) -> str:
    head, slash, _ = id_.rpartition("/")
    return f"{head}{slash}canonical"


def _raw_rows(data: object) -> Sequence[object]:
    rows = cast("Mapping[str, object]", data).get("saes") if isinstance(data, Mapping) else None
    return cast("list[object]", rows) if isinstance(rows, list) else ()


def _row_name(index: int, row: object) -> str:
    id_ = cast("Mapping[str, object]", row).get("id") if isinstance(row, Mapping) else None
    return id_ if isinstance(id_, str) and id_ else f"row {index + 1}"


def _problem(detail: ErrorDetails, data: object) -> Problem:
    """One pydantic error in our words: the row's id and the field in place of a location tuple."""
    loc = list(detail["loc"])
    row = ""
    if len(loc) > 1 and loc[0] == "saes" and isinstance(loc[1], int):
        row = _row_name(loc[1], _raw_rows(data)[loc[1]])
        loc = loc[2:]
    fields = SAEEntry.model_fields if row else ReleaseFile.model_fields
    field = ".".join(str(part) for part in loc)
    if detail["type"] == "missing":
        return Problem(row, field, "is missing")
    if detail["type"] == "extra_forbidden":
        return Problem(row, field, str(unknown_name("key", field, fields)))
    if detail["type"] == "value_error":
        return Problem(row, field, str(detail.get("ctx", {}).get("error", detail["msg"])))
    given = repr(detail["input"])
    return Problem(row, field, f"{detail['msg']}, not {given if len(given) < 80 else given[:77] + '...'}")


def _cross_row_problems(data: Mapping[str, object]) -> list[Problem]:
    """What single rows cannot know. Works on unchecked data, so that it can be reported beside other problems."""
    rows = [cast("Mapping[str, object]", row) for row in _raw_rows(data) if isinstance(row, Mapping)]
    ids = [id_ for row in rows if isinstance(id_ := row.get("id"), str)]
    problems = [Problem(id_, "id", f"{n} rows have this id") for id_, n in _repeated(ids)]
    canonical = [row for row in rows if row.get("canonical") is True and isinstance(row.get("id"), str)]
    places = [tuple(str(row.get(key)) for key in ("site", "layer", "width")) for row in canonical]
    crowded = dict(_repeated(places))
    for place, n in crowded.items():
        first = str(canonical[places.index(place)]["id"])
        text = "{n} rows of site {0}, layer {1}, width {2} are canonical".format(*place, n=n)
        problems.append(Problem(first, "canonical", text))
    names = [_canonical_id(str(r["id"])) for r, place in zip(canonical, places, strict=True) if place not in crowded]
    problems += [Problem(name, "canonical", f"{n} canonical rows would share this id") for name, n in _repeated(names)]
    taken = sorted(set(names) & set(ids))
    problems += [Problem(name, "canonical", "is the canonical name of another row") for name in taken]
    if (release := data.get("release")) is not None and data.get("canonical_release") == release:
        problems.append(Problem("", "canonical_release", f"is the release's own name, {release!r}"))
    return problems


def _repeated(values: Iterable[Any]) -> list[tuple[Any, int]]:
    return [(value, n) for value, n in Counter(values).items() if n > 1]
