"""Reading SAELens folders: ``cfg.json`` and ``sae_weights.safetensors``.

safetensors files carry no checksum: a flipped bit inside a value passes unless the registry row has a sha256.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.weights.sniff import read_head, refuse_other_kinds, weights_error

if TYPE_CHECKING:
    import torch

CFG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
_MAX_CFG = 1 << 20


@dataclass(frozen=True)
class TensorHeader:
    """Shape and safetensors dtype word (``"F32"``, ``"BF16"``, …) of one tensor."""

    shape: tuple[int, ...]
    dtype: str


def read_cfg(folder: str | Path) -> dict[str, Any]:
    """The ``cfg.json`` of a SAELens folder, as it stands.

    Raises:
        WeightsError: when it is missing, huge, or not a JSON object.
    """
    path = Path(folder) / CFG_NAME
    read_head(path)
    if path.stat().st_size > _MAX_CFG:
        raise weights_error(path, f"is {path.stat().st_size} bytes, too large for a configuration")
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise weights_error(path, f"is not JSON ({error})") from error
    if not isinstance(cfg, dict):
        raise weights_error(path, "is not a JSON object")
    return cfg


def inspect_safetensors(path: str | Path) -> dict[str, TensorHeader]:
    """Shapes and dtypes by name, from the header only.

    Raises:
        WeightsError: when the file is missing, empty, truncated, or not safetensors.
    """
    path = Path(path)
    refuse_other_kinds(path, read_head(path), "a safetensors file")
    with _clear_errors(path), _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {name: TensorHeader(tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU, in the dtypes of the file.

    Raises:
        WeightsError: as :func:`inspect_safetensors`.
    """
    path = Path(path)
    refuse_other_kinds(path, read_head(path), "a safetensors file")
    with _clear_errors(path), _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(str(path), framework="pt", device="cpu")


@contextmanager
def _clear_errors(path: Path) -> Generator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except WeightsError:
        raise
    except SafetensorError as error:
        raise weights_error(path, f"is truncated, corrupt or not a safetensors file ({error})") from error
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise weights_error(path, f"cannot be read ({type(error).__name__}: {error})") from error
