"""The single-layer releases of Gemma Scope 2 (Gemma 3), derived from SAELens's catalogue.

Each of the ten models has SAEs at three sites and transcoders, with and without a skip connection, in two series:
``all`` has every layer, and ``subset`` has four layers with more widths and L0s. An SAE's L0 is the target of its
training, by :func:`target_l0`. The technical report describes a complete grid (tables 1 and 2); entries of the grid
that SAELens does not list are added as ``unverified``, because nobody has been seen to load them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from gemma_scope_tl.errors import RegistryError
from gemma_scope_tl.families import Family, ModelDims, family_of_model, plain_name
from gemma_scope_tl.registry.schema import LABELS, Series, parse_release
from gemma_scope_tl.registry.widths import parse_width
from scripts.registry_files.common import Derived, Difference, Row

PREFIX = "gemma-scope-2-"
CONVERTER = "gemma_3"
SIZES = ("270m", "1b", "4b", "12b", "27b")
SUBSET_LAYERS = {
    "270m": (5, 9, 12, 15),
    "1b": (7, 13, 17, 22),
    "4b": (9, 17, 22, 29),
    "12b": (12, 24, 31, 41),
    "27b": (16, 31, 40, 53),
}
"""The layers of the subset, at 25, 50, 65 and 85 % of the depth."""
TARGETS: Mapping[tuple[Series, str], tuple[int, int]] = {
    ("subset", "small"): (10, 20),
    ("subset", "medium"): (30, 60),
    ("subset", "big"): (60, 150),
    ("all", "small"): (10, 20),
    ("all", "big"): (60, 120),
}
"""The target L0s of a label: at layer 0, and from a third of the depth on."""
_PATH = re.compile(
    r"(?P<folder>[a-z_]+)/(?P<name>layer_(?P<layer>\d+)_width_(?P<width>[0-9a-z]+)_l0_(?P<label>small|medium|big)"
    r"(?P<affine>_affine)?(?:_seed_(?P<seed>\d+))?)"
)


@dataclass(frozen=True)
class Kind:
    """A kind of coder: its word in names of releases, its site, its folder, and its name on Neuronpedia."""

    word: str
    site: str
    folder: str
    what: str
    neuronpedia: str


KINDS = (
    Kind("res", "res", "resid_post", "Residual stream of {model} after {layers}", "res"),
    Kind("mlp", "mlp", "mlp_out", "MLP outputs of {model} in {layers}", "mlp"),
    Kind("att", "att", "attn_out", "Attention head outputs of {model} in {layers}", "att"),
    Kind(
        "transcoders",
        "transcoder",
        "transcoder",
        "Transcoders of {model} in {layers}, with and without a skip connection: MLP input to MLP output",
        "transcoder",
    ),
)


@dataclass(frozen=True)
class Spec:
    """One release: a kind of coder, in one series, of one model."""

    size: str
    tuned: bool
    kind: Kind
    series: Series

    @property
    def release(self) -> str:
        """The name of the release, as in SAELens."""
        return f"{self.repo.rpartition('/')[2]}-{self.kind.word}{'-all' if self.series == 'all' else ''}"

    @property
    def repo(self) -> str:
        """The repository on Hugging Face."""
        return f"google/{PREFIX}{self.size}-{'it' if self.tuned else 'pt'}"

    @property
    def model(self) -> str:
        """The registry's name of the model."""
        return f"gemma-3-{self.size}{'-it' if self.tuned else ''}"

    @property
    def family(self) -> Family:
        """The family of the model."""
        return family_of_model(self.model)

    @property
    def dims(self) -> ModelDims:
        """The sizes of the model."""
        dims = self.family.dims_of(self.model)
        assert dims is not None
        return dims

    @property
    def folder(self) -> str:
        """The folder of the repository that holds the SAEs."""
        return f"{self.kind.folder}{'_all' if self.series == 'all' else ''}"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the series."""
        return tuple(range(self.dims.n_layers)) if self.series == "all" else SUBSET_LAYERS[self.size]

    @property
    def widths(self) -> tuple[str, ...]:
        """The widths of the series; SAELens lists 1m for the MLP outputs of one model too."""
        if self.series == "all":
            return ("16k", "262k")
        widest = self.kind.site == "res" or (self.kind.site, self.size) == ("mlp", "1b")
        return ("16k", "65k", "262k", *(("1m",) if widest else ()))

    def names(self) -> Iterator[str]:
        """The names of the folders of the complete grid."""
        labels = [label for label in LABELS if (self.series, label) in TARGETS]
        skips = ("", "_affine") if self.kind.site == "transcoder" else ("",)
        for layer, width, label, skip in product(self.layers, self.widths, labels, skips):
            yield f"layer_{layer}_width_{width}_l0_{label}{skip}"
        if self.series == "subset" and self.kind.site == "res":
            yield from (f"layer_{layer}_width_262k_l0_medium_seed_1" for layer in self.layers)

    def id_of(self, path: str) -> str:
        """SAELens's id of a path: the folder's name, and in the subset's transcoders the whole path."""
        whole = self.kind.site == "transcoder" and self.series == "subset"
        return path if whole else path.rpartition("/")[2]


SPECS = tuple(
    Spec(size, tuned, kind, series)
    for size in SIZES
    for tuned in (False, True)
    for kind in KINDS
    for series in ("subset", "all")
)


def target_l0(series: Series, label: str, layer: int, n_layers: int) -> int:
    """The target L0 of a label: ``floor(lo + (hi - lo) * min(1, 3 layer / n_layers))``, in whole numbers.

    >>> [target_l0("subset", "big", layer, 26) for layer in (0, 7, 13)]
    [60, 132, 150]
    """
    low, high = TARGETS[series, label]
    return low + (high - low) * min(n_layers, 3 * layer) // n_layers


def derive_all(catalogue: Mapping[str, Any]) -> list[Derived]:
    """Every release of the grid.

    Raises:
        RegistryError: when the catalogue has a release, an id or a path of a new kind.
    """
    known = {spec.release for spec in SPECS}
    new = [
        name
        for name, entry in catalogue.items()
        if entry.get("conversion_func") == CONVERTER and name.startswith(PREFIX) and name not in known
    ]
    if new:
        raise RegistryError(f"SAELens has releases of a new kind: {', '.join(new)}.")
    return [derive(spec, catalogue) for spec in SPECS]


def derive(spec: Spec, catalogue: Mapping[str, Any]) -> Derived:
    """Derive one release file from SAELens's rows, which are checked, and from the complete grid."""
    entry = catalogue.get(spec.release)
    listed = entry["saes"] if entry else []
    differences: list[Difference] = []
    if entry and (entry["repo_id"] != spec.repo or plain_name(entry["model"]) != spec.model):
        raise RegistryError(f"SAELens's {spec.release} is now of {entry['model']} in {entry['repo_id']}.")
    rows = {sae["path"]: _row(spec, sae["path"], sae["id"]) for sae in listed}
    compared = [sae for sae in listed if sae.get("l0") is not None]
    wrong = [sae for sae in compared if sae["l0"] != rows[sae["path"]]["l0"]]
    for sae in wrong:
        text = f"l0 of {sae['id']}: {sae['l0']}, by the formula {rows[sae['path']]['l0']}"
        differences.append(Difference(spec.release, text, "the formula does not hold"))
    _neuronpedia(spec, listed, rows, differences)
    grid = [f"{spec.folder}/{name}" for name in spec.names()]
    outside = sorted(set(rows) - set(grid))
    if outside:
        raise RegistryError(f"SAELens's {spec.release} has SAEs outside of the grid: {', '.join(outside)}.")
    missing = [path for path in grid if path not in rows]
    if missing:
        rows |= {path: _row(spec, path, spec.id_of(path)) | {"unverified": True} for path in missing}
        text = f"{len(missing)} of {len(grid)} rows added, unverified"
        differences.append(Difference(spec.release, text, "not in SAELens; of the complete grid"))
    data = _head(spec, len(missing)) | {"saes": sorted(rows.values(), key=_order)}
    file = parse_release(data, f"{spec.release}.yaml")
    return Derived(file, differences, len(compared), len(compared) - len(wrong))


def _row(spec: Spec, path: str, id_: str) -> Row:
    """A row from a path and an id. Paths are parsed only here."""
    match = _PATH.fullmatch(path)
    if match is None or match["folder"] != spec.folder or id_ != spec.id_of(path):
        raise RegistryError(f"SAELens's {spec.release} has an id or path of a new kind: {id_}, {path}.")
    layer, site = int(match["layer"]), spec.family.site(spec.kind.site)
    site.check_layer(layer, spec.dims)
    row: Row = {
        "id": id_,
        "site": site.name,
        "layer": layer,
        "width": match["width"],
        "d_sae": parse_width(match["width"]),
        "d_in": site.d_in(spec.dims),
        "l0": target_l0(spec.series, match["label"], layer, spec.dims.n_layers),
        "label": match["label"],
        "path": path,
    }
    if match["affine"]:
        row["affine"] = True
    if match["seed"]:
        row["seed"] = int(match["seed"])
    return row


def _neuronpedia(
    spec: Spec, listed: list[Mapping[str, Any]], rows: Mapping[str, Row], differences: list[Difference]
) -> None:
    """Put Neuronpedia's ids on their rows; an id that names another model, layer or width is dropped."""
    seen: dict[str, str] = {}
    for sae in listed:
        given, row = sae.get("neuronpedia"), rows[sae["path"]]
        if given is None:
            continue
        wanted = f"{spec.model}/{row['layer']}-gemmascope-2-{spec.kind.neuronpedia}-{row['width']}"
        if given != wanted:
            what = f"neuronpedia id of {sae['id']} dropped: {given}"
            differences.append(Difference(spec.release, what, "it names another model, layer or width"))
        elif given in seen:
            raise RegistryError(f"Two rows of {spec.release} share a Neuronpedia id: {seen[given]}, {sae['id']}.")
        else:
            seen[given] = sae["id"]
            row["neuronpedia"] = given


def _order(row: Row) -> tuple[Any, ...]:
    return row["layer"], row["d_sae"], row["l0"], "affine" in row, row.get("seed", -1)


def _head(spec: Spec, missing: int) -> dict[str, object]:
    """The fields of the release."""
    model = f"{spec.family.title} {spec.size.upper()}{' IT' if spec.tuned else ''}"
    *most, last = map(str, spec.layers)
    layers = "every layer" if spec.series == "all" else f"layers {', '.join(most)} and {last}"
    notes = ["L0s are the targets of training, which the labels stand for, and not measurements."]
    if spec.series == "all":
        notes.append(f"Layers {', '.join(map(str, SUBSET_LAYERS[spec.size]))} are in the subset's release too.")
    if missing:
        notes.append(
            f"{missing} rows are unverified: they are part of the grid that the technical report describes, but "
            "SAELens does not list them."
        )
    return {
        "release": spec.release,
        "repo": spec.repo,
        "model": spec.model,
        "license": "CC-BY-4.0",
        "description": spec.kind.what.format(model=model, layers=layers),
        "notes": notes,
        "format": "gemma_scope_2",
        "series": spec.series,
    }
