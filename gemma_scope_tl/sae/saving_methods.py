"""SAELens's ways of saving an SAE, whole or not at all: its methods write into the very files that they replace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.weights.modes import ordinary_tensors

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAE

    _Base = SAE[Any]
else:
    _Base = object


class SavingMixin(_Base):
    """``save_model`` with SAELens's arguments, files and answer."""

    @ordinary_tensors()
    def save_model(self, path: str | PathLike[str]) -> tuple[Path, Path]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write ``sae_weights.safetensors`` and ``cfg.json`` into a folder, which is made if need be.

        Returns:
            The two files.

        Raises:
            WriteError: they cannot be written, as on a full disk; what was there before is as it was.
        """
        state = dict(self.state_dict())
        self.process_state_dict_for_saving(state)
        return write_sae_lens_files(path, state, self._saved_config())

    def _saved_config(self) -> Mapping[str, Any]:
        return self.cfg.to_dict()


def write_sae_lens_files(
    path: str | PathLike[str], state: Mapping[str, torch.Tensor], cfg: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Write SAELens's two files, both complete before the first is renamed into place.

    Raises:
        WriteError: they cannot be written; what was there before is as it was.
    """
    from safetensors.torch import save_file

    from gemma_scope_tl.files import checked_path, replace_files
    from gemma_scope_tl.weights.sniff import CFG_NAME, WEIGHTS_NAME

    folder, text = checked_path(path), json.dumps(cfg)
    writers = {WEIGHTS_NAME: lambda to: save_file(dict(state), to), CFG_NAME: lambda to: to.write_text(text)}
    replace_files(folder, writers)
    return folder / WEIGHTS_NAME, folder / CFG_NAME
