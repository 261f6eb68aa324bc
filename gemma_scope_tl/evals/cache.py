"""A cache of measurements: finished pieces and checkpoints, in files that are written atomically."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from gemma_scope_tl.errors import GemmaScopeError, WriteError
from gemma_scope_tl.evals.accumulators import Accumulator, with_prefix
from gemma_scope_tl.files import checked_path, reason, replace_files

VERSION = 1
"""Version of the metrics, a part of every key. Raise it whenever a metric changes, so that old values are ignored."""


def key_of(facts: Mapping[str, Any]) -> str:
    """The cache key for tensors that depend on these facts (JSON values) and on the version of the metrics."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class MetricsCache:
    """Tensors by name under a key, in safetensors files. Without a folder it keeps nothing.

    Several processes may share a folder, because equal keys have equal contents. If the folder cannot be used, one
    warning is issued, and the measurement continues without the cache.
    """

    def __init__(self, folder: str | PathLike[str] | None) -> None:
        self.folder = None if folder is None else checked_path(folder)
        self._usable = folder is not None

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors under ``key``, or None.

        Raises:
            GemmaScopeError: for a file that is damaged.
        """
        if self.folder is None or not self._usable:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / _file_name(key)
        try:
            return load_file(path) if path.is_file() else None
        except SafetensorError as error:
            raise GemmaScopeError(f"{path} is damaged ({error}): delete it to measure again.") from error
        except OSError as error:
            self._give_up(f"{path} cannot be read: {reason(error)}. Check its permissions and the disk.")
            return None

    def save(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under ``key``."""
        if self.folder is None or not self._usable:
            return
        from safetensors.torch import save_file

        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            replace_files(self.folder, {_file_name(key): lambda temporary: save_file(whole, str(temporary))})
        except WriteError as error:
            self._give_up(str(error))

    def drop(self, key: str) -> None:
        """Delete what is kept under ``key``."""
        if self.folder is not None:
            with suppress(OSError):  # a file that remains is valid, but no longer needed
                (self.folder / _file_name(key)).unlink()

    def _give_up(self, why: str) -> None:
        self._usable = False
        warnings.warn(f"Further measurements are not kept in the cache: {why}", stacklevel=3)


@dataclass(frozen=True)
class Checkpoint:
    """Unfinished accumulators in one file of a cache, with the number of rows that they contain.

    Attributes:
        cache: the cache that holds the file.
        key: key of the file in the cache.
        parts: the accumulators, by the number with which their names in the file begin.
    """

    cache: MetricsCache
    key: str
    parts: Mapping[int, Accumulator]

    def save(self, rows: int) -> None:
        """Keep all accumulators."""
        state = {"rows": torch.tensor(rows)}
        for number, part in self.parts.items():
            state |= {f"{number}/{name}": tensor for name, tensor in part.state().items()}
        self.cache.save(self.key, state)

    def restore(self) -> int:
        """Restore the accumulators of an interrupted run, and return the next row; 0 without a checkpoint."""
        kept = self.cache.load(self.key)
        if kept is None:
            return 0
        for number, part in self.parts.items():
            part.restore(with_prefix(kept, f"{number}/"))
        return int(kept["rows"])

    def drop(self) -> None:
        """Delete the checkpoint."""
        self.cache.drop(self.key)


def _file_name(key: str) -> str:
    return f"{key}.safetensors"
