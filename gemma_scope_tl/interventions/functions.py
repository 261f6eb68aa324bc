"""``steer``, ``clamp``, ``scale`` and ``ablate``, which return a hook and its hook name for latents of an SAE."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from gemma_scope_tl.errors import SpliceError, unknown_name
from gemma_scope_tl.interventions.hooks import Ablate, Clamp, Intervention, LatentEdit, Scale, SteerLatents, SteerRows
from gemma_scope_tl.interventions.layered import LayeredLatents, Pairs, edit_layered, steer_layered
from gemma_scope_tl.interventions.numbers import Numbers, mean_norm_at, one_for_each
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.access import chosen_latents, locate
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.text.tokens import ExcludeTokens

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from gemma_scope_tl.sae.access import LatentNames, SAEOrLatents

On = Literal["activations", "features"]
Unit = Literal["activation", "norm", "mean_norm"]
ON: tuple[On, ...] = ("activations", "features")
UNITS: tuple[Unit, ...] = ("activation", "norm", "mean_norm")


@overload
def steer(
    sae: SAEOrLatents,
    latent: int | Iterable[int],
    scale: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    unit: Unit = "activation",
    mean_norm: float | pd.DataFrame | None = None,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> tuple[str, Intervention]: ...
@overload
def steer(
    sae: LayeredCoder,
    latent: LatentNames,
    scale: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    unit: Unit = "activation",
    mean_norm: float | pd.DataFrame | None = None,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> Pairs: ...
def steer(
    sae: SAEOrLatents | LayeredCoder,
    latent: int | Iterable[int] | LatentNames,
    scale: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    unit: Unit = "activation",
    mean_norm: float | pd.DataFrame | None = None,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> tuple[str, Intervention] | Pairs:
    """Add decoder rows to a site's activations: ``x + sum_i a_i W_dec[i]``, with ``a_i`` from ``scale`` and ``unit``.

    If a norm follows W_O, as in Gemma 2, it divides by the norm of its input, so the effect of steering at the att site
    saturates as ``scale`` grows.

    Args:
        sae: an SAE, a transcoder (whose output is steered), or :class:`~gemma_scope_tl.sae.latents.Latents`. Gradients
            reach its rows. Or a layered coder, of which a latent is steered at all layers that it writes.
        latent: index or indices; for a layered coder a pair ``(model's layer, index)``, or several.
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
        layers: for a layered coder, the only layers of the model that are steered; None for all that a latent writes.
            A latent has one amount at all of them: for ``"mean_norm"``, ``a = s M / R``, with the roots of the sums of
            squares of the layers' mean norms (M) and of the lengths of its rows (R). ``"norm"`` needs one layer.

    Returns:
        ``(hook name, hook)`` for ``fwd_hooks``, ``add_hook`` or ``hooks``; for a layered coder a list of such pairs,
        which ``fwd_hooks`` accepts as an item.

    Raises:
        SpliceError: for a latent that does not exist, a wrong number of values, a missing ``mean_norm``, a number that
            is not finite, or an SAE of unknown site.
        UnknownNameError: for an unknown ``unit`` or ``on``, a latent that was not loaded, or a site that is not in
            ``mean_norm``.
    """
    _check_unit(unit, mean_norm, on)
    where: dict[str, Any] = {"positions": positions, "exclude_special_tokens": exclude_special_tokens}
    if isinstance(sae, LayeredCoder):
        several = _layered(sae, latent, layers, on)
        return steer_layered(several, one_for_each(scale, several.chosen, "scale"), unit, mean_norm, on, where)
    name, indices = _hook_name(sae, on, reads=False, layers=layers), cast("Iterable[int]", latent)
    chosen = chosen_latents(sae, indices)
    amounts = one_for_each(scale, chosen, "scale")
    if unit == "mean_norm":
        norm = mean_norm_at(mean_norm, name.removesuffix(".hook_sae_acts_post"))
        amounts = amounts * one_for_each(norm, chosen, "mean_norm").to(amounts.device)
    return name, _steered(sae, chosen, amounts, unit, on, where)


def _check_unit(unit: str, mean_norm: float | pd.DataFrame | None, on: On) -> None:
    if unit not in UNITS:
        raise unknown_name("unit", unit, UNITS)
    if unit == "norm" and on == "features":
        raise SpliceError('A hook on features has no access to ||x||: use unit="mean_norm", or on="activations".')
    if unit != "mean_norm" and mean_norm is not None:
        raise SpliceError(f'mean_norm= needs unit="mean_norm", but the given unit is {unit!r}.')


def _steered(
    sae: SAEOrLatents, chosen: list[int], amounts: torch.Tensor, unit: Unit, on: On, where: dict[str, Any]
) -> Intervention:
    where = where | {"per_length": unit != "activation"}
    if on == "features":
        return SteerLatents(sae, chosen, amounts, on_features=True, **where)
    return SteerRows(sae, chosen, amounts, by_norm=unit == "norm", **where)


@overload
def clamp(
    sae: SAEOrLatents,
    latents: int | Iterable[int],
    value: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> tuple[str, Clamp]: ...
@overload
def clamp(
    sae: LayeredCoder,
    latents: LatentNames,
    value: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> Pairs: ...
def clamp(
    sae: SAEOrLatents | LayeredCoder,
    latents: int | Iterable[int] | LatentNames,
    value: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> tuple[str, Clamp] | Pairs:
    """Set activations of latents to ``value``: ``x + sum_i (c_i - f_i(x)) W_dec[i]``, or ``f_i = c_i`` on features.

    Args:
        sae: an SAE or its :class:`~gemma_scope_tl.sae.latents.Latents` with encoder columns; a transcoder only with
            ``on="features"``. Or a layered coder; its latents are read where it reads, and changed at all layers that
            they write, on models from ``load_model``.
        latents: index or indices; for a layered coder a pair ``(model's layer, index)``, or several.
        value: c, one number for all latents or one for each, in units of the activations.
        positions, exclude_special_tokens: as for :func:`steer`.
        on: ``"activations"``, for a plain model; ``"features"``, for a model with the SAE spliced in, whose
            activations the hook edits. Both are equal with the error term. Without it, the site has the edited
            reconstruction.
        layers: for a layered coder on activations, the only layers of the model that are changed; None for all that the
            latents write.

    Returns:
        ``(hook name, hook)``, or for a layered coder a list of such pairs, which ``fwd_hooks`` accepts as an item.
        :class:`~gemma_scope_tl.interventions.hooks.LatentEdit` describes the edit.

    Raises:
        SpliceError: for a transcoder with ``on="activations"`` (its input is another tensor), latents without encoder
            columns, a latent that does not exist, or a wrong number of values.
        UnknownNameError: for an unknown ``on``, or a latent that was not loaded.
    """
    where: dict[str, Any] = {"positions": positions, "exclude_special_tokens": exclude_special_tokens}
    return _edit(Clamp, sae, latents, ("value", value), on, layers, where)


@overload
def scale(
    sae: SAEOrLatents,
    latents: int | Iterable[int],
    factor: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> tuple[str, Scale]: ...
@overload
def scale(
    sae: LayeredCoder,
    latents: LatentNames,
    factor: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> Pairs: ...
def scale(
    sae: SAEOrLatents | LayeredCoder,
    latents: int | Iterable[int] | LatentNames,
    factor: Numbers,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> tuple[str, Scale] | Pairs:
    """Multiply activations of latents: ``x + sum_i (s_i - 1) f_i(x) W_dec[i]``, or ``s_i f_i`` on features.

    Multiplying the *whole* output of a sub-layer before a norm (all heads at the att site of Gemma 2) would change
    nothing, because RMSNorm divides by the factor again.

    Args:
        sae, latents, positions, exclude_special_tokens, on, layers: as for :func:`clamp`.
        factor: s, one number for all latents or one for each.

    Raises:
        SpliceError, UnknownNameError: as :func:`clamp`.
    """
    where: dict[str, Any] = {"positions": positions, "exclude_special_tokens": exclude_special_tokens}
    return _edit(Scale, sae, latents, ("factor", factor), on, layers, where)


@overload
def ablate(
    sae: SAEOrLatents,
    latents: int | Iterable[int],
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> tuple[str, Ablate]: ...
@overload
def ablate(
    sae: LayeredCoder,
    latents: LatentNames,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> Pairs: ...
def ablate(
    sae: SAEOrLatents | LayeredCoder,
    latents: int | Iterable[int] | LatentNames,
    positions: Positions = None,
    exclude_special_tokens: ExcludeTokens = True,
    on: On = "activations",
    layers: int | Iterable[int] | None = None,
) -> tuple[str, Ablate] | Pairs:
    """Remove the contributions of latents: ``x - sum_i f_i(x) W_dec[i]``, or ``f_i = 0`` on features.

    This is equal to :func:`scale` with 0 and :func:`clamp` to 0.

    Args:
        sae, latents, positions, exclude_special_tokens, on, layers: as for :func:`clamp`.

    Raises:
        SpliceError, UnknownNameError: as :func:`clamp`.
    """
    where: dict[str, Any] = {"positions": positions, "exclude_special_tokens": exclude_special_tokens}
    return _edit(Ablate, sae, latents, None, on, layers, where)


def _edit(
    kind: type[LatentEdit],
    sae: SAEOrLatents | LayeredCoder,
    latents: Any,
    given: tuple[str, Numbers] | None,
    on: On,
    layers: Any,
    where: dict[str, Any],
) -> Any:
    """The hook of an edit of this kind, with the name and values of its numbers if it takes some; or several hooks."""
    if isinstance(sae, LayeredCoder):
        several = _layered(sae, latents, layers, on)
        numbers = None if given is None else one_for_each(given[1], several.chosen, given[0])
        return edit_layered(several, kind, numbers, on, where)
    name, chosen = _hook_name(sae, on, reads=True, layers=layers), chosen_latents(sae, latents)
    numbers = () if given is None else (one_for_each(given[1], chosen, given[0]),)
    return name, kind(sae, chosen, *numbers, on_features=on == "features", **where)


def _layered(coder: LayeredCoder, latents: Any, layers: Any, on: On) -> LayeredLatents:
    if on not in ON:
        raise unknown_name("place to edit (on=)", on, ON)
    if layers is not None and on == "features":
        raise SpliceError(
            'A latent of a spliced coder writes all its layers, so layers= needs on="activations", without the splice.'
        )
    return LayeredLatents(coder, latents, layers)


def _hook_name(sae: SAEOrLatents, on: On, reads: bool, layers: Any) -> str:
    """The name of the hook to edit. ``reads`` says whether the edit needs the activations of the latents there."""
    if layers is not None:
        raise SpliceError("layers= is for latents that write several layers, those of crosscoders and CLTs.")
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
