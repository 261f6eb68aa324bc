"""From an SAE in training to the weights that are released."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gemma_scope_tl.weights.fold import fold

LATENTS = 4_096
"""Latents folded at a time, so that no float64 copy of a wide SAE is made."""


@torch.no_grad()
def folded(params: Mapping[str, Tensor], scale: float, *, pre_encoder_bias: bool) -> dict[str, Tensor]:
    """Weights for raw activations (:func:`gemma_scope_tl.weights.fold.fold`), computed in float64, a block at a time.

    Args:
        params: ``enc [d_sae, d_in]``, ``dec [d_sae, d_out]``, ``b_enc``, ``log_threshold``, ``b_dec``.
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
    for i in range(0, params["enc"].shape[0], LATENTS):
        at = slice(i, i + LATENTS)
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
    return {name: _own(value.to("cpu", dtype)) for name, value in found.items()}


def _own(value: Tensor) -> Tensor:
    return value.contiguous().clone() if value.is_contiguous() else value.contiguous()
