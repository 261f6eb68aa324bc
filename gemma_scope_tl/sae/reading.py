"""Reading of checked arrays and their identity from a registry row, a folder, arrays or a SAELens converter.

Loading has three steps. :mod:`gemma_scope_tl.weights.fetch` finds the file of a row. This module reads checked arrays
from the file, in the units of the site's tensor, and their :class:`~gemma_scope_tl.sae.config.Identity`. From these,
:mod:`gemma_scope_tl.sae.building` makes an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.files import checked_path, is_file, is_folder
from gemma_scope_tl.sae.coder_files import described, refuse_table_units
from gemma_scope_tl.sae.config import Identity, expected_of_row, expected_sizes, family_given, name_of
from gemma_scope_tl.sae.sae_lens_config import SAELensConfig
from gemma_scope_tl.sae.units import fold_b_dec, site_units
from gemma_scope_tl.weights.checks import (
    CFG_NAME,
    CODER_NAME,
    PARAMS_NAME,
    WEIGHTS_NAME,
    WHOLE_FOLDER,
    Expected,
    weights_error,
)
from gemma_scope_tl.weights.coder_config import CoderConfig
from gemma_scope_tl.weights.fetch import fetch
from gemma_scope_tl.weights.hub_cache import known_sha256
from gemma_scope_tl.weights.load import canonical_arrays, inspect, load_arrays
from gemma_scope_tl.weights.npz import read_errors
from gemma_scope_tl.weights.safetensors_file import read_cfg
from gemma_scope_tl.weights.seen import warn_if_unverified

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

Checked = tuple[dict[str, torch.Tensor], Identity]
"""The checked arrays of an SAE by canonical name, in the units of the site's tensor, and the identity of the SAE."""


def read_row(row: SAERow, device: torch.device, dtype: torch.dtype, force_download: bool = False) -> Checked:
    """Fetch and read the SAE of a registry row, and check it against the row.

    Args:
        row: the registry row.
        device, dtype: device and dtype of the arrays; thresholds are float32 or wider. If ``b_dec`` is folded, the
            stored dtype is kept.
        force_download: download a file of the Hub again even if it is in the cache.

    Raises:
        WeightsError: when the file cannot be obtained or fails a check.

    Warns:
        UnverifiedSAEWarning: once, for a row whose file nobody has confirmed.
    """
    warn_if_unverified(row)
    file = fetch(row, force_download=force_download)
    config = checked_config(file, row)
    return _read_file(file, Identity.of(row, str(file)), expected_of_row(row), device, dtype, config)


def read_folder(
    path: str | PathLike[str],
    place: tuple[Any, str | None, int | None, str | None],
    device: torch.device,
    dtype: torch.dtype,
) -> Checked:
    """Read the SAE in a folder or a weights file.

    Args:
        path, device, dtype: as for :meth:`LoadingMixin.from_folder`.
        place: model, site, layer and family, as there.
    """
    file = find_file(path)
    model, *_ = place
    identity = _named(str(file), *place)
    config = CoderConfig.beside(file) if file.name == CODER_NAME else None
    if config is not None:
        identity = described(config, identity)
    expected = expected_sizes(model, identity.site, identity.layer, identity.known_family)
    return _read_file(file, identity, expected, device, dtype, config)


def checked_config(file: Path, row: SAERow) -> CoderConfig | None:
    """The ``config.json`` beside the file of a row in Gemma Scope 2's layout, checked against the row; None without it.

    Raises:
        WeightsError: when the two contradict each other. Sizes and the kind are compared when the file is read.
    """
    config = CoderConfig.beside(file) if row.format == "gemma_scope_2" else None
    if config is not None:
        config.check_row(row)
    return config


def read_given(
    arrays: Mapping[str, torch.Tensor | np.ndarray],
    model: Any,
    site: str | None,
    layer: int | None,
    family: str | None = None,
) -> Checked:
    """Check arrays that a user gives. The arguments are those of :meth:`LoadingMixin.from_arrays`."""
    identity = _named("The set of arrays given", model, site, layer, family)
    expected = expected_sizes(model, site, identity.layer, identity.of_model)
    return canonical_arrays(arrays, identity.source, expected), identity


def read_converted(config: SAELensConfig, state: Mapping[str, torch.Tensor], identity: Identity) -> Checked:
    """Check parameters from one of SAELens's converters, which are in the units of the site's tensor.

    Raises:
        WeightsError: when a check fails.
    """
    return _configured(canonical_arrays(state, identity.source), identity, config)


def saved_dtype(path: str | PathLike[str]) -> torch.dtype:
    """The dtype in which an SAE was saved, from SAELens's ``cfg.json``, and in other layouts from ``W_enc``.

    Raises:
        WeightsError: when the files are missing or do not contain an SAE.
        UnknownNameError: for a dtype that SAEs cannot have.
    """
    file = find_file(path)
    named = read_cfg(file.parent).get("dtype") if _is_sae_lens(file) else None
    return parse_dtype(named if isinstance(named, str) else inspect(file)["W_enc"].dtype)


def find_file(path: str | PathLike[str]) -> Path:
    """The weights file of a folder, or the file itself.

    Raises:
        WeightsError: when there is no weights file, or more than one.
    """
    given = checked_path(path)
    with read_errors(given):
        if is_file(given) or given.suffix in (".npz", ".safetensors"):
            return given
        if not is_folder(given):
            raise weights_error(
                given, "does not exist", "Check the path; load a release on the Hub with from_pretrained."
            )
        files = [given / name for name in (PARAMS_NAME, WEIGHTS_NAME, CODER_NAME) if is_file(given / name)]
        layered = not files and any(given.glob("params_layer_*.safetensors"))
    if layered:
        raise weights_error(
            given, "holds a crosscoder or a cross-layer transcoder, with a file for each layer", WHOLE_FOLDER
        )
    if len(files) != 1:
        none = f"has neither {PARAMS_NAME} nor {CODER_NAME} nor {CFG_NAME} with {WEIGHTS_NAME}"
        what = "holds several layouts" if files else none
        raise weights_error(given, what, "Give the file itself." if files else "Check the path.")
    return files[0]


def _is_sae_lens(file: Path) -> bool:
    return file.suffix == ".safetensors" and file.name != CODER_NAME


def _named(source: str, model: Any, site: str | None, layer: int | None, family: str | None) -> Identity:
    return Identity(source, name_of(model), site, layer, of_model=family_given(model, family))


def _read_file(
    file: Path,
    identity: Identity,
    expected: Expected,
    device: torch.device,
    dtype: torch.dtype,
    described_by: CoderConfig | None = None,
) -> Checked:
    sha256 = (identity.row.sha256 if identity.row else None) or known_sha256(file)
    if file.name == CODER_NAME:
        refuse_table_units(identity)
        expected = expected if described_by is None else described_by.complete(expected)
        return load_arrays(file, expected, dtype, device, sha256=sha256), identity
    if not _is_sae_lens(file):
        d_in = expected.d_in or inspect(file, expected)["W_enc"].shape[0]
        units = site_units(identity.site, d_in, identity.family)
        return load_arrays(file, expected, dtype, device, units, sha256), identity
    config = SAELensConfig.read(file.parent)
    expected = config.complete(expected)
    if config.subtracts_b_dec:  # fold in the stored dtype, before rounding
        arrays = load_arrays(file, expected, sha256=sha256)
    else:
        arrays = load_arrays(file, expected, dtype, device, sha256=sha256)
    if config.has_skip != ("W_skip" in arrays):
        raise weights_error(file, f"and {CFG_NAME} disagree on whether there is a W_skip ({config.architecture})")
    return _configured(arrays, identity, config)


def _configured(arrays: dict[str, torch.Tensor], identity: Identity, config: SAELensConfig) -> Checked:
    """Arrays and identity, completed and converted according to a SAELens configuration."""
    metadata = config.metadata
    if config.subtracts_b_dec:
        arrays, metadata = fold_b_dec(arrays), {**metadata, "folded_b_dec": True}
    return arrays, replace(identity, metadata=metadata, transcoder=config.is_transcoder).placed()
