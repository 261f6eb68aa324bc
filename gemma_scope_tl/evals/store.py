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
from gemma_scope_tl.files import replace_files

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
        self.folder = None if folder is None else Path(folder)
        self._full = False

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """What is kept under ``key``, or None.

        Raises:
            GemmaScopeError: for a file that is damaged.
        """
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise GemmaScopeError(f"{path} is damaged ({error}): delete it, and it is measured again.") from error
        except OSError as error:
            why = f"{path} cannot be read: {error.strerror or error}"
            raise GemmaScopeError(f"{why}. Check its permissions and the disk, or leave the cache out.") from error

    def save(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under ``key``. Where that fails, measuring goes on with a warning, and nothing more is kept."""
        if self.folder is None or self._full:
            return
        from safetensors.torch import save_file

        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            replace_files(self.folder, {f"{key}.safetensors": lambda temporary: save_file(whole, str(temporary))})
        except WriteError as error:
            self._full = True
            warnings.warn(f"What is measured from here on is not kept in the cache: {error}", stacklevel=2)

    def drop(self, key: str) -> None:
        """Forget what is kept under ``key``."""
        path = self._path(key)
        if path is not None:
            with suppress(OSError):  # what stays is measured the same
                path.unlink()

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.safetensors"
