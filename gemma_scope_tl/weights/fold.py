"""Conversion of a trained SAE to the units of the raw activations (appendix A of the Gemma Scope paper).

Training divides activations by one fixed scalar per site, ``C = sqrt(E ||x||^2)``, and subtracts ``b_dec`` before the
encoder. Released weights do neither: both steps are folded into the biases and thresholds. The function works on NumPy
arrays and on torch tensors, and imports neither library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_scope_tl.errors import WeightsError

FOLD_KEYS: tuple[str, ...] = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def fold(params: Mapping[str, Any], scale: float, *, pre_encoder_bias: bool = True) -> dict[str, Any]:
    """Fold the activation scale and the pre-encoder bias into the weights (appendix A, equations 5-11).

    With ``x = x_raw / C`` the trained SAE computes ``f = JumpReLU_theta((x - b_dec) W_enc + b_enc)`` and
    ``x_hat = f W_dec + b_dec``. The folded SAE computes the same reconstruction in raw units, and ``f' = C f``::

        W_enc' = W_enc    b_enc' = C b_enc - C b_dec W_enc    theta' = C theta
        W_dec' = W_dec    b_dec' = C b_dec

        x_hat_raw = JumpReLU_theta'(x_raw W_enc' + b_enc') W_dec' + b_dec' = C x_hat

    Args:
        params: ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_in]``, ``b_enc [d_sae]``, ``b_dec [d_in]`` and
            ``threshold [d_sae]``, NumPy or torch, in any floating dtype; float64 avoids rounding errors.
        scale: ``C``, greater than 0. Use 1 to fold only the pre-encoder bias.
        pre_encoder_bias: whether training subtracted ``b_dec`` before the encoder. False for transcoders.

    Returns:
        Arrays with the same five names. The inputs are unchanged; ``W_enc`` and ``W_dec`` are the same objects.

    Raises:
        WeightsError: an array is missing, or the scale is not a positive finite number.
    """
    missing = [key for key in FOLD_KEYS if key not in params]
    if missing:
        raise WeightsError(f"Cannot fold without {', '.join(missing)}; needed: {', '.join(FOLD_KEYS)}.")
    if not 0.0 < scale < float("inf"):
        raise WeightsError(f"The activation scale must be a positive finite number, not {scale!r}.")
    w_enc, b_enc, b_dec = params["W_enc"], params["b_enc"], params["b_dec"]
    shift = b_dec @ w_enc if pre_encoder_bias else 0.0
    return {
        "W_enc": w_enc,
        "W_dec": params["W_dec"],
        "b_enc": (b_enc - shift) * scale,
        "b_dec": b_dec * scale,
        "threshold": params["threshold"] * scale,
    }
