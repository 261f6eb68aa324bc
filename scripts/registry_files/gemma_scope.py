"""The releases of Gemma Scope (Gemma 2), derived from SAELens's catalogue.

SAELens has 17 Gemma Scope releases for nine repositories: eight have a ``-canonical`` twin that repeats one row for
each layer and width. Here each repository is one file, and its canonical rows are marked.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_scope_tl.errors import RegistryError
from gemma_scope_tl.registry.schema import parse_release
from gemma_scope_tl.registry.widths import parse_width
from gemma_scope_tl.sites import ModelDims, get_site
from scripts.registry_files.common import Derived, Difference, Differs, Row, add_note

CANONICAL_L0 = 100
_PATH = re.compile(r"(?:layer_(?P<layer>\d+)|embedding)/width_(?P<width>\w+)/average_l0_(?P<l0>\d+)")

DIMS = {  # Hugging Face configs of the models
    "gemma-2-2b": ModelDims(n_layers=26, d_model=2304, n_heads=8, d_head=256),
    "gemma-2-9b": ModelDims(n_layers=42, d_model=3584, n_heads=16, d_head=256),
    "gemma-2-9b-it": ModelDims(n_layers=42, d_model=3584, n_heads=16, d_head=256),
    "gemma-2-27b": ModelDims(n_layers=46, d_model=4608, n_heads=32, d_head=128),
}


@dataclass(frozen=True)
class Spec:
    """Facts about one release that the catalogue lacks, or states wrongly."""

    release: str
    model: str
    site: str
    description: str
    notes: tuple[str, ...] = ()
    row_notes: Mapping[str, str] | None = None
    unregistered: Mapping[int, tuple[int, ...]] | None = None  # L0s by layer of 16k files that SAELens does not list
    neuronpedia_warning: str | None = None

    @property
    def repo(self) -> str:
        """The repository on Hugging Face."""
        return f"google/{self.release}"


# L0s of the files of google/gemma-scope-2b-pt-transcoders by layer, from stored pages of the Hub's file tree (October
# 2024 to the end of 2025). In layers 5, 6, 10 and 25 a page dates from the upload, and there may be more files; no page
# of layers 9, 13, 16, 19 and 20 was found.
TRANSCODER_L0S = {
    0: (76, 115, 165, 221, 288),
    1: (65, 104, 173, 274, 409),
    2: (49, 87, 155, 271, 444),
    3: (54, 96, 167, 285, 460),
    4: (88, 157, 282, 486, 780),
    5: (87, 153, 272),
    6: (95, 176, 329),
    7: (70, 130, 245, 426, 709),
    8: (52, 92, 168, 314, 549),
    10: (88, 159, 820),
    11: (5, 10, 17, 32, 58, 108, 199, 354, 599, 954),
    12: (6, 10, 18, 32, 60, 111, 204, 359, 604, 955),
    14: (8, 14, 24, 44, 81, 196, 348, 585, 970, 1474),
    15: (8, 14, 25, 43, 78, 186, 334, 569, 928, 1417),
    17: (12, 20, 34, 60, 112, 272, 481, 797, 1246, 1665),
    18: (13, 21, 34, 57, 99, 232, 400, 699, 1060, 1433),
    21: (13, 22, 36, 60, 102, 217, 372, 630, 988, 1411),
    22: (15, 24, 40, 68, 117, 245, 408, 644, 1000, 1413),
    23: (25, 41, 69, 116, 303, 498, 765, 1132, 1557),
    24: (37, 59, 96, 161, 398, 634, 932, 1286, 1674),
    25: (41, 427, 660, 989, 1373, 1797),
}
_WRONG_DASHBOARDS = (
    "Neuronpedia computed this dashboard on the residual stream before the pre-MLP norm, and not on the transcoder's "
    "input, so that for most latents another token comes first"
)
_EMBEDDING = "The embedding SAEs' L0 is read from the folder name; SAELens lists none. Not trained on all tokens."
SPECS = (
    Spec(
        "gemma-scope-2b-pt-res",
        "gemma-2-2b",
        "res",
        "Residual stream of Gemma 2 2B after every layer, and its token embedding",
        (
            "layer_12/width_131k and the embedding have no canonical row, as in SAELens.",
            "The repository's card warns of labelling issues and of SAEs that appear twice: see the rows' notes.",
            _EMBEDDING,
        ),
        {"layer_21/width_16k/average_l0_70": "the repository doubts that this file is the SAE its folder names"},
    ),
    Spec("gemma-scope-2b-pt-mlp", "gemma-2-2b", "mlp", "MLP outputs of Gemma 2 2B in every layer"),
    Spec("gemma-scope-2b-pt-att", "gemma-2-2b", "att", "Attention head outputs of Gemma 2 2B in every layer"),
    Spec(
        "gemma-scope-2b-pt-transcoders",
        "gemma-2-2b",
        "transcoder",
        "Transcoders of Gemma 2 2B in every layer: MLP input to MLP output",
        (
            "SAELens lists, and Neuronpedia shows, one L0 of each layer. The other rows are unverified: their names "
            "are from stored pages of the repository's file tree, and there may be more files in layers 5, 6, 9, 10, "
            "13, 16, 19, 20 and 25.",
            "No row is canonical, as in SAELens, whose L0s run from 49 to 95 in layers 0-10 and from 5 to 41 above.",
            "Neuronpedia's transcoder dashboards were computed on the wrong tensor. Its own audit (scripts/"
            "gemma_transcoder_hook_check.py, August 2026) found an FVU of 6.8e4, an L0 of 664 in place of 12, and the "
            "same top token for 39 % of the latents.",
        ),
        unregistered=TRANSCODER_L0S,
        neuronpedia_warning=_WRONG_DASHBOARDS,
    ),
    Spec(
        "gemma-scope-9b-pt-res",
        "gemma-2-9b",
        "res",
        "Residual stream of Gemma 2 9B after every layer, and its token embedding",
        (
            "layer_20/width_262k and the embedding have no canonical row, as in SAELens.",
            "Some layer 20 variants were deleted from the repository after release; the rows are those that remain.",
            _EMBEDDING,
        ),
    ),
    Spec("gemma-scope-9b-pt-mlp", "gemma-2-9b", "mlp", "MLP outputs of Gemma 2 9B in every layer"),
    Spec("gemma-scope-9b-pt-att", "gemma-2-9b", "att", "Attention head outputs of Gemma 2 9B in every layer"),
    Spec(
        "gemma-scope-9b-it-res",
        "gemma-2-9b-it",
        "res",
        "Residual stream of Gemma 2 9B IT after layers 9, 20 and 31",
        (
            "The model is gemma-2-9b-it; SAELens says so in the -canonical release and gemma-2-9b in this one.",
            "The card: SAEs of the base model are usually enough for the instruction-tuned one.",
        ),
    ),
    Spec(
        "gemma-scope-27b-pt-res",
        "gemma-2-27b",
        "res",
        "Residual stream of Gemma 2 27B after layers 10, 22 and 34",
    ),
)


def derive(spec: Spec, catalogue: Mapping[str, Any]) -> Derived:
    """Derive one release file from SAELens's rows, which are checked and corrected; each correction is listed."""
    base, twin_name = catalogue[spec.release], f"{spec.release}-canonical"
    twin = catalogue.get(twin_name)
    differences: list[Difference] = []

    def differs(what: str, reason: str) -> None:
        differences.append(Difference(spec.release, what, reason))

    for name, entry in ((spec.release, base), (twin_name, twin)):
        if entry and entry["model"] != spec.model:
            differs(f"model of {name}: {entry['model']} -> {spec.model}", "the repository and the other name say so")
        if entry and entry["repo_id"] != spec.repo:
            raise RegistryError(f"SAELens now reads {name} from {entry['repo_id']}, not {spec.repo}.")
    rows = {sae["path"]: _row(spec, sae) for sae in base["saes"]}
    _check_l0(base["saes"], rows, differs)
    _mark_canonical(twin["saes"] if twin else [], rows, differs)
    _check_ties(rows, differs)
    _neuronpedia(spec, base["saes"], twin["saes"] if twin else [], rows, differs)
    _unregistered(spec, rows, differs)
    _notes(spec, rows, differs)
    data: dict[str, object] = {
        "release": spec.release,
        "canonical_release": twin_name if twin else None,
        "repo": spec.repo,
        "model": spec.model,
        "license": "CC-BY-4.0",
        "description": spec.description,
        "notes": list(spec.notes),
        "format": "gemma-scope",
        "saes": sorted(
            rows.values(), key=lambda row: (-1 if row["layer"] is None else row["layer"], row["d_sae"], row["l0"])
        ),
    }
    return Derived(parse_release(data, f"{spec.release}.yaml"), differences)


def _row(spec: Spec, sae: Mapping[str, Any]) -> Row:
    """A row from an id and a path. Paths are parsed only here."""
    match = _PATH.fullmatch(sae["path"])
    if match is None or sae["id"] != sae["path"]:
        raise RegistryError(f"SAELens's {spec.release} has an id or path of a new kind: {sae}.")
    layer = None if match["layer"] is None else int(match["layer"])
    site = get_site("embedding" if layer is None else spec.site)
    site.check_layer(layer, DIMS[spec.model])
    return {
        "id": sae["id"],
        "site": site.name,
        "layer": layer,
        "width": match["width"],
        "d_sae": parse_width(match["width"]),
        "d_in": site.d_in(DIMS[spec.model]),
        "l0": int(match["l0"]),
        "path": sae["path"],
    }


def _check_l0(saes: Iterable[Mapping[str, Any]], rows: Mapping[str, Row], differs: Differs) -> None:
    missing = [sae["id"] for sae in saes if sae.get("l0") is None]
    if missing:
        differs(f"l0 of {len(missing)} rows added: {', '.join(missing)}", "not in SAELens; read from the path")
    for sae in saes:
        if sae.get("l0") not in (None, rows[sae["path"]]["l0"]):
            differs(f"l0 of {sae['id']}: {sae['l0']} -> {rows[sae['path']]['l0']}", "the path says so")


def _mark_canonical(twins: Iterable[Mapping[str, Any]], rows: Mapping[str, Row], differs: Differs) -> None:
    """Mark the canonical rows that SAELens chose, and take their L0 from the row that they name."""
    missing = 0
    for sae in twins:
        row = rows[sae["path"]]
        row["canonical"] = True
        if sae["id"] != f"{sae['path'].rpartition('/')[0]}/canonical":
            raise RegistryError(f"SAELens's canonical id is not the path's: {sae}.")
        missing += sae.get("l0") is None
        if sae.get("l0") not in (None, row["l0"]):
            differs(f"l0 of {sae['id']}: {sae['l0']} -> {row['l0']}", f"its path is {sae['path']}")
            add_note(row, f"SAELens labels {sae['id']} L0 {sae['l0']}, though its path is this one")
    if missing:
        differs(f"l0 of {missing} canonical ids added", "not in SAELens; the L0 of the row that the id names")


def _by_place(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    places: defaultdict[str, list[Row]] = defaultdict(list)
    for path, row in rows.items():
        places[path.rpartition("/")[0]].append(row)
    return places


def _check_ties(rows: Mapping[str, Row], differs: Differs) -> None:
    """List places whose canonical row is not nearest to an L0 of 100, is not the only nearest, or does not exist."""
    for place, here in _by_place(rows).items():
        distance = min(abs(row["l0"] - CANONICAL_L0) for row in here)
        near = sorted(row["l0"] for row in here if abs(row["l0"] - CANONICAL_L0) == distance)
        canonical = [row["l0"] for row in here if row.get("canonical")]
        if not canonical and here[0]["site"] != "transcoder":
            differs(f"{place}: none of {len(here)} is canonical", "SAELens names none; left so")
        elif canonical and canonical[0] not in near:
            differs(f"{place}: canonical is L0 {canonical[0]}, nearest to 100 is {near}", "SAELens's choice kept")
        elif canonical and len(near) > 1:
            other = next(l0 for l0 in near if l0 != canonical[0])
            add_note(
                next(row for row in here if row.get("canonical")), f"average_l0_{other} is as near to an L0 of 100"
            )
            differs(f"{place}: L0s {near} are as near to 100; canonical is {canonical[0]}", "SAELens's choice kept")
    if all(row["site"] == "transcoder" for row in rows.values()):
        differs("no row is canonical", "SAELens has no -canonical release of the transcoders; left so")


def _neuronpedia(
    spec: Spec,
    saes: Iterable[Mapping[str, Any]],
    twins: Iterable[Mapping[str, Any]],
    rows: Mapping[str, Row],
    differs: Differs,
) -> None:
    """Put the Neuronpedia ids of both releases on their rows; ids that name another SAE are dropped."""
    saes, twins = list(saes), list(twins)
    on_rows = {sae["path"] for sae in saes if sae.get("neuronpedia")}
    added = sum(bool(sae.get("neuronpedia")) and sae["path"] not in on_rows for sae in twins)
    for sae in [*twins, *saes]:
        given, row = sae.get("neuronpedia"), rows[sae["path"]]
        if given is None:
            continue
        source = f"{spec.model}/{row['layer']}-gemmascope-{row['site']}-{row['width']}"
        if given not in (source, f"{source}__l0-{row['l0']}"):
            add_note(row, f"SAELens gives it the Neuronpedia id {given}, which is another SAE's")
            differs(f"neuronpedia id of {sae['id']} dropped: {given}", "it names another layer, width or L0")
        elif row.get("neuronpedia") is None:
            row["neuronpedia"] = given
        elif row["neuronpedia"] != given:
            add_note(row, f"also on Neuronpedia as {given}")
            differs(
                f"neuronpedia id of {sae['id']}: {row['neuronpedia']}", f"the canonical id's; also {given}, in the note"
            )
    if added:
        differs(f"neuronpedia id of {added} rows added", "SAELens has it on the canonical id only")
    repeated = [id_ for id_, n in Counter(row.get("neuronpedia") for row in rows.values()).items() if id_ and n > 1]
    if repeated:
        raise RegistryError(f"Two rows of {spec.release} share a Neuronpedia id: {repeated}.")


def _unregistered(spec: Spec, rows: dict[str, Row], differs: Differs) -> None:
    """Add the files that SAELens does not list, and warn of dashboards that show other activations."""
    paths = [
        f"layer_{layer}/width_16k/average_l0_{l0}" for layer, l0s in (spec.unregistered or {}).items() for l0 in l0s
    ]
    new = [path for path in paths if path not in rows]
    rows.update({path: {**_row(spec, {"id": path, "path": path}), "unverified": True} for path in new})
    if new:
        differs(f"{len(new)} rows added, unverified", "not in SAELens; named on stored pages of the repository")
    linked = [row for row in rows.values() if row.get("neuronpedia") and spec.neuronpedia_warning]
    for row in linked:
        row["neuronpedia_warning"] = spec.neuronpedia_warning
    if linked:
        differs(f"{len(linked)} Neuronpedia ids carry a warning", "their dashboards were computed on the wrong tensor")


def _notes(spec: Spec, rows: Mapping[str, Row], differs: Differs) -> None:
    """Note known doubts, and pairs whose L0s differ by one, which are the same SAE (or nearly) released twice."""
    for place, here in _by_place(rows).items():
        by_l0 = {row["l0"]: row for row in here}
        for l0 in sorted(by_l0):
            if l0 + 1 in by_l0:
                add_note(by_l0[l0], f"near-duplicate of average_l0_{l0 + 1}")
                add_note(by_l0[l0 + 1], f"near-duplicate of average_l0_{l0}")
                differs(f"{place}: average_l0_{l0} and average_l0_{l0 + 1} noted", "near-duplicates; both kept")
    for id_, note in (spec.row_notes or {}).items():
        add_note(rows[id_], note)
        differs(f"{id_} noted", note)
