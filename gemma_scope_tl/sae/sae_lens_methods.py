"""SAELens's ways of loading an SAE, and this package's, as class methods."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.saes.sae import SAE

from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.weights.modes import ordinary_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    _Base = SAE[Any]
else:
    _Base = object


class LoadingMixin(_Base):
    """``from_pretrained`` and ``load_from_disk`` with SAELens's arguments; ``from_folder`` and ``from_arrays``."""

    is_transcoder: bool = False

    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> Any:
        """This package's class for a SAELens architecture word.

        Raises:
            UnknownNameError: for architectures that are not JumpReLU.
        """
        from gemma_scope_tl.sae.loading import class_of

        return class_of(architecture)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        release: str,
        sae_id: str,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        force_download: bool = False,
        converter: Any = None,
        fold_W_dec_norm: bool = False,
    ) -> Any:
        """The SAE (or transcoder) that a release has under an id.

        Args:
            release: such as ``"gemma-scope-2b-pt-res"``.
            sae_id: such as ``"layer_20/width_16k/average_l0_71"`` or ``"layer_20/width_16k/canonical"``.
            device: where the parameters go.
            dtype: of all parameters but the thresholds: float32, bfloat16 or float16 (also fp32, bf16, fp16, torch's).
            force_download: download a file of the Hub again although it is in the cache.
            converter: one of SAELens's Hub loaders, or a function of that kind, which then reads the repository in
                place of this package. With one, ``release`` may also be a repository, ``"owner/name"``, and ``sae_id``
                a folder in it.
            fold_W_dec_norm: call :meth:`fold_W_dec_norm` on what is loaded.

        Raises:
            UnknownNameError: for a release, id or dtype that does not exist, with the nearest ones.
            WeightsError: when the file cannot be had or fails a check.
        """
        return cls.from_pretrained_with_cfg_and_sparsity(
            release, sae_id, device, dtype, force_download, converter, fold_W_dec_norm
        )[0]

    @classmethod
    def from_pretrained_with_cfg_and_sparsity(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        release: str,
        sae_id: str,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        force_download: bool = False,
        converter: Any = None,
        fold_W_dec_norm: bool = False,
    ) -> tuple[Any, dict[str, Any], torch.Tensor | None]:
        """:meth:`from_pretrained`, with the config as a dict and the sparsity that a ``converter`` may know, in
        SAELens' shape."""
        from gemma_scope_tl.registry.catalog import resolve
        from gemma_scope_tl.sae.loading import from_converter, load_row

        sparsity = None
        if converter is None:
            sae = load_row(resolve(release, sae_id), device=device, dtype=dtype, force_download=force_download)
        else:
            row = None if "/" in release else resolve(release, sae_id)
            repo, folder = (release, sae_id) if row is None else (row.repo, row.path)
            options = {"device": str(device), "dtype": _name(dtype)}
            cfg, state, sparsity = converter(
                repo_id=repo,
                folder_name=folder,
                device=str(device),
                force_download=force_download,
                cfg_overrides=options,
            )
            sae = from_converter(cfg, state, f"{repo}/{folder}", row, device, dtype)
        own = cls._own(sae)
        if fold_W_dec_norm:
            own.fold_W_dec_norm()
            own.mark_as_loaded()
        return own, own.cfg.to_dict(), sparsity

    @classmethod
    def from_folder(
        cls,
        path: str | PathLike[str],
        model: Any = None,
        site: str | None = None,
        layer: int | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> Any:
        """An SAE from a folder with ``params.npz``, or with ``cfg.json`` and ``sae_weights.safetensors``.

        Args:
            path: the folder, or the ``params.npz`` or ``.safetensors`` itself.
            model: the model's name; or a model or its config, whose sizes are then checked against the file.
            site, layer: where it belongs. SAELens' layout knows; an npz does not, and without them encode and decode
                work and splicing asks. With ``site="embedding"`` an npz is rescaled (:func:`scale_embedding`).
            device, dtype: as :meth:`from_pretrained`.

        Raises:
            WeightsError: when the files are missing or fail a check.
        """
        from gemma_scope_tl.sae.loading import load_folder

        return cls._own(load_folder(path, model=model, site=site, layer=layer, device=device, dtype=dtype))

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, torch.Tensor | np.ndarray],
        model: Any = None,
        site: str | None = None,
        layer: int | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> Any:
        """An SAE from its arrays (``weights/checks.py`` lists them), NumPy or torch.

        The arrays act on the site's own tensor: nothing is rescaled, for the embedding either. Memory is shared where
        dtype and device allow it.

        Raises:
            WeightsError: when a check fails.
        """
        from gemma_scope_tl.sae.loading import build

        return cls._own(build(arrays, model=model, site=site, layer=layer, device=device, dtype=dtype))

    @classmethod
    def load_from_disk(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        path: str | PathLike[str],
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        converter: Any = None,
        fold_W_dec_norm: bool = False,
    ) -> Any:
        """:meth:`from_folder` under SAELens' name and with its arguments.

        Args:
            path: as for :meth:`from_folder`.
            device: where the parameters go.
            dtype: None keeps the one in which the SAE was saved.
            converter: a function ``(path, device, cfg_overrides) -> (config, parameters)`` that reads the folder in
                place of this package.
            fold_W_dec_norm: call :meth:`fold_W_dec_norm` on what is loaded.

        Raises:
            WeightsError: when the files are missing or fail a check.
        """
        from gemma_scope_tl.sae.loading import from_converter, saved_dtype

        if converter is None:
            own = cls.from_folder(path, device=device, dtype=dtype or saved_dtype(path))
        else:
            named = None if dtype is None else {"dtype": _name(dtype)}
            cfg, state = converter(path, str(device), cfg_overrides=named)
            own = cls._own(from_converter(cfg, state, str(path), device=device, dtype=dtype))
        if fold_W_dec_norm:
            own.fold_W_dec_norm()
            own.mark_as_loaded()
        return own

    @classmethod
    def _own(cls, sae: Any) -> Any:
        if cls.is_transcoder and not isinstance(sae, cls):
            raise GemmaScopeError(f"This is a {type(sae).__name__}, not a {cls.__name__}: load it with that class.")
        return sae


def _name(dtype: str | torch.dtype) -> str:
    return str(parse_dtype(dtype)).removeprefix("torch.")


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
    from gemma_scope_tl.weights.checks import CFG_NAME, WEIGHTS_NAME

    folder, text = checked_path(path), json.dumps(cfg)
    writers = {WEIGHTS_NAME: lambda to: save_file(dict(state), to), CFG_NAME: lambda to: to.write_text(text)}
    replace_files(folder, writers)
    return folder / WEIGHTS_NAME, folder / CFG_NAME
