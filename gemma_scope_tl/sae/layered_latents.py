"""Some latents of a crosscoder or cross-layer transcoder, read without the rest of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.dtypes import parse_device, parse_dtype
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, unknown_name
from gemma_scope_tl.sae.arguments import as_index, checked_tensor, distinct_indices
from gemma_scope_tl.sae.building import cast_array
from gemma_scope_tl.sae.config import expected_of_row
from gemma_scope_tl.sae.layered_loading import checked_layers_config
from gemma_scope_tl.weights.fetch import find_local_layers
from gemma_scope_tl.weights.modes import ordinary_tensors
from gemma_scope_tl.weights.partial import Arrays
from gemma_scope_tl.weights.partial_layers import read_local_layer, read_remote_layer
from gemma_scope_tl.weights.remote import RemoteFile
from gemma_scope_tl.weights.seen import warn_if_unverified

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

ByLayer = Mapping[int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class LayeredLatents:
    """The parameters of chosen latents of a coder of several layers, by the layer of the model that they read.

    Attributes:
        kind: ``"crosscoder"`` or ``"clt"``.
        layers: all layers of the coder.
        latents: the chosen layers, each with the indices within it, in the order of the rows below.
        W_dec: for each chosen layer ``[n, K - k, d_out]``, what its latents write at that layer and at later ones.
        b_enc, threshold: for each chosen layer ``[n]``; the thresholds are float32 or wider.
        W_enc: for each chosen layer ``[d_in, n]``; None if not read.
        model_name: the model that the coder was trained on, None if unknown.
        row: the registry row of the coder, if there is one.
    """

    kind: str
    layers: tuple[int, ...]
    latents: Mapping[int, tuple[int, ...]]
    W_dec: ByLayer
    b_enc: ByLayer
    threshold: ByLayer
    W_enc: ByLayer | None = None
    model_name: str | None = None
    row: SAERow | None = None

    def __len__(self) -> int:
        return sum(map(len, self.latents.values()))

    def written(self, layer: int, latent: int) -> dict[int, torch.Tensor]:
        """What one latent writes: ``[d_out]`` for each layer of the model from the latent's own on.

        Raises:
            UnknownNameError: when the latent was not loaded.
        """
        chosen = self._of(layer)
        if latent not in chosen:
            raise unknown_name(f"loaded latent of layer {layer}", latent, map(str, chosen), "Load it too.")
        rows = self.W_dec[layer][chosen.index(latent)]
        later = self.layers[self.layers.index(layer) :]
        return dict(zip(later, rows, strict=True))

    def encode_at(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Activations ``[..., n]`` of the chosen latents of a layer for its input ``x [..., d_in]``.

        Raises:
            UnknownNameError: when no latent of the layer was loaded.
            SpliceError: when the encoder was not loaded, or ``x`` has another width or is not a tensor of real numbers.
            DeviceError: when ``x`` is on another device.
        """
        self._of(layer)
        if self.W_enc is None:
            raise SpliceError("These latents were loaded without their encoder columns: load them from local files.")
        W_enc = self.W_enc[layer]
        x = checked_tensor(x, "A set of latents", W_enc.device)
        if x.shape[-1:] != W_enc.shape[:1]:
            raise SpliceError(f"These latents read [..., {W_enc.shape[0]}], but the given tensor is {list(x.shape)}.")
        pre = x.to(W_enc.dtype) @ W_enc + self.b_enc[layer]
        return torch.where(pre <= self.threshold[layer], 0.0, pre)

    def to(self, device: str | torch.device) -> LayeredLatents:
        """The same latents on another device."""

        def moved(arrays: ByLayer) -> ByLayer:
            return {layer: array.to(device) for layer, array in arrays.items()}

        W_enc = None if self.W_enc is None else moved(self.W_enc)
        named = {"W_dec": moved(self.W_dec), "b_enc": moved(self.b_enc), "threshold": moved(self.threshold)}
        return replace(self, W_enc=W_enc, **named)

    def _of(self, layer: int) -> tuple[int, ...]:
        if layer not in self.latents:
            raise unknown_name("layer with loaded latents", layer, map(str, self.latents), "Load some of it too.")
        return self.latents[layer]


def chosen_by_layer(latents: Any, row: SAERow) -> dict[int, tuple[int, ...]]:
    """Check the latents that a user names as ``{layer: indices}``.

    Raises:
        SpliceError: for anything but such a mapping, and for no latent or one that is given twice.
        UnknownNameError: for a layer that the coder does not have.
    """
    name, layers = f"{row.release}/{row.id}", list(row.layers or ())
    if not isinstance(latents, Mapping):
        example = f"{{{layers[0]}: [3, 5], {layers[-1]}: [0]}}"
        raise SpliceError(f"{name} spans several layers: give its latents by layer, such as latents={example}.")
    if not latents:
        raise SpliceError("No latents were given: name at least one.")
    chosen: dict[int, tuple[int, ...]] = {}
    for given, indices in latents.items():
        layer = as_index(given)
        if layer not in layers:
            raise unknown_name(f"layer of {name}", layer, map(str, layers))
        chosen[layer] = tuple(distinct_indices(indices))
    return chosen


@ordinary_tensors()
def load_layered_latents(
    row: SAERow,
    latents: Any,
    encoder: bool | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> LayeredLatents:
    """Load chosen latents of a registry row of several layers, and read only the bytes that they need.

    Args:
        row: a row with ``layers``.
        latents: ``{layer: indices}``, with layers of the model and indices within the layer.
        encoder: whether to read the encoder columns too; by default if the files are on this machine. They cannot be
            read from remote files.
        device: device of the result.
        dtype: dtype of the result, except thresholds, which stay float32 or wider.

    Raises:
        UnknownNameError: for a layer that the coder lacks, or an unknown dtype.
        SpliceError: for latents in another form, none, or one that is given twice.
        WeightsError: for a latent that does not exist, a value too large for ``dtype``, or a file that cannot be
            obtained or fails a check.
    """
    to, device = parse_dtype(dtype), parse_device(device)
    chosen = chosen_by_layer(latents, row)
    warn_if_unverified(row)
    read = _reader(row, [row.layers.index(layer) for layer in chosen] if row.layers else [], encoder)
    wide = torch.promote_types(torch.float32, to)
    found: dict[str, dict[int, torch.Tensor]] = {}
    for layer, indices in chosen.items():
        for name, array in read((row.layers or ()).index(layer), indices).items():
            kind = wide if name == "threshold" else to
            cast = cast_array(array, name, kind, f"{row.release}/{row.id}").to(device)
            found.setdefault(name, {})[layer] = cast
    arrays: dict[str, Any] = found
    return LayeredLatents(row.site, row.layers or (), chosen, **arrays, model_name=row.model, row=row)


def _reader(row: SAERow, places: list[int], encoder: bool | None) -> Callable[[int, tuple[int, ...]], Arrays]:
    """A function that reads latents of the layer with a place among the coder's layers."""
    expected, count = expected_of_row(row), len(row.layers or ())
    paths: Mapping[int, Path] | None = find_local_layers(row, places)
    if paths is not None:
        checked_layers_config(paths[places[0]].parent, row)
        with_encoder = encoder is not False
        return lambda place, indices: read_local_layer(paths[place], place, count, indices, expected, with_encoder)
    if encoder:
        what = f"{row.release}/{row.id} is not on this machine, and encoder columns are read from local files only"
        raise GemmaScopeError(f"{what}. Load the whole coder once, or leave encoder out.")
    revision: list[str | None] = [row.revision]

    def read(place: int, indices: tuple[int, ...]) -> Arrays:
        remote = RemoteFile(row.repo, row.weights_paths[place], revision[0])
        revision[0] = remote.commit  # all files of one commit, also where a branch moves
        return read_remote_layer(remote, place, count, indices, expected)

    return read
