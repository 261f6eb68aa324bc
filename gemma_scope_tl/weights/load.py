"""Loading of checked tensors from either file layout: headers first, then data and checks in one pass.

A stored array that needs no conversion, in a file that is not modified in place (:func:`may_map`), is memory-mapped,
so its pages are read on access. Every other array is copied chunk by chunk into a tensor of the requested dtype and
device. The full check of a file (checksums, finite values) runs once and is recorded (``stamp.py``); biases and
thresholds are checked at every load.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.files import is_file
from gemma_scope_tl.registry.locate import BUNDLED_DATA
from gemma_scope_tl.weights.checks import (
    SCALING_KEYS,
    Expected,
    canonical_names,
    check_range,
    check_shapes,
    check_skip,
    check_values,
    value_range,
    weights_error,
)
from gemma_scope_tl.weights.hub_cache import check_sha256, in_hub_cache, wrong_hash
from gemma_scope_tl.weights.layout import ArrayLayout, Sink, map_array, stream
from gemma_scope_tl.weights.modes import is_out_of_memory, ordinary_tensors
from gemma_scope_tl.weights.npz import inspect_npz, read_errors
from gemma_scope_tl.weights.safetensors_file import inspect_safetensors
from gemma_scope_tl.weights.stamp import Stamp, file_key, read_stamp, write_stamp

_ANYONE_WRITES = 0o222


def may_map(path: Path) -> bool:
    """Whether a file may be memory-mapped. A later write to a mapped file would change the tensors.

    Files of the Hub's cache and of the package may be mapped, because they are replaced and never modified in place.
    Other files may be mapped only if nobody has the permission to write them.

    Raises:
        OSError: when the status of the file cannot be read.
    """
    return in_hub_cache(path) or path.resolve().is_relative_to(BUNDLED_DATA) or not path.stat().st_mode & _ANYONE_WRITES


_USE_FLOAT = "Use float16, float32 or float64 arrays."
Elementwise = Callable[[torch.Tensor], torch.Tensor]


def inspect(path: str | Path, expected: Expected | None = None) -> dict[str, ArrayLayout]:
    """The arrays of a weights file by canonical name, checked by its headers alone.

    Raises:
        WeightsError: for a file that is not a weights file, or has wrong names, dtypes or shapes.
    """
    path = Path(path)
    layouts = inspect_safetensors(path) if path.suffix == ".safetensors" else inspect_npz(path)
    names = canonical_names(layouts, str(path))
    for layout in layouts.values():
        check_float(path, layout)
    check_skip(names.values(), str(path), expected)
    check_shapes({names[name]: layout.shape for name, layout in layouts.items()}, str(path), expected)
    return {names[name]: layout for name, layout in layouts.items()}


def check_float(source: str | Path, layout: ArrayLayout) -> None:
    """Raise :class:`WeightsError` for an array of a dtype that is not floating."""
    if not layout.dtype.is_floating_point:
        raise weights_error(source, f"has {layout.name} of dtype {layout.dtype}, not a float", _USE_FLOAT)


@ordinary_tensors()
def load_arrays(
    path: str | Path,
    expected: Expected | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    elementwise: Mapping[str, Elementwise] | None = None,
    sha256: str | None = None,
    mapped: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Load and check the parameters in a ``.npz`` or ``.safetensors`` file, under their canonical names.

    Arrays that the file stores uncompressed and that need no conversion are memory-mapped, copy-on-write, if the file
    is not modified in place (:func:`may_map`). Others are copied, converted and moved in slices of 4 MiB, so the peak
    memory is the result and one slice. Keys may be ``W_enc`` or ``w_enc``. Shapes are checked before data is read.

    Args:
        path: the file, whose suffix determines the format.
        expected: sizes that the file must have.
        dtype: dtype of the result (thresholds are float32 or wider); None keeps the dtype of the file.
        device: device of the result.
        elementwise: increasing functions, by canonical name, applied before rounding to ``dtype``.
        sha256: the required sha256 of the whole file.
        mapped: True maps all arrays that can be mapped and False none, instead of following :func:`may_map`. Use True
            only for tensors with a short lifetime.

    Returns:
        ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_out]``, ``b_enc``, ``b_dec``, ``threshold``, and
        ``W_skip [d_out, d_in]`` for a skip transcoder.

    Raises:
        WeightsError: with the file, the problem and the remedy.
    """
    path = Path(path)
    try:
        with read_errors(path):
            mapped = (path.exists() and may_map(path)) if mapped is None else mapped
        read = Reading(path, dtype, torch.device(device), elementwise or {}, mapped)
        return _finished(read.run(inspect(path, expected), sha256), str(path))
    except WeightsError:
        if sha256 is not None and is_file(path):  # report a wrong file as such, not by the first check that it fails
            check_sha256(path, sha256)
        raise


@ordinary_tensors()
def load_array(path: Path, layout: ArrayLayout) -> torch.Tensor:
    """Copy one array into memory and compare its checksum.

    Raises:
        WeightsError: when it is truncated or corrupt.
    """
    tensor = allocated(path, layout.shape, layout.dtype, torch.device("cpu"))
    with read_errors(path):
        stream(path, {layout.name: layout}, {layout.name: [copier(tensor, layout.fortran, None)]}, (layout.name,))
    return tensor


class ValueRange:
    """A sink that records the smallest and largest value, both NaN if any value is NaN."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def __call__(self, index: int, chunk: torch.Tensor) -> None:
        low, high = value_range(chunk)
        if math.isnan(low) or math.isnan(self.low):
            self.low = self.high = math.nan
        else:
            self.low, self.high = min(self.low, low), max(self.high, high)


@dataclass
class Reading:
    """The destination and the checks of each array of one file, which is read in one pass (:meth:`run`).

    Attributes:
        path: the file.
        dtype, device, elementwise, mapped: as for :func:`load_arrays`.
        tensors: the destination of each array.
        sinks: the consumers of each array.
        ranges: the sinks that find the smallest and largest values that are checked.
        verify: names of the arrays whose checksum is compared.
    """

    path: Path
    dtype: torch.dtype | None
    device: torch.device
    elementwise: Mapping[str, Elementwise]
    mapped: bool
    tensors: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    sinks: dict[str, list[Sink]] = field(default_factory=dict[str, "list[Sink]"])
    ranges: dict[str, ValueRange] = field(default_factory=dict[str, ValueRange])
    verify: set[str] = field(default_factory=set[str])

    def run(self, layouts: Mapping[str, ArrayLayout], sha256: str | None) -> dict[str, torch.Tensor]:
        """Read and check all arrays; what a stamp says to be checked already is not read again.

        Args:
            layouts: the arrays by canonical name.
            sha256: the required sha256 of the whole file.

        Raises:
            WeightsError: when a check fails.
        """
        path = self.path
        with read_errors(path):
            key = file_key(path)
        stamp = read_stamp(path)
        fits = stamp is not None and sha256 in (None, stamp.sha256) and stamp.ranges.keys() == self.checked(layouts)
        known = stamp if fits else None
        for name, layout in layouts.items():
            self.plan(name, layout, check=known is None)
        digest = hashlib.sha256() if known is None and sha256 is not None else None
        with read_errors(path):
            stream(path, layouts, self.sinks, self.verify, digest)
        if digest is not None and sha256 is not None and digest.hexdigest() != sha256:
            raise wrong_hash(path, digest.hexdigest(), sha256)
        found = {name: (one.low, one.high) for name, one in self.ranges.items()}
        ranges = {**(known.ranges if known else {}), **found}
        for name, (low, high) in ranges.items():
            self.check_range(name, low, high)
        if known is None:
            write_stamp(path, Stamp(ranges, sha256), key)
        return self.tensors

    def checked(self, layouts: Mapping[str, ArrayLayout]) -> set[str]:
        """The names of the ranges that the full check of a file finds."""
        return set(layouts)

    def check_range(self, name: str, low: float, high: float) -> None:
        """Check the smallest and largest value of an array: finite, and not too large for the destination."""
        check_range(name, low, high, str(self.path))
        self.check_fits(name, low, high)

    def plan(self, name: str, layout: ArrayLayout, check: bool) -> None:
        """Map the array, or create the tensor for its copy. Small arrays are always checked."""
        check = check or len(layout.shape) < 2
        to = self.dtype_of(name, layout)
        sinks: list[Sink] = []
        if check:
            self.ranges[name] = one = ValueRange()
            self.verify.add(name)
            sinks.append(one)
        if self.stays(name, layout) and len(layout.shape) > 1:
            with read_errors(self.path):
                self.tensors[name] = map_array(self.path, layout)
        else:
            self.tensors[name] = allocated(self.path, layout.shape, to, self.device)
            sinks.append(copier(self.tensors[name], layout.fortran, self.elementwise.get(name)))
        self.sinks[name] = sinks

    def stays(self, name: str, layout: ArrayLayout) -> bool:
        """Whether an array can be mapped, as no conversion is needed."""
        same = self.dtype_of(name, layout) == layout.dtype and self.device.type == "cpu"
        return self.mapped and layout.mappable and same and name not in self.elementwise

    def check_fits(self, name: str, low: float, high: float) -> None:
        """Raise if values would become infinite in float16."""
        tensor = self.tensors[name]
        if tensor.dtype != torch.float16:
            return
        bounds = torch.tensor([low, high], dtype=torch.float64)
        scaled = self.elementwise[name](bounds) if name in self.elementwise else bounds
        if not bool(scaled.to(torch.float16).isfinite().all()):
            what = f"has values in {name} too large for float16"
            raise weights_error(self.path, what, "Use dtype='bfloat16' or 'float32'.")

    def dtype_of(self, name: str, layout: ArrayLayout) -> torch.dtype:
        """The dtype of the destination of an array."""
        to = self.dtype or layout.dtype
        wide = name in ("threshold", "log_threshold")
        return torch.promote_types(torch.float32, to) if wide and self.dtype is not None else to


def allocated(path: Path, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor. If memory is insufficient, the error says so instead of reporting a broken file."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = math.prod(shape) * dtype.itemsize / 2**30
        what = f"does not fit: {list(shape)} in {dtype} takes {size:.2f} GiB, which {device} does not have free"
        raise weights_error(path, what, "Free memory, give dtype='bfloat16', or use a narrower SAE.") from error


def copier(target: torch.Tensor, fortran: bool = False, function: Elementwise | None = None) -> Sink:
    """A sink that writes chunks into ``target``, whose memory is in C order for either order of the file."""

    def copy(index: int, chunk: torch.Tensor) -> None:
        chunk = chunk if function is None else function(chunk)
        if not fortran:
            target.view(-1)[index : index + len(chunk)].copy_(chunk)
            return
        rows = target.mT  # row by row in the order of the file
        width = rows.shape[1]
        while len(chunk):
            row, column = divmod(index, width)
            count = len(chunk) // width if column == 0 and len(chunk) >= width else 0
            taken = count * width or min(width - column, len(chunk))
            if count:
                rows[row : row + count].copy_(chunk[:taken].view(count, width))
            else:
                rows[row, column : column + taken].copy_(chunk[:taken])
            index, chunk = index + taken, chunk[taken:]

    return copy


@ordinary_tensors()
def canonical_arrays(
    arrays: Mapping[str, torch.Tensor | np.ndarray], source: str, expected: Expected | None = None
) -> dict[str, torch.Tensor]:
    """Convert arrays under any accepted names to checked tensors under the canonical names.

    ``affine_skip_connection`` becomes ``W_skip`` (its transpose), ``log_threshold`` becomes ``threshold`` (its
    exponential). A ``scaling_factor`` of ones is dropped. Any other value is refused, because no released Gemma Scope
    SAE has one and its meaning is not defined.

    Raises:
        WeightsError: as :func:`load_arrays`.
    """
    names = canonical_names(arrays, source)
    tensors = {names[name]: _tensor(array, name, source) for name, array in arrays.items()}
    check_skip(tensors, source, expected)
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, source, expected)
    check_values(tensors, source)
    return _finished(tensors, source)


def _finished(tensors: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Rename arrays to the parameters of an SAE, and convert other parametrisations."""
    for name in SCALING_KEYS:
        factor = tensors.pop(name, None)
        if factor is not None and not bool((factor == 1).all()):
            why = f"has a {name} other than 1, whose meaning is not defined for these SAEs"
            raise weights_error(source, why, "Fold it into the decoder, or use the original release.")
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
        check_values({"threshold": tensors["threshold"]}, source)
    if "affine_skip_connection" in tensors:
        tensors["W_skip"] = tensors.pop("affine_skip_connection").T
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _tensor(array: torch.Tensor | np.ndarray, name: str, source: str) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.clone() if array.is_inference() else array.detach()
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    except TypeError as error:
        raise WeightsError(f"{source} has {name} of dtype {array.dtype}, which is not a float. {_USE_FLOAT}") from error
