"""Functions that load an SAE by its properties, by its registry row, or from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.registry import catalog
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow


def load_sae(
    model: str,
    site: str,
    layer: int | None = None,
    width: str | int | None = None,
    l0: int | float | str = "canonical",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    release: str | None = None,
    *,
    affine: bool | None = None,
    seed: int | None = None,
    series: str | None = None,
) -> Any:
    """Load the SAE of a model at a site, by its properties instead of a release and id.

    A crosscoder or cross-layer transcoder (CLT) is loaded as a :class:`~gemma_scope_tl.sae.layered.LayeredCoder`.

    Args:
        model: a name such as ``"gemma-2-2b"`` or ``"gemma-3-1b"``, with or without ``google/`` and ``-pt``.
        site: ``res``, ``mlp``, ``att``, ``embedding`` or ``transcoder``; or ``crosscoder`` or ``clt``.
        layer: counts from 0; None for the embedding, and for crosscoders and CLTs, which span several layers.
        width: a label such as ``"65k"``, or the number of latents; by default ``"16k"``.
        l0: ``"canonical"`` (nearest to 100, or the only one where only one is confirmed), an existing L0,
            ``"closest:50"`` (an unverified SAE only where no confirmed one has half to twice this L0; it warns), or the
            label ``"small"``, ``"medium"`` or ``"big"``.
        device, dtype: as for :meth:`JumpReLUSAE.from_pretrained`.
        release: the only release to search; needed if two releases have such an SAE.
        affine: whether a transcoder or CLT with a skip connection is meant; needed if there are both.
        seed: the seed of a further training run; by default the SAE whose name has no seed.
        series: ``"subset"`` (few layers, more widths and L0s) or ``"all"`` (every layer). By default the SAE of the
            subset is taken where both have one.

    Raises:
        RegistryError: when several SAEs fit; the message says which argument chooses one.
        UnknownNameError: when the registry has no such SAE, with the nearest ones.
        WeightsError: when the file cannot be obtained or fails a check.
    """
    row = catalog.find(model, site, layer, width, l0, affine=affine, seed=seed, series=series, release=release)
    return JumpReLUSAE.from_row(row, device, dtype)


def load_row(
    row: SAERow,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    force_download: bool = False,
) -> Any:
    """Load the SAE, transcoder, crosscoder or CLT of a registry row; see :meth:`JumpReLUSAE.from_row`."""
    return JumpReLUSAE.from_row(row, device, dtype, force_download)


def load_folder(
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
    """Load the SAE, transcoder, crosscoder or cross-layer transcoder in a folder.

    See :meth:`JumpReLUSAE.from_folder`.
    """
    return JumpReLUSAE.from_folder(path, model, site, layer, device, dtype, family=family, layers=layers)
