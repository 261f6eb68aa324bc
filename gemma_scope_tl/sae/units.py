"""Conversion from the units and conventions of a weights file to those of the site's tensor, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gemma_scope_tl.families import Family, families
from gemma_scope_tl.weights.fold import fold
from gemma_scope_tl.weights.load import Elementwise


def embedding_scale(d_model: int, family: Family | None = None) -> float:
    """The factor by which models of a family (by default the first) multiply their token embedding.

    >>> embedding_scale(2304)
    48.0
    """
    return (family or families()[0]).embedding_scale(d_model)


def scale_embedding(
    arrays: Mapping[str, torch.Tensor], inverse: bool = False, family: Family | None = None
) -> dict[str, torch.Tensor]:
    """Convert an SAE from the rows of the embedding table to the scaled embedding, or back.

    Released embedding SAEs read the rows ``e`` of the table. Models and hooks have ``x = s e``, with ``s`` from
    :func:`embedding_scale`. With ``W_enc' = W_enc / s`` the pre-activations are the same, ``x W_enc' = e W_enc``, so
    ``b_enc``, the thresholds and the latents do not change. The reconstruction is multiplied by s::

        x_hat = s e_hat = s (f W_dec + b_dec) = f (s W_dec) + (s b_dec)

    so ``W_dec`` *and* ``b_dec`` are multiplied by s. Each value is rounded once to float32. Converting forth and
    back may change its last bit, unless s is a power of two.
    """
    functions = _embedding_units(embedding_scale(arrays["W_enc"].shape[0], family), inverse)
    return {name: functions[name](array) if name in functions else array for name, array in arrays.items()}


def site_units(site: str | None, d_in: int, family: Family) -> dict[str, Elementwise]:
    """The functions, by array, that convert the values of a released file to the units of the site's tensor."""
    if site is None or family.site(site).joins != "embedding":
        return {}
    return _embedding_units(embedding_scale(d_in, family))


def fold_b_dec(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fold the subtraction of ``b_dec`` from the input into ``b_enc`` (appendix A), in float32 or wider.

    ``(x - b_dec) W_enc + b_enc = x W_enc + (b_enc - b_dec W_enc)``. The other arrays do not change.
    """
    wide = {name: a.to(torch.promote_types(a.dtype, torch.float32)) for name, a in arrays.items()}
    return {**arrays, "b_enc": fold(wide, 1.0)["b_enc"]}


def _embedding_units(scale: float, inverse: bool = False) -> dict[str, Elementwise]:
    def up(values: torch.Tensor) -> torch.Tensor:
        return values * scale

    def down(values: torch.Tensor) -> torch.Tensor:
        return values / scale

    enc, dec = (up, down) if inverse else (down, up)
    return {"W_enc": enc, "W_dec": dec, "b_dec": dec}
