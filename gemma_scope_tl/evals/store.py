"""What was measured before: finished pieces and checkpoints in a folder, each file whole or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from gemma_scope_tl.errors import GemmaScopeError
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

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """What is kept under ``key``, or None.

        Raises:
            GemmaScopeError: for a file that is damaged.
        """
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # safetensors has one exception for everything, OSError aside
            raise GemmaScopeError(f"{path} is damaged ({error}): delete it, and it is measured again.") from error

    def save(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under ``key``."""
        if self.folder is None:
            return
        from safetensors.torch import save_file

        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        replace_files(self.folder, {f"{key}.safetensors": lambda temporary: save_file(whole, str(temporary))})

    def drop(self, key: str) -> None:
        """Forget what is kept under ``key``."""
        path = self._path(key)
        if path is not None:
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.safetensors"
