"""Checks of weights before use: names, shapes, dtypes, finite values, and thresholds that are not negative.

An SAE file has five arrays, and the file of a skip transcoder has a sixth one:

=============  ===============  ==========================================================
``W_enc``      [d_in, d_sae]    encoder; rows are the inputs (``x @ W_enc``)
``W_dec``      [d_sae, d_out]   decoder, a row per latent; d_out = d_in except for transcoders
``b_enc``      [d_sae]
``b_dec``      [d_out]
``threshold``  [d_sae]          theta of the JumpReLU
``W_skip``     [d_out, d_in]    optional (``x @ W_skip.T``); also as ``affine_skip_connection`` [d_in, d_out]
=============  ===============  ==========================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_scope_tl.errors import WeightsError

if TYPE_CHECKING:
    import torch

PARAMS_NAME = "params.npz"
CFG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
CODER_NAME, CONFIG_NAME = "params.safetensors", "config.json"
"""The files of Gemma Scope 2's layout; some of its folders have no ``config.json``."""
MAX_ARRAYS = 64
"""The largest number of arrays in a weights file. An SAE has five; more arrays cost memory and lengthen messages."""
WHOLE_FOLDER = "It is loaded together with the files of its other layers: give the folder that holds them."
REMEDY = "Delete the file and download it again (`hf download REPO FILE --force-download`)."
NOT_READ = "Check its permissions and the disk; the file may be sound."
_HEAD = 512
_MAX_NAME = 64  # characters
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")


def weights_error(source: str | Path, what: str, remedy: str = REMEDY) -> WeightsError:
    """Return a :class:`WeightsError` that names the file, the problem and the remedy.

    >>> print(weights_error("params.npz", "is empty (0 bytes)", "Download it again."))
    params.npz is empty (0 bytes). Download it again.
    """
    return WeightsError(f"{source} {what}. {remedy}".rstrip())


def short(value: object) -> str:
    """``repr`` of a value from a file, shortened: a malicious file could fill screens or send terminal control codes.

    >>> short("x" * 1000)[-9:]
    'xxxxxx...'
    """
    try:
        text = repr(value)
    except ValueError:  # Python refuses to convert integers of thousands of digits
        return "a number too large to be shown"
    return text if len(text) <= 80 else text[:77] + "..."


def check_name(source: str | Path, name: str) -> None:
    """Raise for an array name that is too long or has control characters, and so must not be repeated in messages."""
    if len(name) > _MAX_NAME or not name.isprintable():
        raise weights_error(source, f"is corrupt: it holds {short(name)}, which is not an array name")


def read_head(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        WeightsError: when the path does not exist, is not a file, or is an empty file.
    """
    try:
        if not path.exists():
            raise weights_error(path, "does not exist", "Check the path, or download the file first.")
        if not path.is_file():
            raise weights_error(path, "is not a file", "Give the path of the file, or of the folder that holds it.")
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise weights_error(path, f"cannot be read ({error.strerror or error})", NOT_READ) from error
    if not head:
        raise weights_error(path, "is empty (0 bytes)")
    return head


def refuse_other_kinds(path: Path, head: bytes, wanted: str) -> None:
    """Raise for files of other kinds, such as web pages, Git LFS pointers and pickles, and name the kind.

    Args:
        path: the file, for the message.
        head: its first bytes.
        wanted: the expected kind, for example ``"an npz archive"``.
    """
    if "safetensors" in wanted and head[8:9] == b"{":
        return  # safetensors: a length of 8 arbitrary bytes, then JSON
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "is a web page (HTML), not " + wanted + ": the download returned a login or error page"
    elif text.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not " + wanted + ": the repository was cloned without its large files"
    elif head[:1] == b"\x80" and head[1:2] <= b"\x05" and len(head) > 1:
        what = "is a Python pickle, not " + wanted + ". Pickles can run code and are never opened"
    elif head.startswith(b"\x93NUMPY") and "npz" in wanted:
        what = "is a single .npy array, not " + wanted
    elif text.startswith((b"{", b"[")) and "npz" in wanted:
        what = "is JSON text, not " + wanted
    else:
        return
    raise weights_error(path, what)


def starts_as_zip(head: bytes) -> bool:
    """Whether the first bytes are those of a zip archive, the container of an npz."""
    return head.startswith(_ZIP_STARTS)


REQUIRED = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
SKIP_KEYS = ("W_skip", "affine_skip_connection")
SCALING_KEYS = ("scaling_factor", "finetuning_scaling_factor")
_CANONICAL = {name.lower(): name for name in (*REQUIRED, *SKIP_KEYS, *SCALING_KEYS, "log_threshold")}
_WRONG_SAE = "Check that this is the file of the SAE you asked for, then delete it and download it again."
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Expected:
    """The sizes that a file must have according to another source, such as the registry.

    Attributes:
        d_in, d_sae, d_out: sizes, None if unknown. If ``d_out`` is None and ``transcoder`` is not True, the d_out of
            the file must equal its d_in.
        transcoder: whether input and output are different tensors; None if unknown.
        skip: whether there is a linear path around the latents; None if unknown.
        said_by: the source of the sizes, for the message.
    """

    d_in: int | None = None
    d_sae: int | None = None
    d_out: int | None = None
    transcoder: bool | None = None
    skip: bool | None = None
    said_by: str = "the registry"


def canonical_names(names: Iterable[str], source: str) -> dict[str, str]:
    """Map the names in a file to canonical names (``w_enc`` -> ``W_enc``), and check that they are complete.

    Raises:
        WeightsError: with every missing, unknown and duplicate array.
    """
    given = list(names)
    renamed = {name: _CANONICAL.get(name.lower(), "") for name in given}
    canonical = [new for new in renamed.values() if new]
    have_threshold = "log_threshold" in canonical
    problems = []
    if missing := [n for n in REQUIRED if n not in canonical and not (n == "threshold" and have_threshold)]:
        problems.append(f"lacks {', '.join(missing)}")
    if extra := sorted(name for name, new in renamed.items() if not new):
        problems.append(f"has unknown arrays {', '.join(extra)}")
    if doubled := sorted({new for new in canonical if canonical.count(new) > 1}):
        problems.append(f"has {', '.join(doubled)} twice")
    if sum(n in canonical for n in SKIP_KEYS) > 1 or {"threshold", "log_threshold"} <= set(canonical):
        problems.append("has two arrays for the same parameter")
    if problems:
        raise weights_error(source, f"{' and '.join(problems)}; it has {', '.join(sorted(given))}", _WRONG_SAE)
    return renamed


def check_skip(names: Iterable[str], source: str, expected: Expected | None = None) -> None:
    """Check whether a file with these canonical names has the linear path that ``expected`` says.

    Raises:
        WeightsError: when it has one and should not, or the reverse.
    """
    has = any(name in SKIP_KEYS for name in names)
    if expected is not None and has and expected.transcoder is False:
        what = f"has a skip connection, which an SAE at the site according to {expected.said_by} does not have"
        raise weights_error(source, what, _WRONG_SAE)
    if expected is not None and expected.skip not in (None, has):
        what = "has a skip connection, should have none" if has else f"lacks {SKIP_KEYS[1]} (the skip connection)"
        raise weights_error(source, f"{what} according to {expected.said_by}", _WRONG_SAE)


def matrix_shape(name: str, shape: tuple[int, ...], source: str) -> tuple[int, int]:
    """The two sizes of a matrix.

    Raises:
        WeightsError: for an array that does not have two dimensions, or has no entries.
    """
    if name == "W_dec" and len(shape) == 3:
        what = f"has w_dec {list(shape)}, so it is a layer of a crosscoder or of a cross-layer transcoder"
        raise weights_error(source, what, WHOLE_FOLDER)
    if len(shape) != 2 or 0 in shape:
        raise weights_error(source, f"has {name} of shape {shape}, which is not a matrix", _WRONG_SAE)
    return shape[0], shape[1]


def check_shapes(shapes: Mapping[str, tuple[int, ...]], source: str, expected: Expected | None = None) -> None:
    """Check the shapes of canonical arrays against each other and against ``expected``.

    Raises:
        WeightsError: with every array of a wrong shape, and the shape that it should have.
    """
    expected = expected or Expected()
    d_in, d_sae = matrix_shape("W_enc", shapes["W_enc"], source)
    _, d_out = matrix_shape("W_dec", shapes["W_dec"], source)
    wanted: dict[str, tuple[int, ...]] = {
        "W_dec": (d_sae, d_out if expected.transcoder is not False else d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_out,),
        "threshold": (d_sae,),
        "log_threshold": (d_sae,),
        "W_skip": (d_out, d_in),
        "affine_skip_connection": (d_in, d_out),
    }
    wrong = [
        f"{name} is {list(shapes[name])}, should be {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    if wrong:
        where = f"W_enc is {[d_in, d_sae]}"
        raise weights_error(source, f"has shapes that do not fit together: {'; '.join(wrong)} ({where})", _WRONG_SAE)
    asked = {"d_in": (d_in, expected.d_in), "d_sae": (d_sae, expected.d_sae), "d_out": (d_out, expected.d_out)}
    off = [f"{name} {got}, should be {want}" for name, (got, want) in asked.items() if want not in (None, got)]
    if off:
        raise weights_error(source, f"has {'; '.join(off)} according to {expected.said_by}", _WRONG_SAE)


def check_values(arrays: Mapping[str, torch.Tensor], source: str) -> None:
    """Check that dtypes are floating, values finite and thresholds >= 0. Each array is read once and not copied.

    Raises:
        WeightsError: with the first array that fails and the reason.
    """
    for name, array in arrays.items():
        if not array.is_floating_point():
            raise weights_error(source, f"has {name} of dtype {array.dtype}, not a float", _WRONG_SAE)
        check_range(name, *value_range(array), source)


def check_range(name: str, low: float, high: float, source: str) -> None:
    """Check the smallest and largest value of an array: finite, and not negative for thresholds.

    Raises:
        WeightsError: with the name of the array and the reason.
    """
    if not (float("-inf") < low <= high < float("inf")):
        raise weights_error(source, f"has values in {name} that are not finite (NaN or infinity)")
    if name == "threshold" and low < 0:
        raise weights_error(source, f"has negative thresholds (down to {low:.4g}); JumpReLU needs theta >= 0")


def value_range(array: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest value, both NaN if any value is NaN. It works in chunks to avoid large allocations."""
    import torch

    flat = (array if array.is_contiguous() else array.mT).reshape(-1)
    low, high = float("inf"), float("-inf")
    for chunk in flat.split(_CHUNK):
        bounds = torch.aminmax(chunk)
        low_here, high_here = float(bounds.min), float(bounds.max)
        if low_here != low_here or high_here != high_here:
            return float("nan"), float("nan")
        low, high = min(low, low_here), max(high, high_here)
    return low, high
