"""Loss and gradients of several SAEs where few latents are active: only the encoder's product is dense.

All other work is on *entries*: pre-activations above the lower end of the threshold's kernel, active or not. They are a
few dozen among thousands for each token. The SAEs are one stack of latents that read one input, so they share the
encoder's product and every operation after it. Entries are in the order (token, SAE, prefix segment, latent), so each
token has a row for each segment of each SAE: decoding and the gradients of the values are sums over such rows.

Let ``G_t`` be the gradient of the squared error at a row's reconstruction and ``g = G_t . d_i`` that at a latent,
``on`` 1 where the latent is active and 0 elsewhere, ``K`` the kernel at its pre-activation, and ``price`` the price of
the penalties. Then, with sums over the batch::

    d W_dec_i = sum f_i G_t                        d b_dec = sum G_t - sum_i W_enc_i (sum on g)
    d W_enc_i = sum on g (x - b_dec)               d b_enc = sum on g
    d log theta_i = -(theta_i / epsilon) sum K (theta_i g + price)

A skip transcoder's ``x S`` is added to every prefix, as ``b_dec`` is: ``d S = sum x^T G_t``, with the first row of each
token.

With the estimator's gradient to the input, ``on g`` becomes ``on g + c K (theta_i g + price) / epsilon``: the jump
depends on ``pre - theta`` only, so its gradient at the pre-activation is minus that at the threshold. The factor ``c``
is ``Prices.to_input``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

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

WHOLE_CHUNK = 0.75
"""If at least this share of a chunk's rows is touched, the whole chunk is updated in place, without gathering rows."""


class SparsePass:
    """The :class:`~gemma_scope_tl.training.stack.Pass` of neighbouring members of the stack."""

    def __init__(self, weights: Weights, members: Sequence[Member], batch: Batch) -> None:
        self.members, self.batch = members, batch
        at = slice(members[0].rows.start, members[-1].rows.stop)
        self.at, self.enc, self.dec = at, weights.enc[at], weights.dec[at]
        self.b_dec_old = weights.b_dec[members[0].index : members[-1].index + 1]
        self.segments = [segment for member in members for segment in member.segments]
        self.theta = weights.log_threshold[at].exp()
        self.bandwidth = _per_latent(members, self.theta)
        bias = weights.b_enc[at]
        if batch.centred:
            shift = [self.enc[self._own(m)] @ b for m, b in zip(members, self.b_dec_old, strict=True)]
            bias = bias - torch.cat(shift)
        half = 0.5 * self.bandwidth
        starts, self.latents, z = ops.encode(batch.x, self.enc.T, bias, self.theta - half)
        self.offsets, self.row = self._rows(starts)
        self.theta_at = self.theta.index_select(0, self.latents)
        self.on = z > self.theta_at
        self.near = z < (self.theta + half).index_select(0, self.latents)
        self.f = z * self.on
        self._residuals(weights)

    def _own(self, member: Member) -> slice:
        return slice(member.rows.start - self.at.start, member.rows.stop - self.at.start)

    def _rows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets ``[tokens * segments + 1]`` and each entry's row: ``token * segments + segment``."""
        token = ops.rows_of(starts, self.latents.shape[0])
        count = len(self.segments)
        if count == 1:
            return starts, token
        ends = torch.tensor([s.stop - self.at.start for s in self.segments], device=token.device)
        row = token * count + torch.bucketize(self.latents, ends, right=True)
        return ops.starts_of(row.bincount(minlength=(starts.shape[0] - 1) * count)), row

    def _residuals(self, weights: Weights) -> None:
        """Compute the errors, their gradient at each row's reconstruction, and the sums that a step reports."""
        batch, n = self.batch, self.batch.x.shape[0]
        count = len(self.segments)
        partial = ops.row_sums(self.offsets, self.latents, self.f, self.dec).view(n, count, -1)
        partial = batch.shard.sum_latents(partial)
        totals = torch.cat([self.on.new_zeros(1, dtype=torch.int64), self.on.cumsum(0)])
        self.l0 = totals.index_select(0, self.offsets).diff().view(n, count)
        entries = self.offsets.diff().view(n, count)
        found: list[Tensor] = []
        at = 0
        for member, b_dec in zip(self.members, self.b_dec_old, strict=True):
            own = slice(at, at + len(member.segments))
            add_skip_(partial[:, own], member, weights, batch.x)
            _, squares = residuals_(partial[:, own], b_dec, batch.y, batch.n)
            squares = squares.double()
            counts = torch.stack([self.l0[:, own].sum(), entries[:, own].sum()]).double()
            found.append(torch.cat([squares[-1:], squares.mean().view(1), batch.shard.sum_latents(counts)]))
            at = own.stop
        self.g_out = partial.reshape(n * count, -1)
        self.sums = batch.shard.sum_data(torch.stack(found))

    def backward(self, prices: Sequence[Prices]) -> None:
        """Compute the gradients of the entries' values, sorted by latent, and their sums for each latent."""
        shard = self.batch.shard
        order, self.starts = by_latent = ops.groups(self.latents, self.theta.shape[0])
        g = ops.sampled(self.offsets, self.latents, self.g_out, self.dec, by_latent)
        price = self._row_prices(prices).index_select(0, self.row)
        on, near = self.on.to(g.dtype), self.near.to(g.dtype)
        charge = near * (self.theta_at * g + price)
        columns = torch.stack([g * on, charge, on, near], 1).index_select(0, order)
        sums = torch.segment_reduce(columns, "sum", offsets=self.starts, axis=0, initial=0)
        sums = shard.sum_data(sums)
        b_enc, charged, fired, close = sums.unbind(1)
        often = torch.zeros_like(charged)
        for member, p in zip(self.members, prices, strict=True):
            if p.frequency:
                own = self._own(member)
                often[own] = p.of_latents(fired[own], self.batch.n)
        charged = torch.addcmul(charged, close, often)
        share = self._input_share(prices)
        if share is not None:
            b_enc = torch.addcmul(b_enc, charged, share)
        self.vectors = Vectors(b_enc, charged * (-self.theta / self.bandwidth), fired, close)
        self.row = self.row.index_select(0, order)
        count = len(self.segments)
        self.token = self.row if count == 1 else self.row.div(count, rounding_mode="floor")
        self.f, self.g_pre = self.f.index_select(0, order), columns[:, 0].contiguous()
        if share is not None:
            latents = self.latents.index_select(0, order)
            charge = torch.addcmul(columns[:, 1], columns[:, 3], often.index_select(0, latents))
            self.g_pre.addcmul_(charge, share.index_select(0, latents))
        self.b_dec, self.skip = self._direct_gradients(self.g_out.view(-1, count, self.g_out.shape[1]))

    def _direct_gradients(self, by_segment: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The gradients of what is added to reconstructions without latents: ``b_dec``, and skip paths.

        Args:
            by_segment: ``[tokens, segments, d_out]``, the gradient at each row's reconstruction.
        """
        firsts = [sum(len(m.segments) for m in self.members[:i]) for i in range(len(self.members))]
        b_dec = self.batch.shard.sum_data(torch.stack([by_segment[:, first].sum(0) for first in firsts]))
        pairs = zip(self.members, firsts, strict=True)
        return b_dec, [skip_gradient(member, self.batch, by_segment[:, first]) for member, first in pairs]

    def _input_share(self, prices: Sequence[Prices]) -> Tensor | None:
        """For each latent ``to_input / epsilon``; None if all are 0."""
        if not any(p.to_input for p in prices):
            return None
        share = 1.0 / self.bandwidth
        for member, p in zip(self.members, prices, strict=True):
            share[self._own(member)] *= p.to_input
        return share

    def _row_prices(self, prices: Sequence[Prices]) -> Tensor:
        """The L0 penalty's price for each row, ``[tokens * segments]``."""
        found: list[Tensor] = []
        at = 0
        for member, p in zip(self.members, prices, strict=True):
            own = slice(at, at + len(member.segments))
            l0 = self.l0[:, own].sum(1).to(self.theta.dtype)
            if p.around is not None:
                l0 = self.batch.shard.sum_latents(l0)
            found.append(p.of_rows(l0, self.batch.n).unsqueeze(1).expand(-1, own.stop - own.start))
            at = own.stop
        return torch.cat(found, 1).reshape(-1)

    def chunks(self, member: int) -> Iterator[Chunk]:
        """See :class:`~gemma_scope_tl.training.stack.Pass`."""
        own, shard = self._own(self.members[member]), self.batch.shard
        size = chunk_rows(self.enc, max(self.enc.shape[1], self.dec.shape[1]))
        pulled = torch.zeros_like(self.b_dec_old[member])
        for i in range(own.start, own.stop, size):
            j = min(i + size, own.stop)
            starts = self.starts[i : j + 1]
            counts = starts.diff()
            touched = None
            if shard.data_ranks == 1:
                touched = counts.nonzero().squeeze(1)
                if touched.shape[0] == 0:
                    continue
                if touched.shape[0] >= WHOLE_CHUNK * (j - i):
                    touched = None
            a, b = int(starts[0]), int(starts[-1])
            bags = starts - a if touched is None else ops.starts_of(counts.index_select(0, touched))
            dec = shard.sum_data(ops.row_sums(bags, self.row[a:b], self.f[a:b], self.g_out))
            enc = shard.sum_data(ops.row_sums(bags, self.token[a:b], self.g_pre[a:b], self.batch.x))
            if self.batch.centred:
                pull, rows = self.vectors.b_enc[i:j], self.enc[i:j]
                pulled.addmv_(rows.T, pull)
                pull = pull if touched is None else pull.index_select(0, touched)
                enc.addr_(pull, self.b_dec_old[member], alpha=-1.0)
            yield Chunk(slice(self.at.start + i, self.at.start + j), touched, enc, dec)
        if self.batch.centred:
            self.b_dec[member] -= shard.sum_latents(pulled)


def _per_latent(members: Sequence[Member], theta: Tensor) -> Tensor:
    """The bandwidth of every latent, ``[latents]``."""
    sizes = torch.tensor([m.rows.stop - m.rows.start for m in members], device=theta.device)
    return theta.new_tensor([m.bandwidth for m in members]).repeat_interleave(sizes, output_size=theta.shape[0])
