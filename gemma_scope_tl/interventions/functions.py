"""``steer``, ``clamp``, ``scale`` and ``ablate``, which return a hook and its hook name for latents of an SAE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from gemma_scope_tl.errors import SpliceError, unknown_name
from gemma_scope_tl.interventions.hooks import Ablate, Clamp, Intervention, Scale, SteerLatents, SteerRows
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.access import chosen_latents, locate
from gemma_scope_tl.sae.arguments import shown, to_tensor
from gemma_scope_tl.text.tokens import ExcludeTokens

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.sae.access import SAEOrLatents

On = Literal["activations", "features"]
Unit = Literal["activation", "norm", "mean_norm"]
Numbers = float | Sequence[float] | torch.Tensor
ON: tuple[On, ...] = ("activations", "features")
UNITS: tuple[Unit, ...] = ("activation", "norm", "mean_norm")


def steer(
    sae: SAEOrLatents,
    latent: int | Iterable[int],
    scale: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    unit: Unit = "activation",
    mean_norm: float | pd.DataFrame | None = None,
    on: On = "activations",
) -> tuple[str, Intervention]:
    """Add decoder rows to a site's activations: ``x + sum_i a_i W_dec[i]``, with ``a_i`` from ``scale`` and ``unit``.

    If a norm follows W_O, as in Gemma 2, it divides by the norm of its input, so the effect of steering at the att site
    saturates as ``scale`` grows.

    Args:
        sae: an SAE, a transcoder (whose output is steered), or :class:`~gemma_scope_tl.sae.latents.Latents`. Gradients
            reach its rows.
        latent: index or indices.
        scale: s, one number for all latents or one for each; a negative number steers away.
        positions: an int, slice, list, or boolean mask; None for all. They count in the whole text, also during
            generation, from the first token of each row that is not padding (:mod:`gemma_scope_tl.model.positions`).
        exclude_special_tokens: whether to skip BOS, EOS and padding (on models from ``load_model``), or the token ids
            to skip.
        unit: the unit of ``scale``.

            - ``"activation"``: ``a = s``. Gemma Scope's rows have unit norm, so s is the length of the added vector.
            - ``"mean_norm"``: ``a = s m / ||W_dec[i]||``, with the site's mean norm ``m = E||x||`` from ``mean_norm``.
            - ``"norm"``: ``a = s ||x|| / ||W_dec[i]||``, with the norm at the edited position, so that steered
              generation with a cache is the same as without.
        mean_norm: the number m, or the table of :func:`mean_norms`, in which the site and layer are looked up.
        on: ``"activations"``, for a plain model; ``"features"``, for a model with the SAE spliced in, whose latents
            become ``f_i + a_i``. Both are equal with the error term. ``unit="norm"`` is not available for features.

    Returns:
        ``(hook name, hook)`` for ``fwd_hooks``, ``add_hook`` or ``hooks``.

    Raises:
        SpliceError: for a latent that does not exist, a wrong number of values, a missing ``mean_norm``, a number that
            is not finite, or an SAE of unknown site.
        UnknownNameError: for an unknown ``unit`` or ``on``, a latent that was not loaded, or a site that is not in
            ``mean_norm``.
    """
    if unit not in UNITS:
        raise unknown_name("unit", unit, UNITS)
    name = _hook_name(sae, on, reads=False)
    chosen = chosen_latents(sae, latent)
    amounts = _numbers(scale, chosen, "scale")
    if unit == "norm" and on == "features":
        raise SpliceError('A hook on features has no access to ||x||: use unit="mean_norm", or on="activations".')
    if unit == "mean_norm":
        norm = _looked_up(mean_norm, name.removesuffix(".hook_sae_acts_post"))
        amounts = amounts * _numbers(norm, chosen, "mean_norm").to(amounts.device)
    elif mean_norm is not None:
        raise SpliceError(f'mean_norm= needs unit="mean_norm", but the given unit is {unit!r}.')
    where: dict[str, Any] = {"positions": positions, "exclude_special_tokens": exclude_special_tokens}
    where |= {"per_length": unit != "activation"}
    if on == "features":
        return name, SteerLatents(sae, chosen, amounts, on_features=True, **where)
    return name, SteerRows(sae, chosen, amounts, by_norm=unit == "norm", **where)


def clamp(
    sae: SAEOrLatents,
    latents: int | Iterable[int],
    value: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
) -> tuple[str, Clamp]:
    """Set activations of latents to ``value``: ``x + sum_i (c_i - f_i(x)) W_dec[i]``, or ``f_i = c_i`` on features.

    Args:
        sae: an SAE or its :class:`~gemma_scope_tl.sae.latents.Latents` with encoder columns; a transcoder only with
            ``on="features"``.
        latents: index or indices.
        value: c, one number for all latents or one for each, in units of the activations.
        positions, exclude_special_tokens: as for :func:`steer`.
        on: ``"activations"``, for a plain model; ``"features"``, for a model with the SAE spliced in, whose
            activations the hook edits. Both are equal with the error term. Without it, the site has the edited
            reconstruction.

    Returns:
        ``(hook name, hook)``. :class:`~gemma_scope_tl.interventions.hooks.LatentEdit` describes the edit.

    Raises:
        SpliceError: for a transcoder with ``on="activations"`` (its input is another tensor), latents without encoder
            columns, a latent that does not exist, or a wrong number of values.
        UnknownNameError: for an unknown ``on``, or a latent that was not loaded.
    """
    name, chosen, where = _edit(sae, latents, positions, exclude_special_tokens, on)
    return name, Clamp(sae, chosen, _numbers(value, chosen, "value"), **where)


def scale(
    sae: SAEOrLatents,
    latents: int | Iterable[int],
    factor: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
) -> tuple[str, Scale]:
    """Multiply activations of latents: ``x + sum_i (s_i - 1) f_i(x) W_dec[i]``, or ``s_i f_i`` on features.

    Multiplying the *whole* output of a sub-layer before a norm (all heads at the att site of Gemma 2) would change
    nothing, because RMSNorm divides by the factor again.

    Args:
        sae, latents, positions, exclude_special_tokens, on: as for :func:`clamp`.
        factor: s, one number for all latents or one for each.

    Raises:
        SpliceError, UnknownNameError: as :func:`clamp`.
    """
    name, chosen, where = _edit(sae, latents, positions, exclude_special_tokens, on)
    return name, Scale(sae, chosen, _numbers(factor, chosen, "factor"), **where)


def ablate(
    sae: SAEOrLatents,
    latents: int | Iterable[int],
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
) -> tuple[str, Ablate]:
    """Remove the contributions of latents: ``x - sum_i f_i(x) W_dec[i]``, or ``f_i = 0`` on features.

    This is equal to :func:`scale` with 0 and :func:`clamp` to 0.

    Args:
        sae, latents, positions, exclude_special_tokens, on: as for :func:`clamp`.

    Raises:
        SpliceError, UnknownNameError: as :func:`clamp`.
    """
    name, chosen, where = _edit(sae, latents, positions, exclude_special_tokens, on)
    return name, Ablate(sae, chosen, **where)


def _edit(
    sae: SAEOrLatents, latents: int | Iterable[int], positions: Positions, exclude_special_tokens: ExcludeTokens, on: On
) -> tuple[str, list[int], dict[str, Any]]:
    name = _hook_name(sae, on, reads=True)
    where = {
        "positions": positions,
        "exclude_special_tokens": exclude_special_tokens,
        "on_features": on == "features",
    }
    return name, chosen_latents(sae, latents), where


def _hook_name(sae: SAEOrLatents, on: On, reads: bool) -> str:
    """The name of the hook to edit. ``reads`` says whether the edit needs the activations of the latents there."""
    if on not in ON:
        raise unknown_name("place to edit (on=)", on, ON)
    site, layer = locate(sae)
    if on == "features":
        return f"{site.hook_name_out(layer, 'hooked_transformer')}.hook_sae_acts_post"
    if reads and site.is_transcoder:
        raise SpliceError(
            "A transcoder reads another tensor than it writes, so its latents do not follow from its output. Splice "
            'it with the error term, gs.splice(model, sae, error_term=True), and edit with on="features" '
            "(its hook_sae_acts_post). Steering needs no splice."
        )
    encoder = getattr(sae, "W_enc", None)
    if reads and encoder is None:
        raise SpliceError(
            "These latents have no encoder columns, so their activations are unknown: load them from a "
            'local file, or steer, which needs only decoder rows, or splice the SAE and edit with on="features".'
        )
    return site.hook_name_out(layer, "hooked_transformer")


def _numbers(given: Numbers, latents: list[int], name: str) -> torch.Tensor:
    """One number for each latent, float32 or wider."""
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


def _looked_up(mean_norm: Any, hook: str) -> float:
    if mean_norm is None:
        raise SpliceError('unit="mean_norm" needs mean_norm=: a number, or the table of mean_norms(model, texts).')
    if not hasattr(mean_norm, "columns"):
        return _one_number(mean_norm)
    rows = mean_norm[mean_norm["hook"] == hook]
    if rows.empty:
        raise unknown_name("hook in mean_norm", hook, mean_norm["hook"], "Measure that site and layer too.")
    return float(rows["mean_norm"].iloc[0])
