"""Reading of configurations in JSON, and of the tensor positions in safetensors files.

The header of a safetensors file is JSON with the position of every tensor, so tensors are mapped or read in parts
without the safetensors library. The format has no checksum: a flipped bit in a value is detected only if a sha256 is
known, from the registry row or from the Hub's cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from gemma_scope_tl.weights.checks import (
    CFG_NAME,
    MAX_ARRAYS,
    check_name,
    read_head,
    refuse_other_kinds,
    short,
    weights_error,
)
from gemma_scope_tl.weights.layout import ArrayLayout
from gemma_scope_tl.weights.npz import NamedFile, read_errors

_MAX_CFG = 1 << 20
_MAX_HEADER = 1 << 20
_MAX_DIMS = 8
_MAX_NUMBER = 1 << 63
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def read_cfg(folder: str | Path) -> dict[str, Any]:
    """The unchecked content of the ``cfg.json`` of a SAELens folder.

    Raises:
        WeightsError: when the file is missing, too large, or not a JSON object.
    """
    return read_json(Path(folder) / CFG_NAME)


def read_json(path: Path) -> dict[str, Any]:
    """The unchecked content of a configuration file.

    Raises:
        WeightsError: when the file is missing, too large, or not a JSON object.
    """
    read_head(path)
    with read_errors(path):
        if path.stat().st_size > _MAX_CFG:
            raise weights_error(path, f"is {path.stat().st_size} bytes, too large for a configuration")
        raw = path.read_bytes()
    try:
        cfg = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise weights_error(path, f"is not JSON ({error})") from error
    if not isinstance(cfg, dict):
        raise weights_error(path, "is not a JSON object")
    return cfg


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    size: int | None = None,
) -> bytes:
    """The bytes before the data in a safetensors file.

    Args:
        tensors: dtype and shape by name, in the order of their data.
        metadata: texts for the header.
        size: bytes of the result, padded with spaces; None for the next multiple of 64, which aligns the data.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    length = len(text) + -(len(text) + 8) % 64 if size is None else size - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def inspect_safetensors(file: str | Path | NamedFile) -> dict[str, ArrayLayout]:
    """The tensors of a safetensors file by name, from its header only.

    Args:
        file: a path, or an open file with a ``source`` for messages and a ``size``.

    Raises:
        WeightsError: when the file is missing, empty, truncated, not safetensors, or its header is invalid.
    """
    if not isinstance(file, str | Path):
        return _inspect(file, file.source, file.size)  # pyright: ignore[reportAttributeAccessIssue]
    path = Path(file)
    refuse_other_kinds(path, read_head(path), "a safetensors file")
    with read_errors(path), path.open("rb") as opened:
        return _inspect(opened, path, path.stat().st_size)


def _inspect(file: IO[bytes] | NamedFile, source: str | Path, size: int) -> dict[str, ArrayLayout]:
    file.seek(0)
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= size - 8:
        raise weights_error(source, f"is truncated, corrupt or not a safetensors file ({size} bytes)")
    if length > _MAX_HEADER:
        raise weights_error(source, f"has a header of {length} bytes, too large for an SAE")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_sound, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise weights_error(source, f"is truncated, corrupt or not a safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise weights_error(source, "is corrupt: its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise weights_error(source, "is corrupt: its __metadata__ is not a mapping of texts")
    if len(header) > MAX_ARRAYS:
        raise weights_error(source, f"holds {len(header)} tensors, which no SAE file does")
    layouts = [_layout(name, entry, source, 8 + length) for name, entry in header.items()]
    at = 8 + length
    for layout in sorted(layouts, key=lambda one: one.start):
        if layout.start != at:
            raise weights_error(source, f"is corrupt: {layout.name!r} does not begin where the tensor before it ends")
        at += layout.stored_size
    if at != size:
        raise weights_error(source, f"is truncated or corrupt: its tensors need {at} bytes, it has {size}")
    return {layout.name: layout for layout in layouts}


def _layout(name: str, entry: Any, source: str | Path, data_start: int) -> ArrayLayout:
    check_name(source, name)
    try:
        dtype, sizes, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if len(entry) != 3 or not isinstance(sizes, list) or not isinstance(offsets, list) or len(sizes) > _MAX_DIMS:
            raise TypeError("lists")
        shape, (begin, end) = tuple(sizes), offsets
        if not all(type(number) is int and 0 <= number < _MAX_NUMBER for number in (*shape, begin, end)):
            raise ValueError("sizes")
    except (KeyError, TypeError, ValueError) as error:
        raise weights_error(source, f"is corrupt: its header does not describe {name!r}") from error
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise weights_error(source, f"has {name!r} of type {short(dtype)}, not one of {', '.join(_DTYPES)}")
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if needed == 0 or end - begin != needed:
        raise weights_error(source, f"is corrupt: {name!r} of {list(shape)} needs {needed} bytes, has {end - begin}")
    return ArrayLayout(name, shape, _DTYPES[dtype], data_start + begin, needed)


def _sound(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    for key, value in pairs:
        (key + value if isinstance(value, str) else key).encode("utf-8")  # raises for an unpaired surrogate
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
