"""Parameters of a coder over several layers while it is trained, their initial values, and their folding.

With ``K`` layers, ``j`` and ``k`` counting them, the input of each layer and the output of each layer are divided by a
scalar of their own, ``C_j`` and ``D_k``, so that each has unit mean square (Gemma Scope 2's report, section 3: one
scalar per site, each layer of a multi-layer model by itself). For a crosscoder both are the same. The coder in these
units, with ``f_j = JumpReLU((x_j - b_j) E_j^T + b_enc_j)``, where ``b_j`` is the decoder's bias of layer ``j`` for a
crosscoder and 0 for a CLT::

    y_hat_k = b_k + sum_{j <= k} f_j W_j[:, k] + x_k S_k

is for raw activations (:func:`folded`)::

    W_enc_j = E_j^T            b_enc_j = C_j (b_enc_j - E_j b_j)     theta_j = C_j theta_j
    W_dec_j[:, k] = (D_k / C_j) W_j[:, k]     b_dec_k = D_k b_k      S_k = (D_k / C_k) S_k

**Unit rows.** The report keeps the projection of gradients and the renormalisation of decoder rows, and does not say
what a row is here. We take what a latent writes in all layers together, ``W_j[i]`` as one vector of ``(K - j) d_out``
values: its length is 1, and the part of its gradient along it is removed. So how a latent divides its output over
layers is learned, and a latent's activation is the length of all that it writes. A length of 1 in each layer would
force every latent to write everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemma_scope_tl.training.layered_spec import LayeredSpec
from gemma_scope_tl.training.shard import Shard
from gemma_scope_tl.training.stack import BLOCK, Member, Weights, segments_of

SKIP = "skip"


@dataclass
class LayeredWeights:
    """Parameters of one coder, or values of the same shapes, such as second moments.

    Attributes:
        layers: for each layer the stack of its latents, with ``dec [m, (K - j) d_out]``. Its ``b_dec [1, d_out]`` is a
            view of ``b_dec``; its ``skip`` is empty.
        b_dec: ``[K, d_out]``, a row for each output.
        skip: ``[K, d_in, d_out]``; without skip path ``[0, d_in, d_out]``.
    """

    layers: tuple[Weights, ...]
    b_dec: Tensor
    skip: Tensor

    @classmethod
    def zeros(
        cls, latents: int, count: int, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device, *, skip: bool
    ) -> LayeredWeights:
        """All zero, for ``count`` layers with ``latents`` each."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        b_dec = zeros(count, d_out)
        none = zeros(0, d_in, d_out)
        layers = tuple(
            Weights(
                zeros(latents, d_in),
                zeros(latents, (count - j) * d_out),
                zeros(latents),
                zeros(latents),
                b_dec[j : j + 1],
                none,
            )
            for j in range(count)
        )
        return cls(layers, b_dec, zeros(count, d_in, d_out) if skip else none)

    def named(self) -> dict[str, Tensor]:
        """Views of all parameters, by name: ``3.enc`` is that of layer 3 of the coder."""
        names = ("enc", "dec", "b_enc", "log_threshold")
        found = {f"{j}.{name}": getattr(layer, name) for j, layer in enumerate(self.layers) for name in names}
        found["b_dec"] = self.b_dec
        return found | ({SKIP: self.skip} if len(self.skip) else {})


def member_of(spec: LayeredSpec, shard: Shard) -> Member:
    """What a pass needs to know of the latents of a layer; it is the same for every layer."""
    own = shard.latents(spec.width)
    segments = segments_of(spec.recipe.prefixes_of(spec.width), own, 0)
    momentum = spec.recipe.betas[0] > 0.0
    return Member(0, slice(0, own.stop - own.start), segments, spec.recipe.bandwidth, spec.width, momentum)


@torch.no_grad()
def initialize(weights: LayeredWeights, spec: LayeredSpec, shard: Shard) -> None:
    """Fill ``weights`` with the recipe's initial values, which the report does not change for several layers.

    All thresholds are equal; biases and skip paths are 0. The rows of ``W_j`` are He-uniform and scaled to length 1.
    ``E_j`` of a crosscoder begins at what its latents write in their own layer, scaled to rows of length 1, so that
    pre-activations are projections as those of an SAE are; that of a CLT is drawn independently, as a transcoder's.
    Either is multiplied by the recipe's ``init_encoder_scale``.
    """
    own = shard.latents(spec.width)
    d_in, d_out = weights.layers[0].enc.shape[1], weights.b_dec.shape[1]
    for j, layer in enumerate(weights.layers):
        layer.log_threshold.fill_(float(np.log(spec.recipe.init_threshold)))
        for block in range(own.start // BLOCK, -(-own.stop // BLOCK)):
            first, last = max(own.start, block * BLOCK), min(own.stop, (block + 1) * BLOCK)
            here, inside = (
                slice(first - own.start, last - own.start),
                slice(first - block * BLOCK, last - block * BLOCK),
            )
            enc, dec = _draw(spec, j, block, d_in, d_out)
            layer.enc[here] = (enc[inside] * spec.recipe.init_encoder_scale).to(layer.enc)
            layer.dec[here] = dec[inside].to(layer.dec)


def _draw(spec: LayeredSpec, j: int, block: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """Encoder and decoder rows of a whole block of layer ``j`` in float64, so that every dtype starts alike."""
    seed = np.random.SeedSequence((spec.seed, j, block)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed))
    planes = len(spec.layers) - j
    dec = 2.0 * torch.rand(BLOCK, planes * d_out, dtype=torch.float64, generator=generator) - 1.0
    dec /= dec.norm(dim=1, keepdim=True)
    if not spec.is_transcoder:
        enc = dec[:, :d_out]
        return enc / enc.norm(dim=1, keepdim=True), dec
    bound = (6.0 / d_in) ** 0.5
    return bound * (2.0 * torch.rand(BLOCK, d_in, dtype=torch.float64, generator=generator) - 1.0), dec


@torch.no_grad()
def folded(
    weights: LayeredWeights, inputs: Sequence[float], outputs: Sequence[float], *, pre_encoder_bias: bool
) -> list[dict[str, Tensor]]:
    """The arrays of every layer for raw activations, as the module's docstring says; scales are applied in float64.

    Args:
        weights: the trained parameters, of this process's latents.
        inputs, outputs: ``C_j`` and ``D_k``.
        pre_encoder_bias: whether ``b_dec`` was subtracted before the encoder.

    Returns:
        For each layer ``W_enc [d_in, m]``, ``W_dec [m, K - j, d_out]``, ``b_enc``, ``b_dec``, ``threshold``, and with
        skip path ``affine_skip_connection [d_in, d_out]``, on the CPU in the dtype of ``weights``.
    """
    found: list[dict[str, Tensor]] = []
    dtype, count = weights.b_dec.dtype, len(weights.layers)
    for j, layer in enumerate(weights.layers):
        bias = layer.b_enc.double()
        if pre_encoder_bias:
            bias = bias - layer.enc.double() @ weights.b_dec[j].double()
        sizes = torch.tensor([outputs[k] / inputs[j] for k in range(j, count)], dtype=torch.float64)
        planes = layer.dec.view(len(layer.dec), count - j, -1)
        arrays = {
            "W_enc": layer.enc.T,
            "W_dec": planes * sizes.to(planes.device, dtype).view(1, -1, 1),
            "b_enc": bias * inputs[j],
            "b_dec": weights.b_dec[j].double() * outputs[j],
            "threshold": layer.log_threshold.double().exp() * inputs[j],
        }
        if len(weights.skip):
            arrays["affine_skip_connection"] = weights.skip[j] * (outputs[j] / inputs[j])
        found.append({name: value.to("cpu", dtype).contiguous() for name, value in arrays.items()})
    return found


@torch.no_grad()
def unfolded(
    layers: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[float],
    outputs: Sequence[float],
    *,
    pre_encoder_bias: bool,
) -> dict[str, Tensor]:
    """The inverse of :func:`folded`, with rows of all that a latent writes scaled to length 1.

    A latent whose row has the length ``n`` gets ``1 / n`` of its decoder, and ``n`` times its encoder, bias and
    threshold, which changes nothing but the unit of its activation.

    Args:
        layers: for each layer what :func:`folded` returns.
        inputs, outputs: ``C_j`` and ``D_k``.
        pre_encoder_bias: as for :func:`folded`.

    Returns:
        Parameters under the names of :meth:`LayeredWeights.named`, in float64.
    """
    count = len(layers)
    b_dec = torch.stack([arrays["b_dec"].double() / outputs[k] for k, arrays in enumerate(layers)])
    found: dict[str, Tensor] = {"b_dec": b_dec}
    for j, arrays in enumerate(layers):
        sizes = torch.tensor([inputs[j] / outputs[k] for k in range(j, count)], dtype=torch.float64)
        dec = (arrays["W_dec"].double() * sizes.view(1, -1, 1)).flatten(1)
        norm = torch.linalg.vector_norm(dec, dim=1)
        w_enc, b_enc = arrays["W_enc"].double(), arrays["b_enc"].double() / inputs[j]
        if pre_encoder_bias:
            b_enc = b_enc + b_dec[j] @ w_enc
        found |= {
            f"{j}.enc": w_enc.T * norm.unsqueeze(1),
            f"{j}.dec": dec / norm.unsqueeze(1),
            f"{j}.b_enc": b_enc * norm,
            f"{j}.log_threshold": (arrays["threshold"].double() * norm / inputs[j]).log(),
        }
    if "affine_skip_connection" in layers[0]:
        skips = [layers[k]["affine_skip_connection"].double() * (inputs[k] / outputs[k]) for k in range(count)]
        found[SKIP] = torch.stack(skips)
    return found
