"""Random coders in float64 for graphs of tiny random models, one mixture for each kind."""

from __future__ import annotations

from typing import Any

import torch

from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.layered import LayeredCoder

WIDTH = 12


def sae_of(model: Any, site: str, layer: int, seed: int = 0, skip: bool = False) -> Any:
    """A random SAE or transcoder, of which a part of the latents fires."""
    dims, generator = model.dims, torch.Generator().manual_seed(100 * seed + layer)
    place = model.family.site(site)
    d_in, d_out = place.d_in(dims), model.family.d_out(site, dims)
    arrays = _arrays(generator, d_in, d_out, WIDTH)
    if skip:
        arrays["W_skip"] = 0.3 * torch.randn(d_out, d_in, generator=generator, dtype=torch.float64) * d_in**-0.5
    sae = JumpReLUSAE.from_arrays(arrays, site=site, layer=layer, family=model.family.name)
    return sae.double().requires_grad_(False)


def layered_of(model: Any, kind: Any, layers: list[int], seed: int = 0, skip: bool = False) -> LayeredCoder:
    """A random crosscoder or cross-layer transcoder with layers of different widths."""
    generator = torch.Generator().manual_seed(seed)
    d, count = model.dims.d_model, len(layers)
    each = [_arrays(generator, d, d, WIDTH + j) for j in range(count)]
    planes = [
        torch.randn(WIDTH + j, count - j, d, generator=generator, dtype=torch.float64) * d**-0.5 for j in range(count)
    ]
    skips = [0.3 * torch.randn(d, d, generator=generator, dtype=torch.float64) * d**-0.5 for _ in layers]
    w_enc, b_enc, threshold, b_dec = ([one[name] for one in each] for name in ("W_enc", "b_enc", "threshold", "b_dec"))
    return LayeredCoder(kind, layers, w_enc, b_enc, threshold, planes, b_dec, skips if skip else None)


def mixtures(model: Any) -> dict[str, list[Any]]:
    """The kinds of coders, and mixtures."""
    last = model.dims.n_layers - 1
    return {
        "transcoders": [sae_of(model, "transcoder", layer, skip=layer % 2 == 1) for layer in range(last)],
        "saes": [sae_of(model, "att", 0), sae_of(model, "mlp", 1), sae_of(model, "res", last - 1)],
        "clt": [layered_of(model, "clt", [0, 1, last], skip=True)],
        "crosscoder": [layered_of(model, "crosscoder", [0, last - 1])],
        "mixture": [
            layered_of(model, "clt", [0, last]),
            sae_of(model, "transcoder", 1, skip=True),
            sae_of(model, "att", last),
            sae_of(model, "res", last - 1),
        ],
    }


def _arrays(generator: torch.Generator, d_in: int, d_out: int, width: int) -> dict[str, torch.Tensor]:
    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    return {
        "W_enc": normal(d_in, width, scale=d_in**-0.5),
        "b_enc": normal(width, scale=0.1),
        "threshold": normal(width).abs() * 0.5,
        "W_dec": normal(width, d_out, scale=d_out**-0.5),
        "b_dec": normal(d_out, scale=0.1),
    }
