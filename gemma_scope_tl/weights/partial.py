"""Reading of some latents of an SAE: rows of the decoder, columns of the encoder, entries of the vectors.

From a local file with uncompressed arrays, only the pages with these values are read. From a remote file, only their
bytes are requested, all at once. A compressed array must be inflated completely.

In Gemma Scope's layout a latent is a row of ``W_dec`` but a column of ``W_enc [d_in, d_sae]``, with one value in each
row of the matrix. Reading a column of a 16k SAE touches 2,304 pages of 4 KiB for 9 KiB of values, and would transfer
the whole matrix from a remote file. Hence encoder columns are read from local files only, and :func:`read_cached`
keeps a copy with latents as rows.

The values that are read are checked (finite, thresholds not negative). The rest of the file is not checked, unless
the whole file was loaded before.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gemma_scope_tl.errors import WeightsError, WriteError
from gemma_scope_tl.files import replace_files
from gemma_scope_tl.weights.checks import (
    Expected,
    canonical_names,
    check_shapes,
    check_skip,
    check_values,
    matrix_shape,
    weights_error,
)
from gemma_scope_tl.weights.layout import ArrayLayout, map_array
from gemma_scope_tl.weights.load import check_float, inspect, load_array, load_arrays
from gemma_scope_tl.weights.npz import inspect_npz
from gemma_scope_tl.weights.safetensors_file import inspect_safetensors, safetensors_header
from gemma_scope_tl.weights.stamp import CACHE_VARIABLE, cache_folder, file_key

if TYPE_CHECKING:
    from gemma_scope_tl.weights.remote import RemoteFile

_NAME = "W_enc_rows"
_BLOCK = 1 << 26  # bytes transposed at a time


def read_cached(path: Path, latents: Sequence[int], expected: Expected) -> Arrays:
    """Read as :func:`read_local` with the encoder, but take its columns from a copy with latents as rows.

    The copy is made on the first call, from a file that was checked completely. It belongs to one version of the file
    (size, inode and times), so a changed file gets a new copy. If the copy cannot be written, a warning says so and the
    columns are read from the file itself.

    Raises:
        WeightsError: as :func:`load_arrays` while the copy is made, and as :func:`read_local`.
    """
    try:
        place = _rows(path, expected)
    except WriteError as error:
        warnings.warn(f"The encoder is read from the weights file, without a copy by rows: {error}", stacklevel=5)
        return read_local(path, latents, expected, encoder=True)
    found = read_local(path, latents, expected, encoder=False)
    rows = map_array(*place).index_select(0, torch.tensor(latents))
    b_dec = load_array(path, inspect(path, expected)["b_dec"])
    return {**found, "W_enc": rows.T.contiguous(), "b_dec": b_dec}


def _rows(path: Path, expected: Expected) -> tuple[Path, ArrayLayout]:
    key = hashlib.sha256(json.dumps(file_key(path), sort_keys=True).encode()).hexdigest()[:32]
    cache = cache_folder()
    if cache is None:
        raise WriteError(f"there is no home folder for it. Set {CACHE_VARIABLE} to a folder.")
    place = cache / "rows" / f"{key}.safetensors"
    if not place.is_file():
        encoder = load_arrays(path, expected, mapped=True)["W_enc"]
        replace_files(place.parent, {place.name: lambda temporary: _write_rows(temporary, encoder)})
    return place, inspect_safetensors(place)[_NAME]


def _write_rows(path: Path, encoder: torch.Tensor) -> None:
    """Write a safetensors file of ``encoder.T`` block by block, so that memory never holds a second copy of it."""
    d_in, d_sae = encoder.shape
    block = max(1, _BLOCK // (d_in * encoder.itemsize))
    with path.open("wb") as file:
        file.write(safetensors_header({_NAME: (encoder.dtype, (d_sae, d_in))}))
        for start in range(0, d_sae, block):
            rows = encoder[:, start : start + block].T.contiguous()
            file.write(rows.view(torch.uint8).numpy().data)


Arrays = dict[str, torch.Tensor]
_VECTORS = ("b_enc", "threshold", "log_threshold")
_ROWS = ("W_dec", *_VECTORS)  # the arrays that have a row, or an entry, for each latent


def read_local(path: Path, latents: Sequence[int], expected: Expected, encoder: bool) -> Arrays:
    """Read the arrays of some latents from a file on this machine.

    Args:
        path: npz or safetensors.
        latents: indices, in any order.
        expected: sizes that the file must have.
        encoder: whether to read the encoder columns and ``b_dec`` too.

    Returns:
        ``W_dec [n, d_out]``, ``b_enc [n]``, ``threshold [n]``, and with ``encoder`` also ``W_enc [d_in, n]`` and
        ``b_dec [d_out]``, as copies in float32 or the dtype of the file.

    Raises:
        WeightsError: as :func:`load_arrays`, for the values that are read.
    """
    layouts = inspect(path, expected)
    check_latents(latents, layouts["W_dec"].shape[0], str(path))
    index = torch.tensor(latents)
    found = {"W_dec": _whole(path, layouts["W_dec"]).index_select(0, index)}
    found |= {name: _whole(path, layouts[name]).index_select(0, index) for name in _VECTORS if name in layouts}
    if encoder:
        found["W_enc"] = _whole(path, layouts["W_enc"]).index_select(1, index)
        found["b_dec"] = _whole(path, layouts["b_dec"]).clone()
    return checked_arrays(found, str(path))


def read_remote(remote: RemoteFile, latents: Sequence[int], expected: Expected) -> Arrays:
    """Read ``W_dec [n, d_out]``, ``b_enc [n]`` and ``threshold [n]`` of some latents from a file on the Hub.

    Raises:
        WeightsError: when the file is compressed or column-major, or as :func:`load_arrays` for the values read.
    """
    layouts = _inspect_remote(remote, expected)
    shapes = {name: layout.shape for name, layout in layouts.items()}
    source = remote.source
    d_sae, d_out = matrix_shape("W_dec", shapes["W_dec"], source)
    check_shapes({"W_enc": (expected.d_in or d_out, d_sae), "b_dec": (d_out,), **shapes}, source, expected)
    layouts = {name: layout for name, layout in layouts.items() if name in _ROWS}
    check_latents(latents, d_sae, source)
    whole = "Load the whole SAE instead."
    for name, layout in layouts.items():
        if layout.deflated or layout.fortran or layout.swapped:
            raise weights_error(source, f"stores {name} compressed or by columns, so single rows cannot be read", whole)
    found = read_rows(remote, {name: (layout, latents) for name, layout in layouts.items()})
    return checked_arrays({name: a.squeeze(-1) if len(shapes[name]) == 1 else a for name, a in found.items()}, source)


def read_rows(
    source: RemoteFile,
    wanted: Mapping[str, tuple[ArrayLayout, Sequence[int]]],
    first: Mapping[str, int] | None = None,
) -> Arrays:
    """Read rows of stored arrays (entries of vectors) with one set of requests.

    Args:
        source: the file.
        wanted: the arrays, each with the rows to read.
        first: by array, the first value of each row to read; without it, rows are read whole.

    Returns:
        Arrays ``[number of rows, row width]`` by the same names.
    """
    names, ranges = [], []
    for name, (layout, rows) in wanted.items():
        width, begin = layout.count // layout.shape[0], (first or {}).get(name, 0)
        size = (width - begin) * layout.dtype.itemsize
        names += [name] * len(rows)
        ranges += [(layout.element_offset(row * width + begin), size) for row in rows]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    for name, raw in zip(names, source.read_many(ranges), strict=True):
        found[name].append(torch.frombuffer(bytearray(raw), dtype=wanted[name][0].dtype))
    return {name: torch.stack(rows) for name, rows in found.items()}


def _inspect_remote(remote: RemoteFile, expected: Expected) -> dict[str, ArrayLayout]:
    if remote.source.split(" ")[0].endswith(".safetensors"):
        layouts = inspect_safetensors(remote)
        names = canonical_names(layouts, remote.source)
        check_skip(names.values(), remote.source, expected)
        for layout in layouts.values():
            check_float(remote.source, layout)
        return {names[name]: layout for name, layout in layouts.items()}
    vectors = {} if expected.d_sae is None else {"b_enc": expected.d_sae, "threshold": expected.d_sae}
    return inspect_npz(remote, ["W_dec", "b_enc", "threshold"], vectors)


def _whole(path: Path, layout: ArrayLayout) -> torch.Tensor:
    return map_array(path, layout) if layout.mappable else load_array(path, layout)


def check_latents(latents: Iterable[int], d_sae: int, source: str) -> None:
    """Raise :class:`WeightsError` for an index that the file ``source`` with ``d_sae`` latents does not have."""
    wrong = [latent for latent in latents if not 0 <= latent < d_sae]
    if wrong:
        raise WeightsError(f"{source} has no latent {wrong[0]}: it has 0..{d_sae - 1}.")


def checked_arrays(arrays: Arrays, source: str) -> Arrays:
    """The arrays with thresholds in place of their logarithms, of finite values and with no negative threshold."""
    if "log_threshold" in arrays:
        arrays["threshold"] = arrays.pop("log_threshold").exp()
    check_values(arrays, source)
    return arrays
