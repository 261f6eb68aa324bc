"""JumpReLU SAEs whose gate, decoder and gradients take time proportional to the number of active latents.

With row vectors ``x [..., d_in]``, as in :mod:`gemma_scope_tl.sae.base`::

    z = x W_enc + b_enc            f = z * H(z - theta)            x_hat = f W_dec + b_dec

Only ``x W_enc`` is dense. It is computed and gated in blocks, so memory never holds all of z or f. With 131072 latents
and 512 tokens a forward pass takes about 25 MB and the gradient of x about 75 MB, while z alone would take 268 MB. Of
16384 latents about 70 are active, and decoding, ``df`` and ``dx`` are sums over these. Above the densities that are
fixed in :mod:`gemma_scope_tl.sae.sparse_ops`, the dense product is used instead.

Backward, with ``g`` the gradient of ``x_hat`` and sums over tokens written out::

    df_ti = g_t . W_dec_i  at active places       dz = df H(z - theta)
    dx = dz W_enc^T      dW_enc = x^T dz      db_enc = sum_t dz_t      dW_dec = f^T g      db_dec = sum_t g_t
    dtheta_i = -(theta_i / epsilon) sum_t K((z_ti - theta_i) / epsilon) df_ti              (ste.py; with a bandwidth)

Only the requested gradients are computed. Weights have separate nodes in autograd's graph, so with frozen weights and
in ``torch.autograd.grad(metric, activations)`` only ``dx`` is computed. The time of the pass itself does not change.

Rounding: every sum has the terms of the dense formula without the zeros, in another order. The error of a sum of n
terms is at most n u times the sum of their absolute values, with u = 2^-53 or 2^-24, and typically about sqrt(n) u:
within 1e-12 in float64 and 1e-5 in float32 at Gemma's widths. The order is fixed, so repeated passes give identical
bits. A pre-activation that rounds to the other side of its threshold switches a latent, as between two BLAS libraries.

SAEs of 16 bits return their dtype. The product is rounded to it before the bias is added, as ``base.py`` and SAELens
do, so that all of them gate the same numbers.

Second derivatives (``create_graph=True``) are computed with dense products, from the formulas above. With a bandwidth
there are none, because the pseudo-derivative of the threshold has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.sae.sparse_autograd import Decode, DecodeDense, DecodeWeights, Encode, EncodeWeights, spread


@dataclass(frozen=True, eq=False)
class SparseActs:
    """Active latents of a batch of tokens, as a CSR matrix with a row for each token.

    Attributes:
        offsets: int64 ``[n + 1]``; token t has the entries ``offsets[t]`` to ``offsets[t + 1]``.
        latents: int64 ``[nnz]``, ascending within a token.
        values: ``[nnz]``, tracked by autograd. With a bandwidth there are explicit zeros for inactive latents within
            half a bandwidth of their threshold, because the gradient of the threshold needs them.
        shape: shape of the dense activations, ``(..., d_sae)``, whose leading dimensions have n tokens.
    """

    offsets: Tensor
    latents: Tensor
    values: Tensor
    shape: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Number of tokens, which is the product of all dimensions but the last."""
        return self.offsets.shape[0] - 1

    @property
    def d_sae(self) -> int:
        """Number of latents of the SAE."""
        return self.shape[-1]

    @property
    def density(self) -> float:
        """The share of the dense entries that are stored, from 0 to 1."""
        return self.latents.shape[0] / max(1, self.n_tokens * self.d_sae)

    @property
    def l0(self) -> float:
        """Mean number of active latents per token, without explicit zeros. NaN if there are no tokens."""
        return int(torch.count_nonzero(self.values)) / self.n_tokens if self.n_tokens else math.nan

    def tokens(self) -> Tensor:
        """The token index of each entry over the flattened batch dimensions, int64 ``[nnz]``."""
        return ops.rows_of(self.offsets, self.latents.shape[0])

    def with_values(self, values: Tensor) -> SparseActs:
        """The same entries with other values ``[nnz]``, such as from a hook that scales or clamps active latents.

        Raises:
            GemmaScopeError: for another shape.
        """
        if values.shape != self.latents.shape:
            raise GemmaScopeError(
                f"There are {self.latents.shape[0]} active entries, but the values have shape {list(values.shape)}: "
                "give one value for each, or edit to_dense() to switch other latents on."
            )
        return replace(self, values=values)

    def to_dense(self) -> Tensor:
        """``[..., d_sae]``, differentiable with respect to ``values``."""
        return spread(self.offsets, self.latents, self.values, self.d_sae).view(self.shape)

    @classmethod
    def from_dense(cls, acts: Tensor) -> SparseActs:
        """The non-zero entries (including NaN) of ``[..., d_sae]``. Gradients flow back only to these entries."""
        d_sae = acts.shape[-1]
        flat = acts.reshape(-1, d_sae)
        offsets, latents, values = ops.compact(flat.detach(), None)
        if acts.requires_grad:
            places = ops.rows_of(offsets, latents.shape[0]) * d_sae + latents
            values = flat.reshape(-1).index_select(0, places)
        return cls(offsets, latents, values, tuple(acts.shape))


def compact(pre: Tensor, threshold: Tensor) -> SparseActs:
    """Gate given pre-activations. Not differentiable, unlike :func:`encode_sparse`.

    Args:
        pre: ``[..., d_sae]``. 16-bit values are compared in float32; NaN is kept.
        threshold: ``[d_sae]``, float32 or wider. Latents with ``pre <= threshold`` are inactive.
    """
    entries = ops.compact(pre.detach().reshape(-1, pre.shape[-1]), threshold.detach())
    return SparseActs(*entries, tuple(pre.shape))


def encode_sparse(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float | None = None
) -> SparseActs:
    """Active latents, differentiable with respect to all four tensors.

    Args:
        x: ``[..., d_in]``, any floating dtype, which is cast to the SAE's dtype.
        W_enc: ``[d_in, d_sae]``, any strides. If it is ``w.T`` of a contiguous ``[d_sae, d_in]``, the gradient of
            ``x`` is about three times faster and encoding takes the same time. No transposed copy is made.
        b_enc: ``[d_sae]``.
        threshold: ``[d_sae]``, float32 or wider.
        bandwidth: epsilon of the threshold's pseudo-derivative; None (inference) gives the threshold no gradient.

    Raises:
        GemmaScopeError: for shapes that do not match, or a bandwidth that is not positive.
    """
    d_in, d_sae = W_enc.shape
    if x.shape[-1:] != (d_in,) or b_enc.shape != (d_sae,) or threshold.shape != (d_sae,):
        raise GemmaScopeError(
            f"W_enc is [{d_in}, {d_sae}]: x must be [..., {d_in}], b_enc and threshold [{d_sae}]; given: "
            f"{list(x.shape)}, {list(b_enc.shape)} and {list(threshold.shape)}."
        )
    if bandwidth is not None and not bandwidth > 0:
        raise GemmaScopeError(f"The bandwidth must be positive, not {bandwidth}.")
    flat = x.reshape(-1, d_in).to(W_enc.dtype)
    weights = (W_enc, b_enc) if bandwidth is None else (W_enc, b_enc, threshold)
    fixed = W_enc.detach(), b_enc.detach(), threshold.detach(), bandwidth
    values, *entries = Encode.apply(flat, *fixed, lambda: W_enc)  # type: ignore[misc]
    if _tracked(*weights):
        inputs = flat.detach(), lambda: flat, bandwidth
        values = values + EncodeWeights.apply(W_enc, b_enc, threshold, *inputs, *entries)
    return SparseActs(entries[0], entries[1], values, (*x.shape[:-1], d_sae))


def decode_sparse(acts: SparseActs | Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction ``f W_dec + b_dec``, ``[..., d_out]`` in the dtype of ``W_dec``.

    Args:
        acts: sparse activations, differentiable with respect to their values; or dense activations ``[..., d_sae]``,
            such as after an edit by a hook. Their gradient is dense and includes inactive latents.
        W_dec: ``[d_sae, d_out]``.
        b_dec: ``[d_out]``.

    Raises:
        GemmaScopeError: for shapes that do not match.
    """
    d_sae, d_out = W_dec.shape
    if acts.shape[-1] != d_sae or b_dec.shape != (d_out,):
        raise GemmaScopeError(
            f"W_dec is [{d_sae}, {d_out}]: acts must be [..., {d_sae}] and b_dec [{d_out}]; given: "
            f"{list(acts.shape)} and {list(b_dec.shape)}."
        )
    out: Any
    fixed = W_dec.detach(), b_dec.detach()
    if isinstance(acts, Tensor):
        flat = acts.reshape(-1, d_sae).to(W_dec.dtype)
        out, *entries = DecodeDense.apply(flat, *fixed, lambda: W_dec)  # type: ignore[misc]
        dense = lambda: flat  # noqa: E731
    else:
        values = acts.values.to(W_dec.dtype)
        entries = [acts.offsets, acts.latents, values.detach()]
        out = Decode.apply(values, *fixed, acts.offsets, acts.latents, lambda: W_dec)
        dense = lambda: spread(acts.offsets, acts.latents, values, d_sae)  # noqa: E731
    if _tracked(W_dec, b_dec):
        out = out + DecodeWeights.apply(W_dec, b_dec, *entries, dense)
    return out.view(*acts.shape[:-1], d_out)


def reconstruct(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    bandwidth: float | None = None,
) -> tuple[Tensor, SparseActs]:
    """Encode and decode: return ``x_hat [..., d_out]`` in the SAE's dtype, and the active latents.

    Raises:
        GemmaScopeError: as :func:`encode_sparse` and :func:`decode_sparse`.
    """
    acts = encode_sparse(x, W_enc, b_enc, threshold, bandwidth)
    return decode_sparse(acts, W_dec, b_dec), acts


def _tracked(*weights: Tensor) -> bool:
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
