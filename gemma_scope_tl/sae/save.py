"""Writing of SAEs in the layouts of Gemma Scope, Gemma Scope 2 and SAELens, so that tools for them can read them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from safetensors.torch import save_file

from gemma_scope_tl.errors import GemmaScopeError, known_name
from gemma_scope_tl.files import checked_path, replace_files
from gemma_scope_tl.sae.building import class_of
from gemma_scope_tl.sae.coder_files import refuse_table_units, written_config
from gemma_scope_tl.sae.config import OF_IDENTITY, Identity
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sae.layered_save import save_layered
from gemma_scope_tl.sae.provenance import config_of
from gemma_scope_tl.sae.units import fold_b_dec, scale_embedding
from gemma_scope_tl.weights.checks import CFG_NAME, CODER_NAME, CONFIG_NAME, PARAMS_NAME, WEIGHTS_NAME
from gemma_scope_tl.weights.load import canonical_arrays
from gemma_scope_tl.weights.modes import ordinary_tensors
from gemma_scope_tl.weights.safetensors_file import safetensors_header

Format = Literal["gemma-scope", "sae-lens", "gemma_scope_2"]
_DEFAULTS: tuple[Format, Format] = ("gemma-scope", "gemma_scope_2")
_ALIGN = 64
_ALIGN_FIELD = 0xD935  # the zip extra field that zipalign pads with
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20


@ordinary_tensors()
def save_sae(sae: Any, path: str | PathLike[str], format: Format | None = None, compress: bool = False) -> Path:
    """Write an SAE into a folder.

    ``"gemma-scope"`` writes ``params.npz`` as in the releases. Values are written exactly, with two exceptions. The
    subtraction of ``b_dec`` from the input is folded into ``b_enc``. An embedding SAE is converted back to the units of
    the rows of the embedding table, which may change the last bit of a value (:func:`scale_embedding`). bfloat16 has no
    npz type, so it is written as float32, which represents every bfloat16 exactly. Arrays are aligned to 64 bytes, so
    that they can be memory-mapped (which happens if nobody may write the file: ``chmod a-w``). Equal SAEs give equal
    files.

    ``"sae-lens"`` writes ``cfg.json`` and ``sae_weights.safetensors``, exactly, with SAELens's architecture names, so
    ``sae_lens.SAE.load_from_disk`` reads them without this package. Weights that were changed after loading are saved
    without the release, id and L0 of the loaded weights.

    ``"gemma_scope_2"`` writes ``params.safetensors`` with lower-case names and ``config.json``, as Gemma Scope 2 does,
    with the values and dtypes of ``"gemma-scope"``. It has no name for sites that are no module's input or output.

    Each file is written under a temporary name, flushed to the disk and renamed, so a crash leaves either the old file
    or the new one. Both files of a SAELens folder are complete before the first is renamed.

    Args:
        sae: an SAE or transcoder of this package, or a JumpReLU one of SAELens; or a crosscoder or cross-layer
            transcoder, which is written as :func:`~gemma_scope_tl.sae.layered_save.save_layered` says.
        path: the folder, which is created if necessary.
        format: the layout; by default ``"gemma-scope"``, and for coders of several layers ``"gemma_scope_2"``, the only
            one that they have.
        compress: whether to deflate the npz, which is then smaller but cannot be memory-mapped.

    Returns:
        The path of the folder.

    Raises:
        WeightsError: when the arrays of the SAE fail the checks.
        GemmaScopeError: when the layout cannot represent the SAE.
    """
    layered = isinstance(sae, LayeredCoder)
    format = cast("Format", known_name("format", format or _DEFAULTS[layered], get_args(Format)))
    if layered:
        if format != "gemma_scope_2" or compress:
            raise GemmaScopeError(f"A {sae.kind} is saved with format='gemma_scope_2' and without compress.")
        return save_layered(sae, path)
    class_of(sae.cfg.architecture())
    if sae.cfg.normalize_activations not in (None, "none"):
        raise GemmaScopeError(
            f"{sae.get_name()} normalises activations: fold the normalisation into its weights before saving."
        )
    state = {name: parameter.detach().cpu() for name, parameter in sae.state_dict().items()}
    arrays = canonical_arrays(state, sae.get_name())
    folder = checked_path(path)
    if format == "gemma-scope":
        released = _release_arrays(arrays, sae, _identity(sae))
        replace_files(folder, {PARAMS_NAME: lambda path: write_npz(path, released, compress)})
    elif format == "gemma_scope_2":
        replace_files(folder, _coder_writers(sae, arrays))
    else:
        cfg = json.dumps({**config_of(sae), "device": "cpu"}, indent=2, sort_keys=True)
        replace_files(
            folder, {WEIGHTS_NAME: lambda p: save_file(_unshared(arrays), p), CFG_NAME: lambda p: p.write_text(cfg)}
        )
    return folder


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], compress: bool = False) -> None:
    """Write arrays as an npz whose bytes depend only on the arrays, with the data of each aligned to 64 bytes."""
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with path.open("w+b") as file, zipfile.ZipFile(file, "w", method, allowZip64=True) as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type, info.external_attr = method, 0o644 << 16
            used = file.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + 4
            pad = -used % _ALIGN
            info.extra = _ALIGN_FIELD.to_bytes(2, "little") + pad.to_bytes(2, "little") + bytes(pad)
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _identity(sae: Any) -> Identity:
    metadata = {name: sae.cfg.metadata.get(name) for name in OF_IDENTITY}
    place = {"site": getattr(sae, "site", None), "layer": getattr(sae, "layer", None)}
    return Identity(sae.get_name(), **place, metadata=metadata).placed()


def _coder_writers(sae: Any, arrays: dict[str, torch.Tensor]) -> dict[str, Callable[[Path], object]]:
    """The writers of both files of Gemma Scope 2's layout, by name."""
    identity = _identity(sae)
    refuse_table_units(identity)
    config = json.dumps(written_config(sae, identity), indent=2)
    lower = {
        name.lower(): torch.from_numpy(np.ascontiguousarray(array))
        for name, array in _release_arrays(arrays, sae, identity).items()
    }
    shapes = {name: (array.dtype, array.shape) for name, array in lower.items()}

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(safetensors_header(shapes))  # aligned to 64 bytes, so that the arrays can be mapped
            for array in lower.values():
                file.write(array.view(torch.uint8).numpy().data)

    return {CODER_NAME: write, CONFIG_NAME: lambda path: path.write_text(config)}


def _release_arrays(arrays: dict[str, torch.Tensor], sae: Any, identity: Identity) -> dict[str, np.ndarray]:
    if sae.cfg.apply_b_dec_to_input:
        arrays = fold_b_dec(arrays)
    if identity.site is not None and identity.family.site(identity.site).joins == "embedding":
        arrays = scale_embedding(arrays, inverse=True, family=identity.family)
    if "W_skip" in arrays:  # name and orientation as in the release
        arrays = {**arrays, "affine_skip_connection": arrays["W_skip"].T}
        del arrays["W_skip"]
    return {name: (a.float() if a.dtype == torch.bfloat16 else a).numpy() for name, a in arrays.items()}


def _unshared(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share memory, which safetensors refuses."""
    seen: set[int] = set()
    result = {}
    for name, array in arrays.items():
        storage = array.untyped_storage().data_ptr()
        result[name] = array.clone() if storage in seen else array
        seen.add(storage)
    return result
