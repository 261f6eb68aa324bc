"""Sources carried forwards through the frozen pass: the counterpart of the backward walks that give edges.

What is added at the written tensors goes forwards through attention, the residual stream and skip connections, and ends
where a coder cuts the pass. The result is what reaches every tensor that is read. With all sources it is the pass
itself; with one source it is that source's part, whose product with a target's vector is an edge. It is the same number
as from the backward walk, by another way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma_scope_tl.attributions.placing import layer_stage, stage_of
from gemma_scope_tl.attributions.sources import Entries, Sources, active_latents, add_latents
from gemma_scope_tl.attributions.tracing import Targets
from gemma_scope_tl.errors import GemmaScopeError


@dataclass(frozen=True, eq=False)
class Added:
    """Tensors that sources add to a pass.

    Attributes:
        written: by the stage of the tensor, ``[pos, width]``: what coders write.
        raw: by the stage, ``[pos, d]``: embeddings and outputs of MLPs.
    """

    written: dict[int, Tensor]
    raw: dict[int, Tensor]


@torch.no_grad()
def added_by(sources: Sources, number: int) -> Added:
    """What one source adds.

    Raises:
        GemmaScopeError: for the bias of the encoders, which is not added to any tensor of the pass.
    """
    if number < sources.n_latents:
        return Added(_latent(sources, number), {})
    length = sources.frozen.length
    for stage, cut in sources.cuts.items():
        if cut.first <= number < cut.first + length:
            return Added({stage: _only(cut.error, number - cut.first)}, {})
        if number == cut.bias:
            return Added({stage: cut.applied[:, None].to(cut.error) * cut.written.b_dec.to(cut.error)}, {})
    for stage, raw in sources.raw.items():
        if raw.first <= number < raw.first + length:
            return Added({}, {stage: _only(raw.vectors, number - raw.first)})
    raise GemmaScopeError("The biases of encoders are part of latents, and are not added to any tensor of the pass.")


@torch.no_grad()
def added_by_all(sources: Sources) -> Added:
    """What all sources add together."""
    tensors = sources.frozen.replay(sources.sites)
    written: dict[int, Tensor] = {}
    for stage, cut in sources.cuts.items():
        whole = tensors[stage]
        if cut.written.skip is not None:
            read = tensors[stage_of(cut.written.source, cut.written.place.layer)]
            whole = whole - (cut.applied[:, None].to(whole) * read) @ cut.written.skip.to(whole)
        written[stage] = whole
    return Added(written, {stage: raw.vectors for stage, raw in sources.raw.items()})


@torch.no_grad()
def carried(sources: Sources, added: Added) -> dict[int, Tensor]:
    """What arrives at every tensor that is read, by its stage and before a coder cuts the pass there.

    Heads have an entry in every layer. The last stage is the input of the unembedding.
    """

    def write(stage: int, found: Mapping[int, Tensor]) -> Tensor:
        return added.written.get(stage, torch.zeros_like(found[stage]))

    return _forward(sources, added.raw, write)


@torch.no_grad()
def computed_anew(sources: Sources, number: int, scale: float) -> dict[int, Tensor]:
    """The frozen pass with one latent scaled, in which latents behind it are computed anew, thresholds included.

    Args:
        sources: of the pass. Errors and biases stay as they are.
        number: of a latent.
        scale: its activation is multiplied by this.

    Returns:
        As :func:`carried`.
    """
    anew: dict[int, Entries] = {}

    def latents(old: Entries, found: Mapping[int, Tensor]) -> Entries:
        if old.first not in anew:
            new = active_latents(old.reader, found[old.reader.stage], sources.applied, old.first)
            if old.first <= number < old.first + len(old):
                row = number - old.first
                here = (new.position == old.position[row]) & (new.latent == old.latent[row])
                new = replace(new, activation=torch.where(here, new.activation * scale, new.activation))
            anew[old.first] = new
        return anew[old.first]

    def write(stage: int, found: Mapping[int, Tensor]) -> Tensor:
        cut = sources.cuts[stage]
        out = cut.error + cut.applied[:, None].to(cut.error) * cut.written.b_dec.to(cut.error)
        for old, plane in cut.writers:
            add_latents(out, latents(old, found), plane, sources.room)
        return out

    return _forward(sources, {stage: raw.vectors for stage, raw in sources.raw.items()}, write)


def _forward(
    sources: Sources, raw: Mapping[int, Tensor], write: Callable[[int, Mapping[int, Tensor]], Tensor]
) -> dict[int, Tensor]:
    """The frozen pass with sources ``raw``; ``write`` gives what is written at a stage, without skip connections."""
    frozen, found = sources.frozen, dict[int, Tensor]()
    zero = torch.zeros_like(frozen.embedding)

    def at(stage: int, arriving: Tensor) -> Tensor:
        found[stage] = arriving
        return write(stage, found) if stage in sources.cuts else arriving

    x = at(0, raw.get(0, zero))
    for layer in range(frozen.n_layers):
        stage = layer_stage(layer)
        x = x + frozen.after_heads(layer, at(stage + 1, frozen.heads(layer, x)))
        if stage + 2 in sources.sites:
            found[stage + 2] = frozen.mlp_input(layer, x, sources.sites[stage + 2])
        out = at(stage + 3, raw.get(stage + 3, zero))
        cut = sources.cuts.get(stage + 3)
        if cut is not None and cut.written.skip is not None:
            out = out + (cut.applied[:, None].to(out) * found[stage + 2]) @ cut.written.skip.to(out)
        x = at(stage + 4, x + out)
    found[layer_stage(frozen.n_layers) + 1] = frozen.final(x)
    return found


def arriving_at(targets: Targets, tensors: Mapping[int, Tensor]) -> Tensor:
    """``[n]``: the part of each target that tensors from :func:`carried` make."""
    return (tensors[targets.stage][targets.positions] * targets.vectors).sum(-1)


def _latent(sources: Sources, number: int) -> dict[int, Tensor]:
    for entries in sources.entries:
        row = number - entries.first
        if not 0 <= row < len(entries):
            continue
        written: dict[int, Tensor] = {}
        for stage, cut in sources.cuts.items():
            for one, plane in cut.writers:
                if one is entries:
                    vector = entries.reader.rows(plane, entries.latent[row : row + 1], cut.error)[0]
                    written[stage] = torch.zeros_like(cut.error)
                    written[stage][entries.position[row]] = entries.activation[row] * vector
        return written
    raise AssertionError(number)


def _only(vectors: Tensor, position: int) -> Tensor:
    out = torch.zeros_like(vectors)
    out[position] = vectors[position]
    return out
