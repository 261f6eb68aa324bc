"""The sources of a frozen pass: what is added to its tensors, and the direct effect of each along a gradient.

Where a coder writes a tensor y at position t, the pass is cut, and y is the sum of sources

    y_t = sum_i f_i W_dec_i + b_dec + x_t W_skip + e_t

over the active latents i that write there: those of a layered coder at t may come from several layers. e is the error.
The skip connection is no source but a path, since it is linear in the coder's input x. Where no coder is applied, at
special tokens for one, e is the whole tensor. Other sources are the token embeddings and the outputs of MLPs that no
coder replaces.

With the gradient G of a target at y, the direct effect of a latent is ``f_i sum_planes (W_dec_i . G_t)`` over the
tensors that it writes, of an error ``e_t . G_t``, and of a bias ``sum_t b_dec . G_t``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_scope_tl.attributions.frozen import FrozenPass
from gemma_scope_tl.attributions.placing import PlacedCoders, Reader, Written, layer_stage, stage_of
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sae.sparse import encode_sparse
from gemma_scope_tl.sites import Site
from gemma_scope_tl.weights.ahead import read_ahead


@dataclass(frozen=True, eq=False)
class Entries:
    """The active latents of a reader, in the order of their positions.

    Attributes:
        reader: whose latents they are.
        first: number of the first among the sources.
        position, latent: int64 ``[n]``.
        activation: ``[n]``, which is also the pre-activation.
    """

    reader: Reader
    first: int
    position: Tensor
    latent: Tensor
    activation: Tensor

    def __len__(self) -> int:
        return self.position.shape[0]

    def parts(self, most: int, length: int) -> Iterator[tuple[slice, int, Tensor]]:
        """Entries of a few positions each.

        Args:
            most: number of entries in a part, which has at least those of one position.
            length: number of positions to cover, from 0.

        Returns:
            For each part its entries, its first position, and ``[positions, widest]`` with the numbers of the entries
            of each of its positions, -1 where there are no more.
        """
        counts = self.position.bincount(minlength=length)[:length]
        begins = counts.cumsum(0) - counts
        listed, start = counts.tolist(), 0
        while start < length:
            stop, widest = start + 1, listed[start]
            while stop < length and max(widest, listed[stop]) * (stop + 1 - start) <= most:
                widest, stop = max(widest, listed[stop]), stop + 1
            if widest:
                column = torch.arange(widest, device=counts.device)[None]
                numbers = begins[start:stop, None] + column
                first = int(begins[start])
                some = slice(first, first + sum(listed[start:stop]))
                yield some, start, torch.where(column < counts[start:stop, None], numbers, -1)
            start = stop


@dataclass(frozen=True, eq=False)
class Cut:
    """A tensor that a coder writes.

    Attributes:
        written: which tensor, and the coder's bias and skip connection.
        writers: the latents that write there, and the number of the plane of their decoder.
        applied: True ``[pos]`` where the coder is applied.
        error: ``[pos, width]``.
        first: number of the first error among the sources; the bias has the number ``bias``.
        bias: see ``first``.
    """

    written: Written
    writers: tuple[tuple[Entries, int], ...]
    applied: Tensor
    error: Tensor
    first: int
    bias: int


@dataclass(frozen=True, eq=False)
class Raw:
    """A source at every position that no coder made: the token embedding, or the output of an MLP.

    Attributes:
        stage, layer: the tensor.
        vectors: ``[pos, d]``.
        first: number of the first among the sources.
    """

    stage: int
    layer: int | None
    vectors: Tensor
    first: int


@dataclass(frozen=True, eq=False)
class Sources:
    """All sources of a pass, numbered from 0: latents, errors and biases, other sources, and the encoders' biases.

    Attributes:
        frozen: the pass.
        placed: the coders.
        entries: the active latents of every reader.
        cuts, raw: by their stage.
        count: number of sources. The last is the bias of the encoders, which is part of every latent's pre-activation.
        room: number of floats of decoder rows and products to hold at a time.
        applied: True ``[pos]`` where coders are applied.
        sites: the sites of all tensors that are read or written by coders, by their stage.
    """

    frozen: FrozenPass
    placed: PlacedCoders
    entries: tuple[Entries, ...]
    cuts: dict[int, Cut]
    raw: dict[int, Raw]
    count: int
    room: int
    applied: Tensor
    sites: dict[int, Site]

    @property
    def n_latents(self) -> int:
        """Number of active latents, which come first."""
        return sum(map(len, self.entries))

    def add_written(self, stage: int, gradient: Tensor, out: Tensor) -> None:
        """Add the direct effects of what coders write at a tensor.

        Args:
            stage: of the tensor.
            gradient: ``[batch, positions, width]`` of each target with respect to it; the first positions of the text.
            out: ``[batch, sources]``, which is changed.
        """
        cut, length = self.cuts.get(stage), gradient.shape[1]
        if cut is None:
            return
        out[:, cut.first : cut.first + length] += torch.einsum("btd,td->bt", gradient, cut.error[:length])
        where = cut.applied[:length].to(gradient)
        out[:, cut.bias] += torch.einsum("btd,t->bd", gradient, where) @ cut.written.b_dec.to(gradient)
        for entries, plane in cut.writers:
            self._add_latents(entries, plane, gradient, out)

    def _add_latents(self, entries: Entries, plane: int, gradient: Tensor, out: Tensor) -> None:
        batch, length, width = gradient.shape
        for some, start, padded in entries.parts(max(1, self.room // (width + batch)), length):
            inside = padded >= 0
            rows = entries.reader.rows(plane, entries.latent[padded.clamp_min(0)].flatten(), gradient)
            here = gradient[:, start : start + len(padded)].permute(1, 2, 0)
            products = (rows.view(*padded.shape, width) @ here)[inside]  # [entries, batch]
            where = slice(entries.first + some.start, entries.first + some.stop)
            out[:, where] += (products * entries.activation[some, None]).T

    def add_raw(self, stage: int, gradient: Tensor, out: Tensor) -> None:
        """Add the direct effects of the embeddings or of an MLP; arguments as for :meth:`add_written`."""
        raw, length = self.raw.get(stage), gradient.shape[1]
        if raw is not None:
            out[:, raw.first : raw.first + length] += torch.einsum("btd,td->bt", gradient, raw.vectors[:length])

    def through_skip(self, stage: int, gradient: Tensor) -> Tensor | None:
        """The gradient at the input of the coder that writes a tensor, along its skip connection; None without one."""
        cut = self.cuts.get(stage)
        if cut is None or cut.written.skip is None:
            return None
        where = cut.applied[: gradient.shape[1], None].to(gradient)
        return (gradient * where) @ cut.written.skip.to(gradient).T


@torch.no_grad()
def sources_of(frozen: FrozenPass, placed: PlacedCoders, applied: Tensor, room: int) -> Sources:
    """Encode and decompose the tensors of a frozen pass.

    Args:
        frozen: the pass.
        placed: the coders.
        applied: True ``[pos]`` where coders are applied.
        room: number of floats to hold at a time for decoder rows.

    Raises:
        GemmaScopeError: what a coder reads off or writes is not finite.
    """
    sites = {reader.stage: reader.site for reader in placed.readers} | {one.stage: one.site for one in placed.written}
    tensors = frozen.replay(sites)
    entries: list[Entries] = []
    count = 0
    for reader in placed.readers:
        entries.append(active_latents(reader, tensors[reader.stage], applied, count))
        _check_finite(entries[-1].activation, f"activations of {reader.name} at layer {reader.layer}")
        read_ahead(reader.W_dec, entries[-1].latent)
        count += len(entries[-1])
    cuts: dict[int, Cut] = {}
    for written in placed.written:
        writers = tuple(
            (one, one.reader.planes.index(written.place))
            for one in entries
            if one.reader.coder == written.coder and written.place in one.reader.planes
        )
        source = tensors[_source_stage(written)]
        error = _error(written, writers, applied, tensors[written.stage], source, room)
        _check_finite(error, f"values that {placed.names[written.coder]} writes at {written.place.key}")
        cuts[written.stage] = Cut(written, writers, applied, error, count, count + frozen.length)
        count += frozen.length + 1
    raw: dict[int, Raw] = {}
    for stage, layer, vectors in _raw(frozen, cuts):
        raw[stage] = Raw(stage, layer, vectors, count)
        count += frozen.length
    return Sources(frozen, placed, tuple(entries), cuts, raw, count + 1, room, applied, sites)


def _check_finite(found: Tensor, what: str) -> None:
    """Raise for NaN and infinities, whose edges would be missing from a graph without a word."""
    if not bool(found.isfinite().all()):
        raise GemmaScopeError(f"Some {what} are NaN or infinite: check the weights of this coder.")


def _raw(frozen: FrozenPass, cuts: dict[int, Cut]) -> Iterator[tuple[int, int | None, Tensor]]:
    """The stages, layers and vectors of sources that no coder made, MLPs first."""
    for layer, vectors in enumerate(frozen.mlps):
        stage = layer_stage(layer) + 3
        if stage not in cuts or _source_stage(cuts[stage].written) == stage:  # an SAE reads what the MLP wrote
            yield stage, layer, vectors
    yield 0, None, frozen.embedding


def _source_stage(written: Written) -> int:
    return stage_of(written.source, written.place.layer)


def active_latents(reader: Reader, tensor: Tensor, applied: Tensor, first: int) -> Entries:
    """The latents that are active on a tensor ``[pos, d_in]`` where the coder is applied, numbered from ``first``."""
    chosen = applied.nonzero().flatten()
    weights = (reader.W_enc.to(tensor), reader.b_enc.to(tensor), reader.threshold.to(tensor.device))
    acts = encode_sparse(tensor[chosen], *weights)
    kept = acts.values != 0
    return Entries(reader, first, chosen[acts.tokens()][kept], acts.latents[kept], acts.values[kept].to(tensor))


def _error(
    written: Written, writers: tuple[tuple[Entries, int], ...], applied: Tensor, tensor: Tensor, x: Tensor, room: int
) -> Tensor:
    """``[pos, width]``: the tensor without what the coder writes; the whole tensor where none is applied."""
    error = tensor - applied[:, None].to(tensor) * written.b_dec.to(tensor)
    if written.skip is not None:
        error = error - (applied[:, None].to(tensor) * x) @ written.skip.to(tensor)
    for entries, plane in writers:
        add_latents(error, entries, plane, room, -1)
    return error


def add_latents(out: Tensor, entries: Entries, plane: int, room: int, factor: int = 1) -> None:
    """Add what latents write at one place to ``out [pos, width]``, times a factor.

    Args:
        out: the tensor, which is changed.
        entries: the latents.
        plane: of their decoder.
        room: number of floats of decoder rows to hold at a time.
        factor: 1 or -1.
    """
    size = max(1, room // out.shape[1])
    for start in range(0, len(entries), size):
        some = slice(start, start + size)
        rows = entries.reader.rows(plane, entries.latent[some], out) * entries.activation[some, None]
        out.index_add_(0, entries.position[some], rows, alpha=factor)
