"""Problems of a registry file: their text, and the checks that compare several rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from pydantic_core import ErrorDetails

from gemma_scope_tl.errors import RegistryError, unknown_name
from gemma_scope_tl.families import families, family_of_model, named_family, names_with
from gemma_scope_tl.sites import LAYERED_SITES, SITES

_SHOWN_PROBLEMS = 100
_MAPPING = "should be a mapping of keys"


class Problem(NamedTuple):
    """One error of a registry file."""

    row: str
    field: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


def error_text(detail: ErrorDetails, known: Iterable[str], words: Mapping[str, str]) -> str:
    """Describe one of pydantic's errors.

    Args:
        detail: the error.
        known: the valid keys, for an error about an unknown key.
        words: texts that replace pydantic's messages, by the type of the error.
    """
    kind = detail["type"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return str(unknown_name("key", detail["loc"][-1], known))
    if kind == "value_error":
        return str(detail.get("ctx", {}).get("error", detail["msg"]))
    given = repr(detail["input"])
    shown = given if len(given) < 80 else given[:77] + "..."
    return f"{words.get(kind, detail['msg'])}, not {shown}"


def problem_of(detail: ErrorDetails, data: object, of_row: Iterable[str], of_release: Iterable[str]) -> Problem:
    """Convert one of pydantic's errors, with the row id and the field in place of a location tuple.

    Args:
        detail: the error.
        data: the unchecked content of the file.
        of_row, of_release: the valid keys of a row and of a release.
    """
    loc = list(detail["loc"])
    row = ""
    if len(loc) > 1 and loc[0] == "saes" and isinstance(loc[1], int):
        row = row_name(loc[1], raw_rows(data)[loc[1]])
        loc = loc[2:]
    field = ".".join(str(part) for part in loc)
    return Problem(row, field, error_text(detail, of_row if row else of_release, {"model_type": _MAPPING}))


def broken_file(source: str, problems: Sequence[Problem]) -> RegistryError:
    """The error for a registry file with these problems, of which the first are shown."""
    shown = [f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        shown.append(f"  and {len(problems) - _SHOWN_PROBLEMS} more")
    listed = "\n".join(shown)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return RegistryError(f"{source} breaks the registry schema in {count}:\n{listed}")


def cross_row_problems(data: Mapping[str, object]) -> list[Problem]:
    """Problems that involve several rows. ``data`` is unchecked, so that they are reported with all other problems."""
    given = raw_rows(data)
    rows = [cast("Mapping[str, object]", row) for row in given if isinstance(row, Mapping)]
    ids = [_id_of(row) or index for index, row in enumerate(given)]
    problems = [Problem(id_, "id", _rows_text(at) + " have this id") for id_, at in _repeated(ids).items()]
    problems += _sites_of_other_families(data, rows)
    problems += _rows_of_several_layers(data, rows)
    canonical = [row for row in rows if row.get("canonical") is True and isinstance(row.get("id"), str)]
    places = [tuple(str(row.get(key)) for key in ("site", "layer", "width")) for row in canonical]
    crowded = _repeated(places)
    for place, at in crowded.items():
        first = str(canonical[at[0]]["id"])
        text = "{n} rows of site {0}, layer {1}, width {2} are canonical".format(*place, n=len(at))
        problems.append(Problem(first, "canonical", text))
    names = [canonical_id(str(r["id"])) for r, place in zip(canonical, places, strict=True) if place not in crowded]
    shared = _repeated(names)
    problems += [
        Problem(id_, "canonical", f"{len(at)} canonical rows would share this id") for id_, at in shared.items()
    ]
    taken = sorted(set(names) & set(ids))
    problems += [Problem(name, "canonical", "is the canonical name of another row") for name in taken]
    if (release := data.get("release")) is not None and data.get("canonical_release") == release:
        problems.append(Problem("", "canonical_release", f"is the release's own name, {release!r}"))
    return problems


def _sites_of_other_families(data: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> list[Problem]:
    """Problems of rows whose site exists, but not in the family of the release's model."""
    name, model = data.get("family"), data.get("model")
    by_name = {family.name: family for family in families()}
    family = by_name.get(str(name)) if name is not None else family_of_model(model if isinstance(model, str) else None)
    if family is None:  # reported as a problem of the release
        return []
    problems: list[Problem] = []
    for row in rows:
        site = row.get("site")
        base = LAYERED_SITES.get(site, site) if isinstance(site, str) else ""
        if isinstance(site, str) and base in SITES and base not in family.sites:
            unsaid = name is None and named_family(model if isinstance(model, str) else None) is None
            hint = f"If the model is of another family, state it as family: {names_with(site)}." if unsaid else ""
            error = unknown_name(f"site of {family.title}", site, family.sites, hint)
            problems.append(Problem(str(row.get("id")), "site", str(error)))
    return problems


def _rows_of_several_layers(data: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> list[Problem]:
    """Problems of crosscoders and cross-layer transcoders, which have layers and files of one format."""
    problems: list[Problem] = []
    for row in rows:
        site = row.get("site")
        if not isinstance(site, str) or site not in LAYERED_SITES:
            continue
        if row.get("layers") is None:
            problems.append(Problem(str(row.get("id")), "layers", f"a {site} needs its layers"))
        if data.get("format", "gemma-scope") != "gemma_scope_2":
            text = f"a {site} has a file for each layer, which only format: gemma_scope_2 defines"
            problems.append(Problem(str(row.get("id")), "site", text))
    return problems


def _repeated(values: Iterable[Any]) -> dict[Any, list[int]]:
    """The values that occur more than once, with their positions."""
    places: defaultdict[Any, list[int]] = defaultdict(list)
    for index, value in enumerate(values):
        places[value].append(index)
    return {value: at for value, at in places.items() if len(at) > 1}


def _rows_text(at: Sequence[int]) -> str:
    return f"rows {', '.join(str(index + 1) for index in at[:-1])} and {at[-1] + 1}"


def canonical_id(id_: str) -> str:
    """SAELens's ``…/canonical`` name for the row with this id."""
    head, slash, _ = id_.rpartition("/")
    return f"{head}{slash}canonical"


def raw_rows(data: object) -> Sequence[object]:
    """The rows of unchecked data; empty if it has no list of rows."""
    rows = cast("Mapping[str, object]", data).get("saes") if isinstance(data, Mapping) else None
    return cast("list[object]", rows) if isinstance(rows, list) else ()


def row_name(index: int, row: object) -> str:
    """The name of an unchecked row in messages: its id, or its number if it has no id."""
    return _id_of(row) or f"row {index + 1}"


def _id_of(row: object) -> str | None:
    id_ = cast("Mapping[str, object]", row).get("id") if isinstance(row, Mapping) else None
    return id_ if isinstance(id_, str) else None
