"""A local copy of an encoder with latents as rows, so that a latent lies in one place on the disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from gemma_scope_tl.errors import WriteError
from gemma_scope_tl.files import replace_files
from gemma_scope_tl.weights.checks import Expected
from gemma_scope_tl.weights.layout import ArrayLayout, map_array
from gemma_scope_tl.weights.load import inspect, load_array, load_arrays
from gemma_scope_tl.weights.partial import Arrays, read_local
from gemma_scope_tl.weights.safetensors_file import inspect_safetensors
from gemma_scope_tl.weights.stamp import CACHE_VARIABLE, cache_folder, file_key

_NAME = "W_enc_rows"
_BLOCK = 1 << 26  # bytes transposed at a time


def read_cached(path: Path, latents: Sequence[int], expected: Expected) -> Arrays:
    """As :func:`read_local` with the encoder, whose columns come from the copy; it is made when there is none.

    The copy belongs to the file as it is now (size, inode and times); a changed file gets a new one. It is made from a
    file that was checked whole. Where it cannot be written, a warning says so and the file itself is read.

    Raises:
        WeightsError: as :func:`load_arrays` while it is made, and as :func:`read_local`.
    """
    try:
        place = _rows(path, expected)
    except WriteError as error:
        warnings.warn(f"There is no copy of the encoder by rows, so the file itself is read: {error}", stacklevel=5)
        return read_local(path, latents, expected, encoder=True)
    found = read_local(path, latents, expected, encoder=False)
    rows = map_array(*place).index_select(0, torch.tensor(latents))
    b_dec = load_array(path, inspect(path, expected)["b_dec"])
    return {**found, "W_enc": rows.T.contiguous(), "b_dec": b_dec}


def _rows(path: Path, expected: Expected) -> tuple[Path, ArrayLayout]:
    key = hashlib.sha256(json.dumps(file_key(path), sort_keys=True).encode()).hexdigest()[:32]
    cache = cache_folder()
    if cache is None:
        raise WriteError(f"there is no home folder for it. Name a folder with {CACHE_VARIABLE}.")
    place = cache / "rows" / f"{key}.safetensors"
    if not place.is_file():
        encoder = load_arrays(path, expected, mapped=True)["W_enc"]
        replace_files(place.parent, {place.name: lambda temporary: _write_rows(temporary, encoder)})
    return place, inspect_safetensors(place)[_NAME]


def _write_rows(path: Path, encoder: torch.Tensor) -> None:
    """A safetensors file of ``encoder.T``, block by block, so that no second copy of it stands in memory."""
    d_in, d_sae = encoder.shape
    size = encoder.numel() * encoder.itemsize
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    entry = {"dtype": kinds[encoder.dtype], "shape": [d_sae, d_in], "data_offsets": [0, size]}
    header = json.dumps({_NAME: entry}).encode()
    header += b" " * (-len(header) % 64 + 56)  # so that the data is aligned to 64 bytes
    block = max(1, _BLOCK // (d_in * encoder.itemsize))
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, d_sae, block):
            rows = encoder[:, start : start + block].T.contiguous()
            file.write(rows.view(torch.uint8).numpy().data)
