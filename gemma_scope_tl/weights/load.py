"""One checked set of tensors from either file layout: headers first, then the data, then the values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.weights.checks import SCALING_KEYS, Expected, canonical_names, check_shapes, check_values
from gemma_scope_tl.weights.npz import inspect_npz, read_member
from gemma_scope_tl.weights.safetensors_file import inspect_safetensors, read_safetensors
from gemma_scope_tl.weights.sniff import weights_error

_FLOATS = ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8")
_USE_FLOAT = "Use float16, float32 or float64 arrays."


def load_arrays(path: str | Path, expected: Expected | None = None) -> dict[str, torch.Tensor]:
    """The parameters in a ``.npz`` or ``.safetensors`` file under their canonical names, checked.

    Arrays that the file stores uncompressed are memory-mapped, copy-on-write. Keys may be ``W_enc`` or ``w_enc`` alike.
    Shapes are judged before any data is read.

    Args:
        path: the file; what it is follows from its suffix.
        expected: sizes that the file must have.

    Returns:
        ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_out]``, ``b_enc``, ``b_dec``, ``threshold``, perhaps
        ``W_skip [d_out, d_in]``; in the file's dtypes, on the CPU.

    Raises:
        WeightsError: naming the file, what is wrong and what to do.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        headers = inspect_safetensors(path)
        names = canonical_names(headers, str(path))
        check_shapes({names[k]: header.shape for k, header in headers.items()}, str(path), expected)
        return canonical_arrays(read_safetensors(path), str(path), expected)
    members = inspect_npz(path)
    names = canonical_names(members, str(path))
    for name, member in members.items():
        if member.dtype.newbyteorder("<").str not in _FLOATS:
            raise weights_error(path, f"has {name} of dtype {member.dtype}, not a float", _USE_FLOAT)
    check_shapes({names[k]: member.shape for k, member in members.items()}, str(path), expected)
    return canonical_arrays({k: read_member(path, m) for k, m in members.items()}, str(path), expected)


def canonical_arrays(
    arrays: Mapping[str, torch.Tensor | np.ndarray], source: str, expected: Expected | None = None
) -> dict[str, torch.Tensor]:
    """Arrays under any accepted names -> checked tensors under the canonical ones.

    ``affine_skip_connection`` becomes ``W_skip`` (its transpose), ``log_threshold`` becomes ``threshold`` (its
    exponential). A ``scaling_factor`` of ones is dropped; any other is refused, because no released Gemma Scope SAE has
    one and what it should multiply is not defined.

    Raises:
        WeightsError: as :func:`load_arrays`.
    """
    names = canonical_names(arrays, source)
    tensors = {names[name]: _tensor(array, name, source) for name, array in arrays.items()}
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, source, expected)
    for name in SCALING_KEYS:
        factor = tensors.pop(name, None)
        if factor is not None and not bool((factor == 1).all()):
            why = f"has a {name} that is not 1: what it multiplies is not defined for these SAEs"
            raise weights_error(source, why, "Fold it into the decoder, or use the original release.")
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "affine_skip_connection" in tensors:
        tensors["W_skip"] = tensors.pop("affine_skip_connection").T
    check_values(tensors, source)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _tensor(array: torch.Tensor | np.ndarray, name: str, source: str) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.detach()
    try:
        native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{source} has {name} of dtype {array.dtype}, which is not a float. {_USE_FLOAT}") from error
