"""The numbers that users give for latents: amounts, factors and mean norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gemma_scope_tl.errors import SpliceError, unknown_name
from gemma_scope_tl.sae.arguments import shown, to_tensor

Numbers = float | Sequence[float] | torch.Tensor


def one_for_each(given: Numbers, latents: Sequence[Any], name: str) -> torch.Tensor:
    """One number for each latent, float32 or wider.

    Raises:
        SpliceError: for another count, or anything but finite real numbers; ``name`` is that of the argument.
    """
    try:
        numbers = to_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise SpliceError(f"{name}= takes numbers; given: {shown(given)}.") from None
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise SpliceError(f"{name}= takes real numbers; given: {shown(given)}.")
    numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32)).detach()
    if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != len(latents)):
        raise SpliceError(
            f"{name}= takes one number, or one for each of the {len(latents)} latents; given: shape "
            f"{list(numbers.shape)}."
        )
    if not numbers.is_meta and not bool(numbers.isfinite().all()):
        raise SpliceError(f"{name}= takes finite numbers; given: {given}.")
    return numbers.expand(len(latents))


def _one_number(mean_norm: Any) -> float:
    try:
        number = to_tensor(mean_norm)
        if number.numel() != 1 or number.dtype == torch.bool or number.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise SpliceError(
            f"mean_norm= takes a number, or the table of mean_norms; given: {shown(mean_norm)}."
        ) from None
    return float(number)


def mean_norm_at(mean_norm: Any, hook: str) -> float:
    """The mean norm at a hook, from a number or the table of :func:`mean_norms`.

    Raises:
        SpliceError: for neither of these.
        UnknownNameError: when the hook is not in the table.
    """
    if mean_norm is None:
        raise SpliceError('unit="mean_norm" needs mean_norm=: a number, or the table of mean_norms(model, texts).')
    if not hasattr(mean_norm, "columns"):
        return _one_number(mean_norm)
    rows = mean_norm[mean_norm["hook"] == hook]
    if rows.empty:
        raise unknown_name("hook in mean_norm", hook, mean_norm["hook"], "Measure that site and layer too.")
    return float(rows["mean_norm"].iloc[0])
