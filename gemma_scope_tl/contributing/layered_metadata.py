"""Folders of crosscoders and cross-layer transcoders: their metadata for a draft, and the check of a row's files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.contributing.folder_claims import NAME, FolderMetadata
from gemma_scope_tl.contributing.repositories import Repository
from gemma_scope_tl.registry.schema import LABELS, LAYER_FILE
from gemma_scope_tl.registry.widths import parse_width
from gemma_scope_tl.sites import LAYERED_SITES
from gemma_scope_tl.weights.checks import CONFIG_NAME, Expected, weights_error
from gemma_scope_tl.weights.layer_files import SKIP_NAME, check_layer_arrays, is_layer_file
from gemma_scope_tl.weights.layers_config import LayersConfig

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

_NAME = re.compile(
    rf"(?:layer_(?P<layers>\d{{1,4}}(?:_\d{{1,4}})+)_)?width_(?P<width>[0-9]+[km]?)_l0_(?P<l0>{'|'.join(LABELS)}|"
    r"\d{1,9}(?:\.\d{1,9})?)(?P<affine>_affine)?(?:_seed_(?P<seed>\d{1,4}))?"
)


def files_of_layers(repository: Repository, folder: str) -> list[str]:
    """The paths of the files of layers in a folder, in the order of their names."""
    names = [path for path in repository.files if path.rpartition("/")[0] == folder]
    return sorted(path for path in names if is_layer_file(path.rpartition("/")[2]))


def read_layers(metadata: FolderMetadata, repository: Repository) -> None:
    """Read the headers, the ``config.json`` and the name of a folder with a file for each of several layers.

    Raises:
        WeightsError: when the files are broken or do not belong together.
    """
    paths = files_of_layers(repository, metadata.path)
    _check_names(repository, metadata.path, len(paths))
    shapes = check_files(repository, metadata.path, len(paths), Expected())
    metadata.d_in, metadata.d_sae = shapes[0]["W_enc"][0], sum(one["W_enc"][1] for one in shapes)
    metadata.d_out, metadata.has_skip = shapes[0]["b_dec"][0], SKIP_NAME in shapes[0]
    _read_name(metadata)
    path = f"{metadata.path}/{CONFIG_NAME}"
    named: Any = metadata.layers
    if path in repository.files:
        config = LayersConfig.parse(repository.config(path), Path(path))
        config.complete(Expected(d_sae=metadata.d_sae, skip=metadata.has_skip, said_by="the weights"))
        named = config.layers if named is None else named
        if isinstance(named, tuple):
            config.check_layers(named, NAME)
        metadata.families = None if config.family is None else frozenset({config.family})
        for key, value in {"site": config.kind, "model": config.model, "l0": config.l0}.items():
            if value is not None:
                metadata.claims[key][CONFIG_NAME] = value
    if not isinstance(named, tuple) and (named is not None or metadata.value("site") == "clt"):
        named = tuple(range(len(paths)))  # all layers
    if named is None:
        metadata.problems.append(f"Its layers are not known: neither {NAME} nor a {CONFIG_NAME} names them.")
    elif len(named) != len(paths):
        metadata.problems.append(f"It has files of {len(paths)} layers, but the layers {list(named)} are named.")
    metadata.layers = named or tuple(range(len(paths)))


def _read_name(metadata: FolderMetadata) -> None:
    """Read ``{crosscoder|clt}/[layer_7_13_17_22_]width_262k_l0_medium[_affine]``."""
    *above, name = metadata.path.split("/")
    if above and above[-1] in LAYERED_SITES:
        metadata.claims["site"][NAME] = above[-1]
    match = _NAME.fullmatch(name)
    if match is None:
        return
    if match["layers"]:
        metadata.layers = tuple(map(int, match["layers"].split("_")))
    metadata.width_label = parse_width(match["width"])
    metadata.named |= {"label": match["l0"]} if match["l0"] in LABELS else {}
    metadata.named |= {"seed": int(match["seed"])} if match["seed"] else {}
    if match["l0"] not in LABELS:
        metadata.claims["l0"][NAME] = float(match["l0"])
    if (match["affine"] is not None) != metadata.has_skip:
        metadata.problems.append(f"{NAME} and the weights disagree on whether there is a skip connection.")


def check_row_files(repository: Repository, row: SAERow, expected: Expected) -> None:
    """Check the headers and the ``config.json`` of a row of several layers.

    Raises:
        WeightsError: when they contradict each other or the row.
    """
    count = len(row.layers or ())
    _check_names(repository, row.path, count)
    path = f"{row.path}/{CONFIG_NAME}"
    if path in repository.files:
        config = LayersConfig.parse(repository.config(path), Path(path))
        config.check_row(row)
        config.check_layers(row.layers or (), "the row")
        expected = config.complete(expected)
    shapes = check_files(repository, row.path, count, expected)
    total = sum(one["W_enc"][1] for one in shapes)
    if total != row.d_sae:
        raise weights_error(f"{repository.name}/{row.path}", f"holds {total} latents, but the row says {row.d_sae}", "")


def check_files(
    repository: Repository, folder: str, count: int, expected: Expected
) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the arrays of each layer, checked in each file and between them.

    Raises:
        WeightsError: when a file is broken, or they do not belong together.
    """
    found: list[dict[str, tuple[int, ...]]] = []
    for number in range(count):
        path = f"{folder}/{LAYER_FILE.format(number)}".lstrip("/")
        shapes = repository.shapes(path)
        check_layer_arrays(shapes, f"{repository.name}/{path}", expected, count)
        found.append(shapes)
        expected = replace(
            expected, d_in=shapes["W_enc"][0], d_out=shapes["b_dec"][0], skip=SKIP_NAME in shapes,
            said_by=expected.said_by if number else f"{expected.said_by} or the file of the first layer",
        )  # fmt: skip
    return found


def _check_names(repository: Repository, folder: str, count: int) -> None:
    wanted = {f"{folder}/{LAYER_FILE.format(number)}".lstrip("/") for number in range(count)}
    there = set(files_of_layers(repository, folder))
    parts = [f"lacks {', '.join(sorted(wanted - there))}"] if wanted - there else []
    parts += [f"has {', '.join(sorted(there - wanted))} too"] if there - wanted else []
    if parts:
        raise weights_error(repository.name, f"should hold a coder of {count} layers, but {' and '.join(parts)}", "")
