"""The stack of latents of the SAEs of a place: parameters, initialisation, folding, and the interface of passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gemma_scope_tl.training.optimizer import Prices
from gemma_scope_tl.training.shard import Shard
from gemma_scope_tl.training.spec import SAESpec
from gemma_scope_tl.weights.fold import fold

BLOCK = 1_024
"""Latents are initialised in blocks of this many, each with its own generator, so that any division of the latents
over processes starts from the same values."""

FOLDED = 4_096
"""Latents that are folded at a time, so that no float64 copy of a wide SAE is made."""


@dataclass
class Weights:
    """Parameters of ``s`` SAEs with ``m`` latents in all, or values of the same shapes, such as second moments.

    Attributes:
        enc: ``[m, d_in]``, a row for each latent: ``W_enc`` transposed.
        dec: ``[m, d_out]``, ``W_dec``, rows of unit length.
        b_enc: ``[m]``.
        log_threshold: ``[m]``.
        b_dec: ``[s, d_out]``, a row for each SAE.
        skip: ``[k, d_in, d_out]``, the matrix ``S`` of each of the ``k`` skip transcoders among the SAEs.
    """

    enc: Tensor
    dec: Tensor
    b_enc: Tensor
    log_threshold: Tensor
    b_dec: Tensor
    skip: Tensor

    @classmethod
    def zeros(
        cls, latents: int, saes: int, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device, skips: int = 0
    ) -> Weights:
        """All zero."""
        shapes = ((latents, d_in), (latents, d_out), (latents,), (latents,), (saes, d_out), (skips, d_in, d_out))
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

    def of(self, index: int, rows: slice, skip: int | None = None) -> dict[str, Tensor]:
        """Views of the parameters of one SAE, by name.

        Args:
            index: number of the SAE.
            rows: its latents in the stack.
            skip: number of its matrix among those of skip transcoders; None for SAEs without one.
        """
        found = {name: getattr(self, name)[rows] for name in ("enc", "dec", "b_enc", "log_threshold")}
        found["b_dec"] = self.b_dec[index]
        return found if skip is None else found | {"skip": self.skip[skip]}


@torch.no_grad()
def initialize(weights: Weights, specs: Sequence[SAESpec], members: Sequence[Member], shard: Shard) -> None:
    """Fill ``weights`` with the initialisation of the paper (section 3.2; appendix B for transcoders).

    All thresholds are equal and biases are 0. ``W_dec`` is He-uniform and then scaled to unit rows, so the bound does
    not matter. ``W_enc`` of an SAE is ``W_dec^T``; that of a transcoder is drawn independently. The paper does not say
    how; here it is He-uniform, ``U(-b, b)`` with ``b = sqrt(6 / d_in)``. Either is multiplied by the recipe's
    ``init_encoder_scale``. The matrix of a skip transcoder starts at 0, as in SAELens; Gemma Scope 2's report
    does not say how. The first gradient is then the regression of the target on the input.
    """
    weights.b_enc.zero_()
    weights.b_dec.zero_()
    weights.skip.zero_()
    for spec, member in zip(specs, members, strict=True):
        at = member.rows
        weights.log_threshold[at] = float(np.log(spec.recipe.init_threshold))
        own = shard.latents(spec.d_sae)
        for block in range(own.start // BLOCK, -(-own.stop // BLOCK)):
            first, last = max(own.start, block * BLOCK), min(own.stop, (block + 1) * BLOCK)
            here = slice(at.start + first - own.start, at.start + last - own.start)
            inside = slice(first - block * BLOCK, last - block * BLOCK)
            enc, dec = _draw(spec, block, weights.enc.shape[1], weights.dec.shape[1])
            weights.enc[here] = (enc[inside] * spec.recipe.init_encoder_scale).to(weights.enc)
            weights.dec[here] = dec[inside].to(weights.dec)


def _draw(spec: SAESpec, block: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """Encoder and decoder rows of one whole block in float64, so that every dtype starts from the same numbers."""
    seed = np.random.SeedSequence((spec.seed, block)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed))
    dec = 2.0 * torch.rand(BLOCK, d_out, dtype=torch.float64, generator=generator) - 1.0
    dec /= dec.norm(dim=1, keepdim=True)
    if not spec.is_transcoder:
        return dec, dec
    bound = (6.0 / d_in) ** 0.5
    return bound * (2.0 * torch.rand(BLOCK, d_in, dtype=torch.float64, generator=generator) - 1.0), dec


@dataclass(frozen=True)
class Member:
    """One SAE of the stack.

    Attributes:
        index: index of the SAE among those of the place, and of its row in ``b_dec``.
        rows: rows of this process's latents of the SAE in the stack.
        segments: ``rows`` cut where Matryoshka prefixes end; some may be empty where latents are divided.
        bandwidth: epsilon, the width of the kernel.
        d_sae: number of latents on all processes together.
        momentum: whether Adam has momentum, for which :attr:`Vectors.near` is needed.
        skip: number of the SAE's matrix in :attr:`Weights.skip`; None if it is not a skip transcoder.
    """

    index: int
    rows: slice
    segments: tuple[slice, ...]
    bandwidth: float
    d_sae: int
    momentum: bool = False
    skip: int | None = None


def members_of(specs: Sequence[SAESpec], shard: Shard) -> list[Member]:
    """The members of a stack that holds the SAEs one after the other, in the order of ``specs``."""
    members: list[Member] = []
    at = skips = 0
    for index, spec in enumerate(specs):
        own = shard.latents(spec.d_sae)
        segments = segments_of(spec.recipe.prefixes_of(spec.d_sae), own, at)
        rows = slice(at, at + own.stop - own.start)
        recipe = spec.recipe
        skip = skips if spec.skip else None
        members.append(Member(index, rows, segments, recipe.bandwidth, spec.d_sae, recipe.betas[0] > 0.0, skip))
        at, skips = rows.stop, skips + spec.skip
    return members


def segments_of(prefixes: Sequence[int], own: slice, at: int) -> tuple[slice, ...]:
    """The latents ``own`` of an SAE, which begin at row ``at`` of a stack, cut where its prefixes end."""
    ends = [min(max(size, own.start), own.stop) - own.start for size in prefixes]
    return tuple(slice(at + a, at + b) for a, b in zip([0, *ends[:-1]], ends, strict=True))


@torch.no_grad()
def folded(params: Mapping[str, Tensor], scale: float, *, pre_encoder_bias: bool) -> dict[str, Tensor]:
    """Weights for raw activations (:func:`gemma_scope_tl.weights.fold.fold`), computed in float64, a block at a time.

    Args:
        params: ``enc [d_sae, d_in]``, ``dec [d_sae, d_out]``, ``b_enc``, ``log_threshold``, ``b_dec``, and ``skip
            [d_in, d_out]`` of skip transcoders. That has no unit, since input and target are divided by the same ``C``:
            ``C (x / C) S = x S``.
        scale: ``C``.
        pre_encoder_bias: whether ``b_dec`` was subtracted before the encoder.

    Returns:
        New tensors on the CPU, contiguous, in the dtype of ``params``, under Gemma Scope's names and in its layout.

    Raises:
        WeightsError: the scale is not a positive finite number.
    """
    dtype = params["enc"].dtype
    biases: list[Tensor] = []
    thresholds: list[Tensor] = []
    b_dec = params["b_dec"].double()
    folded_b_dec = b_dec * scale
    for i in range(0, params["enc"].shape[0], FOLDED):
        at = slice(i, i + FOLDED)
        block = {
            "W_enc": params["enc"][at].T.double(),
            "W_dec": params["dec"][at],
            "b_enc": params["b_enc"][at].double(),
            "b_dec": b_dec,
            "threshold": params["log_threshold"][at].double().exp(),
        }
        done = fold(block, scale, pre_encoder_bias=pre_encoder_bias)
        biases.append(done["b_enc"])
        thresholds.append(done["threshold"])
        folded_b_dec = done["b_dec"]
    found = {
        "W_enc": params["enc"].T,
        "W_dec": params["dec"],
        "b_enc": torch.cat(biases),
        "b_dec": folded_b_dec,
        "threshold": torch.cat(thresholds),
    }
    if "skip" in params:
        found["affine_skip_connection"] = params["skip"]
    return {name: _own(value.to("cpu", dtype)) for name, value in found.items()}


def _own(value: Tensor) -> Tensor:
    return value.contiguous().clone() if value.is_contiguous() else value.contiguous()


@dataclass(frozen=True)
class Batch:
    """One batch, with the values that all passes of a step need.

    Attributes:
        x: ``[rows, d_in]``, this process's rows.
        y: the target ``[rows, d_out]``, the same tensor as ``x`` unless the SAEs are transcoders.
        n: number of rows on all processes together.
        centred: whether ``b_dec`` is subtracted before the encoder.
        shard: computes the sums over processes.
    """

    x: Tensor
    y: Tensor
    n: int
    centred: bool
    shard: Shard


@dataclass(frozen=True)
class Chunk:
    """Gradients of the matrices for some neighbouring latents, summed over the batch and all processes.

    Attributes:
        rows: rows of these latents in the stack.
        touched: which of ``rows`` have gradients, ``[k]``, counted from ``rows.start``; None for all.
        enc, dec: ``[k, d_in]`` and ``[k, d_out]``, which the caller may overwrite.
    """

    rows: slice
    touched: Tensor | None
    enc: Tensor
    dec: Tensor


@dataclass
class Vectors:
    """Results of a pass for every latent of its SAEs, ``[latents]`` each, summed over the rows of all processes.

    Attributes:
        b_enc, log_threshold: gradients.
        fired: number of activations of the batch on which each latent was active.
        near: number of those on which its pre-activation was within the threshold's kernel; 0 if neither momentum nor
            a frequency penalty needs it.
    """

    b_enc: Tensor
    log_threshold: Tensor
    fired: Tensor
    near: Tensor


class Pass(Protocol):
    """Forward and backward through some SAEs of the stack for one batch, without changing any parameter.

    Attributes:
        members: the SAEs.
        sums: ``[members, 4]`` in float64 after the forward half, over all processes: of ``||e||^2`` for the whole SAE
            and for the mean of its prefixes, of active latents, and of pre-activations above the kernel's lower end
            (from a sample of the rows where products are dense).
        vectors: complete once the chunks of all members have been taken.
        b_dec: ``[members, d_out]``, likewise.
        skip: the gradient ``[d_in, d_out]`` of each member's matrix; None for members without one.
    """

    members: Sequence[Member]
    sums: Tensor
    vectors: Vectors
    b_dec: Tensor
    skip: Sequence[Tensor | None]

    def backward(self, prices: Sequence[Prices]) -> None:
        """Prepare the gradients, one :class:`Prices` for each member."""
        ...

    def chunks(self, member: int) -> Iterator[Chunk]:
        """The gradients of a member's matrices. A chunk's rows may be changed as soon as it has been yielded."""
        ...


def add_skip_(partial: Tensor, member: Member, weights: Weights, x: Tensor) -> None:
    """Add the skip path ``x S`` of a member, if it has one, to the reconstruction of its first segment.

    Every prefix has it then, as it has ``b_dec``.

    Args:
        partial: ``[rows, segments, d_out]``, after the sum over processes that divide the latents.
        x: ``[rows, d_in]``.
    """
    if member.skip is not None:
        partial[:, 0].addmm_(x, weights.skip[member.skip])


def skip_gradient(member: Member, batch: Batch, g: Tensor) -> Tensor | None:
    """The gradient of a member's ``S``, ``x^T g``, over all processes; None if it has no skip path.

    Processes that divide the latents each compute the whole product, as ``S`` is not divided.

    Args:
        g: ``[rows, d_out]``, the gradient at the reconstruction of the first segment.
    """
    return None if member.skip is None else batch.shard.sum_data(batch.x.T @ g)


def residuals_(partial: Tensor, b_dec: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Replace partial reconstructions by the gradients of the squared error, and return these with the errors' squares.

    With ``P_j`` what segment ``j`` of ``k`` reconstructs, ``e_j = b_dec - y + P_1 + ... + P_j`` is the error of prefix
    ``j``, and the loss ``mean_j mean_t ||e_j||^2`` has the gradient ``(2 / (n k)) (e_j + ... + e_k)`` with respect to
    ``P_j``.

    Args:
        partial: ``[rows, k, d_out]``; overwritten.

    Returns:
        The gradients, in ``partial``'s memory, and the sum of ``||e_j||^2`` over the rows, ``[k]``.
    """
    k = partial.shape[1]
    partial[:, 0] += b_dec
    partial[:, 0] -= y
    for j in range(1, k):
        partial[:, j] += partial[:, j - 1]
    squares = torch.linalg.vector_norm(partial, dim=(0, 2)).square()
    partial *= 2.0 / (n * k)
    for j in range(k - 2, -1, -1):
        partial[:, j] += partial[:, j + 1]
    return partial, squares
