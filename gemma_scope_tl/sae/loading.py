"""From a registry row, a folder or arrays to an SAE object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.saes.sae import SAEMetadata

from gemma_scope_tl.dtypes import parse_device, parse_dtype
from gemma_scope_tl.errors import GemmaScopeError, WeightsError, unknown_name
from gemma_scope_tl.files import checked_path, is_file, is_folder
from gemma_scope_tl.sae.base import GemmaScopeMixin
from gemma_scope_tl.sae.config import (
    HOW_TO_FINISH,
    UNFINISHED,
    expected_of_row,
    expected_sizes,
    make_config,
    make_metadata,
    name_of,
    site_in_metadata,
)
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder
from gemma_scope_tl.weights.checks import (
    CFG_NAME,
    PARAMS_NAME,
    WEIGHTS_NAME,
    Expected,
    short,
    value_range,
    weights_error,
)
from gemma_scope_tl.weights.fetch import fetch, known_sha256
from gemma_scope_tl.weights.fold import fold
from gemma_scope_tl.weights.load import Elementwise, canonical_arrays, inspect, load_arrays
from gemma_scope_tl.weights.modes import ordinary_tensors
from gemma_scope_tl.weights.npz import read_errors
from gemma_scope_tl.weights.safetensors_file import read_cfg

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

_CLASSES: dict[str, type[GemmaScopeMixin]] = {
    "jumprelu": JumpReLUSAE,
    "jumprelu_transcoder": JumpReLUTranscoder,
    "jumprelu_skip_transcoder": JumpReLUSkipTranscoder,
}
_FOLD_FIRST = "Fold it into the weights with SAELens and save again."


def class_of(architecture: str) -> type[GemmaScopeMixin]:
    """This package's class for one of SAELens' architecture words.

    Raises:
        UnknownNameError: for architectures that are not JumpReLU.
    """
    try:
        return _CLASSES[architecture]
    except (KeyError, TypeError):
        raise unknown_name("JumpReLU architecture", architecture, _CLASSES) from None


@ordinary_tensors()
def load_row(
    row: SAERow,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    force_download: bool = False,
) -> Any:
    """The SAE of a registry row; fetched, checked against the row, and for the embedding rescaled.

    Raises:
        WeightsError: when the file cannot be had or fails a check.
    """
    to, device = parse_dtype(dtype), parse_device(device)
    path, expected = fetch(row, force_download=force_download), expected_of_row(row)
    if row.format == "sae-lens":
        return _load_sae_lens(path, expected, row.model, row.site, row.layer, row, device, dtype)
    units = site_units(row.site, expected.d_in)
    arrays = load_arrays(path, expected, to, device, units, row.sha256 or known_sha256(path))
    return _build(arrays, row.model, row.site, row.layer, row, None, device, dtype, str(path))


@ordinary_tensors()
def load_folder(
    path: str | PathLike[str],
    model: Any = None,
    site: str | None = None,
    layer: int | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Any:
    """See :meth:`GemmaScopeMixin.from_folder`."""
    to, given, device = parse_dtype(dtype), checked_path(path), parse_device(device)
    with read_errors(given):
        file = _find_file(given)
    expected = expected_sizes(model, site, layer)
    if file.suffix == ".safetensors":
        return _load_sae_lens(file, expected, name_of(model), site, layer, None, device, dtype)
    d_in = inspect(file, expected)["W_enc"].shape[0] if site == "embedding" else None
    units = site_units(site, d_in)
    arrays = load_arrays(file, expected, to, device, units)
    return _build(arrays, name_of(model), site, layer, None, None, device, dtype, str(file))


@ordinary_tensors()
def build(
    arrays: Mapping[str, torch.Tensor | np.ndarray],
    model: Any = None,
    site: str | None = None,
    layer: int | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Any:
    """See :meth:`GemmaScopeMixin.from_arrays`."""
    parse_dtype(dtype)
    device, source = parse_device(device), "The set of arrays given"
    tensors = canonical_arrays(arrays, source, expected_sizes(model, site, layer))
    return _build(tensors, name_of(model), site, layer, None, None, device, dtype, source)


def embedding_scale(d_model: int) -> float:
    """``sqrt(d_model)`` rounded to float32, by which Gemma multiplies its token embedding.

    >>> embedding_scale(2304)
    48.0
    """
    return float(np.float32(math.sqrt(d_model)))


def scale_embedding(arrays: Mapping[str, torch.Tensor], inverse: bool = False) -> dict[str, torch.Tensor]:
    """Turn an SAE of the embedding table's rows into one of the scaled embedding, or back.

    Released embedding SAEs act on the rows ``e`` of the table; models and hooks see ``x = s e`` with ``s = sqrt(d)``.
    With ``W_enc' = W_enc / s`` the pre-activations are the same numbers, ``x W_enc' = e W_enc``, so ``b_enc`` and the
    thresholds stay as they are and the latents are unchanged. The reconstruction must grow by s as a whole::

        x_hat = s e_hat = s (f W_dec + b_dec) = f (s W_dec) + (s b_dec)

    so ``W_dec`` *and* ``b_dec`` are multiplied by s. One float32 rounding a value; going there and back may change the
    last bit, unless d is a power of four.
    """
    functions = _embedding_units(arrays["W_enc"].shape[0], inverse)
    return {name: functions[name](array) if name in functions else array for name, array in arrays.items()}


def site_units(site: str | None, d_in: int | None) -> dict[str, Elementwise]:
    """What each array of a release's file must go through to act on the site's own tensor, by name."""
    return _embedding_units(d_in) if site == "embedding" and d_in is not None else {}


def _embedding_units(d_model: int, inverse: bool = False) -> dict[str, Elementwise]:
    scale = embedding_scale(d_model)

    def up(t: torch.Tensor) -> torch.Tensor:
        return t * scale

    def down(t: torch.Tensor) -> torch.Tensor:
        return t / scale

    enc, dec = (up, down) if inverse else (down, up)
    return {"W_enc": enc, "W_dec": dec, "b_dec": dec}


def fold_b_dec(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fold the subtraction of ``b_dec`` from the input into ``b_enc`` (appendix A), in float32 or wider.

    ``(x - b_dec) W_enc + b_enc = x W_enc + (b_enc - b_dec W_enc)``; nothing else changes.
    """
    wide = {name: a.to(torch.promote_types(a.dtype, torch.float32)) for name, a in arrays.items()}
    return {**arrays, "b_enc": fold(wide, 1.0)["b_enc"]}


def _find_file(path: Path) -> Path:
    if is_file(path) or path.suffix in (".npz", ".safetensors"):
        return path
    if not is_folder(path):
        raise weights_error(path, "does not exist", "Check the path; a release on the Hub is for from_pretrained.")
    found = [path / name for name in (PARAMS_NAME, WEIGHTS_NAME) if is_file(path / name)]
    if len(found) != 1:
        what = "holds both layouts" if found else f"has neither {PARAMS_NAME} nor {CFG_NAME} with {WEIGHTS_NAME}"
        raise weights_error(path, what, "Give the file itself." if found else "Check the path.")
    return found[0]


def _load_sae_lens(
    file: Path,
    expected: Expected,
    model_name: str | None,
    site: str | None,
    layer: int | None,
    row: SAERow | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
) -> Any:
    cfg_path = file.parent / CFG_NAME
    cfg = _read_sae_lens_cfg(file.parent)
    class_of(cfg["architecture"])
    if cfg.get("normalize_activations") not in (None, "none"):
        given = short(cfg["normalize_activations"]).strip("'")
        what = f"normalises activations ({given}), whose factor is not in the file"
        raise weights_error(cfg_path, what, _FOLD_FIRST)
    expected = _agree(expected, cfg, cfg_path)
    folds = _folds(cfg)
    sha256 = (row.sha256 if row is not None else None) or known_sha256(file)
    as_is = None if folds else parse_dtype(dtype)
    arrays = load_arrays(file, expected, as_is, "cpu" if folds else device, sha256=sha256)
    metadata = dict(cfg.get("metadata") or {})
    if folds:
        arrays = fold_b_dec(arrays)
        metadata["folded_b_dec"] = True
    if site is None:
        site, layer = site_in_metadata(metadata)
    skip = cfg["architecture"] == "jumprelu_skip_transcoder"
    if skip != ("W_skip" in arrays):
        raise weights_error(file, f"and {CFG_NAME} disagree on whether there is a W_skip ({cfg['architecture']})")
    transcoder = bool(expected.transcoder)
    return _build(arrays, model_name, site, layer, row, metadata, device, dtype, str(file), transcoder)


def saved_dtype(path: str | PathLike[str]) -> str:
    """The dtype in which an SAE was saved: what ``cfg.json`` says, or that of ``W_enc`` in an npz.

    Raises:
        WeightsError: when the files are missing or are none.
        UnknownNameError: for a dtype that SAEs cannot have.
    """
    file = _find_file(Path(path))
    named = read_cfg(file.parent).get("dtype") if file.suffix == ".safetensors" else None
    stored = named if isinstance(named, str) else inspect(file)["W_enc"].dtype
    return str(parse_dtype(stored)).removeprefix("torch.")


def from_converter(
    given: dict[str, Any],
    state: Mapping[str, torch.Tensor],
    source: str,
    row: SAERow | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
) -> Any:
    """The SAE of a configuration and parameters, as SAELens's converters give them.

    Args:
        given: the configuration, of any version of SAELens.
        state: the parameters; they act on the site's own tensor.
        source: where they came from, for errors.
        row: their registry row, if they have one.
        device, dtype: of the SAE; without a dtype the configuration's.

    Raises:
        WeightsError: when a check fails.
        GemmaScopeError: for a configuration that is not of a JumpReLU SAE or normalises activations.
    """
    try:
        cfg = handle_config_defaulting(given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GemmaScopeError(f"The converter's configuration of {source} is not SAELens's ({error}).") from error
    kind = class_of(cfg["architecture"])
    if cfg.get("normalize_activations") not in (None, "none"):
        raise GemmaScopeError(f"{source} normalises activations ({cfg['normalize_activations']}). {_FOLD_FIRST}")
    arrays, metadata = canonical_arrays(state, source), dict(cfg.get("metadata") or {})
    if _folds(cfg):
        arrays, metadata["folded_b_dec"] = fold_b_dec(arrays), True
    site, layer = (row.site, row.layer) if row is not None else site_in_metadata(metadata)
    to = dtype or cfg.get("dtype") or "float32"
    name = None if row is None else row.model
    return _build(arrays, name, site, layer, row, metadata, device, to, source, kind.is_transcoder)


def folds_b_dec(folder: Path) -> bool:
    """Whether an SAE in SAELens' layout subtracts ``b_dec`` from its input, which loading folds into ``b_enc``."""
    return _folds(_read_sae_lens_cfg(folder))


def _folds(cfg: dict[str, Any]) -> bool:
    return bool(cfg.get("apply_b_dec_to_input")) and cfg["architecture"] == "jumprelu"


def _read_sae_lens_cfg(folder: Path) -> dict[str, Any]:
    raw = read_cfg(folder)
    if raw.get("architecture") == UNFINISHED:
        raise weights_error(folder / CFG_NAME, "is of a training checkpoint, not of an SAE", HOW_TO_FINISH)
    try:
        cfg = handle_config_defaulting(raw)
        _check_types(cfg)
        class_of(cfg["architecture"])
        return cfg
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"is not the configuration of a JumpReLU SAE ({str(error)[:300]})"
        raise weights_error(folder / CFG_NAME, what, "Only JumpReLU SAEs and transcoders can be loaded.") from error


def _check_types(cfg: dict[str, Any]) -> None:
    """Raise for fields that are no words or numbers, and for metadata that would replace SAELens' own methods."""
    if not isinstance(cfg["architecture"], str) or len(cfg["architecture"]) > 80:
        raise TypeError(f"its architecture is {short(cfg['architecture'])}")
    for name in ("d_in", "d_sae", "d_out"):
        if type(cfg.get(name)) not in (int, type(None)):
            raise TypeError(f"its {name} is {short(cfg[name])}")
    metadata = cfg.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise TypeError(f"its metadata is {short(metadata)}")
    for name in metadata:
        if name == "self" or hasattr(SAEMetadata, name):
            raise ValueError(f"its metadata has {short(name)}")


def _agree(expected: Expected, cfg: dict[str, Any], cfg_path: Path) -> Expected:
    """``expected`` completed by what a SAELens config says; a contradiction is an error."""
    transcoder = cfg["architecture"] != "jumprelu"
    if expected.transcoder not in (None, transcoder):
        kinds = "a transcoder, not an SAE" if transcoder else "an SAE, not a transcoder"
        raise weights_error(cfg_path, f"describes {kinds}", "Give the site that it belongs to.")
    said = {"d_in": cfg.get("d_in"), "d_sae": cfg.get("d_sae"), "d_out": cfg.get("d_out") if transcoder else None}
    for name, value in said.items():
        wanted = getattr(expected, name)
        if value is not None and wanted not in (None, value):
            raise weights_error(cfg_path, f"has {name} {value}, should be {wanted} according to {expected.said_by}")
    merged = {name: getattr(expected, name) or value for name, value in said.items()}
    return replace(expected, **merged, transcoder=transcoder, said_by=f"{expected.said_by} or {CFG_NAME}")


def _build(
    arrays: Mapping[str, torch.Tensor],
    model_name: str | None,
    site: str | None,
    layer: int | None,
    row: SAERow | None,
    base: dict[str, Any] | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
    source: str,
    transcoder: bool | None = None,
) -> Any:
    """Checked arrays in the site's units -> SAE. Parameters are cast one by one, so the peak is one copy and a bit."""
    to = parse_dtype(dtype)
    (d_in, d_sae), d_out = arrays["W_enc"].shape, arrays["W_dec"].shape[1]
    metadata = make_metadata(model_name, site, layer, row, base)
    skip = "W_skip" in arrays
    is_transcoder = transcoder if transcoder is not None else (skip or d_in != d_out or site == "transcoder")
    sizes = {"d_in": d_in, "d_sae": d_sae, **({"d_out": d_out} if is_transcoder else {})}
    cfg = make_config(sizes, skip, str(to).removeprefix("torch."), metadata)
    cfg.device = "meta"  # allocate nothing: the arrays become the parameters
    sae: Any = class_of(cfg.architecture())(cfg)
    wide = torch.promote_types(torch.float32, to)
    state = {name: _cast(a, name, wide if name == "threshold" else to, device, source) for name, a in arrays.items()}
    sae.load_state_dict(state, assign=True)
    sae.to(device=device)
    sae.eval()
    sae.site, sae.layer, sae.row = site, metadata.layer if site is not None else None, row
    sae.mark_as_loaded()
    return sae


def _cast(array: torch.Tensor, name: str, dtype: torch.dtype, device: str | torch.device, source: str) -> torch.Tensor:
    cast = array.to(dtype)
    if dtype == torch.float16 and array.dtype != dtype and not math.isfinite(sum(value_range(cast))):
        raise WeightsError(f"{source} has values in {name} too large for float16. Use dtype='bfloat16' or 'float32'.")
    return cast.to(device)
