"""Direct effects on many targets, in batches, the most influential latents first, in bounded memory.

A target is a linear function of one tensor at one position: the column of an encoder, or a logit's vector. Its gradient
at that tensor is carried backwards through the frozen pass, all targets of a batch at once, and at every tensor where
sources are added their effects are read off with dot products (:mod:`gemma_scope_tl.attributions.sources`). The walk
needs memory for one layer and some decoder rows, whatever the number of active latents.

The logits come first. Then the latents with most influence on the logits, by the effects found so far, are traced in
turns until there are as many as asked for, so that a long prompt with hundreds of thousands of active latents needs a
few thousand backward walks. circuit-tracer (Hanna et al., 2025) orders its work so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemma_scope_tl.attributions.placing import layer_stage
from gemma_scope_tl.attributions.readout import Readout
from gemma_scope_tl.attributions.sources import Sources
from gemma_scope_tl.errors import unknown_name

Progress = Callable[[int, int], None]
AtHeads = Callable[[int, Tensor], None]
TURN = 4
"""Batches that are traced between two orderings of the latents."""
_ROWS = 256  # rows of effects normalised at a time


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets that read one tensor.

    Attributes:
        stage: of the tensor.
        positions: int64 ``[n]``.
        vectors: ``[n, width]``.
    """

    stage: int
    positions: Tensor
    vectors: Tensor


@dataclass(frozen=True, eq=False)
class Traced:
    """The effects of all sources on the targets that were traced.

    Attributes:
        latents: the numbers of the latents that are targets, in the order of their rows, which follow the logits'.
        effects: ``[logits + latents, sources]``. A large one is in a temporary file.
        batch: number of targets in a walk.
    """

    latents: Tensor
    effects: Tensor
    batch: int


def targets_of(sources: Sources, read: Readout, node_ids: Sequence[str], numbers: Mapping[str, int]) -> list[Targets]:
    """One item for each node that is a target, in the order of ``node_ids``.

    Args:
        sources: of the pass.
        read: the logits.
        node_ids: ids of latents and logits.
        numbers: the number of every source by its node's id (:func:`~gemma_scope_tl.attributions.assembling.numbers`).

    Raises:
        UnknownNameError: for another node.
    """
    logits = logit_targets(sources, read)
    at = {f"logit_{one}_{sources.frozen.position}": row for row, one in enumerate(read.token_ids)}
    found: list[Targets] = []
    for name in node_ids:
        if name in at:
            row = slice(at[name], at[name] + 1)
            found.append(Targets(logits.stage, logits.positions[row], logits.vectors[row]))
        elif name in numbers and numbers[name] < sources.n_latents:
            found += latent_targets(sources, torch.tensor([numbers[name]], device=sources.frozen.embedding.device))
        else:
            latents = [one for one, number in numbers.items() if number < sources.n_latents]
            raise unknown_name("target of edges (a latent or a logit)", name, [*at, *latents])
    return found


def latent_targets(sources: Sources, numbers: Tensor) -> list[Targets]:
    """The targets of latents, one item for each tensor that is read, in the order of ``numbers`` (ascending)."""
    found: list[Targets] = []
    for entries in sources.entries:
        inside = (numbers >= entries.first) & (numbers < entries.first + len(entries))
        chosen = numbers[inside] - entries.first
        if len(chosen):
            vectors = entries.reader.encoder_columns(entries.latent[chosen], sources.frozen.embedding)
            found.append(Targets(entries.reader.stage, entries.position[chosen], vectors))
    return found


def logit_targets(sources: Sources, read: Readout) -> Targets:
    """The targets of logits."""
    frozen = sources.frozen
    positions = torch.full((len(read.token_ids),), frozen.position, device=frozen.embedding.device)
    return Targets(layer_stage(frozen.n_layers) + 1, positions, read.vectors)


@torch.no_grad()
def direct_effects(sources: Sources, targets: Sequence[Targets], at_heads: AtHeads | None = None) -> Tensor:
    """The direct effect of every source on every target, ``[targets, sources]``, without the bias of encoders.

    Args:
        sources: of the pass.
        targets: any targets; their rows are in the order of this list.
        at_heads: called with each layer and the gradient ``[targets, pos, heads * d_head]`` at its heads. With it, the
            walk does not go on through attention, so the effects are those that bypass all heads, and the gradients
            those of paths from the heads of a layer that pass no later ones.
    """
    walk = _Walk(sources, targets)
    frozen = sources.frozen
    g = walk.inject(layer_stage(frozen.n_layers) + 1, None, frozen.embedding.shape[-1])
    g = None if g is None else frozen.final_back(g)
    for layer in range(frozen.n_layers - 1, -1, -1):
        stage = layer_stage(layer)
        g = walk.through(stage + 4, g, frozen.embedding.shape[-1])
        walk.through(stage + 3, g, frozen.embedding.shape[-1])
        g = walk.mlp_input(layer, g)
        z = None if g is None else frozen.after_heads_back(layer, g)
        z = walk.through(stage + 1, z, frozen.model.dims.n_heads * frozen.model.dims.d_head)
        if z is not None and at_heads is not None:
            at_heads(layer, z)
        elif z is not None:
            read = frozen.heads_back(layer, z)
            g = read if g is None else g + read
    walk.through(0, g, frozen.embedding.shape[-1])
    return walk.out


class _Walk:
    """The gradients of a batch of targets on their way backwards. None stands for a gradient of zero."""

    def __init__(self, sources: Sources, targets: Sequence[Targets]) -> None:
        self.sources = sources
        self.length = 1 + max(int(one.positions.max()) for one in targets)
        self.batch = sum(len(one.positions) for one in targets)
        self.at: dict[int, list[tuple[int, Targets]]] = {}
        row = 0
        for one in targets:
            self.at.setdefault(one.stage, []).append((row, one))
            row += len(one.positions)
        self.out = sources.frozen.embedding.new_zeros(self.batch, sources.count)

    def inject(self, stage: int, g: Tensor | None, width: int) -> Tensor | None:
        """Add the targets that read a tensor to the gradient there, which is changed."""
        for row, one in self.at.get(stage, ()):
            if g is None:
                g = self.out.new_zeros(self.batch, self.length, width)
            rows = torch.arange(row, row + len(one.positions), device=g.device)
            g[rows, one.positions] += one.vectors
        return g

    def through(self, stage: int, g: Tensor | None, width: int) -> Tensor | None:
        """Read off the sources at a tensor; return the gradient before a coder cuts it, with the targets there."""
        cut = stage in self.sources.cuts
        if cut and g is not None:
            self.sources.add_written(stage, g, self.out)
        start = None if cut or g is None else g
        if start is not None and stage in self.at:
            start = start.clone()
        before = self.inject(stage, start, width)
        if before is not None:
            self.sources.add_raw(stage, before, self.out)
        return before

    def mlp_input(self, layer: int, g: Tensor | None) -> Tensor | None:
        """The gradient at the residual stream after attention: of the stream, of transcoders and skip connections."""
        stage, frozen = layer_stage(layer) + 2, self.sources.frozen
        width = frozen.embedding.shape[-1]
        skip = None if g is None else self.sources.through_skip(stage + 1, g)
        into = self.inject(stage, skip, width)
        if into is None:
            return g
        more = frozen.mlp_input_back(layer, into, self.sources.sites[stage])
        return more if g is None else g + more


@torch.no_grad()
def trace(
    sources: Sources, read: Readout, most: int, batch: int, room: int, progress: Progress | None = None
) -> Traced:
    """The effects on logits and on at most ``most`` latents.

    Args:
        sources: of the pass.
        read: the logits.
        most: number of latents that become targets.
        batch: number of targets in a walk.
        room: number of bytes above which the effects are held in a temporary file.
        progress: called with the number of targets done and to do.
    """
    logits, latents = len(read.token_ids), sources.n_latents
    most = min(most, latents)
    effects = _matrix(logits + most, sources, room)
    for start in range(0, logits, batch):
        targets = logit_targets(sources, read)
        some = slice(start, min(start + batch, logits))
        part = Targets(targets.stage, targets.positions[some], targets.vectors[some])
        effects[some] = direct_effects(sources, [part]).cpu()
    bias = encoder_biases(sources).cpu()
    weights = torch.tensor(read.probabilities, dtype=torch.float64)
    order: list[Tensor] = []
    done = torch.zeros(latents, dtype=torch.bool)
    count = 0
    while count < most:
        if most == latents:
            chosen = torch.arange(latents)
        else:
            found = torch.cat(order) if order else torch.zeros(0, dtype=torch.long)
            scores = partial_influence(sources, effects[: logits + count], weights, found)[:latents]
            scores[done] = -1
            chosen = scores.topk(min(TURN * batch, most - count)).indices.sort().values
        done[chosen] = True
        order.append(chosen)
        for some in chosen.split(batch):
            rows = slice(logits + count, logits + count + len(some))
            block = direct_effects(sources, latent_targets(sources, some.to(sources.frozen.embedding.device))).cpu()
            block[:, -1] = bias[some]
            effects[rows] = block
            count += len(some)
            if progress is not None:
                progress(logits + count, logits + most)
    return Traced(torch.cat(order) if order else torch.zeros(0, dtype=torch.long), effects, batch)


def encoder_biases(sources: Sources) -> Tensor:
    """``[latents]``: the bias of every active latent's encoder."""
    like = sources.frozen.embedding
    found = [one.reader.b_enc.to(like)[one.latent] for one in sources.entries]
    return torch.cat(found) if found else like.new_zeros(0)


def latent_stages(sources: Sources) -> Tensor:
    """int64 ``[latents]``: the stage of the tensor that each active latent reads."""
    found = [torch.full((len(one),), one.reader.stage) for one in sources.entries]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def partial_influence(sources: Sources, effects: Tensor, weights: Tensor, latents: Tensor) -> Tensor:
    """The influence of every source on the logits along the effects that are known, ``[sources]`` in float64.

    Biases are left out. With the absolute effects of each target normalised to a sum of 1, influence is the sum over
    all paths of the products of these shares, and of the logits' weights. A latent has effects only on targets at later
    stages, so one sweep from the last stage to the first adds up all paths.

    Args:
        sources: of the pass.
        effects: ``[logits + latents, sources]``.
        weights: of the logits, their probabilities.
        latents: the numbers of the latents of the other rows.
    """
    count = effects.shape[1]
    total = torch.zeros(count, dtype=torch.float64)
    biases = [cut.bias for cut in sources.cuts.values()] + [sources.count - 1]
    _add_shares(total, effects[: len(weights)], weights, biases)
    stages = latent_stages(sources)[latents]
    for stage in sorted(set(stages.tolist()), reverse=True):
        rows = (stages == stage).nonzero().flatten()
        for some in rows.split(_ROWS):
            _add_shares(total, effects[some + len(weights)], total[latents[some]], biases)
    return total


def _add_shares(total: Tensor, rows: Tensor, weights: Tensor, biases: list[int]) -> None:
    absolute = rows.abs()
    absolute[:, biases] = 0.0
    sums = absolute.sum(1, dtype=torch.float64).clamp_min(1e-30)
    total += (weights / sums).to(absolute.dtype) @ absolute


def _matrix(rows: int, sources: Sources, room: int) -> Tensor:
    """A matrix of zeros, in a temporary file that ends with it if it takes more than ``room`` bytes."""
    dtype, shape = sources.frozen.dtype, (rows, sources.count)
    size = rows * sources.count * dtype.itemsize
    if size <= room:
        return torch.zeros(shape, dtype=dtype)
    kind = np.dtype(str(dtype).removeprefix("torch."))
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return torch.from_numpy(np.memmap(file, dtype=kind, mode="r+", shape=shape))
