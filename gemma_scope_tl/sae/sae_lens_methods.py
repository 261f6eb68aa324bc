"""Class methods that load and save SAEs: those of SAELens, with their arguments, and those of this package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from gemma_scope_tl.dtypes import parse_device, parse_dtype
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import checked_path, replace_files
from gemma_scope_tl.registry import catalog
from gemma_scope_tl.sae.building import build, class_of
from gemma_scope_tl.sae.config import Identity
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sae.layered_loading import is_layered_folder, load_layered_folder, load_layered_row
from gemma_scope_tl.sae.reading import Checked, read_converted, read_folder, read_given, read_row, saved_dtype
from gemma_scope_tl.sae.sae_lens_config import SAELensConfig
from gemma_scope_tl.weights.checks import CFG_NAME, WEIGHTS_NAME
from gemma_scope_tl.weights.modes import ordinary_tensors

if TYPE_CHECKING:
    import numpy as np
    from sae_lens.saes.sae import SAE

    from gemma_scope_tl.registry.schema import SAERow

    _Base = SAE[Any]
else:
    _Base = object


class LoadingMixin(_Base):
    """SAELens's ``from_pretrained`` and ``load_from_disk``; ``from_row``, ``from_folder`` and ``from_arrays``.

    All of them return an object of the class that suits the SAE: ``JumpReLUSAE.from_pretrained`` loads transcoders too.
    """

    is_transcoder: bool = False

    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> Any:
        """The class of this package for a SAELens architecture.

        Raises:
            UnknownNameError: for architectures that are not JumpReLU.
        """
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
        """Load the SAE (or transcoder) with an id in a release, or a coder of several layers, as :meth:`from_row`.

        Args:
            release: a name such as ``"gemma-scope-2b-pt-res"``.
            sae_id: an id such as ``"layer_20/width_16k/average_l0_71"`` or ``"layer_20/width_16k/canonical"``.
            device: device of the parameters.
            dtype: dtype of the parameters, except thresholds: float32, bfloat16 or float16 (or fp32, bf16, fp16, or a
                torch dtype).
            force_download: download a file of the Hub again even if it is in the cache.
            converter: one of SAELens's Hub loaders, or a similar function, which then reads the repository in place of
                this package. With a converter, ``release`` may also be a repository, ``"owner/name"``, and ``sae_id`` a
                folder in it.
            fold_W_dec_norm: call :meth:`fold_W_dec_norm` on the loaded SAE.

        Raises:
            UnknownNameError: for a release, id or dtype that does not exist, with the nearest ones.
            WeightsError: when the file cannot be obtained or fails a check.
        """
        if converter is None and (row := catalog.resolve(release, sae_id)).layers is not None:
            if fold_W_dec_norm:
                raise GemmaScopeError(f"{release}/{sae_id} is a {row.site}, whose decoder norms are not folded.")
            return cls.from_row(row, device, dtype, force_download)
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
        """Load as :meth:`from_pretrained`, and also return the config as a dict and a ``converter``'s sparsity."""
        if converter is None:
            row = catalog.resolve(release, sae_id)
            if row.layers is not None:
                what = f"{release}/{sae_id} is a {row.site}, which has no configuration of SAELens"
                raise GemmaScopeError(f"{what}. Load it with from_pretrained.")
            sae, sparsity = cls.from_row(row, device, dtype, force_download), None
        else:
            row = None if "/" in release else catalog.resolve(release, sae_id)
            repo, folder = (release, sae_id) if row is None else (row.repo, row.path)
            cfg, state, sparsity = converter(
                repo_id=repo,
                folder_name=folder,
                device=str(device),
                force_download=force_download,
                cfg_overrides={"device": str(device), "dtype": _name(dtype)},
            )
            sae = cls._converted(cfg, state, f"{repo}/{folder}", row, device, dtype)
        if fold_W_dec_norm:
            _fold(sae)
        return sae, sae.cfg.to_dict(), sparsity

    @classmethod
    def from_row(
        cls,
        row: SAERow,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        force_download: bool = False,
    ) -> Any:
        """Fetch and load the SAE (or transcoder) of a registry row, and check it against the row.

        For a row of several layers the result is a :class:`~gemma_scope_tl.sae.layered.LayeredCoder`.

        Args:
            row: a row, such as from :func:`gemma_scope_tl.registry.resolve`.
            device, dtype, force_download: as for :meth:`from_pretrained`.

        Raises:
            UnknownNameError: for a dtype that does not exist.
            WeightsError: when the file cannot be obtained or fails a check.
        """
        if row.layers is not None:
            cls._check_class(LayeredCoder)
            return load_layered_row(row, device, dtype, force_download)
        return cls._loaded(lambda to, kind: read_row(row, to, kind, force_download), device, dtype)

    @classmethod
    def from_folder(
        cls,
        path: str | PathLike[str],
        model: Any = None,
        site: str | None = None,
        layer: int | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        *,
        family: str | None = None,
        layers: Sequence[int] | None = None,
    ) -> Any:
        """Load an SAE from a folder with ``params.npz``; with ``cfg.json`` and ``sae_weights.safetensors``; or with
        ``params.safetensors`` and, if there is one, ``config.json``. From a folder with ``params_layer_k.safetensors``
        for each of several layers, the result is a :class:`~gemma_scope_tl.sae.layered.LayeredCoder`.

        Args:
            path: the folder, or the ``params.npz`` or ``.safetensors`` file.
            model: the name of a model; or a model or its config, whose sizes are then checked against the file.
            site, layer: the place of the SAE. SAELens's layout and ``config.json`` contain it. Other files do not:
                encoding and decoding work without it, but splicing needs it. With ``site="embedding"`` an npz is
                rescaled (:func:`~gemma_scope_tl.sae.units.scale_embedding`).
            device, dtype: as for :meth:`from_pretrained`.
            family: family of a model of your own, such as ``"gemma2"``, whose name does not tell it. Transcoders of
                different families read different tensors.
            layers: the layers of a crosscoder whose folder has no ``config.json``. Such a folder also needs ``site``,
                ``"crosscoder"`` or ``"clt"``. Coders of several layers have no ``layer``.

        Raises:
            WeightsError: when the files are missing or fail a check.
            GemmaScopeError: the model is of another family.

        Warns:
            AssumedFamilyWarning: nothing says the family, and SAEs at this site differ between families.
        """
        if is_layered_folder(path):
            if layer is not None:
                raise GemmaScopeError(f"{path} holds a coder of several layers: omit layer={layer!r}.")
            cls._check_class(LayeredCoder)
            return load_layered_folder(path, model, site, layers, device, dtype, family=family)
        if layers is not None:
            raise GemmaScopeError(f"{path} holds no coder of several layers: give layer= in place of layers=.")
        place = (model, site, layer, family)
        return cls._loaded(lambda to, kind: read_folder(path, place, to, kind), device, dtype)

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, torch.Tensor | np.ndarray],
        model: Any = None,
        site: str | None = None,
        layer: int | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        *,
        family: str | None = None,
    ) -> Any:
        """Make an SAE from NumPy or torch arrays (``weights/checks.py`` lists them).

        The arrays are in the units of the site's tensor, so nothing is rescaled, not even for the embedding. Memory is
        shared if dtype and device allow it. The other arguments are those of :meth:`from_folder`.

        Raises:
            WeightsError: when a check fails.
            GemmaScopeError: the model is of another family.

        Warns:
            AssumedFamilyWarning: nothing says the family, and SAEs at this site differ between families.
        """
        return cls._loaded(lambda to, kind: read_given(arrays, model, site, layer, family), device, dtype)

    @classmethod
    def load_from_disk(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        path: str | PathLike[str],
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        converter: Any = None,
        fold_W_dec_norm: bool = False,
    ) -> Any:
        """Load as :meth:`from_folder`, with SAELens's name and arguments.

        Args:
            path: as for :meth:`from_folder`.
            device: device of the parameters.
            dtype: dtype of the parameters; None keeps the dtype in which the SAE was saved.
            converter: a function ``(path, device, cfg_overrides) -> (config, parameters)`` that reads the folder in
                place of this package.
            fold_W_dec_norm: call :meth:`fold_W_dec_norm` on the loaded SAE.

        Raises:
            WeightsError: when the files are missing or fail a check.
        """
        if converter is None:
            sae = cls.from_folder(path, device=device, dtype=dtype or saved_dtype(path))
        else:
            named = None if dtype is None else {"dtype": _name(dtype)}
            cfg, state = converter(path, str(device), cfg_overrides=named)
            sae = cls._converted(cfg, state, str(path), None, device, dtype)
        if fold_W_dec_norm:
            _fold(sae)
        return sae

    @classmethod
    def _converted(
        cls,
        given: dict[str, Any],
        state: Mapping[str, torch.Tensor],
        source: str,
        row: SAERow | None,
        device: str | torch.device,
        dtype: str | torch.dtype | None,
    ) -> Any:
        """Make an SAE from the configuration and parameters of one of SAELens's converters."""
        config = SAELensConfig.given(given, source)
        identity = Identity(source) if row is None else Identity.of(row, source)
        kind = dtype or config.dtype or "float32"
        return cls._loaded(lambda *_: read_converted(config, state, identity), device, kind)

    @classmethod
    @ordinary_tensors()
    def _loaded(
        cls,
        read: Callable[[torch.device, torch.dtype], Checked],
        device: str | torch.device,
        dtype: str | torch.dtype,
    ) -> Any:
        """Build the SAE from ``read``. On a transcoder class, the result must be of that class."""
        kind, to = parse_dtype(dtype), parse_device(device)  # checked before a download
        arrays, identity = read(to, kind)
        sae = build(arrays, identity, to, kind)
        cls._check_class(type(sae))
        return sae

    @classmethod
    def _check_class(cls, found: type) -> None:
        """Raise unless a coder of class ``found`` may be the result, which on a transcoder class must be of it."""
        if cls.is_transcoder and not issubclass(found, cls):
            raise GemmaScopeError(f"This is a {found.__name__}, not a {cls.__name__}: load it with that class.")


class SavingMixin(_Base):
    """SAELens's ``save_model``."""

    @ordinary_tensors()
    def save_model(self, path: str | PathLike[str]) -> tuple[Path, Path]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write ``sae_weights.safetensors`` and ``cfg.json`` into a folder, which is created if necessary.

        Returns:
            The paths of the two files.

        Raises:
            WriteError: when a file cannot be written, as on a full disk. Existing files are unchanged then.
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
        WriteError: when a file cannot be written. Existing files are unchanged then.
    """
    folder, text = checked_path(path), json.dumps(cfg)
    writers = {
        WEIGHTS_NAME: lambda to: safetensors.torch.save_file(dict(state), to),
        CFG_NAME: lambda to: to.write_text(text),
    }
    replace_files(folder, writers)
    return folder / WEIGHTS_NAME, folder / CFG_NAME


def _fold(sae: Any) -> None:
    """Fold the norms of the decoder rows into the encoder, and record the result as the loaded weights."""
    sae.fold_W_dec_norm()
    sae.mark_as_loaded()


def _name(dtype: str | torch.dtype) -> str:
    return str(parse_dtype(dtype)).removeprefix("torch.")
