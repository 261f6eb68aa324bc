"""Write the trained suite: weights in the bundle's layout, and registry files."""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import gemma_scope_tl as gs
from gemma_scope_tl.activations.source import Place
from gemma_scope_tl.contributing.coder_paths import coder_path, parse_coder_path
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry.render import render_release
from gemma_scope_tl.registry.schema import LABELS, WEIGHTS_FILES, parse_release
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.training.recipe import Recipe
from gemma_scope_tl.weights.checks import CODER_NAME
from gemma_scope_tl.weights.safetensors_file import safetensors_header
from scripts.bundled.bundles import Bundle
from scripts.bundled.files import write_atomic, write_text
from scripts.registry_files.gemma_scope_2 import target_l0

LICENSE = "MIT"
SITES = ("res", "mlp", "att", "transcoder", "embedding")


@dataclass(frozen=True)
class Published:
    """One SAE on disk and its held-out measurements."""

    place: Place
    folder: str
    d_in: int
    d_sae: int
    target: float
    affine: bool
    recipe: Recipe
    sha256: str
    size: int
    metrics: dict[str, Any]

    @property
    def id(self) -> str:
        """The id in the registry: the path below the site's folder, or with it for the embedding beside other sites."""
        return self.folder if self.place.layer is None else self.folder.split("/", 1)[1]

    @property
    def order(self) -> tuple[Any, ...]:
        """The place in tables: by site, layer, width, sparsity and skip connection."""
        return SITES.index(self.place.site), self.place.layer or 0, self.d_sae, self.metrics["l0"], self.affine


def label_of(target: float, layer: int, n_layers: int) -> str:
    """The label of a target L0 in Gemma Scope 2's releases.

    Raises:
        GemmaScopeError: no label has this target at this layer.

    >>> [label_of(target, layer, 6) for target, layer in ((10, 0), (15, 1), (20, 5), (60, 2))]
    ['small', 'small', 'small', 'medium']
    """
    targets = {target_l0("subset", label, layer, n_layers): label for label in LABELS}
    if target not in targets:
        raise GemmaScopeError(f"No label means an L0 of {target:g} at layer {layer} of {n_layers}: {targets}.")
    return targets[int(target)]


def write_coder(folder: Path, to: Path, bundle: Bundle, row: dict[str, Any]) -> None:
    """Write the trained SAE in `folder` as Gemma Scope 2's files into `to`, with the target as `l0`."""
    kind = gs.JumpReLUTranscoder if row["site"] == "transcoder" else gs.JumpReLUSAE
    sae = kind.from_folder(folder, model=bundle.name, site=row["site"], layer=row["layer"])
    sae.cfg.metadata.l0 = row["target_l0"]
    gs.save_sae(sae, to, format="gemma_scope_2")
    store_narrow(to / CODER_NAME)


def store_narrow(path: Path) -> None:
    """Write a file of Gemma Scope 2's layout again, with all arrays but the thresholds in bfloat16.

    That takes half of the place, and what is loaded as float32 has the same bits.

    Raises:
        ValueError: a value has more significant bits than bfloat16 has.
    """
    arrays = load_file(path)
    narrow = {name: array if name == "threshold" else array.bfloat16() for name, array in arrays.items()}
    lossy = [name for name, array in arrays.items() if not torch.equal(narrow[name].to(array.dtype), array)]
    if lossy:
        raise ValueError(f"{path}: bfloat16 cannot represent the values of {', '.join(lossy)}")
    data = [safetensors_header({name: (array.dtype, array.shape) for name, array in narrow.items()})]
    data += [array.contiguous().view(torch.uint8).numpy().tobytes() for array in narrow.values()]
    write_atomic(path, lambda temporary: temporary.write_bytes(b"".join(data)))


def name_of(root: Path, bundle: Bundle, row: dict[str, Any], l0: float, n_layers: int) -> str:
    """The folder below `root` of an SAE whose held-out L0 is `l0`.

    It is `<site>/layer_L/width_W/average_l0_N`, where N is that L0 (a second SAE of that name gets a decimal), or in
    Gemma Scope 2's layout `<folder>_all/layer_L_width_W_l0_<label>[_affine]`.
    """
    place = Place(row["site"], row["layer"])
    if bundle.layout == "gemma_scope_2":
        label = label_of(row["target_l0"], row["layer"], n_layers)
        kind, _, name = coder_path(row["site"], row["layer"], row["d_sae"], label, row.get("affine", False)).partition(
            "/"
        )
        return f"{kind}_all/{name}"
    head = f"{place.key}/width_{width_label(row['d_sae'])}/average_l0_"
    name = f"{head}{l0:.0f}"
    return f"{head}{l0:.1f}" if (root / name).exists() else name


def publish_folder(
    root: Path, folder: Path, name: str, bundle: Bundle, row: dict[str, Any], recipe: Recipe, metrics: dict[str, Any]
) -> Published:
    """Copy the SAE in `folder` to `root / name`."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, root / name)
    data = (root / name / WEIGHTS_FILES[bundle.layout]).read_bytes()
    size = sum(path.stat().st_size for path in (root / name).iterdir())
    digest = hashlib.sha256(data).hexdigest()
    place, affine = Place(row["site"], row["layer"]), bool(row.get("affine"))
    return Published(place, name, row["d_in"], row["d_sae"], row["target_l0"], affine, recipe, digest, size, metrics)


def write_registry(folder: Path, bundle: Bundle, published: list[Published]) -> list[Path]:
    """Write the bundle's registry files. Without labels, the middle one of the SAEs of each place is canonical."""
    paths: list[Path] = []
    alike: dict[tuple[Place, int], list[Published]] = defaultdict(list)
    for p in published:
        alike[p.place, p.d_sae].append(p)
    middle = {sorted(group, key=lambda p: p.metrics["l0"])[len(group) // 2].folder for group in alike.values()}
    notes = ["Canonical: the middle one of the SAEs of a layer and width.", "L0 is measured on held-out text."]
    if bundle.layout == "gemma_scope_2":
        middle = set[str]()
        notes = ["L0s are the targets of training, which the labels stand for, and not measurements."]
    for name, (sites, description) in bundle.releases.items():
        saes = sorted((p for p in published if p.place.site in sites), key=lambda p: p.order)
        if not saes:
            continue
        rows = [_row(p, bundle, canonical=p.folder in middle) for p in saes]
        about = {"release": name, "repo": bundle.name, "model": bundle.name, "format": bundle.layout}
        about |= {"license": LICENSE, "description": description}
        release = parse_release({**about, "notes": notes, "saes": rows}, f"{name}.yaml")
        paths.append(folder / f"{name}.yaml")
        write_text(paths[-1], render_release(release))
    return paths


def _row(p: Published, bundle: Bundle, *, canonical: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": p.id,
        "site": p.place.site,
        "layer": p.place.layer,
        "width": width_label(p.d_sae),
        "d_sae": p.d_sae,
        "d_in": p.d_in,
        "path": p.folder,
        "canonical": canonical,
        "sha256": p.sha256,
    }
    if bundle.layout == "gemma-scope":
        return row | {"l0": float(p.folder.rsplit("_", 1)[1])}
    said = parse_coder_path(p.folder)
    assert said is not None
    return row | {"l0": p.target, "label": said.label, "affine": said.affine}
