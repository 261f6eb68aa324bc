"""Coders of every kind in one form: which tensors they read and write, and their matrices for each.

A graph takes any mixture of SAEs, transcoders with and without skip connections, crosscoders and cross-layer
transcoders. All are the same thing to it: *readers* that turn a tensor of the model into active latents, and planes of
a decoder that these latents write at one tensor or several. An SAE has one reader and one plane, a layered coder of K
layers has K readers, of which reader j writes the layers j..K-1.

The tensors of a pass are numbered in the order in which they are computed (:func:`stage_of`), so a latent has a direct
effect on what is read at a later stage than its first written one, and never on an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sae.access import locate
from gemma_scope_tl.sae.choices import as_saes
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sites import Place, Site

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

_STAGES = {"embedding": 0, "attention": 1, "nowhere": 2, "branch": 3, "residual": 4}
_PER_LAYER = 4
_KINDS = ("transcoder", "skip_transcoder")
RECTIFIED = ("standard", "jumprelu", *_KINDS, *(f"jumprelu_{kind}" for kind in _KINDS))
"""Architectures, as SAELens names them, whose active latents equal their pre-activation, linear in the input."""


def stage_of(site: Site, layer: int | None) -> int:
    """The place of a site's tensor in the order of the pass: 0 is the embedding, then four tensors a layer.

    Within a layer: 1 heads before W_O, 2 input of the MLP, 3 output of the MLP, 4 residual stream after the layer.
    """
    return _STAGES[site.joins] + layer_stage(layer or 0)


def layer_stage(layer: int) -> int:
    """The stage of the residual stream before a layer; 0 for the embedding, as the first layer reads it."""
    return _PER_LAYER * layer


@dataclass(frozen=True, eq=False)
class Reader:
    """The latents of a coder that read one tensor.

    Attributes:
        coder: number of the coder in the graph.
        kind: ``"clt"``, ``"crosscoder"``, or the site of an SAE or transcoder.
        name: name of the coder.
        site: the site whose tensor is read.
        layer: its layer in the model; None for the embedding.
        planes: the written places, in the order of the decoder's planes.
        W_enc: ``[d_in, m]``.
        b_enc, threshold: ``[m]``.
        W_dec: ``[m, planes, d_out]``, which may lie in a mapped file.
    """

    coder: int
    kind: str
    name: str
    site: Site
    layer: int | None
    planes: tuple[Place, ...]
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    threshold: torch.Tensor
    W_dec: torch.Tensor

    @property
    def stage(self) -> int:
        """The stage of the tensor that is read."""
        return stage_of(self.site, self.layer)

    def rows(self, plane: int, latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """``[n, d_out]``: what latents write at one place, on the device and in the dtype of ``like``.

        Only these rows of this plane are read, which is what makes a decoder in a mapped file of any size usable.
        """
        return self.W_dec[:, plane].index_select(0, latents.to(self.W_dec.device)).to(like)

    def encoder_columns(self, latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """``[n, d_in]``: the encoder's columns of some latents, on the device and in the dtype of ``like``."""
        return self.W_enc.index_select(1, latents.to(self.W_enc.device)).T.to(like)


@dataclass(frozen=True, eq=False)
class Written:
    """A tensor that a coder reconstructs: its part that does not come from latents.

    Attributes:
        coder: number of the coder.
        place: the tensor.
        site: its site.
        b_dec: ``[d_out]``.
        skip: ``[d_in, d_out]``, applied as ``x @ skip`` to what the reader of the same layer reads; None without.
        source: site of the tensor that ``skip`` is applied to.
    """

    coder: int
    place: Place
    site: Site
    b_dec: torch.Tensor
    skip: torch.Tensor | None
    source: Site

    @property
    def stage(self) -> int:
        """The stage of the written tensor."""
        return stage_of(self.site, self.place.layer)


@dataclass(frozen=True, eq=False)
class PlacedCoders:
    """All coders of a graph.

    Attributes:
        names: of each coder.
        readers: of all coders.
        written: of all coders, at most one for each tensor.
    """

    names: tuple[str, ...]
    readers: tuple[Reader, ...]
    written: tuple[Written, ...]


def placed_coders(model: GemmaModel, coders: Any) -> PlacedCoders:
    """Find what each coder reads and writes in ``model``.

    Args:
        model: from ``load_model``.
        coders: one coder, several, a mapping from names to coders, or a suite.

    Raises:
        SpliceError: for no coder, one that does not fit the model, two that write one tensor, or one whose latents are
            not rectified linear functions of their input.
    """
    names, listed = _named(coders)
    readers: list[Reader] = []
    written: list[Written] = []
    for number, (name, coder) in enumerate(zip(names, listed, strict=True)):
        make = _layered if isinstance(coder, LayeredCoder) else _single
        more, at = make(model, coder, number, name)
        readers += more
        written += at
    taken: dict[Place, Written] = {}
    for one in written:
        if one.place in taken:
            both = f"{names[taken[one.place].coder]} and {names[one.coder]}"
            raise SpliceError(f"{one.place.key} is taken: {both} write there. Give each place one coder.")
        taken[one.place] = one
    return PlacedCoders(tuple(names), tuple(readers), tuple(written))


def _named(coders: Any) -> tuple[list[str], list[Any]]:
    listed = as_saes(coders, whole=True, layered=True)
    given = [str(one) for one in coders] if isinstance(coders, Mapping) else [""] * len(listed)
    names: list[str] = []
    for name, one in zip(given, listed, strict=True):
        row = getattr(one, "row", None)
        name = name or (f"{row.release}/{row.id}" if row is not None else "")
        names.append(name or _described(one))
    for name in names:
        if names.count(name) > 1:
            raise SpliceError(f"Two coders are called {name!r}: give a mapping from names to coders.")
    return names, listed


def _described(coder: Any) -> str:
    if isinstance(coder, LayeredCoder):
        return coder.kind
    site, layer = locate(coder)
    return Place(site.name, layer).key


def _single(model: GemmaModel, sae: Any, number: int, name: str) -> tuple[list[Reader], list[Written]]:
    """An SAE or transcoder."""
    site, layer = locate(sae, model.family)
    model.check_fits(sae, site, layer)
    kind = sae.cfg.architecture()
    if kind not in RECTIFIED or sae.cfg.normalize_activations not in ("none", None):
        raise SpliceError(
            f"{name} is a {kind!r} SAE (normalisation: {sae.cfg.normalize_activations}), but the latents of a graph "
            f"are rectified linear functions of what they read: {', '.join(RECTIFIED)}, without normalisation."
        )
    W_enc, b_enc, b_dec = sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach()
    if sae.cfg.apply_b_dec_to_input:
        b_enc = b_enc - b_dec @ W_enc
    found = getattr(sae, "threshold", None)
    threshold = torch.zeros_like(b_enc) if found is None else found.detach()
    skip = getattr(sae, "W_skip", None)
    places = site.writes_at(layer)
    if len(places) != 1:
        raise SpliceError(f"{name} writes {len(places)} tensors, but an SAE writes one.")
    out = model.family.site(places[0].site)
    if tuple(sae.W_dec.shape) != (W_enc.shape[1], out.d_in(model.dims)):
        raise SpliceError(f"{name} writes {list(sae.W_dec.shape)}, but {out.name} has {out.d_in(model.dims)}.")
    reader = Reader(number, site.name, name, site, layer, places, W_enc, b_enc, threshold, sae.W_dec.detach()[:, None])
    turned = None if skip is None else skip.detach().T
    return [reader], [Written(number, places[0], out, b_dec, turned, site)]


def _layered(model: GemmaModel, coder: LayeredCoder, number: int, name: str) -> tuple[list[Reader], list[Written]]:
    """A crosscoder or cross-layer transcoder."""
    site = model.family.site(coder.site)
    places: list[Place] = []
    for layer in coder.layers:
        model.check_fits(coder, site, layer)
        places += site.writes_at(layer)
    out = model.family.site(places[0].site)
    if len(places) != len(coder.layers):
        raise SpliceError(f"{name} writes {len(places)} tensors from {len(coder.layers)} layers: one each is needed.")
    readers: list[Reader] = []
    written: list[Written] = []
    for k, layer in enumerate(coder.layers):
        arrays = (getattr(coder, array)[k].detach() for array in ("W_enc", "b_enc", "threshold", "W_dec"))
        readers.append(Reader(number, coder.kind, name, site, layer, tuple(places[k:]), *arrays))
        skip = None if coder.W_skip is None else coder.W_skip[k].detach()
        written.append(Written(number, places[k], out, coder.b_dec[k].detach(), skip, site))
    return readers, written
