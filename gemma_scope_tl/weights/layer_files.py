"""The files of a coder that spans several layers: one ``params_layer_k.safetensors`` for each of its n layers.

==========================  ============  ==================================================================
``w_enc``                   [d_in, m]     encoder of layer k (``x_k @ w_enc``)
``b_enc``, ``threshold``    [m]           theta > 0
``w_dec``                   [m, n, d_out] what the latents write at each of the n layers, earlier ones included
``b_dec``                   [d_out]       belongs to the output at layer k
``affine_skip_connection``  [d_in, d_out] optional (``x_k @ affine_skip_connection``)
==========================  ============  ==================================================================

The number in a name counts the coder's layers, which for a crosscoder are not those of the model. Latents write only
their own layer and later ones, so the planes ``w_dec[:, :k]`` must be zeros. That is checked once, in the pass that
checks all values of a file, and recorded with it; afterwards these planes are neither read nor held in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.files import is_file
from gemma_scope_tl.registry.schema import LAYER_FILE
from gemma_scope_tl.weights.checks import (
    REQUIRED,
    Expected,
    canonical_names,
    check_skip,
    weights_error,
)
from gemma_scope_tl.weights.hub_cache import check_sha256
from gemma_scope_tl.weights.layout import CHUNK, ArrayLayout, Sink, map_array
from gemma_scope_tl.weights.load import Reading, ValueRange, allocated, check_float, copier, may_map
from gemma_scope_tl.weights.modes import ordinary_tensors
from gemma_scope_tl.weights.npz import read_errors
from gemma_scope_tl.weights.safetensors_file import inspect_safetensors

SKIP_NAME = "affine_skip_connection"
EARLIER = "W_dec of earlier layers"
_PATTERN = re.compile(LAYER_FILE.replace(".", r"\.").format(r"(\d+)"))
_ANY = LAYER_FILE.format("*")
_INCOMPLETE = "Download the whole folder again."
_WRONG = "Check that the files belong together, then delete them and download them again."
Layouts = dict[str, ArrayLayout]


@dataclass(frozen=True)
class LayerFiles:
    """The files of one coder in the order of its layers, with the arrays in their headers.

    Attributes:
        paths: the files.
        layouts: the arrays of each file by canonical name.
    """

    paths: tuple[Path, ...]
    layouts: tuple[Layouts, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of latents of each layer."""
        return tuple(layouts["W_enc"].shape[1] for layouts in self.layouts)

    @property
    def sizes(self) -> tuple[int, int]:
        """``d_in`` and ``d_out``."""
        return self.layouts[0]["W_enc"].shape[0], self.layouts[0]["b_dec"].shape[0]

    @property
    def has_skip(self) -> bool:
        """Whether the layers have a linear path around their latents."""
        return SKIP_NAME in self.layouts[0]


def holds_layers(folder: Path) -> bool:
    """Whether a folder has a file that belongs to one layer of a coder of several layers."""
    return next(folder.glob(_ANY), None) is not None


def is_layer_file(name: str) -> bool:
    """Whether a file's name is that of one layer."""
    return _PATTERN.fullmatch(name) is not None


def find_layers(folder: Path, count: int | None = None) -> list[Path]:
    """The files of the layers in a folder, in their order.

    Args:
        folder: the folder.
        count: the number of layers, if it is known; None for as many as there are files.

    Raises:
        WeightsError: for a missing or surplus file.
    """
    with read_errors(folder):
        names = sorted(path.name for path in folder.glob(_ANY))
    if not names:
        raise weights_error(folder, f"has no {_ANY}", _INCOMPLETE)
    found = len(names) if count is None else count
    wanted = [LAYER_FILE.format(number) for number in range(found)]
    surplus = [name for name in names if name not in wanted]
    missing = [name for name in wanted if name not in names]
    if missing or surplus:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(surplus)} too"] if surplus else []
        for_layers = f"of {found} layers" if count is not None else f"with {found} files of layers"
        raise weights_error(folder, f"should hold a coder {for_layers}, but {' and '.join(parts)}", _INCOMPLETE)
    return [folder / name for name in wanted]


def surplus_files(folder: Path, count: int) -> list[str]:
    """The names of files of layers that a coder of ``count`` layers does not have."""
    wanted = {LAYER_FILE.format(number) for number in range(count)}
    return sorted(path.name for path in folder.glob(_ANY) if path.name not in wanted)


def inspect_layers(paths: Sequence[Path], expected: Expected) -> LayerFiles:
    """Check the files of a coder by their headers: names, dtypes and shapes, in each file and between them.

    Args:
        paths: the files in the order of the layers.
        expected: sizes that the coder must have; ``d_sae`` is the number of latents of all layers together.

    Raises:
        WeightsError: when a file is broken, or they do not belong together.
    """
    found = LayerFiles(tuple(paths), tuple(inspect_layer(path, expected, len(paths)) for path in paths))
    d_in, d_out = found.sizes
    for path, layouts in zip(paths, found.layouts, strict=True):
        sizes = layouts["W_enc"].shape[0], layouts["b_dec"].shape[0]
        if sizes != (d_in, d_out):
            what = f"reads {sizes[0]} and writes {sizes[1]} values, but {paths[0].name} {d_in} and {d_out}"
            raise weights_error(path, what, _WRONG)
        if (SKIP_NAME in layouts) != found.has_skip:
            one, other = ("has", "none") if SKIP_NAME in layouts else ("lacks", "one")
            raise weights_error(path, f"{one} {SKIP_NAME}, but {paths[0].name} has {other}", _WRONG)
    total = sum(found.widths)
    if expected.d_sae not in (None, total):
        what = f"holds {total} latents in {len(paths)} layers, should be {expected.d_sae} according to"
        raise weights_error(paths[0].parent, f"{what} {expected.said_by}", _WRONG)
    return found


def inspect_layer(path: Path, expected: Expected, count: int) -> Layouts:
    """The arrays of the file of one layer by canonical name, checked by its header alone.

    Args:
        path: the file.
        expected: as for :func:`inspect_layers`.
        count: number of layers of the coder.
    """
    layouts = inspect_safetensors(path)
    return checked_layer(layouts, str(path), expected, count)


def checked_layer(layouts: Mapping[str, ArrayLayout], source: str, expected: Expected, count: int) -> Layouts:
    """As :func:`inspect_layer`, for the arrays of a header."""
    names = canonical_names(layouts, source)
    for layout in layouts.values():
        check_float(source, layout)
    named = {names[name]: layout for name, layout in layouts.items()}
    check_layer_arrays({name: layout.shape for name, layout in named.items()}, source, expected, count)
    return named


def check_layer_arrays(shapes: Mapping[str, tuple[int, ...]], source: str, expected: Expected, count: int) -> None:
    """Check the names and shapes of the arrays of one layer, by canonical name.

    Raises:
        WeightsError: for an array that such a file does not have, or shapes that do not fit.
    """
    if surplus := sorted(set(shapes) - {*REQUIRED, SKIP_NAME}):
        raise weights_error(source, f"has {', '.join(surplus)}, which no layer of such a coder has", _WRONG)
    check_skip(shapes, source, replace(expected, transcoder=None))
    _check_layer_shapes(shapes, source, expected, count)


def _check_layer_shapes(shapes: Mapping[str, tuple[int, ...]], source: str, expected: Expected, count: int) -> None:
    enc, dec = shapes["W_enc"], shapes["W_dec"]
    if len(enc) != 2:
        raise weights_error(source, f"has w_enc of shape {list(enc)}, which is not a matrix", _WRONG)
    (d_in, m), d_out = enc, dec[-1]
    wanted = {
        "W_dec": (m, count, d_out),
        "b_enc": (m,),
        "threshold": (m,),
        "b_dec": (d_out,),
        SKIP_NAME: (d_in, d_out),
    }
    wrong = [
        f"{name} is {list(shapes[name])}, should be {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    if wrong:
        where = f"w_enc is {[d_in, m]}, and there are {count} layers"
        raise weights_error(source, f"has shapes that do not fit together: {'; '.join(wrong)} ({where})", _WRONG)
    asked = {"d_in": (d_in, expected.d_in), "d_out": (d_out, expected.d_out)}
    off = [f"{name} {got}, should be {want}" for name, (got, want) in asked.items() if want not in (None, got)]
    if off:
        raise weights_error(source, f"has {'; '.join(off)} according to {expected.said_by}", _WRONG)


@ordinary_tensors()
def load_layer(
    path: Path,
    layouts: Layouts,
    place: int,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    sha256: str | None = None,
) -> dict[str, torch.Tensor]:
    """Load and check the arrays of one layer. As :func:`~gemma_scope_tl.weights.load.load_arrays`, it maps what it can.

    Args:
        path, layouts: one of :class:`LayerFiles`.
        place: the layer's number among the coder's layers.
        dtype, device: dtype and device of the result; thresholds are float32 or wider.
        sha256: the required sha256 of the file.

    Returns:
        ``W_enc [d_in, m]``, ``b_enc [m]``, ``threshold [m]``, ``W_dec [m, n - place, d_out]``, ``b_dec [d_out]``, and
        ``W_skip [d_in, d_out]`` (``x @ W_skip``) if the coder has it. A mapped ``W_dec`` is a view with strides.

    Raises:
        WeightsError: with the file, the problem and the remedy.
    """
    try:
        with read_errors(path):
            mapped = may_map(path)
        reading = LayerReading(path, dtype, torch.device(device), {}, mapped, place=place)
        found = dict(reading.run(layouts, sha256))
    except WeightsError:
        if sha256 is not None and is_file(path):  # report a wrong file as such, not by the first check that it fails
            check_sha256(path, sha256)
        raise
    if SKIP_NAME in found:
        found["W_skip"] = found.pop(SKIP_NAME)
    return found


@dataclass
class LayerReading(Reading):
    """As :class:`Reading`, for one layer: planes of ``W_dec`` before its own are compared with zero and left out.

    Attributes:
        place: the layer's number among the coder's layers, which is the number of planes to leave out.
    """

    place: int = 0

    def checked(self, layouts: Mapping[str, ArrayLayout]) -> set[str]:
        """The names of the ranges that the full check finds, with one for the planes of earlier layers."""
        return {*layouts, *([EARLIER] if self.place else [])}

    def check_range(self, name: str, low: float, high: float) -> None:
        """As in the base class; planes of earlier layers must be zero, and thresholds positive."""
        if name != EARLIER:
            super().check_range(name, low, high)
            if name == "threshold" and low <= 0:
                raise weights_error(self.path, "has thresholds that are 0; those of such coders are positive")
        elif not low == high == 0:
            what = f"has latents that write layers before their own: w_dec[:, :{self.place}] is not zero"
            raise weights_error(self.path, what, "Check that the file has the number of its layer in its name.")

    def plan(self, name: str, layout: ArrayLayout, check: bool) -> None:
        """As in the base class, with ``W_dec`` from the layer's own plane on."""
        if name != "W_dec" or not self.place:
            super().plan(name, layout, check)
            return
        m, planes, d_out = layout.shape
        earlier, width = self.place * d_out, planes * d_out
        sinks: list[Sink] = []
        if check:
            self.ranges[name], self.ranges[EARLIER] = own, others = ValueRange(), ValueRange()
            sinks = [_Columns(width, earlier, width, own), _Columns(width, 0, earlier, others)]
        if self.stays(name, layout):
            with read_errors(self.path):
                self.tensors[name] = map_array(self.path, layout)[:, self.place :]
        else:
            shape = (m, planes - self.place, d_out)
            self.tensors[name] = target = allocated(self.path, shape, self.dtype_of(name, layout), self.device)
            if check:
                sinks.append(_Columns(width, earlier, width, copier(target)))
            else:  # the planes of earlier layers are known to be zeros, and are not read
                self._copy_planes(layout, target)
        self.sinks[name] = sinks

    def _copy_planes(self, layout: ArrayLayout, target: torch.Tensor) -> None:
        """Copy the planes from the layer's own on, a block of rows at a time."""
        with read_errors(self.path):
            stored = map_array(self.path, layout)
        rows = max(1, CHUNK // (stored[0].numel() * stored.itemsize))
        for start in range(0, len(stored), rows):
            target[start : start + rows].copy_(stored[start : start + rows, self.place :])


class _Columns:
    """A sink for a matrix in the order of its rows, which passes the columns ``[start, stop)`` on to another sink."""

    def __init__(self, width: int, start: int, stop: int, sink: Sink) -> None:
        self.width, self.start, self.stop, self.sink = width, start, stop, sink

    def __call__(self, index: int, chunk: torch.Tensor) -> None:
        taken = self.stop - self.start
        for row, column, piece in _pieces(index, chunk, self.width):
            first, last = max(self.start - column, 0), min(self.stop - column, piece.shape[1])
            if first < last:
                self.sink(row * taken + column + first - self.start, piece[:, first:last].reshape(-1))


def _pieces(index: int, chunk: torch.Tensor, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Divide a chunk into whole rows and parts of one row: the first row and column, and the piece as a matrix."""
    while len(chunk):
        row, column = divmod(index, width)
        whole = len(chunk) // width if column == 0 else 0
        taken = whole * width or min(width - column, len(chunk))
        yield row, column, chunk[:taken].view(max(whole, 1), -1)
        index, chunk = index + taken, chunk[taken:]
