"""A control for what an SAE is said to find: random directions with the same sparsity."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float

from gemma_scope_tl.attached import locate
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.subjects import latents_of
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE

_CHUNK = 1024  # latents whose pre-activations are sorted at once


@torch.no_grad()
def random_twin(sae: Any, x: Float[torch.Tensor, "n d_in"], seed: int = 0) -> Any:
    """An SAE of the same shape with random weights, whose thresholds give the same L0 on ``x``.

    Encoder columns and decoder rows are random unit vectors; ``b_enc`` takes the mean of ``x`` away; each latent's
    threshold is the quantile of its pre-activations above which it fires on a share ``L0 / d_sae`` of the tokens. So
    all latents fire equally often, where the SAE's differ.

    Args:
        sae: an SAE or transcoder.
        x: activations at its place, some thousands of tokens.
        seed: of the weights.

    Raises:
        GemmaScopeError: without an activation.
    """
    if not x.shape[0]:
        raise GemmaScopeError("A random twin needs activations to set its thresholds by.")
    site, layer = locate(sae)
    generator = torch.Generator().manual_seed(seed)
    d_sae, d_out = sae.W_dec.shape
    x = x.float().cpu()
    w_enc = torch.nn.functional.normalize(torch.randn(x.shape[1], d_sae, generator=generator), dim=0)
    w_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_out, generator=generator), dim=1)
    b_enc = -x.mean(0) @ w_enc
    share = min(1.0, latents_of(sae, x.to(sae.device)).l0 / d_sae)
    fires = round(share * x.shape[0])
    thresholds: list[torch.Tensor] = []
    for columns, bias in zip(w_enc.split(_CHUNK, dim=1), b_enc.split(_CHUNK), strict=True):
        z = (x @ columns + bias).sort(dim=0, descending=True).values
        thresholds.append(z[min(fires, x.shape[0] - 1)].clamp_min(1e-6))
    arrays = {"W_enc": w_enc, "W_dec": w_dec, "b_enc": b_enc, "b_dec": torch.zeros(d_out)}
    arrays["threshold"] = torch.cat(thresholds)
    return JumpReLUSAE.from_arrays(arrays, site=site.name, layer=layer, device=sae.device)
