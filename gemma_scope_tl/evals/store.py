"""What was measured before: finished pieces and checkpoints in a folder, each file whole or not there."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from gemma_scope_tl.errors import GemmaScopeError, WriteError
from gemma_scope_tl.files import checked_path, reason, replace_files

VERSION = 1
"""Of the metrics: raised whenever a number would come out differently, so that no old one is taken for it."""


def key_of(facts: Mapping[str, Any]) -> str:
    """The name of what these JSON-able facts determine, for this version of the metrics."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class Store:
    """Tensors by name under a key, in safetensors files; without a folder it remembers nothing.

    Two processes may share a folder: the same key always has the same content.
    """

    def __init__(self, folder: str | PathLike[str] | None) -> None:
        self.folder = None if folder is None else checked_path(folder)
        self._given_up = False

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """What is kept under ``key``, or None. Where it cannot be read, a warning says so, and nothing more is kept.

        Raises:
            GemmaScopeError: for a file that is damaged.
        """
        path = self._path(key)
        if path is None or self._given_up:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path) if path.is_file() else None
        except SafetensorError as error:
            raise GemmaScopeError(f"{path} is damaged ({error}): delete it, and it is measured again.") from error
        except OSError as error:
            self._give_up(f"{path} cannot be read: {reason(error)}. Check its permissions and the disk.")
            return None

    def save(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under ``key``. Where that fails, measuring goes on with a warning, and nothing more is kept."""
        if self.folder is None or self._given_up:
            return
        from safetensors.torch import save_file

        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            replace_files(self.folder, {f"{key}.safetensors": lambda temporary: save_file(whole, str(temporary))})
        except WriteError as error:
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        self._given_up = True
        warnings.warn(f"What is measured from here on is not kept in the cache: {why}", stacklevel=3)

    def drop(self, key: str) -> None:
        """Forget what is kept under ``key``."""
        path = self._path(key)
        if path is not None:
            with suppress(OSError):  # what stays is measured the same
                path.unlink()

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.safetensors"
