"""Loss and gradients of one SAE where many latents are near their thresholds: dense products, block by block.

The equations are those of ``sparse_pass.py``. The forward and the backward half go over blocks of latents. For a small
SAE the forward half keeps the pre-activations. For a large one the backward half computes them again (one product in
six), so that neither a tensor ``[batch, latents]`` nor a full gradient ever exists. In a block where few latents are
active although many are near their thresholds, the decoder's product and the gradients of both matrices are sums over
the active latents, which on a CPU is many times faster than products. Early in training, and on a GPU, they are
products.

Active latents are found token by token, the order of the decoder's sums, and sorted by latent, the order of the
gradients' sums. Finding them is expensive, because the processor cannot predict the branches, while sorting many at
once is cheap. The active latents of all kept blocks are therefore sorted together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_scope_tl.activations.buckets import BufferPool
from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.training.optimizer import Prices, chunk_rows
from gemma_scope_tl.training.stack import (
    Batch,
    Chunk,
    Member,
    Vectors,
    Weights,
    add_skip_,
    residuals_,
    skip_gradient,
)

BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
"""Size of one ``[batch, block]`` temporary, of which a step has about four at a time. Masks are floating-point, because
comparing into them, and summing them by products with ones, takes a third of the time of boolean masks."""

NARROW_BYTES = 16 << 10
"""On a CPU a block has at most this many bytes for each dimension of the input. With few dimensions the products are
short, and it is faster to keep the block in a core's cache: a step of width 128 takes a quarter less time, one of width
1,024 more."""

ACTIVE_ENTRIES = 0.08
"""Share of active pre-activations in a block below which sums over the active ones replace products."""

SAMPLE_ROWS = 512
"""Pre-activations near their thresholds are counted on these first rows of a batch, which suffices to choose a pass."""

KEPT_BYTES = 16 << 20
"""Size of the pre-activations that the first half keeps for the second, with the active ones where they are few."""

_POOL = BufferPool(keep=4)


class DensePass:
    """The :class:`~gemma_scope_tl.training.stack.Pass` of one member of the stack."""

    def __init__(self, weights: Weights, member: Member, batch: Batch) -> None:
        self._begin(weights, member, batch)
        partial = batch.x.new_zeros(len(batch.x), len(member.segments), weights.dec.shape[1])
        self._forward(partial)
        self._residuals(partial, weights)

    def _begin(self, weights: Weights, member: Member, batch: Batch) -> None:
        self.members: Sequence[Member] = [member]
        self.batch, self.member = batch, member
        self.enc, self.dec = weights.enc[member.rows], weights.dec[member.rows]
        self.b_dec_old = weights.b_dec[member.index]
        self.theta = weights.log_threshold[member.rows].exp()
        self.bias = weights.b_enc[member.rows]
        if batch.centred:
            self.bias = self.bias - self.enc @ self.b_dec_old

    def _forward(self, partial: Tensor) -> None:
        """Add what the latents of each segment write to ``partial [rows, segments, d_out]``, and count."""
        n, member, batch = len(self.batch.x), self.member, self.batch
        self.l0 = batch.x.new_zeros(n)
        entries = self.l0.new_zeros((), dtype=torch.int64)
        self.kept: dict[int, Tensor] = {}
        self.sparse_blocks: dict[int, _Active] = {}  # of blocks whose pre-activations are kept
        whole = self._space(min(KEPT_BYTES // batch.x.element_size(), n * len(self.theta)))
        space = self._space(2 * n * self._block_size())
        for segment, at in self._blocks():
            own, mask = _cut(space, n, at, 2)
            keep = whole.numel() >= own.numel()
            if keep:
                own, whole = self.kept.setdefault(at.start, whole[: own.numel()].view_as(own)), whole[own.numel() :]
            z = self._pre(at, own)
            entries += (z[:SAMPLE_ROWS] > self.theta[at] - 0.5 * member.bandwidth).sum()
            on = torch.gt(z, self.theta[at], out=mask)
            counts = on.sum(1)
            self.l0 += counts
            if self._few(counts.sum(), z):
                active = _Active.find(z, on)
                starts = ops.starts_of(counts.long())
                partial[:, segment] += ops.weighted_rows(starts, active.latent, active.f, self.dec[at])
                if keep:
                    self.sparse_blocks[at.start] = active
            else:
                partial[:, segment].addmm_(on.mul_(z), self.dec[at])
        self.entries = entries.double() * (n / min(n, SAMPLE_ROWS))

    def _residuals(self, partial: Tensor, weights: Weights) -> None:
        """Compute the gradients of the squared error at the reconstructions, and the sums that a step reports."""
        batch, member, shard = self.batch, self.member, self.batch.shard
        partial = shard.sum_latents(partial)
        add_skip_(partial, member, weights, batch.x)
        self.g_out, squares = residuals_(partial, self.b_dec_old, batch.y, batch.n)
        squares = squares.double()
        counts = shard.sum_latents(torch.stack([self.l0.double().sum(), self.entries]))
        self.sums = shard.sum_data(torch.cat([squares[-1:], squares.mean().view(1), counts]).unsqueeze(0))

    def _block_size(self) -> int:
        """Number of latents in a block."""
        x = self.batch.x
        most = BLOCK_BYTES["cuda"] if x.is_cuda else min(BLOCK_BYTES["cpu"], max(1 << 20, NARROW_BYTES * x.shape[1]))
        return min(max(1, most // (x.shape[0] * x.element_size())), len(self.theta))

    def _blocks(self) -> Iterator[tuple[int, slice]]:
        """Blocks of latents, counted from the first of this SAE in this process, with the number of their segment."""
        size, first = self._block_size(), self.member.rows.start
        for number, segment in enumerate(self.member.segments):
            for i in range(segment.start - first, segment.stop - first, size):
                yield number, slice(i, min(i + size, segment.stop - first))

    def _space(self, count: int) -> Tensor:
        """Uninitialised memory for ``count`` numbers, from the pool on a CPU."""
        x = self.batch.x
        return x.new_empty(count) if x.is_cuda else _POOL.empty((count,), x.dtype)

    def _pre(self, at: slice, out: Tensor) -> Tensor:
        """Pre-activations ``[batch, block]``."""
        return torch.addmm(self.bias[at], self.batch.x, self.enc[at].T, out=out)

    def backward(self, prices: Sequence[Prices]) -> None:
        """Keep the prices, and compute the direct part of the gradient of ``b_dec``; the blocks add the rest."""
        (self.prices,) = prices
        self.row_prices = self._row_prices()
        self.b_dec, self.skip = self._direct_gradients()
        zeros = torch.zeros_like(self.theta)
        self.vectors = Vectors(zeros, zeros.clone(), zeros.clone(), zeros.clone())
        if self.sparse_blocks:
            self.sorted, self.starts = _Active.join(self.sparse_blocks).by_latent(len(self.theta))

    def _row_prices(self) -> Tensor:
        """The L0 penalty's price for each activation, ``[rows]``."""
        l0 = self.l0
        if self.prices.around is not None:
            l0 = self.batch.shard.sum_latents(l0.clone())
        return self.prices.of_rows(l0, self.batch.n)

    def _direct_gradients(self) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The gradients of what is added to reconstructions without latents: ``b_dec``, and a skip path."""
        b_dec = self.batch.shard.sum_data(self.g_out[:, 0].sum(0, keepdim=True))
        return b_dec, [skip_gradient(self.member, self.batch, self.g_out[:, 0])]

    def chunks(self, member: int) -> Iterator[Chunk]:
        """See :class:`~gemma_scope_tl.training.stack.Pass`."""
        shard = self.batch.shard
        first = self.member.rows.start
        size = chunk_rows(self.enc, max(self.enc.shape[1], self.dec.shape[1]))
        pulled = torch.zeros_like(self.b_dec_old)
        space = self._space(4 * len(self.batch.x) * self._block_size())
        for segment, at in self._blocks():
            enc, dec = (shard.sum_data(grad) for grad in self._block_gradients(segment, at, space))
            if self.batch.centred:
                pulled.addmv_(self.enc[at].T, self.vectors.b_enc[at])
                enc.addr_(self.vectors.b_enc[at], self.b_dec_old, alpha=-1.0)
            for i in range(0, at.stop - at.start, size):
                j = min(i + size, at.stop - at.start)
                yield Chunk(slice(first + at.start + i, first + at.start + j), None, enc[i:j], dec[i:j])
        if self.batch.centred:
            self.b_dec[0] -= shard.sum_latents(pulled)

    def _few(self, active: Tensor, z: Tensor) -> bool:
        """Whether sums over the ``active`` of a block's pre-activations are faster than products."""
        return not z.is_cuda and float(active) < ACTIVE_ENTRIES * z.numel()

    def _if_few(self, at: slice, z: Tensor, on: Tensor) -> tuple[_Active, Tensor] | None:
        """The active entries of a block by latent, and the offset at which those of each latent begin.

        If the active entries are many, return None and write their mask to ``on``.
        """
        if at.start in self.sparse_blocks:
            starts = self.starts[at.start : at.stop + 1]
            first, last = int(starts[0]), int(starts[-1])
            return _Active(*(values[first:last] for values in self.sorted)), starts - first
        torch.gt(z, self.theta[at], out=on)
        return _Active.find(z, on).by_latent(at.stop - at.start) if self._few(on.sum(), z) else None

    def _block_gradients(self, segment: int, at: slice, space: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a block of both matrices from this process's rows; those of the vectors are stored."""
        theta, half, g_out = self.theta[at], 0.5 * self.member.bandwidth, self.g_out[:, segment]
        own, on, near, work = _cut(space, len(self.batch.x), at, 4)
        kept = self.kept.pop(at.start, None)
        z = self._pre(at, own) if kept is None else kept
        ones = z.new_ones(z.shape[0])
        torch.gt(z, theta - half, out=near).mul_(torch.lt(z, theta + half, out=work))
        few, to_input = self._if_few(at, z, on), self.prices.to_input
        enc = None
        if few is not None:
            active, starts = few
            fired = starts.diff().to(z.dtype)
            if to_input:
                torch.gt(z, theta, out=on)
            dec = ops.weighted_rows(starts, active.token, active.f, g_out)
        else:
            fired = ones @ on
            dec = z.mul_(on).T @ g_out
        g = torch.mm(g_out, self.dec[at].T, out=z)
        charge = (ones @ torch.mul(g, near, out=work)) * theta + self.row_prices @ near
        if few is not None and not to_input:
            active, starts = few
            g_pre = g.view(-1).index_select(0, active.flat)
            enc = ops.weighted_rows(starts, active.token, g_pre, self.batch.x)
            b_enc = torch.segment_reduce(g_pre, "sum", offsets=starts, initial=0)
        else:
            if to_input:
                work.mul_(theta).addcmul_(near, self.row_prices.unsqueeze(1))
            b_enc = ones @ g.mul_(on)
        close = ones @ near if self.prices.frequency or self.member.momentum else torch.zeros_like(fired)
        often = self._store(at, torch.stack([b_enc, charge, fired, close]))
        if enc is None:
            if to_input:
                g.add_(work if often is None else work.addcmul_(near, often), alpha=to_input / self.member.bandwidth)
            enc = g.T @ self.batch.x
        return enc, dec

    def _store(self, at: slice, sums: Tensor) -> Tensor | None:
        """Sum a block's four vectors over processes, and store what they say: gradients and counts.

        Args:
            sums: ``[4, block]``: gradient of ``b_enc`` by active latents, charge of the threshold without the
                frequency penalty, and how often each latent was active and near its threshold.

        Returns:
            The frequency penalty's price for each latent of the block; None if there is none.
        """
        b_enc, charge, fired, close = self.batch.shard.sum_data(sums).unbind()
        often = None
        if self.prices.frequency:
            often = self.prices.of_latents(fired, self.batch.n)
            charge = charge + close * often
        if self.prices.to_input:
            b_enc = b_enc + charge * (self.prices.to_input / self.member.bandwidth)
        self.vectors.b_enc[at], self.vectors.fired[at], self.vectors.near[at] = b_enc, fired, close
        self.vectors.log_threshold[at] = charge * (-self.theta[at] / self.member.bandwidth)
        return often


def _cut(space: Tensor, n: int, at: slice, count: int) -> list[Tensor]:
    """The first ``count`` temporaries ``[n, block]`` in ``space``."""
    size = n * (at.stop - at.start)
    return [part.view(n, -1) for part in space[: count * size].split(size)]


class _Active(NamedTuple):
    """The active entries of a block, or of several one after the other."""

    flat: Tensor
    """Indices of the entries in the flattened block ``[batch, block]``."""
    token: Tensor
    latent: Tensor
    f: Tensor

    @classmethod
    def find(cls, z: Tensor, on: Tensor) -> _Active:
        """The active entries of a block ``z [batch, block]``, given its mask, token by token."""
        return cls(*ops.entries(z, on.bool()))

    @classmethod
    def join(cls, blocks: dict[int, _Active]) -> _Active:
        """The entries of several blocks, each keyed by the number of its first latent."""
        shifted = (block._replace(latent=block.latent + first) for first, block in blocks.items())
        return cls(*(torch.cat(parts) for parts in zip(*shifted, strict=True)))

    def by_latent(self, latents: int) -> tuple[_Active, Tensor]:
        """The entries sorted by latent, then token, and the offset of each latent's first entry, ``[latents + 1]``."""
        order, starts = ops.groups(self.latent, latents)
        return _Active(*(values.index_select(0, order) for values in self)), starts
