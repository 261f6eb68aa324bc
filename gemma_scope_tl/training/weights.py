"""The trained parameters of all SAEs of one place, stacked latent after latent, and how they start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemma_scope_tl.training.shard import Shard
from gemma_scope_tl.training.spec import SAESpec

BLOCK = 1_024
"""Latents are drawn in blocks of this many, each from its own generator, so any division into parts starts equal."""

LATENT_FIELDS = ("enc", "dec", "b_enc", "log_threshold")
FIELDS = (*LATENT_FIELDS, "b_dec")


@dataclass
class Weights:
    """Parameters of ``s`` SAEs with ``m`` latents in all, or something of each parameter's shape.

    Attributes:
        enc: ``[m, d_in]``, a row for each latent: ``W_enc`` transposed.
        dec: ``[m, d_out]``, ``W_dec``, rows of unit length.
        b_enc: ``[m]``.
        log_threshold: ``[m]``.
        b_dec: ``[s, d_out]``, a row for each SAE.
    """

    enc: Tensor
    dec: Tensor
    b_enc: Tensor
    log_threshold: Tensor
    b_dec: Tensor

    @classmethod
    def zeros(cls, latents: int, saes: int, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device) -> Weights:
        """All zero."""
        shapes = ((latents, d_in), (latents, d_out), (latents,), (latents,), (saes, d_out))
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

    def of(self, sae: int, rows: slice) -> dict[str, Tensor]:
        """Views of one SAE's parameters: its number and its latents in the stack."""
        found = {name: getattr(self, name)[rows] for name in LATENT_FIELDS}
        return found | {"b_dec": self.b_dec[sae]}


@torch.no_grad()
def start(weights: Weights, specs: Sequence[SAESpec], rows: Sequence[slice], shard: Shard) -> None:
    """Fill ``weights`` with the initialisation of the paper (section 3.2; appendix B for transcoders).

    Thresholds all equal, biases 0, ``W_dec`` He-uniform and then scaled to unit rows (which forgets He's bound).
    ``W_enc`` of an SAE is ``W_dec^T``; that of a transcoder is independent of it. The paper does not say how the latter
    is drawn; here He-uniform, ``U(-b, b)`` with ``b = sqrt(6 / d_in)``.
    """
    weights.b_enc.zero_()
    weights.b_dec.zero_()
    for spec, at in zip(specs, rows, strict=True):
        weights.log_threshold[at] = float(np.log(spec.recipe.init_threshold))
        own = shard.latents(spec.d_sae)
        for block in range(own.start // BLOCK, -(-own.stop // BLOCK)):
            first, last = max(own.start, block * BLOCK), min(own.stop, (block + 1) * BLOCK)
            here = slice(at.start + first - own.start, at.start + last - own.start)
            inside = slice(first - block * BLOCK, last - block * BLOCK)
            enc, dec = _draw(spec, block, weights.enc.shape[1], weights.dec.shape[1])
            weights.enc[here] = enc[inside].to(weights.enc)
            weights.dec[here] = dec[inside].to(weights.dec)


def _draw(spec: SAESpec, block: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """Encoder and decoder rows of one whole block in float64: every dtype starts from the same numbers."""
    seed = np.random.SeedSequence((spec.seed, block)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed))
    dec = 2.0 * torch.rand(BLOCK, d_out, dtype=torch.float64, generator=generator) - 1.0
    dec /= dec.norm(dim=1, keepdim=True)
    if not spec.is_transcoder:
        return dec, dec
    bound = (6.0 / d_in) ** 0.5
    return bound * (2.0 * torch.rand(BLOCK, d_in, dtype=torch.float64, generator=generator) - 1.0), dec
