"""Loss and gradients of one SAE where many latents are active, as early in training: dense products, block by block.

The equations are those of ``sparse_pass.py``. Both halves go over blocks of latents; the second computes the block's
pre-activations again, one product in six, so that neither ``[batch, latents]`` nor a full gradient ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gemma_scope_tl.training.optimizer import chunk_rows
from gemma_scope_tl.training.penalties import Prices
from gemma_scope_tl.training.stack import Batch, Chunk, Member, Vectors, residuals_
from gemma_scope_tl.training.weights import Weights

BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
"""Size of one ``[batch, block]`` temporary; a step has some four at a time. Masks are floating-point: comparing into
them, and adding them up by products with ones, takes a third of the time that boolean masks take."""


class DensePass:
    """The :class:`~gemma_scope_tl.training.stack.Pass` of one member of the stack."""

    def __init__(self, weights: Weights, member: Member, batch: Batch) -> None:
        self.members: Sequence[Member] = [member]
        self.batch, self.member = batch, member
        self.enc, self.dec = weights.enc[member.rows], weights.dec[member.rows]
        self.b_dec_old = weights.b_dec[member.index]
        self.theta = weights.log_threshold[member.rows].exp()
        self.bias = weights.b_enc[member.rows]
        if batch.centred:
            self.bias = self.bias - self.enc @ self.b_dec_old
        n, shard = batch.x.shape[0], batch.shard
        partial = batch.x.new_zeros(n, len(member.segments), weights.dec.shape[1])
        self.l0 = batch.x.new_zeros(n)
        entries = self.l0.new_zeros((), dtype=torch.float64)
        for segment, at in self._blocks():
            z = self._pre(at)
            mask = torch.gt(z, self.theta[at] - 0.5 * member.bandwidth, out=torch.empty_like(z))
            entries += mask.sum(1).double().sum()
            on = torch.gt(z, self.theta[at], out=mask)
            self.l0 += on.sum(1)
            partial[:, segment].addmm_(z.mul_(on), self.dec[at])
        self.g_out, squares = residuals_(shard.sum_latents(partial), self.b_dec_old, batch.y, batch.n)
        squares = squares.double()
        counts = shard.sum_latents(torch.stack([self.l0.sum(), entries]).double())
        self.sums = shard.sum_data(torch.cat([squares[-1:], squares.mean().view(1), counts]).unsqueeze(0))

    def _blocks(self) -> Iterator[tuple[int, slice]]:
        """Blocks of latents, counted from the SAE's first here, with the number of their segment."""
        x = self.batch.x
        size = max(1, BLOCK_BYTES["cuda" if x.is_cuda else "cpu"] // (x.shape[0] * x.element_size()))
        first = self.member.rows.start
        for number, segment in enumerate(self.member.segments):
            for i in range(segment.start - first, segment.stop - first, size):
                yield number, slice(i, min(i + size, segment.stop - first))

    def _pre(self, at: slice) -> Tensor:
        """Pre-activations ``[batch, block]``."""
        return torch.addmm(self.bias[at], self.batch.x, self.enc[at].T)

    def backward(self, prices: Sequence[Prices]) -> None:
        """The prices and the direct part of ``b_dec``'s gradient; the rest comes with the blocks."""
        (self.prices,) = prices
        l0 = self.l0
        if self.prices.around is not None:
            l0 = self.batch.shard.sum_latents(l0.clone())
        self.row_prices = self.prices.of_rows(l0, self.batch.n)
        self.b_dec = self.batch.shard.sum_data(self.g_out[:, 0].sum(0, keepdim=True))
        zeros = torch.zeros_like(self.theta)
        self.vectors = Vectors(zeros, zeros.clone(), zeros.clone())

    def chunks(self, member: int) -> Iterator[Chunk]:
        """See :class:`~gemma_scope_tl.training.stack.Pass`."""
        shard = self.batch.shard
        first = self.member.rows.start
        size = chunk_rows(self.enc, max(self.enc.shape[1], self.dec.shape[1]))
        pulled = torch.zeros_like(self.b_dec_old)
        for segment, at in self._blocks():
            enc, dec = (shard.sum_data(grad) for grad in self._block_gradients(segment, at))
            if self.batch.centred:
                pulled.addmv_(self.enc[at].T, self.vectors.b_enc[at])
                enc.addr_(self.vectors.b_enc[at], self.b_dec_old, alpha=-1.0)
            for i in range(0, at.stop - at.start, size):
                j = min(i + size, at.stop - at.start)
                yield Chunk(slice(first + at.start + i, first + at.start + j), None, enc[i:j], dec[i:j])
        if self.batch.centred:
            self.b_dec[0] -= shard.sum_latents(pulled)

    def _block_gradients(self, segment: int, at: slice) -> tuple[Tensor, Tensor]:
        """Gradients of this block's rows of both matrices from this process's rows; fills the block of the vectors."""
        theta, half, g_out = self.theta[at], 0.5 * self.member.bandwidth, self.g_out[:, segment]
        z = self._pre(at)
        on, near, work = (torch.empty_like(z) for _ in range(3))
        torch.gt(z, theta, out=on)
        torch.gt(z, theta - half, out=near).mul_(torch.lt(z, theta + half, out=work))
        dec = z.mul_(on).T @ g_out
        g = torch.mm(g_out, self.dec[at].T, out=z)
        ones = g.new_ones(g.shape[0])
        charge = (ones @ torch.mul(g, near, out=work)) * theta + self.row_prices @ near
        g.mul_(on)
        sums = torch.stack([ones @ g, charge, ones @ on, ones @ near])
        b_enc, charge, fired, close = self.batch.shard.sum_data(sums).unbind()
        if self.prices.frequency:
            charge = charge + close * self.prices.of_latents(fired, self.batch.n)
        self.vectors.b_enc[at] = b_enc
        self.vectors.log_threshold[at] = charge * (-theta / self.member.bandwidth)
        self.vectors.fired[at] = fired
        return g.T @ self.batch.x, dec
