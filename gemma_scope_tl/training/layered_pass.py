"""Loss and gradients of a coder over several layers: each layer's latents as those of an SAE, sparse or dense.

The latents of each layer are a stack of their own, which reads the layer's input and writes ``(K - j) d_out`` values:
its outputs in all layers from its own on. What all of them write is summed into reconstructions of all layers, whose
errors form one vector of ``K d_out`` values for each token. The loss is the square of its length (the sum of the
layers' squared errors, each in units of its layer), and the penalty is on the number of active latents of all layers
together. Given errors and counts, the gradients of each layer's latents are those of :class:`SparsePass`, or of
:class:`DensePass` where many of a layer's latents are active, as at the start of training.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.training.dense_pass import DensePass
from gemma_scope_tl.training.layered_stack import LayeredWeights
from gemma_scope_tl.training.optimizer import Prices
from gemma_scope_tl.training.shard import Shard
from gemma_scope_tl.training.sparse_pass import SparsePass
from gemma_scope_tl.training.stack import Batch, Member, Pass, Weights, residuals_


class LayerPass(Pass, Protocol):
    """The pass through the latents of one layer, whose errors the :class:`LayeredPass` sets.

    Attributes:
        batch: its input, with the target of the same layer.
        entries: the number of pre-activations above the kernel's lower end, in float64 (from a sample of the rows where
            products are dense).
    """

    batch: Batch
    entries: Tensor

    @property
    def active(self) -> Tensor:
        """``[rows]``, the number of this process's latents of the layer that are active."""
        ...

    def set_errors(self, g_out: Tensor, row_prices: Tensor) -> None:
        """Set what the backward half starts from.

        Args:
            g_out: ``[rows, segments, (K - j) d_out]``, the gradient at what this layer's latents write.
            row_prices: ``[rows]``, the L0 penalty's price.
        """
        ...

    def release(self) -> None:
        """Forget what the backward half has used."""
        ...


class SparseLayer(SparsePass):
    """A :class:`LayerPass` whose work is on the entries near and above the thresholds."""

    def __init__(self, weights: Weights, member: Member, batch: Batch, partial: Tensor) -> None:
        """
        Args:
            weights: the parameters of the layer's latents.
            member: this process's latents.
            batch: the layer's input and target.
            partial: ``[rows, segments, (K - j) d_out]``, to which what the latents write is added.
        """
        self._partial = partial
        super().__init__(weights, [member], batch)
        del self._partial

    def _residuals(self, weights: Weights) -> None:
        n, count = self.batch.x.shape[0], len(self.segments)
        self._partial += ops.row_sums(self.offsets, self.latents, self.f, self.dec).view(n, count, -1)
        totals = torch.cat([self.on.new_zeros(1, dtype=torch.int64), self.on.cumsum(0)])
        self.l0 = totals.index_select(0, self.offsets).diff().view(n, count)
        self.entries = self.l0.new_tensor(self.latents.shape[0], dtype=torch.float64)

    @property
    def active(self) -> Tensor:
        """See :class:`LayerPass`."""
        return self.l0.sum(1)

    def set_errors(self, g_out: Tensor, row_prices: Tensor) -> None:
        """See :class:`LayerPass`."""
        count = len(self.segments)
        self.g_out = g_out.reshape(g_out.shape[0] * count, -1)
        self._prices_of_rows = row_prices.unsqueeze(1).expand(-1, count).reshape(-1)

    def release(self) -> None:
        """See :class:`LayerPass`."""
        for name in ("g_out", "f", "g_pre", "row", "token", "on", "near", "latents", "theta_at", "offsets"):
            self.__dict__.pop(name, None)

    def _row_prices(self, prices: Sequence[Prices]) -> Tensor:
        return self._prices_of_rows

    def _direct_gradients(self, by_segment: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Zeros: biases and skip paths belong to outputs, not to the latents of a layer."""
        return torch.zeros_like(self.b_dec_old), [None]


class DenseLayer(DensePass):
    """A :class:`LayerPass` of dense products, block by block."""

    def __init__(self, weights: Weights, member: Member, batch: Batch, partial: Tensor) -> None:
        """As of :class:`SparseLayer`."""
        self._begin(weights, member, batch)
        self._forward(partial)

    @property
    def active(self) -> Tensor:
        """See :class:`LayerPass`."""
        return self.l0

    def set_errors(self, g_out: Tensor, row_prices: Tensor) -> None:
        """See :class:`LayerPass`."""
        self.g_out, self._prices_of_rows = g_out, row_prices

    def release(self) -> None:
        """See :class:`LayerPass`."""
        for name in ("g_out", "kept", "sparse_blocks", "sorted", "starts"):
            self.__dict__.pop(name, None)

    def _row_prices(self) -> Tensor:
        return self._prices_of_rows

    def _direct_gradients(self) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Zeros, as of :class:`SparseLayer`."""
        return torch.zeros_like(self.b_dec_old).unsqueeze(0), [None]


class LayeredPass:
    """Forward and backward through one coder for one batch, without changing any parameter.

    Attributes:
        layers: the passes of the layers.
        squares: ``[K]`` in float64, the sum of each output's squared errors over all processes.
        loss: the sum of squared errors of all outputs, a mean over Matryoshka prefixes.
        active: ``[K]`` in float64, the number of active latents of each layer.
        entries: ``[K]`` in float64, likewise of pre-activations above the kernel's lower end.
        b_dec, skip: gradients ``[K, d_out]`` and ``[K, d_in, d_out]``; ``b_dec`` is complete after all layers.
    """

    def __init__(
        self,
        weights: LayeredWeights,
        member: Member,
        x: Sequence[Tensor],
        y: Sequence[Tensor],
        *,
        dense: Sequence[bool],
        centred: bool,
        shard: Shard,
    ) -> None:
        """
        Args:
            weights: the coder's parameters.
            member: this process's latents of each layer.
            x, y: for each layer its input ``[rows, d_in]`` and target ``[rows, d_out]``, this process's rows.
            dense: for each layer whether its pass is made of dense products.
            centred: whether ``b_dec`` is subtracted before the encoders.
            shard: computes the sums over processes.
        """
        self.weights, self.shard, self.x = weights, shard, x
        rows, self.n = len(x[0]), len(x[0]) * shard.data_ranks
        count, self.d_out = len(weights.layers), weights.b_dec.shape[1]
        self.segments = len(member.segments)
        partial = x[0].new_zeros(rows, self.segments, count * self.d_out)
        self.layers: list[LayerPass] = []
        for j, layer in enumerate(weights.layers):
            kind = DenseLayer if dense[j] else SparseLayer
            batch = Batch(x[j], y[j], self.n, centred, shard)
            self.layers.append(kind(layer, member, batch, partial[:, :, j * self.d_out :]))
        partial = shard.sum_latents(partial)
        for k, matrix in enumerate(weights.skip):
            partial[:, 0, k * self.d_out : (k + 1) * self.d_out].addmm_(x[k], matrix)
        target = torch.cat(list(y), 1)
        self.g_out, squares = residuals_(partial, weights.b_dec.view(-1), target, self.n)
        self._sum_up(squares)

    def _sum_up(self, squares: Tensor) -> None:
        """The sums that a step reports, over all processes."""
        last = self.g_out[:, -1].double() * (self.n * self.segments / 2.0)  # the errors of the whole coder
        of_outputs = last.square().sum(0).view(len(self.layers), self.d_out).sum(1)
        counts = [each.active.sum(dtype=torch.float64) for each in self.layers] + [each.entries for each in self.layers]
        found = self.shard.sum_latents(torch.stack(counts))
        sums = self.shard.sum_data(torch.cat([of_outputs, found, squares.double().mean().view(1)]))
        count = len(self.layers)
        self.squares, self.active, self.entries, last = sums.split([count, count, count, 1])
        self.loss = float(last)

    def backward(self, prices: Prices) -> None:
        """Compute the gradients of biases and skip paths, and keep the prices for :meth:`layer`."""
        l0 = torch.stack([each.active.to(self.g_out.dtype) for each in self.layers]).sum(0)
        if prices.around is not None:
            l0 = self.shard.sum_latents(l0)
        self.prices = prices
        self.row_prices = prices.of_rows(l0, self.n)
        whole = self.g_out[:, 0]
        self.b_dec = self.shard.sum_data(whole.sum(0).view(len(self.layers), self.d_out))
        self.skip = torch.zeros_like(self.weights.skip)
        for k, grad in enumerate(self.skip):
            torch.mm(self.x[k].T, whole[:, k * self.d_out : (k + 1) * self.d_out], out=grad)
        if len(self.skip):
            self.skip = self.shard.sum_data(self.skip)

    @contextmanager
    def layer(self, j: int) -> Generator[LayerPass]:
        """The pass of a layer with its gradients; a sparse one holds a copy of the errors within the context only.

        At its end the part of ``b_dec``'s gradient is added that comes from the subtraction before the encoder, so the
        chunks must have been taken.
        """
        each = self.layers[j]
        each.set_errors(self.g_out[:, :, j * self.d_out :], self.row_prices)
        each.backward([self.prices])
        yield each
        if each.batch.centred:
            self.b_dec[j] += each.b_dec[0]
        each.release()
