"""Loading of coders that span several layers, crosscoders and cross-layer transcoders, from folders of their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from gemma_scope_tl.counts import whole_number
from gemma_scope_tl.dtypes import parse_device, parse_dtype
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.families import Family, assumed_family, bare_name, family_named, named_family
from gemma_scope_tl.files import checked_path, is_folder
from gemma_scope_tl.sae.config import expected_of_row, expected_sizes, family_given, name_of
from gemma_scope_tl.sae.layered import LayeredCoder, LayeredKind
from gemma_scope_tl.sites import LAYERED_SITES, ModelDims
from gemma_scope_tl.weights.checks import CONFIG_NAME, Expected, weights_error
from gemma_scope_tl.weights.fetch import fetch_layers
from gemma_scope_tl.weights.hub_cache import known_sha256
from gemma_scope_tl.weights.layer_files import find_layers, holds_layers, inspect_layers, load_layer
from gemma_scope_tl.weights.layers_config import ALL, LayersConfig
from gemma_scope_tl.weights.modes import ordinary_tensors
from gemma_scope_tl.weights.npz import read_errors
from gemma_scope_tl.weights.seen import warn_if_unverified

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow


@dataclass(frozen=True)
class LayeredPlace:
    """What is known of a layered coder beside its arrays.

    Attributes:
        kind: ``crosscoder`` or ``clt``.
        layers: the model's layers; None for all of a model whose number of layers is unknown.
        model: the name of the model.
        family: the family of the model.
        l0: the target of the mean number of active latents.
    """

    kind: LayeredKind
    layers: tuple[int, ...] | None
    model: str | None = None
    family: Family | None = None
    l0: float | None = None


def is_layered_folder(path: str | PathLike[str]) -> bool:
    """Whether a path is a folder with files of the layers of a coder.

    Raises:
        WeightsError: when the folder cannot be read.
    """
    given = checked_path(path)
    with read_errors(given):
        return is_folder(given) and holds_layers(given)


@ordinary_tensors()
def load_layered_folder(
    path: str | PathLike[str],
    model: Any = None,
    kind: str | None = None,
    layers: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    *,
    family: str | None = None,
) -> LayeredCoder:
    """Load a crosscoder or cross-layer transcoder from a folder of ``params_layer_k.safetensors``.

    Args:
        path: the folder, with a ``config.json`` if there is one.
        model: the name of a model; or a model or its config, whose sizes are then checked against the files.
        kind: ``"crosscoder"`` or ``"clt"``; needed without a ``config.json``.
        layers: the model's layers that the files belong to; needed for a crosscoder without a ``config.json``.
        device, dtype: device and dtype of the parameters; thresholds are float32 or wider.
        family: family of a model of your own, whose name does not tell it.

    Raises:
        WeightsError: when files are missing, surplus or contradictory, or fail a check.
        GemmaScopeError: when it is not known which coder this is, or the model is of another family.

    Warns:
        AssumedFamilyWarning: nothing says the family of the model of a cross-layer transcoder.
    """
    to, wanted = parse_dtype(dtype), parse_device(device)
    folder = checked_path(path)
    with read_errors(folder):
        config = LayersConfig.of_folder(folder)
    place = _place(folder, config, (model, kind, layers, family))
    expected = expected_of_model(model, place)
    if config is not None:
        expected = config.complete(expected)
    paths = find_layers(folder, _count(model, place))
    return _read(paths, place, expected, wanted, to, (None,) * len(paths))


@ordinary_tensors()
def load_layered_row(
    row: SAERow,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    force_download: bool = False,
) -> LayeredCoder:
    """Fetch and load the crosscoder or cross-layer transcoder of a registry row, and check it against the row.

    Args:
        row: a row with ``layers``.
        device, dtype: device and dtype of the parameters; thresholds are float32 or wider.
        force_download: download files of the Hub again even if they are in the cache.

    Raises:
        WeightsError: when a file cannot be obtained or fails a check.

    Warns:
        UnverifiedSAEWarning: once, for a row whose files nobody has confirmed.
    """
    to, wanted = parse_dtype(dtype), parse_device(device)
    warn_if_unverified(row)
    paths = fetch_layers(row, force_download=force_download)
    config = checked_layers_config(paths[0].parent, row)
    place, expected = place_of_row(row, config), expected_of_row(row)
    if config is not None:
        expected = config.complete(expected)
    coder = _read(paths, place, expected, wanted, to, row.hashes)
    coder.row = row
    return coder


def checked_layers_config(folder: Path, row: SAERow) -> LayersConfig | None:
    """The ``config.json`` in the folder of a row of several layers, checked against the row; None without it.

    Raises:
        WeightsError: when the two contradict each other. Sizes are compared when the files are read.
    """
    with read_errors(folder):
        config = LayersConfig.of_folder(folder)
    if config is not None:
        config.check_row(row)
        config.check_layers(row.layers or (), f"the registry ({row.release}/{row.id})")
    return config


def place_of_row(row: SAERow, config: LayersConfig | None = None) -> LayeredPlace:
    """What a registry row of several layers says of its coder, with the L0 of the ``config.json``."""
    l0 = config.l0 if config is not None and config.l0 is not None else row.l0
    return LayeredPlace(cast("LayeredKind", row.site), row.layers, row.model, row.model_family, l0)


def expected_of_model(model: Any, place: LayeredPlace) -> Expected:
    """The sizes that follow from a model; none if only its name is known.

    Raises:
        WeightsError: when the model has no such layer.
    """
    last = place.layers[-1] if place.layers else 0
    return expected_sizes(model, LAYERED_SITES[place.kind], last, place.family)


def _place(
    folder: Path, config: LayersConfig | None, given: tuple[Any, str | None, Sequence[int] | None, str | None]
) -> LayeredPlace:
    """Combine what the user says with the ``config.json``; contradictions raise."""
    model, kind, layers, family = given
    if kind is not None and kind not in LAYERED_SITES:
        raise unknown_name("kind of coder of several layers", kind, LAYERED_SITES, f"{folder} holds such a coder.")
    config = config or LayersConfig(folder / CONFIG_NAME)
    if kind is not None and config.kind not in (None, kind):
        what = f"has type {config.kind}, but site={kind!r} was given"
        raise weights_error(config.source, what, "Leave the argument out, or check the file.")
    kind = kind or config.kind
    if kind is None:
        what = "holds a coder of several layers, and has no config.json that says of which kind"
        raise GemmaScopeError(f"{folder} {what}. Give site='clt' or site='crosscoder'.")
    chosen = _layers(layers)
    if chosen is None and isinstance(config.layers, tuple):
        chosen = config.layers
    if chosen is not None:
        config.check_layers(chosen, "layers=")
    elif kind == "crosscoder" and config.layers != ALL:
        what = "holds a crosscoder, and has no config.json that says which layers it reads"
        raise GemmaScopeError(f"{folder} {what}. Give layers=, such as layers=[5, 9, 12, 15].")
    name = name_of(model) or config.model
    known = family_given(model, family) or (family_named(config.family) if config.family else named_family(name))
    if known is None and kind == "clt":
        known = assumed_family(name, LAYERED_SITES[kind], str(folder))
    return LayeredPlace(cast("LayeredKind", kind), chosen, name and bare_name(name), known, config.l0)


def _layers(given: Sequence[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    numbers = [whole_number(one) for one in given] if not isinstance(given, (str, bytes)) else [None]
    found = [number for number in numbers if number is not None and number >= 0]
    if len(found) != len(numbers) or not found or found != sorted(set(found)):
        raise GemmaScopeError(f"layers= takes the coder's layers, ascending from 0, such as [5, 9]; given: {given!r}.")
    return tuple(found)


def _count(model: Any, place: LayeredPlace) -> int | None:
    """The number of layers that the coder must have, if it is known."""
    if place.layers is not None:
        return len(place.layers)
    if model is not None and not isinstance(model, str):
        config = getattr(model, "cfg", None) or getattr(model, "config", None) or model
        return ModelDims.from_config(config).n_layers
    dims = None if place.family is None or place.model is None else place.family.dims_of(place.model)
    return None if dims is None else dims.n_layers


def _read(
    paths: Sequence[Path],
    place: LayeredPlace,
    expected: Expected,
    device: torch.device,
    dtype: torch.dtype,
    sha256: Sequence[str | None],
) -> LayeredCoder:
    """Check the headers of all files, read one after the other, and make the coder."""
    files = inspect_layers(paths, expected)
    layers = [
        load_layer(path, layouts, number, dtype, device, sha256[number] or known_sha256(path))
        for number, (path, layouts) in enumerate(zip(files.paths, files.layouts, strict=True))
    ]
    names = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec", *(["W_skip"] if files.has_skip else []))
    coder = LayeredCoder(
        place.kind,
        place.layers or range(len(paths)),
        **{name: [arrays[name] for arrays in layers] for name in names},
        model_name=place.model,
        family=None if place.family is None else place.family.name,
        l0=place.l0,
    )
    coder.mark_as_loaded()
    return coder
