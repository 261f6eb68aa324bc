"""``load_latents``, which reads some latents of a released SAE without loading the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from gemma_scope_tl.dtypes import parse_device, parse_dtype
from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.registry import catalog
from gemma_scope_tl.sae.arguments import distinct_indices
from gemma_scope_tl.sae.building import cast_array
from gemma_scope_tl.sae.config import Identity, expected_of_row
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sae.layered_latents import LayeredLatents, load_layered_latents
from gemma_scope_tl.sae.reading import checked_config
from gemma_scope_tl.sae.sae_lens_config import SAELensConfig
from gemma_scope_tl.sae.units import site_units
from gemma_scope_tl.weights.fetch import find_local
from gemma_scope_tl.weights.modes import ordinary_tensors
from gemma_scope_tl.weights.partial import Arrays, read_cached, read_local, read_remote
from gemma_scope_tl.weights.remote import RemoteFile
from gemma_scope_tl.weights.seen import warn_if_unverified

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow


@overload  # a mapping is an iterable of integers too, and the first overload takes it
def load_latents(  # pyright: ignore[reportOverlappingOverload]
    release: str,
    sae_id: str,
    latents: Mapping[int, int | Iterable[int]],
    encoder: bool | None = None,
    cache_rows: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> LayeredLatents: ...


@overload
def load_latents(
    release: str,
    sae_id: str,
    latents: int | Iterable[int],
    encoder: bool | None = None,
    cache_rows: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Latents: ...


@ordinary_tensors()
def load_latents(
    release: str,
    sae_id: str,
    latents: int | Iterable[int] | Mapping[int, int | Iterable[int]],
    encoder: bool | None = None,
    cache_rows: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Latents | LayeredLatents:
    """Load decoder rows, biases and thresholds of chosen latents, and read only the bytes that they need.

    A file in the Hub's cache, in a local folder or in this package is read in place. A file that is only on the Hub is
    read by HTTP range requests and not downloaded: six requests and some kilobytes per latent for any size of the file.

    Args:
        release, sae_id: as for :meth:`JumpReLUSAE.from_pretrained`.
        latents: indices of the latents. For a crosscoder or cross-layer transcoder, they are named by the layer of the
            model that they read: ``{7: [1, 2], 9: [5]}``.
        encoder: whether to read the encoder columns too, which ablating and clamping need. The default is True for a
            local file and False for a remote one. True is an error for a remote file, because its columns are spread
            over the whole file: download it first.
        cache_rows: whether to keep a local copy of the encoder with latents as rows (as large as the encoder) and to
            read columns from it. The first call writes the copy. It is useful for files on slow disks and for many
            calls on one SAE: a column of 2,304 values is then in 3 pages instead of 2,304. Coders of several layers
            have no such copy.
        device: device of the result.
        dtype: dtype of the result, except thresholds, which stay float32 or wider.

    Returns:
        :class:`~gemma_scope_tl.sae.latents.Latents`, or for a coder of several layers
        :class:`~gemma_scope_tl.sae.layered_latents.LayeredLatents`.

    Raises:
        UnknownNameError: for a release, id or dtype that does not exist, with the nearest ones.
        SpliceError: for no latent, one that is given twice, or an index that is no integer.
        WeightsError: for a latent that does not exist, a value that is too large for ``dtype``, or a file that cannot
            be obtained or fails a check.
    """
    to, device = parse_dtype(dtype), parse_device(device)
    row = catalog.resolve(release, sae_id)
    if row.layers is not None:
        if cache_rows:
            raise GemmaScopeError(f"{release}/{sae_id} spans several layers, of which no copy by rows is kept.")
        return load_layered_latents(row, latents, encoder, device, dtype)
    if isinstance(latents, Mapping):
        raise SpliceError(f"{release}/{sae_id} belongs to one layer: give a list of its latents.")
    chosen = distinct_indices(latents)
    warn_if_unverified(row)
    path = find_local(row)
    arrays = _read(row, path, chosen, encoder if encoder is not None else path is not None, cache_rows)
    units = site_units(row.site, row.d_in, Identity.of(row, f"{row.release}/{row.id}").family)
    arrays = {name: units[name](array) if name in units else array for name, array in arrays.items()}
    wide, source = torch.promote_types(torch.float32, to), f"{row.release}/{row.id}"
    cast: dict[str, Any] = {
        name: cast_array(array, name, wide if name == "threshold" else to, source).to(device)
        for name, array in arrays.items()
    }
    return Latents(tuple(chosen), **cast, site=row.site, layer=row.layer, model_name=row.model, row=row)


def _read(row: SAERow, path: Path | None, latents: list[int], encoder: bool, cache_rows: bool) -> Arrays:
    expected = expected_of_row(row)
    if path is not None:
        checked_config(path, row)
        folds = row.format == "sae-lens" and SAELensConfig.read(path.parent).subtracts_b_dec
        if cache_rows and encoder and not folds:
            return read_cached(path, latents, expected)
        arrays = read_local(path, latents, expected, encoder or folds)
        if folds:
            arrays["b_enc"] = arrays["b_enc"] - arrays["b_dec"].float() @ arrays["W_enc"].float()
        return arrays
    if encoder or cache_rows:
        what = f"{row.release}/{row.id} is not on this machine, and encoder columns are read from local files only"
        raise GemmaScopeError(f"{what}. Load the whole SAE once, or leave encoder and cache_rows out.")
    if row.format == "sae-lens":
        raise GemmaScopeError(
            f"{row.release}/{row.id} is in SAELens's layout and not on this machine: load the whole SAE."
        )
    return read_remote(RemoteFile(row.repo, row.weights_path, row.revision), latents, expected)
